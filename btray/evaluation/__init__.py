"""Evaluation of a model on labelled images: metrics, plots, report and model card."""
