"""What a job may end with besides success; `btray.launch` turns each into its exit code."""

from __future__ import annotations

from typing import ClassVar


class Failed(Exception):
    """The job could not continue for a reason that is not a mistake and may pass, such as a store that is away.

    One line; exit code 1, so that whatever supervises the job starts it again.
    """

    exit_code: ClassVar[int] = 1


class UserError(Exception):
    """Wrong use or unusable input: one line that names the value and the remedy; exit code 2."""

    exit_code: int = 2


class ThresholdExceeded(Exception):
    """The job did its work and crossed a threshold that the user set; exit code 3."""

    exit_code: ClassVar[int] = 3


class Stopped(BaseException):
    """The job was asked to end (SIGTERM) and did so in order; exit code 143.

    Not an Exception, as KeyboardInterrupt is not one: code that catches errors on the way must let it pass.
    """
