"""Audit of a labelled data set: duplicates, leakage between splits, label conflicts, images that are not MRI slices."""
