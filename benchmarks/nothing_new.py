"""Measure how long the nightly job takes if nothing is new: the fixed cost of every night.

python benchmarks/nothing_new.py --model BUNDLE --data ../data/brain-tumor-mri [--objects 100000]

The archive consists of hard links; the table has a row for every object, in files of 512 rows as the job writes them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from itertools import cycle, islice
from pathlib import Path

from btray import storage
from btray.bulk import table as results_table
from btray.bulk.report import PartTally
from btray.bulk.runs import write_part
from btray.model.bundle import load_bundle
from btray.model.prediction import Prediction

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="bundle")
    parser.add_argument("--data", required=True, help="folder of JPEG")
    parser.add_argument("--objects", type=int, default=100_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="btray-night-") as name:
        archive, table = Path(name, "archive"), Path(name, "table")
        pictures = sorted(path for path in Path(arguments.data).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
        for number, picture in enumerate(islice(cycle(pictures), arguments.objects)):
            link = archive / f"{number // 1000:04d}" / f"{number:07d}.jpg"
            link.parent.mkdir(parents=True, exist_ok=True)
            os.link(picture, link)
        _fill(str(archive), str(table), load_bundle(arguments.model).manifest.model_id)
        job = [sys.executable, str(ROOT / "jobs" / "classify.py"), "--model", arguments.model]
        started = time.perf_counter()
        done = subprocess.run(
            [*job, "--input", str(archive), "--output", str(table)], check=True, capture_output=True, text=True
        )
        seconds = time.perf_counter() - started
    message = done.stdout.splitlines()[0]
    print(json.dumps({"objects": arguments.objects, "seconds": round(seconds, 2), "message": message}, indent=2))


def _fill(archive: str, table: str, model_id: str) -> None:
    """Write a table that holds every object of the archive."""
    folder = storage.join(table, results_table.folder(model_id, "2026-01-01"))
    now = datetime.now(UTC)
    listed = storage.list_files(archive)
    number = 0
    while infos := list(islice(listed, 512)):
        prediction = Prediction(index=0, label="glioma", confidence=0.9, probabilities={"glioma": 0.9, "no_tumor": 0.1})
        rows = [results_table.row_of(prediction, info, run_id="earlier", classified_at=now) for info in infos]
        write_part(storage.join(folder, f"part-earlier-{number:06d}.parquet"), rows, results_table.SCHEMA, PartTally())
        number += 1


if __name__ == "__main__":
    main()
