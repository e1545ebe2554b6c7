"""Evaluate a bundle on labelled data: metrics.json, plots and a report.

python jobs/evaluate.py --model runs/first --data ../data/brain-tumor-mri --out runs/evaluation
"""

from btray.evaluation.config import EvaluateConfig
from btray.launch import run_job


def main(config: EvaluateConfig) -> str:
    """Return the folder of the report."""
    from btray.evaluation.job import evaluate

    return evaluate(config)


if __name__ == "__main__":
    run_job(EvaluateConfig, main)
