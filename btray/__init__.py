"""Brain-tumor classification of MRI slices on Ray: train, classify an archive, serve."""
