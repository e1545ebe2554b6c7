"""From frames to batches on a worker's device."""
