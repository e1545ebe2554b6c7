"""The network, its bundle and the classifier."""
