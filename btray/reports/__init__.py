"""What every HTML page and plot shares."""
