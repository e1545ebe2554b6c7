"""Tell Ray that this spot instance is about to be reclaimed, so that training writes a checkpoint in time.

python spot_notice.py --address HEAD:6379

EC2 announces the interruption two minutes ahead in the instance's metadata. This script polls for the notice every few
seconds, then makes Ray drain the node. It needs only Python and the `ray` command, and runs beside `ray start` on every
spot worker.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime

METADATA = "http://169.254.169.254"


def main() -> int:
    """Wait for the notice and pass it on to Ray; return the exit code of `ray drain-node`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", required=True, help="the head's address, HOST:PORT")
    parser.add_argument("--metadata", default=METADATA, help="address of the instance's metadata service")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two requests")
    arguments = parser.parse_args()
    while True:
        try:
            notice = read_notice(arguments.metadata)
        except OSError as error:  # the metadata service may be down for a moment
            print(f"no answer from {arguments.metadata}: {error}", flush=True)
            notice = None
        if notice is not None:
            return drain(arguments.address, notice)
        time.sleep(arguments.every)


def read_notice(metadata: str) -> datetime | None:
    """Return when the instance will be reclaimed, or None if there is no notice.

    Raises:
        OSError: the metadata service does not answer.
    """
    request = urllib.request.Request(  # noqa: S310 - the metadata service
        f"{metadata}/latest/api/token", method="PUT", headers={"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    )
    with urllib.request.urlopen(request, timeout=2) as answer:  # noqa: S310
        token = answer.read().decode()
    request = urllib.request.Request(  # noqa: S310
        f"{metadata}/latest/meta-data/spot/instance-action", headers={"X-aws-ec2-metadata-token": token}
    )
    try:
        with urllib.request.urlopen(request, timeout=2) as answer:  # noqa: S310
            return datetime.fromisoformat(json.load(answer)["time"])
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise


def drain(address: str, reclaimed_at: datetime) -> int:
    """Make Ray drain this node ten seconds before it is reclaimed; return the exit code of `ray drain-node`."""
    left = max(1, int((reclaimed_at - datetime.now(UTC)).total_seconds()) - 10)
    print(f"the instance is reclaimed at {reclaimed_at.isoformat()}: draining, {left} s left", flush=True)
    command = ["ray", "drain-node", "--address", address, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    command += ["--reason-message", "spot notice", "--deadline-remaining-seconds", str(left)]
    # Without a node id the command asks Ray which node this is, and it finds Ray through RAY_ADDRESS only.
    return subprocess.run(command, check=False, env=os.environ | {"RAY_ADDRESS": address}).returncode


if __name__ == "__main__":
    sys.exit(main())
