"""The `btray models` command: models are promoted on purpose, and rolled back."""
