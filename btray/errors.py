"""What a job may end with besides success; `btray.config.run_job` turns each into its exit code."""

from __future__ import annotations


class UserError(Exception):
    """Wrong use or unusable input: one line that names the value and the remedy; the job exits with 2."""


class ThresholdExceeded(Exception):
    """The job did its work and a threshold that the user set was crossed; the job exits with 3."""


def reject_threshold(rejected: int, total: int, limit: float, worst: str) -> None:
    """Raise `ThresholdExceeded` where more than the share `limit` of `total` inputs was rejected.

    `worst` names the commonest reason; it stands in the message so that the reader knows where to look.
    """
    if total and rejected / total > limit:
        raise ThresholdExceeded(
            f"{rejected} of {total} inputs were rejected ({rejected / total:.1%}), above --max-rejected {limit:.1%}; "
            f"most often: {worst}. Mend the data or raise --max-rejected."
        )
