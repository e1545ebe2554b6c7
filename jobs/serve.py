"""Serve a bundle over HTTP on this machine: a page for people, /v1/classify, the Open Inference Protocol, metrics.

python jobs/serve.py --model runs/first                        # http://127.0.0.1:8000, for this machine alone
btray key --file keys.txt --name radiology && python jobs/serve.py --model runs/first --host 0.0.0.0 --keys keys.txt
kill -HUP PID                                                  # takes over a new bundle, and what --config says now
serve deploy serve.yaml                                        # on a cluster; the bundle stands in serve.yaml
"""

from btray.launch import read_config, run_job
from btray.serving.config import ServeConfig


def main(config: ServeConfig) -> str:
    """Return the URL, once the service was told to end."""
    from btray.serving.job import run_service

    return run_service(config, lambda: read_config(ServeConfig))


if __name__ == "__main__":
    run_job(ServeConfig, main)
