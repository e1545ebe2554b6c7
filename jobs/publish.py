"""Make of a trained bundle one to pass on: half precision, no picture of a scan, its terms; at most 6 MB.

python jobs/publish.py --model runs/first --out runs/published --license LICENSE-OF-THE-MODEL --data ../data/dataset
"""

from btray.evaluation.config import PublishConfig
from btray.launch import run_job


def main(config: PublishConfig) -> str:
    """Return the URI of the published bundle."""
    from btray.evaluation.publish import publish

    return publish(config)


if __name__ == "__main__":
    run_job(PublishConfig, main)
