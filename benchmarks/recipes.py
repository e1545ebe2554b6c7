"""Compare recipes and networks on patients and sources that they have not seen; the test split is never read.

python benchmarks/recipes.py --data both --out runs/recipes --table docs/recipes.csv [--only default] [--seeds 0 1]

`both` is what `jobs/acquire.py` merged. Every row is a training of `--epochs` (5: less than 8 minutes on two otherwise
idle cores for the default) at `--size`, which stand in the table. Images of a test split are left out of the data. All
rows of a seed hold out the same quarter of the patients, but for those named `without SOURCE`, which hold out that
source and learn from all others. The learning curve ("50 % of patients", "2 sources", the largest ones first) takes as
many steps on fewer images, of the classes alone that the largest source has.

A row that the table already has is not trained again, and an interrupted training is resumed: the same command
continues a comparison. `benchmarks/recipes_page.py` makes a page's table and plot of it.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from btray.data.config import PreprocessConfig
from btray.data.fingerprint import NO_FINGERPRINT, Fingerprints, fingerprint_of, unpack
from btray.data.frames import FrameSource, Rejection
from btray.data.labelled import read_labelled
from btray.data.splits import hold_out, k_folds
from btray.model.bundle import Bundle, load_bundle
from btray.model.classifier import Classifier
from btray.model.comparison import noise_frames
from btray.model.network import count_flops, count_parameters

JOB = Path(__file__).resolve().parent.parent / "jobs" / "train.py"
HELD_OUT = 0.25
"""Share of the patients that no row of a seed learns from."""
BEFORE = (
    "--network.architecture=cnn", "--preprocess.size=160", "--optimiser.learning-rate=2e-3",
    "--optimiser.class-power=1", "--optimiser.source-power=0", "--precision=float32",
)  # fmt: skip
"""The defaults before: 1.1 M parameters that start at random."""
# With the last layer alone learning, from its random start.
FROZEN = ("--optimiser.freeze-epochs={epochs}", "--optimiser.learning-rate=1e-2")
SQUEEZENET = ("--network.architecture=squeezenet1_0", "--init-from={squeezenet}")
NETWORKS: dict[str, tuple[str, ...]] = {
    "default": (),
    "before": BEFORE,
    # from weights of ImageNet; frozen: only the last layer learns
    "mobile_cnn, frozen": FROZEN,
    "squeezenet1_0, frozen": (*SQUEEZENET, *FROZEN),
    "squeezenet1_0": SQUEEZENET,
    # from random weights
    "cnn": ("--network.architecture=cnn", "--optimiser.learning-rate=2e-3"),
    "cnn, wide": (
        "--network.widths=48,96,160,224", "--network.depths=1,2,2,2", "--optimiser.learning-rate=2e-3",
    ),
    "cnn, narrow": ("--network.widths=16,32,48,72", "--optimiser.learning-rate=2e-3"),
    "vgg-like": (  # VGG-16 itself takes 22 GFLOP an image: hours
        "--network.widths=32,64,128,256", "--no-network.residual", "--network.squeeze-excite=0",
        "--network.pooling=average", "--optimiser.learning-rate=2e-3",
    ),
    "resnet18": ("--network.architecture=resnet18",),
    "efficientnet_b0": ("--network.architecture=efficientnet_b0",),
}  # fmt: skip
ABLATION: dict[str, tuple[str, ...]] = {
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
}
"""The default less one part, or with another."""
QUARTERS = {f"{25 * quarters} % of patients": quarters for quarters in (1, 2, 4)}
"""Rows of the learning curve: of how many quarters of the patients that are not held out they learn."""


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
    parser.add_argument("--size", type=int, default=PreprocessConfig().size, help="edge of the frames, in pixels")
    parser.add_argument("--squeezenet", type=Path, help="its weights of ImageNet: a .safetensors file of torchvision's")
    arguments = parser.parse_args()
    table = read_labelled(arguments.data)
    table = table.filter(pc.not_equal(table["split"].fill_null("train"), "test"))
    sources = [name for name in table["source"].unique().to_pylist() if name]
    rows = NETWORKS | ABLATION | {f"without {source}": () for source in sources}
    rows |= {f"before, without {source}": BEFORE for source in sources}
    rows |= dict.fromkeys([*QUARTERS, "1 source", *(f"{count} sources" for count in range(2, len(sources)))], ())
    if unknown := [name for name in arguments.only or () if name not in rows]:
        parser.error(f"--only {unknown[0]!r} is none of: {'; '.join(rows)}")
    prints = _fingerprints(table)
    for name in arguments.only or rows:
        if rows[name][:2] == SQUEEZENET and not arguments.squeezenet:
            print(f"{name!r} is left out: it needs --squeezenet", flush=True)
            continue
        for seed in arguments.seeds:
            images, epochs = _divide(name, seed, table, prints, arguments)
            _add_row({"row": name, "seed": seed, "epochs": epochs}, rows[name], images, arguments)


def _fingerprints(table: pa.Table) -> Fingerprints:
    """Return the fingerprints of all images, [n, VIEWS, LENGTH]."""
    scans = FrameSource(PreprocessConfig()).scans(table["uri"].to_pylist())
    return unpack([NO_FINGERPRINT if isinstance(scan, Rejection) else fingerprint_of(scan.frames) for scan in scans])


def _divide(
    name: str, seed: int, table: pa.Table, prints: Fingerprints, arguments: argparse.Namespace
) -> tuple[pa.Table, int]:
    """Return the images of a row, of which those that it is measured on have the split val, and its epochs."""
    sources, labels = (np.array(table[column].to_pylist(), object) for column in ("source", "label"))
    left_out = name.partition("without ")[2]
    held = sources == left_out if left_out else hold_out(table, fraction=HELD_OUT, seed=seed, prints=prints)
    learnt = np.flatnonzero(~held)
    split = pa.array(["val" if measured else None for measured in held.tolist()], pa.string())
    table = table.set_column(table.column_names.index("split"), "split", split)
    largest = [source for source, _ in Counter(sources[learnt]).most_common()]
    if name in QUARTERS:
        quarter = k_folds(table.take(learnt), k=4, seed=seed, prints=prints[learnt])
        kept = learnt[quarter < QUARTERS[name]]
    elif name.endswith((" source", " sources")):
        kept = learnt[np.isin(sources[learnt], largest[: int(name.split(maxsplit=1)[0])])]
    else:
        return table, arguments.epochs
    comparable = np.isin(labels, [*{*labels[learnt][sources[learnt] == largest[0]], arguments.outliers}])
    kept = kept[comparable[kept]]
    chosen = np.concatenate([kept, np.flatnonzero(held & comparable)])
    return table.take(np.sort(chosen)), round(arguments.epochs * comparable[learnt].sum() / len(kept))


def _add_row(row: dict[str, Any], flags: tuple[str, ...], images: pa.Table, arguments: argparse.Namespace) -> None:
    """Train a row and add it to the table, unless it is there."""
    sizes = [flag.partition("=")[2] for flag in flags if flag.startswith("--preprocess.size=")]
    row |= {"size": int(sizes[0]) if sizes else arguments.size}
    if _is_in(arguments.table, row):
        return
    name = row["row"].replace(" ", "-").replace(",", "").replace("%", "percent")
    out = arguments.out / f"{name}-{row['epochs']}x{row['size']}-{row['seed']}"
    out.mkdir(parents=True, exist_ok=True)
    pq.write_table(images, out / "data.parquet")
    subprocess.run([sys.executable, str(JOB), *_command(row, flags, out, arguments)], check=True)
    row |= _figures(out / "model")
    new = not arguments.table.exists()
    with arguments.table.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)
    print(row, flush=True)


def _command(row: dict[str, Any], flags: tuple[str, ...], out: Path, arguments: argparse.Namespace) -> list[str]:
    """Return the arguments of the training of a row; those of the recipe come last."""
    given = [flag.format(epochs=row["epochs"], squeezenet=arguments.squeezenet) for flag in flags]
    if not any(flag.startswith("--preprocess.size=") for flag in flags):
        given.append(f"--preprocess.size={row['size']}")
    places = ["--data", str(out / "data.parquet"), "--out", str(out / "model")]
    schedule = ["--epochs", str(row["epochs"]), "--refit-epochs=0", "--seed", str(row["seed"])]
    return [*places, "--outliers", arguments.outliers, *schedule, *given]


def _is_in(table: Path, key: dict[str, Any]) -> bool:
    if not table.exists():
        return False
    with table.open(newline="") as file:
        return any(all(row[name] == str(value) for name, value in key.items()) for row in csv.DictReader(file))


def _figures(model: Path) -> dict[str, Any]:
    """Return what the table says of a bundle that was measured on its validation images."""
    bundle = load_bundle(str(model))
    metrics = json.loads((model / "metrics.json").read_text())
    history = [json.loads(line) for line in (model / "history.jsonl").read_text().splitlines()]
    network, whole = bundle.network(), metrics["by_patients"]
    parts = {source: part for source, part in (metrics["sources"] or {}).items() if part["n"]}
    return {
        "parameters": count_parameters(network),
        "gflop": round(count_flops(network, bundle.manifest.preprocess.size) / 1e9, 3),
        "images_per_cpu_second": round(_images_per_cpu_second(bundle), 1),
        "training_seconds": round(sum(epoch["seconds"] for epoch in history)),
        "images": whole["n"],
        "patients": whole["groups"],
        "macro_f1": round(_score(whole), 3),
        "macro_f1_ci95": " to ".join(f"{end:.3f}" for end in whole["macro_f1_ci95"] or whole["recall_ci95"]),
        "accuracy": round(whole["accuracy"], 3),
        "ece": round(whole["ece"], 3),
        "by_source": " ".join(f"{source}={_score(part):.3f}" for source, part in parts.items()),
        "recalls": " ".join(f"{label}={part['recall']:.3f}" for label, part in whole["per_class"].items()),
    }


def _score(part: dict[str, Any]) -> float:
    """Return macro-F1, or the recall if there is one class alone."""
    return float(part["recall"] if part["macro_f1"] is None else part["macro_f1"])


def _images_per_cpu_second(bundle: Bundle, rounds: int = 5) -> float:
    """Measure forward passes of 16 frames on one core, in its own time, whatever else the machine does."""
    torch.set_num_threads(1)
    frames = noise_frames(16, bundle.manifest.preprocess.size)
    classifier = Classifier(bundle, device="cpu", batch_size=len(frames))
    seconds: list[float] = []
    for _ in range(rounds + 2):  # the first two optimise the graph
        started = time.process_time()
        classifier.answer(frames)
        seconds.append(time.process_time() - started)
    return len(frames) / min(seconds)


if __name__ == "__main__":
    main()
