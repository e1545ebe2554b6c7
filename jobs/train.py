"""Train the network on Ray Train and write a model bundle.

python jobs/train.py --data ../data/brain-tumor-mri --out runs/first
python jobs/train.py --data ../data/brain-tumor-mri --out runs/small --epochs 2 --preprocess.size 96   # a quick look
ray job submit --working-dir . -- python jobs/train.py --data s3://bucket/scans --out s3://bucket/models/first
"""

from btray.launch import run_job
from btray.training.config import TrainConfig


def main(config: TrainConfig) -> str:
    """Return the URI of the bundle."""
    from btray.training.job import train

    return train(config)


if __name__ == "__main__":
    run_job(TrainConfig, main)
