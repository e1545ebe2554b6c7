"""What a job may end with besides success; `btray.core.config.run_job` turns each into its exit code."""

from __future__ import annotations


class UserError(Exception):
    """Wrong use or unusable input: one line that names the value and the remedy; the job exits with 2."""


class Failed(Exception):
    """The job could not go on for a reason that is no mistake and may pass, a store that is away, say: one line; the
    job exits with 1, so that who watches over it starts it again."""


class ThresholdExceeded(Exception):
    """The job did its work and a threshold that the user set was crossed; the job exits with 3."""


class Stopped(BaseException):
    """The job was asked to end (SIGTERM) and did so in order; the job exits with 143.

    No Exception, as KeyboardInterrupt is none: whoever catches errors on the way must not take it for one.
    """
