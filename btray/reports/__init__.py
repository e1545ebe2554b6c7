"""Parts that every HTML page and plot shares: the base template, macros, palette and style."""
