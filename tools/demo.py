"""The whole workflow, from data to a model bundle, its report and a results table, without preparation.

    make demo                                  # or: python -m tools.demo
    make demo DATA=../shared/data/brain-tumor-mri
    make demo DATA=s3://bucket/scans
    make demo SCANS=folder                     # what the model that ships with btray says of your scans

Without data it starts a real S3 server on loopback, fills a bucket with phantoms (`btray.phantoms`), trains over
`s3://` with two workers, downloads report and bundle to `runs/demo/<time>/model`, classifies the bucket into
`runs/demo/<time>/results` and stops the server. It takes a few minutes on two cores. With data it trains on them with
the job's defaults. Last, the model that ships with btray, if it is there, classifies your scans, or a phantom of each
class, which it has never seen the like of. It returns the exit code of a job that fails.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from btray import phantoms, storage
from btray.model.shipped import FOLDER, SHIPPED
from tools.s3_server import S3Server

ROOT = Path(__file__).resolve().parent.parent
BUCKET = "btray-demo"
PER_CLASS = {"Training": 240, "Testing": 60}
SEED = 1
# Sized for five minutes in all on two cores; phantoms need neither the job's default resolution nor its epochs.
PHANTOM_FLAGS = ("--epochs=11", "--batch-size=32", "--num-workers=2", "--preprocess.size=112", "--refit-epochs=0")
GRACE_SECONDS = 30.0

console = Console(highlight=False)


def main() -> int:
    """Run the demo of the command line and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="", help="labelled data, as for jobs/train.py; default: generated phantoms")
    parser.add_argument("--scans", default="", help="a scan, or a folder of them, for the model that ships with btray")
    parser.add_argument("--out", type=Path, help="local folder for the result; default: runs/demo/<time>")
    arguments, job_flags = parser.parse_known_args()
    out: Path = arguments.out or ROOT / "runs" / "demo" / f"{datetime.now():%Y%m%d-%H%M%S}"
    started = time.monotonic()
    code = _train_on(arguments.data, out, job_flags) if arguments.data else _train_on_phantoms(out, job_flags)
    if code == 0:
        _show_result(out / "model", phantom=not arguments.data)
        code = _ask_shipped_model(arguments.scans, out)
        console.print(f"{time.monotonic() - started:.0f} s in all")
    return code


def _train_on(data: str, out: Path, flags: list[str]) -> int:
    model = str(out / "model")
    return _run_job("train.py", ["--data", data, "--out", model, *flags], os.environ) or _classify(data, model, out)


def _classify(data: str, model: str, out: Path) -> int:
    flags = ["--model", model, "--input", data, "--output", str(out / "results")]
    return _run_job("classify.py", flags, os.environ)


def _train_on_phantoms(out: Path, flags: list[str]) -> int:
    with tempfile.TemporaryDirectory(prefix="btray-demo-") as folder, S3Server(Path(folder)) as server:
        console.print(f"S3 server on {server.endpoint}, until the demo ends")
        # btray.storage, in this process and in the jobs, reads the standard AWS variables.
        environment = server.environment_over(os.environ)
        os.environ.clear()
        os.environ.update(environment)
        server.make_bucket(BUCKET)
        data, model = f"s3://{BUCKET}/phantoms", f"s3://{BUCKET}/model"
        started = time.monotonic()
        phantoms.write_data_set(data, per_class=PER_CLASS, seed=SEED)
        count = sum(PER_CLASS.values()) * len(phantoms.CLASSES)
        console.print(f"{count} phantom slices written to {data} in {time.monotonic() - started:.0f} s")
        code = _run_job("train.py", ["--data", data, "--out", model, *PHANTOM_FLAGS, *flags], os.environ)
        if code == 0:
            _download(model, out / "model")
            code = _classify(data, model, out)
        return code


def _run_job(script: str, flags: list[str], environment: Mapping[str, str]) -> int:
    """Run a job with its output on this terminal; return its exit code, or 128 + n if signal n ended it."""
    console.print(f"[bold]python jobs/{script} {' '.join(flags)}[/bold]", soft_wrap=True)
    with subprocess.Popen([sys.executable, str(ROOT / "jobs" / script), *flags], env=dict(environment)) as job:
        try:
            code = job.wait()
        except KeyboardInterrupt:
            # Ctrl-C reached the job too: give it time to stop its cluster, but not for ever.
            try:
                job.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                job.kill()
            return 128 + signal.SIGINT
    if code:
        console.print(f"[red]jobs/{script} failed with exit code {code}[/red]")
    return 128 - code if code < 0 else code


def _ask_shipped_model(scans: str, out: Path) -> int:
    """Print what the shipped model says of `scans`, or of phantoms; return the exit code."""
    if not scans and not (FOLDER / SHIPPED).is_dir():
        return 0
    if not scans:
        scans = str(out / "phantoms")
        for label in phantoms.CLASSES:
            storage.write_bytes(f"{scans}/{label}.jpg", phantoms.encoded_phantom(label, SEED))
        console.print("The model that ships with btray, on phantoms: it knows real slices, and should say so.")
    console.print(f"[bold]btray predict {scans}[/bold]", soft_wrap=True)
    command = [sys.executable, "-c", "from btray.cli import main; main()", "predict", "--", scans]
    return subprocess.run(command, check=False).returncode


def _download(source: str, target: Path) -> None:
    """Copy the bundle and its report, without the run's files below `_run`, which `list_files` skips."""
    for file in storage.list_files(source):
        storage.write_bytes(
            storage.join(str(target), file.uri.removeprefix(source + "/")), storage.read_bytes(file.uri)
        )


def _show_result(model: Path, *, phantom: bool) -> None:
    metrics: dict[str, Any] = json.loads((model / "metrics.json").read_text(encoding="utf-8"))
    low, high = metrics["accuracy_ci95"]
    table = Table(title=f"On {metrics['n']} test slices", title_justify="left")
    table.add_column("")
    table.add_column("value", justify="right")
    table.add_row("accuracy", f"{metrics['accuracy']:.3f} (95 % interval {low:.3f} to {high:.3f})")
    table.add_row("macro-F1", f"{metrics['macro_f1']:.3f}")
    clean = metrics["clean"]
    if clean and clean["n"] < metrics["n"]:
        accuracy = f"{clean['accuracy']:.3f}" if clean["n"] else "-"
        table.add_row("accuracy, clean", f"{accuracy} ({clean['n']} slices with no twin in the training data)")
    table.add_row("AUROC, mean", _number(metrics["auroc_macro"]), end_section=True)
    for label, values in metrics["per_class"].items():
        table.add_row(f"F1 of {label}", f"{_number(values['f1'])} ({values['support']} slices)")
    console.print(table)
    if phantom:
        console.print(
            "These are cartoon slices: the figures show that the software works, and say nothing about patients."
        )
    console.print(
        f"report  {model / 'report.html'}\nbundle  {model}\nresults {model.parent / 'results'}", soft_wrap=True
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    sys.exit(main())
