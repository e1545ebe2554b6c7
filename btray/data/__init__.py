"""Labelled data and scans: manifests, splits, decoding, preprocessing, packs."""
