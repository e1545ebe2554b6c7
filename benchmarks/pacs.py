"""Compare the rate of the classify job from a PACS with that from disk: the same series, in turn, on the same cores.

python benchmarks/pacs.py [--model BUNDLE] [--series 20] [--slices 100] [--side 320] [--rounds 3]

The PACS is Debian's Orthanc with its DICOMweb plugin, on this machine: what it takes of the cores is part of
the result. The slices are phantoms as uncompressed MR objects. Each rate is that between the first and the last part of
a run; the ratio is that of the medians. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import checkout
import numpy as np
from PIL import Image

from btray import phantoms
from btray.data.scans import decode
from tests.helpers.dicom_files import slice_file
from tests.helpers.orthanc import Orthanc
from tools.processes import cpu_seconds

UID = "1.2.826.0.1.3680043.10.543.77"
PICTURES = 40


def main() -> None:
    """Measure, print each run as it ends, then the comparison as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="bundle; default: the one that ships")
    parser.add_argument("--series", type=int, default=20)
    parser.add_argument("--slices", type=int, default=100, help="of each series")
    parser.add_argument("--side", type=int, default=320, help="pixels")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="btray-pacs-") as name, Orthanc(Path(name) / "orthanc") as server:
        folder = Path(name)
        _archive(folder / "disk", server, arguments)
        sources = {"disk": str(folder / "disk"), "pacs": f"{server.address}?ModalitiesInStudy=MR"}
        rates: dict[str, list[float]] = {source: [] for source in sources}
        for number in range(arguments.rounds):
            for source, uri in sources.items():
                before = cpu_seconds(server.pid or 0)
                report = _classify(arguments.model, uri, folder / f"{source}-{number}", server)
                rates[source].append(report["images_per_second"])
                stages = report["seconds_by_stage"]
                used = cpu_seconds(server.pid or 0) - before
                line = {"images_per_s": rates[source][-1], "seconds": stages, "cpu_seconds_of_the_pacs": round(used, 1)}
                print(source, json.dumps(line), file=sys.stderr, flush=True)
    medians = {source: statistics.median(measured) for source, measured in rates.items()}
    print(
        json.dumps({"images_per_s": medians, "pacs_over_disk": round(medians["pacs"] / medians["disk"], 3)}, indent=2)
    )


def _archive(folder: Path, server: Orthanc, arguments: argparse.Namespace) -> None:
    """Write the same slices to a folder and into the PACS."""
    size = (arguments.side, arguments.side)
    frames = [decode(phantoms.encoded_phantom("glioma", seed)).frames[0] for seed in range(PICTURES)]
    pictures = [np.asarray(Image.fromarray(frame).resize(size)).astype(np.uint16) * 16 for frame in frames]
    for series in range(arguments.series):
        (folder / str(series)).mkdir(parents=True)
        for number in range(arguments.slices):
            uids = {
                "StudyInstanceUID": f"{UID}.{series}",
                "SeriesInstanceUID": f"{UID}.{series}.1",
                "SOPInstanceUID": f"{UID}.{series}.1.{number}",
            }
            position = [0, 0, 2.0 * number]
            data = slice_file(pictures[(series + number) % PICTURES], ImagePositionPatient=position, **uids)
            (folder / str(series) / f"{number}.dcm").write_bytes(data)
            server.upload([data])


def _classify(model: str | None, uri: str, out: Path, server: Orthanc) -> dict[str, Any]:
    """Run the job and return its run.json."""
    command = [sys.executable, str(checkout.ROOT / "jobs" / "classify.py"), "--input", uri, "--output", str(out)]
    named = ["--model", model] if model else []
    environment = os.environ | server.environment | {"PYTHONPATH": str(checkout.ROOT)}
    subprocess.run([*command, *named], env=environment, check=True, stdout=subprocess.DEVNULL)
    (report,) = out.glob("_runs/*/*/run.json")
    found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    main()
