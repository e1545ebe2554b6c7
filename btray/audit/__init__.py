"""The audit job: what makes figures untrue is looked for."""
