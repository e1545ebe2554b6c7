"""What is new in an archive: its objects as they are listed, less those that are completed, sealed into a worklist."""
