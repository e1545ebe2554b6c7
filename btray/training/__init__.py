"""The train and tune jobs."""
