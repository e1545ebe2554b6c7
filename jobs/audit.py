"""Look for duplicates, leakage, label conflicts and strays in labelled data, before training on them.

python jobs/audit.py --data ../data/brain-tumor-mri --out runs/audit
python jobs/audit.py --data s3://bucket/scans --out s3://bucket/audits/first --fail-on leak,conflict   # exit code 3
"""

from btray.audit.config import AuditConfig
from btray.launch import run_job


def main(config: AuditConfig) -> str:
    """Return the folder of the audit."""
    from btray.audit.job import audit

    return audit(config)


if __name__ == "__main__":
    run_job(AuditConfig, main)
