"""What a PACS speaks: studies pushed to the service (STOW-RS), and their reports sent back to the archive."""
