"""Erase objects from a results table or a packed archive: every row and picture; no later run takes them again.

python jobs/erase.py --output runs/results --uris withdrawn.txt --dry-run
python jobs/erase.py --output s3://bucket/results --study 1.2.840.113619.2.5.1762583153
python jobs/erase.py --output runs/results --where "uri LIKE '%/patient-7/%'"
"""

from btray.bulk.config import EraseConfig
from btray.launch import run_job


def main(config: EraseConfig) -> str:
    """Return the URI of a report, which names no object; with --dry-run that of the output."""
    from btray.bulk.erasure.job import erase

    return erase(config)


if __name__ == "__main__":
    run_job(EraseConfig, main)
