"""Tell Ray that this spot instance is about to be taken back, so that training writes a checkpoint in time.

python spot_notice.py --address HEAD:6379

EC2 gives two minutes' notice through the instance's metadata; this asks every few seconds, and then has Ray drain the
node. It needs nothing but Python and the `ray` command, and runs beside `ray start` on every spot worker.
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
    """Wait for the notice and pass it on; 0 once Ray has taken it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", required=True, help="the head's address, HOST:PORT")
    parser.add_argument("--metadata", default=METADATA, help="address of the instance's metadata service")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two looks")
    arguments = parser.parse_args()
    while True:
        try:
            notice = look(arguments.metadata)
        except OSError as error:  # the metadata service is away for a moment
            print(f"no answer from {arguments.metadata}: {error}", flush=True)
            notice = None
        if notice is not None:
            return drain(arguments.address, notice)
        time.sleep(arguments.every)


def look(metadata: str) -> datetime | None:
    """When the instance will be taken; None where there is no notice. Raises OSError."""
    asked = urllib.request.Request(  # noqa: S310 - the metadata service
        f"{metadata}/latest/api/token", method="PUT", headers={"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    )
    with urllib.request.urlopen(asked, timeout=2) as answer:  # noqa: S310
        token = answer.read().decode()
    asked = urllib.request.Request(  # noqa: S310
        f"{metadata}/latest/meta-data/spot/instance-action", headers={"X-aws-ec2-metadata-token": token}
    )
    try:
        with urllib.request.urlopen(asked, timeout=2) as answer:  # noqa: S310
            return datetime.fromisoformat(json.load(answer)["time"])
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise


def drain(address: str, taken_at: datetime) -> int:
    """Have Ray drain this node by then."""
    left = max(1, int((taken_at - datetime.now(UTC)).total_seconds()) - 10)
    print(f"the instance is taken back at {taken_at.isoformat()}: draining, {left} s left", flush=True)
    command = ["ray", "drain-node", "--address", address, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    command += ["--reason-message", "spot notice", "--deadline-remaining-seconds", str(left)]
    # Without a node's id the command asks Ray which node this is, and finds Ray by its address in the environment.
    return subprocess.run(command, check=False, env=os.environ | {"RAY_ADDRESS": address}).returncode


if __name__ == "__main__":
    sys.exit(main())
