"""The classify and pack jobs: whole archives, part by part, on Ray Data."""
