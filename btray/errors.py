"""What a job may end with besides success; `btray.config.run_job` turns each into its exit code."""

from __future__ import annotations


class UserError(Exception):
    """Wrong use or unusable input: one line that names the value and the remedy; the job exits with 2."""


class ThresholdExceeded(Exception):
    """The job did its work and a threshold that the user set was crossed; the job exits with 3."""


class Stopped(Exception):
    """The job was asked to end (SIGTERM) and did so in order; the same command goes on; the job exits with 143."""
