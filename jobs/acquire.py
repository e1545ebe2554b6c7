"""Import data sets: download, verify, unpack and merge them, and write a manifest.

python jobs/acquire.py --source kaggle:masoudnickparvar/brain-tumor-mri-dataset --out data/mri
python jobs/acquire.py --source https://example.org/slices.zip --sha256 <64 digits> --source more/ --out s3://bucket/mri
"""

from __future__ import annotations

from btray.acquire.config import AcquireConfig
from btray.launch import run_job


def main(config: AcquireConfig) -> str:
    """Return the URI of the manifest."""
    from btray.acquire.job import acquire

    return acquire(config)


if __name__ == "__main__":
    run_job(AcquireConfig, main)
