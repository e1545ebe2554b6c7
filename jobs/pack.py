"""Pack many small objects into few Parquet shards, which classify, train and audit read several times faster.

python jobs/pack.py --input ../data/brain-tumor-mri --output runs/packed
python jobs/train.py --data runs/packed --out runs/first
python jobs/pack.py --frames --input ../data/brain-tumor-mri --output runs/frames   # decoded and preprocessed once
ray job submit --working-dir . -- python jobs/pack.py --input s3://bucket/scans --output s3://bucket/packed
"""

from btray.bulk.config import PackConfig
from btray.launch import run_job


def main(config: PackConfig) -> str:
    """Return the URI of the pack."""
    from btray.bulk.pack import pack

    return pack(config)


if __name__ == "__main__":
    run_job(PackConfig, main)
