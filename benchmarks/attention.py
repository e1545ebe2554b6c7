"""Measure what a model looks at, source by source: Grad-CAM, occlusion, and a probe that names the source.

python benchmarks/attention.py --model brain-mri --data both --out runs/attention [--split val] [--before BUNDLE]

`both` is what `jobs/acquire.py` merged. Writes `attention.json` and `attention.md`; less than three minutes on two
cores. No picture is written.

Grad-CAM's heat is shared out among three parts of the frame: the ground around the head, the rim of the head (its outer
tenth, skull and scalp, or cortex where the skull was taken off) and what lies inside. Occlusion covers one patch of the
frame after the other, as large as a cell of the last feature map, with the mean gray of the head, and measures by how
much the probability of the answer falls. The probe is a logistic regression that names the source from the pooled
features that the last layer sees, on patients that it has not seen; chance is 1 / number of sources. Sources differ in
their classes, so it is asked within single classes too. `before` are the same network with ImageNet's weights, other
bundles, and the frame itself, shrunk.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from PIL import Image
from scipy import ndimage
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from btray.data.fingerprint import fingerprint_of, unpack
from btray.data.frames import Rejection
from btray.data.labelled import read_labelled
from btray.data.preprocess import to_tensor
from btray.data.splits import group_rows
from btray.explain import heat_maps
from btray.model.classifier import Classifier
from btray.model.network import Network, build_network, load_matching
from btray.training.config import IMAGENET
from btray.training.pretrained import read_initial_weights

Frames = npt.NDArray[np.uint8]
PARTS = ("ground", "rim", "inside")
FOLDS = 3
SHRUNK = 12
"""Edge of the shrunk frame that the probe is given as it is: 144 numbers, no fewer than a network's features."""
# Gray levels above this belong to the head, whose frame is stretched to 0 to 255.
_HEAD_ABOVE = 20
_RIM = 0.1  # of the head's shorter side
_FEWEST = 30  # images of a source, within a class, to ask for it


