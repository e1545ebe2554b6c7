"""The evaluate job: metrics, plots and the report."""
