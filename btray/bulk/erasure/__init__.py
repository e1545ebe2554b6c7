"""Erasing objects from an output for good: their rows, their pictures and what was derived of them."""