def main() -> None:
    """Measure, and write the JSON object and the Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a bundle, or the name of the shipped one")
    parser.add_argument("--data", required=True, help="labelled images whose manifest names sources")
    parser.add_argument("--split", help="look at the images of this split alone, such as val or test")
    parser.add_argument("--before", nargs="*", default=[], help="bundles that the probe is tried on too")
    parser.add_argument("--out", required=True, type=Path, help="folder")
    parser.add_argument("--images", type=int, default=100, help="most hits, and misses, of a source for Grad-CAM")
    parser.add_argument("--occluded", type=int, default=20, help="most of these for occlusion")
    parser.add_argument("--probed", type=int, default=400, help="most images of a source for the probe")
    arguments = parser.parse_args()
    classifier = Classifier.load(arguments.model, device="cpu")
    table = read_labelled(arguments.data)
    known = np.isin(np.array(table["label"].to_pylist(), object), list(classifier.classes))
    table = table.filter(pa.array(known & np.array([bool(source) for source in table["source"].to_pylist()])))
    looked_at = table if arguments.split is None else table.filter(pa.array(_column(table, "split") == arguments.split))
    seen = _read(_sample(looked_at, 4 * arguments.images), classifier)
    report = {
        "model": classifier.model_id,
        "split": arguments.split,
        "looks_at": list(_looks(classifier, *seen, arguments.images, arguments.occluded)),
        "source_probe": list(
            _probe(classifier, arguments.before, *_read(_sample(table, arguments.probed), classifier))
        ),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "attention.json").write_text(json.dumps(report, indent=2) + "\n")
    (arguments.out / "attention.md").write_text(_markdown(report))
    print(_markdown(report))


def _column(table: pa.Table, name: str) -> npt.NDArray[np.object_]:
    return np.array(table[name].to_pylist(), object)


def _sample(table: pa.Table, most: int) -> pa.Table:
    """Return up to `most` images of each source, drawn at random."""
    order, sources = np.random.default_rng(0).permutation(len(table)), _column(table, "source")
    chosen = [order[sources[order] == source][:most] for source in np.unique(sources)]
    return table.take(np.sort(np.concatenate(chosen)))


def _read(table: pa.Table, classifier: Classifier) -> tuple[pa.Table, Frames, Any]:
    """Return the rows that can be read, their first frames [n, size, size], and the fingerprints of their scans."""
    scans = enumerate(classifier.source.scans(table["uri"].to_pylist()))
    good = {number: scan for number, scan in scans if not isinstance(scan, Rejection)}
    frames = np.stack([classifier.source.frames_of(scan)[0] for scan in good.values()])
    return table.take([*good]), frames, unpack([fingerprint_of(scan.frames) for scan in good.values()])


# ---- Grad-CAM and occlusion


def _looks(
    classifier: Classifier, table: pa.Table, frames: Frames, _: Any, images: int, occluded: int
) -> Iterator[dict[str, Any]]:
    """Yield what is measured on the hits and on the misses of each source."""
    probabilities = _probabilities(classifier, frames)
    answers = np.array(classifier.classes, object)[probabilities.argmax(1)]
    hit, sources = answers == _column(table, "label"), _column(table, "source")
    for source in np.unique(sources):
        for outcome in (True, False):
            rows = np.flatnonzero((sources == source) & (hit == outcome))[:images]
            if not len(rows):
                continue
            heat = heat_maps(classifier, frames[rows])
            parts = np.stack([_parts(frame) for frame in frames[rows]])
            some = min(occluded, len(rows))
            yield {
                "source": source,
                "answer": "hit" if outcome else "miss",
                "images": len(rows),
                "heat": _shares(heat, parts),
                "area": _shares(np.ones_like(heat), parts),
                "occluded_images": some,
                **_occlusion(classifier, frames[rows[:some]], heat[:some], parts[:some]),
            }


def _probabilities(classifier: Classifier, frames: Frames) -> npt.NDArray[np.float32]:
    return Classifier.calibrated(classifier.answer(frames).logits, classifier.manifest.calibration.temperature)


def _parts(frame: Frames) -> npt.NDArray[np.int64]:
    """Number the pixels of a frame by the part of PARTS that they belong to."""
    labelled, _ = ndimage.label(ndimage.binary_opening(frame > _HEAD_ABOVE, iterations=2))
    sizes = np.bincount(labelled.ravel())
    sizes[0] = 0
    head = ndimage.binary_fill_holes(labelled == sizes.argmax()) if sizes.any() else np.ones(frame.shape, bool)
    depth = ndimage.distance_transform_edt(np.pad(head, 1))[1:-1, 1:-1]
    shorter = min(np.count_nonzero(head.any(axis)) for axis in (0, 1))
    return head.astype(np.int64) + (depth > _RIM * shorter)


def _shares(heat: npt.NDArray[np.floating], parts: npt.NDArray[np.int64]) -> dict[str, float]:
    """Return by part the share of the heat, in the mean over the images that have any."""
    totals = np.stack([np.where(parts == number, heat, 0).sum((1, 2)) for number in range(len(PARTS))], 1)
    shares = totals[totals.sum(1) > 0]
    means = (shares / shares.sum(1, keepdims=True)).mean(0)
    return {part: round(float(mean), 3) for part, mean in zip(PARTS, means, strict=True)}


def _occlusion(
    classifier: Classifier, frames: Frames, heat: npt.NDArray[np.float32], parts: npt.NDArray[np.int64]
) -> dict[str, Any]:
    """Cover each patch of each frame; compare where the answer's probability falls with Grad-CAM's heat."""
    with torch.inference_mode():
        grid = classifier.network.feature_map(to_tensor(torch.from_numpy(frames[:1]))).shape[-1]
    edges = np.linspace(0, frames.shape[1], grid + 1).astype(int)
    cells = [np.s_[top:bottom, left:right] for top, bottom in _pairs(edges) for left, right in _pairs(edges)]
    largest, agreement, inside, hottest_changes, changes = [], [], [], [], []
    for frame, warm, part in zip(frames, heat, parts, strict=True):
        covered = np.repeat(frame[None], len(cells) + 1, 0)
        for number, cell in enumerate(cells):
            covered[number][cell] = frame[part > 0].mean()
        probabilities = _probabilities(classifier, covered)
        answer = probabilities[-1].argmax()
        drops = probabilities[-1, answer] - probabilities[:-1, answer]
        warmth = np.array([warm[cell].mean() for cell in cells])
        changed = probabilities[:-1].argmax(1) != answer
        largest.append(drops.max())
        agreement.append(_rank_correlation(drops, warmth))
        inside.append(part[cells[drops.argmax()]].mean() > 1)  # more of it is inside than on the ground
        hottest_changes.append(changed[warmth.argmax()])
        changes.append(changed.mean())
    figures = {
        "largest_drop": largest,
        "agreement": agreement,
        "largest_drop_inside": inside,
        "changed_by_hottest": hottest_changes,
        "changed_by_any": changes,
    }
    return {name: round(float(np.mean(values)), 3) for name, values in figures.items()}


def _pairs(edges: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    return list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))


def _rank_correlation(first: npt.NDArray[np.floating], second: npt.NDArray[np.floating]) -> float:
    """Return Spearman's coefficient; 0 if one of them is constant."""
    ranks = rankdata(first), rankdata(second)
    return float(np.corrcoef(*ranks)[0, 1]) if all(rank.std() for rank in ranks) else 0.0


# ---- the probe


