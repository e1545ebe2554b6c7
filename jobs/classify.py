"""Classify an archive into a Parquet table, reading only what is new.

python jobs/classify.py --input ../data/brain-tumor-mri/Testing --output runs/results   # by the model that ships
python jobs/classify.py --model runs/first --input scans --output runs/results --dry-run   # how much, how long
ray job submit --working-dir . -- python jobs/classify.py --model s3://bucket/model --input s3://bucket/scans \
    --output s3://bucket/results
"""

from btray.bulk.config import ClassifyConfig
from btray.launch import run_job


def main(config: ClassifyConfig) -> str:
    """Return the URI of the table."""
    from btray.bulk.classify import classify

    return classify(config)


if __name__ == "__main__":
    run_job(ClassifyConfig, main)
