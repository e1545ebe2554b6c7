"""Compare recipes and networks on patients and sources that they have not seen; the test split is never read.

python benchmarks/recipes.py --data both --out runs/recipes --table docs/recipes.csv [--only default] [--seeds 0 1]

`both` is what `jobs/acquire.py` merged. Every row is a training of `--epochs` (5: less than 8 minutes on two otherwise
idle cores for the default). Images of a test split are left out of the data. Rows named `without SOURCE` hold out that
source and learn from all others; the rest hold out a quarter of the patients, the same for all rows of a seed. A row
that the table already has is not trained again, so an interrupted comparison continues.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from btray.data.labelled import read_labelled
from btray.model.bundle import load_bundle
from btray.model.network import count_flops, count_parameters

JOB = Path(__file__).resolve().parent.parent / "jobs" / "train.py"
BEFORE = (
    "--network.architecture=cnn", "--preprocess.size=160", "--optimiser.learning-rate=2e-3",
    "--optimiser.class-power=1", "--optimiser.source-power=0", "--precision=float32",
)  # fmt: skip
"""The defaults before: 1.1 M parameters that start at random."""
RECIPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "before": BEFORE,
    # the default less one part
    "random start": ("--init-from=random",),
    "all stages learn": ("--optimiser.frozen-stages=0",),
    "160 pixels": ("--preprocess.size=160",),
    "no crop": ("--no-preprocess.crop",),
    "every image alike": ("--optimiser.class-balance=none",),
    "sources alike": ("--optimiser.source-power=0",),
    "sampling": ("--optimiser.class-balance=sampling",),
    "no gray curves": ("--augment.tone=0",),
    "no augmentation": ("--no-augment.enabled",),
    "no moving average": ("--optimiser.ema=0",),
    "no label smoothing": ("--optimiser.label-smoothing=0",),
    "mixup": ("--optimiser.mixup=0.2",),
    # other networks, from random weights
    "cnn": ("--network.architecture=cnn", "--optimiser.learning-rate=2e-3"),
    "cnn, wide": (
        "--network.widths=48,96,160,224", "--network.depths=1,2,2,2", "--optimiser.learning-rate=2e-3",
    ),
    "cnn, narrow": ("--network.widths=16,32,48,72", "--optimiser.learning-rate=2e-3"),
    "resnet18": ("--network.architecture=resnet18",),
    "vgg16": ("--network.architecture=vgg16",),
    "efficientnet_b0": ("--network.architecture=efficientnet_b0",),
}  # fmt: skip


def main() -> None:
    """Train the rows that the table lacks, and add each when it is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder or manifest that names sources")
    parser.add_argument("--outliers", default="other", help="label of images that show none of the classes")
    parser.add_argument("--out", required=True, type=Path, help="folder of bundles")
    parser.add_argument("--table", required=True, type=Path, help="CSV file")
    parser.add_argument("--only", nargs="*", help="names of rows; default: all")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--epochs", type=int, default=5)
    arguments = parser.parse_args()
    table = read_labelled(arguments.data)
    table = table.filter(pc.not_equal(table["split"].fill_null("train"), "test"))
    sources = [name for name in table["source"].unique().to_pylist() if name]
    rows = RECIPES | {f"without {source}": () for source in sources}
    rows |= {f"before, without {source}": BEFORE for source in sources}
    for name in arguments.only or rows:
        for seed in arguments.seeds:
            if not _is_in(arguments.table, name, seed):
                _add(arguments.table, _row(name, seed, rows[name], table, arguments))


def _row(
    name: str, seed: int, flags: tuple[str, ...], table: pa.Table, arguments: argparse.Namespace
) -> dict[str, Any]:
    out = arguments.out / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
    out.mkdir(parents=True, exist_ok=True)
    held = name.partition("without ")[2]
    split = pa.array(
        ["val" if held and source == held else None for source in table["source"].to_pylist()], pa.string()
    )
    data = out / "data.parquet"
    pq.write_table(table.set_column(table.column_names.index("split"), "split", split), data)
    started = time.monotonic()
    command = [
        sys.executable, str(JOB), "--data", str(data), "--out", str(out / "model"), "--outliers", arguments.outliers,
        "--epochs", str(arguments.epochs), "--refit-epochs=0", "--validation=0.25", "--seed", str(seed), "--overwrite",
    ]  # fmt: skip
    subprocess.run([*command, *flags], check=True)
    seconds = time.monotonic() - started
    bundle = load_bundle(str(out / "model"))
    metrics = json.loads((out / "model" / "metrics.json").read_text())
    network = bundle.network()
    row = {
        "row": name,
        "seed": seed,
        "parameters": count_parameters(network),
        "gflop": round(count_flops(network, bundle.manifest.preprocess.size) / 1e9, 3),
        "seconds": round(seconds),
        "images": metrics["n"],
        "macro_f1": round(metrics["macro_f1"], 3),
        "macro_f1_ci95": " to ".join(f"{end:.3f}" for end in metrics["macro_f1_ci95"]),
        "ece": round(metrics["ece"], 3),
    }
    parts = {source: part for source, part in (metrics.get("sources") or {}).items() if part["n"]}
    by_source = {source: part["macro_f1"] or part["recall"] for source, part in parts.items()}
    return row | {"by_source": " ".join(f"{source}={value:.3f}" for source, value in by_source.items() if value)}


def _is_in(table: Path, name: str, seed: int) -> bool:
    if not table.exists():
        return False
    with table.open(newline="") as file:
        return any(row["row"] == name and int(row["seed"]) == seed for row in csv.DictReader(file))


def _add(table: Path, row: dict[str, Any]) -> None:
    new = not table.exists()
    with table.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)
    print(row, flush=True)


if __name__ == "__main__":
    main()
