"""Serve a bundle over HTTP on this machine: a page for people, /v1/classify, the Open Inference Protocol, metrics.

python jobs/serve.py                                           # http://127.0.0.1:8000, for this machine only
btray key --file keys.txt --name radiology && python jobs/serve.py --model runs/first --host 0.0.0.0 --keys keys.txt
kill -HUP PID                                                  # loads the current bundle and --config
serve deploy serve.yaml                                        # on a cluster; the bundle is named in serve.yaml
"""

from btray.launch import read_config, run_job
from btray.serving.config import ServeConfig


def main(config: ServeConfig) -> str:
    """Serve until a signal ends the service; return its URL."""
    from btray.serving.job import run_service

    return run_service(config, lambda: read_config(ServeConfig))


if __name__ == "__main__":
    run_job(ServeConfig, main)
