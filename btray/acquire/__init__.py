"""The acquire job: data sets are brought in."""