def _probe(
    classifier: Classifier, before: list[str], table: pa.Table, frames: Frames, prints: Any
) -> Iterator[dict[str, Any]]:
    """Yield how well the source is told from several kinds of features, over all images and within classes."""
    network, config = classifier.network, classifier.manifest.network
    features = {"the model": _embeddings(network, frames)}
    if config.architecture == "mobile_cnn":
        untrained = build_network(config, len(classifier.classes)).eval()
        load_matching(untrained, read_initial_weights(IMAGENET, config, len(classifier.classes)))
        features["ImageNet's weights, before training"] = _embeddings(untrained, frames)
    for uri in before:
        other = Classifier.load(uri, device="cpu")
        (_, shown, _) = _read(table, other)
        features[f"{other.manifest.network.architecture}, {other.model_id[:8]}"] = _embeddings(other.network, shown)
    small = [np.asarray(Image.fromarray(frame).resize((SHRUNK, SHRUNK), Image.Resampling.BOX)) for frame in frames]
    features[f"the frame itself, {SHRUNK} x {SHRUNK} pixels"] = np.stack(small).reshape(len(frames), -1)
    labels, sources, groups = _column(table, "label"), _column(table, "source"), group_rows(table, prints)
    for label in ("all classes", *np.unique(labels)):
        rows = np.flatnonzero((labels == label) | (label == "all classes"))
        names, counts = np.unique(sources[rows], return_counts=True)
        asked = [
            name
            for name, count in zip(names, counts, strict=True)
            if count >= _FEWEST and len(np.unique(groups[rows][sources[rows] == name])) >= FOLDS
        ]
        rows = rows[np.isin(sources[rows], asked)]
        if len(asked) > 1:
            told = {
                name: _balanced_accuracy(values[rows], sources[rows], groups[rows]) for name, values in features.items()
            }
            yield {
                "within": label,
                "sources": asked,
                "images": len(rows),
                "chance": round(1 / len(asked), 3),
                "told": told,
            }


def _embeddings(network: Network, frames: Frames) -> npt.NDArray[np.float32]:
    """Return the pooled features before the last layer, [n, features]."""
    with torch.inference_mode():
        batches = (
            to_tensor(batch).contiguous(memory_format=torch.channels_last)
            for batch in torch.from_numpy(frames).split(32)
        )
        return np.concatenate([network.embed(network.feature_map(batch)).numpy() for batch in batches])


def _balanced_accuracy(
    features: npt.NDArray[Any], sources: npt.NDArray[np.object_], groups: npt.NDArray[np.int64]
) -> dict[str, Any]:
    """Return the mean recall over the sources, with a 95 % bootstrap interval over patients."""
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500, class_weight="balanced"))
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0)
    told = cross_val_predict(model, features, sources, groups=groups, cv=folds)
    names, source = np.unique(sources, return_inverse=True)
    group = np.unique(groups, return_inverse=True)[1]
    counts = np.zeros((2, group.max() + 1, len(names)))
    np.add.at(counts, ((told == sources).astype(int), group, source), 1)
    drawn = np.random.default_rng(0).multinomial(len(counts[0]), np.full(len(counts[0]), 1 / len(counts[0])), 500)
    missed, found = drawn @ counts
    with np.errstate(invalid="ignore"):  # not all sources are in every draw
        interval = np.nanpercentile(np.nanmean(found / (found + missed), 1), (2.5, 97.5))
    recalls = counts[1].sum(0) / counts.sum((0, 1))
    return {
        "balanced_accuracy": round(float(recalls.mean()), 3),
        "ci95": [round(float(end), 3) for end in interval],
        "recalls": dict(zip(names.tolist(), recalls.round(3).tolist(), strict=True)),
    }


def _markdown(report: dict[str, Any]) -> str:
    lines = [
        "| source | answer | images | heat on the ground (its area) | on the rim (area) | inside (area) "
        "| largest drop by a covered patch | which lies inside | agreement with Grad-CAM "
        "| answer changed by covering the hottest patch (any patch) |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in report["looks_at"]:
        heat = " | ".join(f"{row['heat'][part]:.2f} ({row['area'][part]:.2f})" for part in PARTS)
        lines.append(
            f"| {row['source']} | {row['answer']} | {row['images']} | {heat} | {row['largest_drop']:.2f} "
            f"| {row['largest_drop_inside']:.2f} | {row['agreement']:.2f} "
            f"| {row['changed_by_hottest']:.2f} ({row['changed_by_any']:.2f}) |"
        )
    kinds = list(report["source_probe"][0]["told"])
    lines += [
        "",
        f"| within | sources | images | chance | {' | '.join(kinds)} |",
        f"|---|---:|---:|---:|{'---:|' * len(kinds)}",
    ]
    for row in report["source_probe"]:
        told = " | ".join(
            "{balanced_accuracy:.2f} ({0:.2f} to {1:.2f})".format(*value["ci95"], **value)
            for value in row["told"].values()
        )
        lines.append(f"| {row['within']} | {len(row['sources'])} | {row['images']} | {row['chance']:.2f} | {told} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
