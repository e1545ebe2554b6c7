"""Programs around btray for development: a real S3 server on loopback and the demo. Not part of the package."""
