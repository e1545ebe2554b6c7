"""What archives of a hospital need: pseudonyms, a choice of series, studies decided as a whole."""
