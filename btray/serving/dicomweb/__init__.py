"""What a PACS speaks: instances pushed to the service (STOW-RS)."""
