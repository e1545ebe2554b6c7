"""Search for a better network and optimiser with Ray Tune, and write the best trial as a model bundle.

python jobs/tune.py --data ../data/brain-tumor-mri --out runs/tuned
python jobs/tune.py --data dataset --out runs/tuned --trials 4 --epochs 4 --preprocess.size 96   # a quick look
ray job submit --working-dir . -- python jobs/tune.py --data s3://bucket/scans --out s3://bucket/models/tuned --use-gpu
"""

from btray.launch import run_job
from btray.training.config import TuneConfig


def main(config: TuneConfig) -> str:
    """Return the URI of the bundle."""
    from btray.training.tuning import tune

    return tune(config)


if __name__ == "__main__":
    run_job(TuneConfig, main)
