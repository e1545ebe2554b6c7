"""What an audit says of a data set, computed from what is known of each file: groups, leakage, conflicts, tallies.

Everything here works on columns: nothing is opened, and nothing is kept that grows faster than the list of files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from btray.data.duplicates import Pairs, components
from btray.data.fingerprint import SAME_IMAGE
from btray.data.splits import SPLIT_ORDER, group_occurrence, have_earlier_twin

GRADES = {
    "same_bytes": "another file of the group is this one, byte by byte",
    "same_pixels": "another file decodes to the same gray pixels, encoded anew or stored in colour",
    "same_image": f"another file's 48 x 48 gray thumbnail correlates with this one's by at least {SAME_IMAGE}: "
    "rescaled, compressed anew, mirrored, turned by 90 degrees, or slightly cropped or brightened",
}
"""How close a file is to the closest other one of its group; the first that holds counts."""
_MOST_SIZES = 20

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Twins:
    """Which pictures are the same: n different pictures, and the pairs of them that were found to show one image."""

    pixels: Numbers
    """Number of the picture of each readable file, [files], 0 to n - 1."""
    pairs: Pairs
    """Pairs of pictures with a correlation of at least SAME_IMAGE, [p, 2], enough to hold each group together."""
    correlations: npt.NDArray[np.float32]
    """Of the pairs, [p]."""
    candidates: int
    """Pairs whose fingerprints were near enough to be worth a comparison."""
    compared: int
    """Pairs that were compared, picture by picture."""


def distinct(digests: pa.ChunkedArray) -> Numbers:
    """Numbers int64 [n] from 0 on, equal for equal digests, in the order in which they first occur."""
    return np.asarray(pc.dictionary_encode(digests.combine_chunks()).indices.to_numpy(), np.int64)


def group(files: pa.Table, twins: Twins) -> pa.Table:
    """The files that are in a group of two or more: columns row, group_id, grade, score; ascending by group and row.

    `files` are the readable rows of `inspection.FOUND`, ascending by row. Groups are numbered in the order of their
    first files.
    """
    if not len(files):
        return pa.schema(
            [("row", pa.int64()), ("group_id", pa.int64()), ("grade", pa.string()), ("score", pa.float32())]
        ).empty_table()
    pictures = int(twins.pixels.max()) + 1
    of_file = components(pictures, twins.pairs)[twins.pixels]
    best = np.zeros(pictures, np.float32)
    for side in (0, 1):
        np.maximum.at(best, twins.pairs[:, side], twins.correlations)
    bytes_of = distinct(files["byte_digest"])
    in_bytes, in_pixels, in_group = (np.bincount(ids)[ids] > 1 for ids in (bytes_of, twins.pixels, of_file))
    grade = np.select([in_bytes, in_pixels], ["same_bytes", "same_pixels"], "same_image")
    score = np.where(in_pixels, np.float32(1), np.minimum(best[twins.pixels], np.float32(1)))
    member = np.flatnonzero(in_group)
    _, first, number = np.unique(of_file[member], return_index=True, return_inverse=True)
    ranked = np.argsort(np.argsort(first))[number]
    table = {"row": files["row"].to_numpy()[member], "group_id": ranked, "grade": grade[member], "score": score[member]}
    return pa.table(table).sort_by([("group_id", "ascending"), ("row", "ascending")])


def effective_splits(splits: pa.ChunkedArray) -> pa.Array:
    """Splits as text, null ones train where others are there: that is what training does with them."""
    named = splits.combine_chunks()
    return named if named.null_count == len(named) else named.fill_null("train")


def summarise(data: str, table: pa.Table, found: pa.Table, twins: Twins, members: pa.Table) -> dict[str, Any]:
    """The contents of audit.json.

    `table` is the list of labelled files, `found` (inspection.FOUND) what is known of each, in the same order;
    `members` is what `group` gives.
    """
    splits = effective_splits(table["split"])
    readable = found.filter(pc.equal(found["code"], ""))
    rejected = found.filter(pc.not_equal(found["code"], ""))
    suspects = readable.filter(pc.not_equal(readable["not_mri"], ""))
    return {
        "data": data,
        "images": len(table),
        "classes": sorted(table["label"].unique().to_pylist()),
        "splits": _class_balance(splits, table["label"]),
        "unreadable": {"images": len(rejected), "by_code": _tally(rejected["code"])},
        "duplicates": _duplicates(len(readable), twins, members),
        "leakage": _leakage(splits, table, found, members),
        "label_conflicts": _conflicts(table, members),
        "patients": _patients(splits, table["patient_id"]),
        "not_mri": {"images": len(suspects), "by_reason": _tally(suspects["not_mri"])},
        "files": _file_facts(readable),
        "intensity": {name: _quantiles(readable[name]) for name in ("mean", "deviation", "black", "white")},
    }


def crossings(findings: Mapping[str, Any]) -> dict[str, str]:
    """The findings that `--fail-on` may name and that are there, each with what and how many."""
    leaking = {split: entry for split, entry in findings["leakage"].items() if entry["with_twin"]}
    counts = {
        "leak": sum(entry["with_twin"] for entry in leaking.values()),
        "conflict": findings["label_conflicts"]["images"],
        "patient": findings["patients"]["in_several_splits"],
        "duplicate": findings["duplicates"]["images"],
        "not_mri": findings["not_mri"]["images"],
        "unreadable": findings["unreadable"]["images"],
    }
    said = {
        "leak": " and ".join(
            f"{entry['with_twin']} of {entry['images']} {split} images have a twin in {' or '.join(entry['in'])}"
            for split, entry in leaking.items()
        ),
        "conflict": f"{findings['label_conflicts']['groups']} groups of the same image have several labels",
        "patient": f"{counts['patient']} of {findings['patients']['named']} patients are in several splits",
        "duplicate": f"{counts['duplicate']} images are in {findings['duplicates']['groups']} groups of the same image",
        "not_mri": f"{counts['not_mri']} images are probably no MRI slices",
        "unreadable": f"{counts['unreadable']} of {findings['images']} files cannot be read",
    }
    return {name: said[name] for name, count in counts.items() if count}


def leaking_rows(table: pa.Table, members: pa.Table) -> npt.NDArray[np.bool_]:
    """bool [members]: whether a file of a group has a twin in an earlier split than its own."""
    ranks = _ranks(effective_splits(table["split"]))[members["row"].to_numpy()]
    return have_earlier_twin(ranks, members["group_id"].to_numpy())


def conflicting_groups(table: pa.Table, members: pa.Table) -> set[int]:
    """Numbers of the groups whose members have several labels."""
    labels = pc.dictionary_encode(table["label"].combine_chunks()).indices.to_numpy()[members["row"].to_numpy()]
    pairs = np.unique(np.stack([members["group_id"].to_numpy(), labels], 1), axis=0)
    groups, counts = np.unique(pairs[:, 0], return_counts=True)
    return set(groups[counts > 1].tolist())


def _ranks(splits: pa.Array) -> Numbers:
    """Place of each split in SPLIT_ORDER, -1 where there is none."""
    return np.asarray(pc.index_in(splits, pa.array(SPLIT_ORDER)).fill_null(-1).to_numpy(zero_copy_only=False), np.int64)


def _class_balance(splits: pa.Array, labels: pa.ChunkedArray) -> dict[str, Any]:
    counted = pa.table({"split": splits, "label": labels}).group_by(["split", "label"]).aggregate([([], "count_all")])
    by_split: dict[str, dict[str, int]] = {}
    for row in counted.sort_by([("label", "ascending")]).to_pylist():
        by_split.setdefault(row["split"] or "all", {})[row["label"]] = row["count_all"]
    return {
        split: {"images": sum(by_split[split].values()), "by_class": by_split[split]}
        for split in (*SPLIT_ORDER, "all")
        if split in by_split
    }


def _duplicates(readable: int, twins: Twins, members: pa.Table) -> dict[str, Any]:
    sizes = np.bincount(members["group_id"].to_numpy())
    grades = _tally(members["grade"])
    return {
        "groups": len(sizes),
        "images": len(members),
        "share": len(members) / readable if readable else None,
        "redundant": len(members) - len(sizes),
        "by_grade": {name: grades.get(name, 0) for name in GRADES},
        "group_sizes": {str(size): count for size, count in sorted(Counter(sizes.tolist()).items())},
        "least_correlation": SAME_IMAGE,
        "pairs_considered": twins.candidates,
        "pairs_compared": twins.compared,
    }


def _leakage(splits: pa.Array, table: pa.Table, found: pa.Table, members: pa.Table) -> dict[str, Any]:
    """For val and test: how many of their readable images have a twin in an earlier split, by that split and class."""
    rank, labels = _ranks(splits), table["label"].combine_chunks()
    readable = np.asarray(pc.equal(found["code"], "").to_numpy())
    groups = members["group_id"].to_numpy()
    rows = members["row"].to_numpy()
    occurs, leaks = group_occurrence(rank[rows], groups), have_earlier_twin(rank[rows], groups)
    leakage: dict[str, Any] = {}
    for later in (2, 1):
        own = readable & (rank == later)
        earlier = [number for number in range(later) if (rank == number).any()]
        if not (own.any() and earlier):
            continue
        mine = rank[rows] == later
        totals, leaked = _tally(labels.filter(own)), _tally(labels.take(rows[mine & leaks]))
        leakage[SPLIT_ORDER[later]] = {
            "images": int(own.sum()),
            "with_twin": int((mine & leaks).sum()),
            "share": float((mine & leaks).sum() / own.sum()),
            "in": {SPLIT_ORDER[number]: int((mine & occurs[:, number]).sum()) for number in earlier},
            "by_class": {
                name: {"images": total, "with_twin": leaked.get(name, 0)} for name, total in sorted(totals.items())
            },
        }
    return leakage


def _conflicts(table: pa.Table, members: pa.Table) -> dict[str, Any]:
    conflicting = sorted(conflicting_groups(table, members))
    inside = members.filter(pc.is_in(members["group_id"], pa.array(conflicting, pa.int64())))
    labels = table["label"].combine_chunks().take(inside["row"].combine_chunks())
    by_group: dict[int, set[str]] = {}
    for number, label in zip(inside["group_id"].to_pylist(), labels.to_pylist(), strict=True):
        by_group.setdefault(number, set()).add(label)
    combinations = Counter(tuple(sorted(names)) for names in by_group.values())
    return {
        "groups": len(conflicting),
        "images": len(inside),
        "between": [{"labels": list(names), "groups": count} for names, count in combinations.most_common()],
    }


def _patients(splits: pa.Array, patients: pa.ChunkedArray) -> dict[str, Any]:
    named = pa.table({"patient": patients, "split": splits}).filter(pc.is_valid(patients))
    per_patient = named.group_by("patient").aggregate([("split", "count_distinct"), ([], "count_all")])
    several = per_patient.filter(pc.greater(per_patient["split_count_distinct"], 1))
    return {
        "named": len(per_patient),
        "images": len(named),
        "in_several_splits": len(several),
        "images_of_these": pc.sum(several["count_all"]).as_py() or 0,
    }


def _file_facts(readable: pa.Table) -> dict[str, Any]:
    sizes = readable.group_by(["width", "height"]).aggregate([([], "count_all")])
    common = sizes.sort_by([("count_all", "descending"), ("width", "descending"), ("height", "descending")])
    return {
        "formats": _tally(readable["format"]),
        "modes": _tally(readable["mode"]),
        "several_frames": int(pc.sum(pc.greater(readable["frames"], 1)).as_py() or 0),
        "width": _quantiles(readable["width"]),
        "height": _quantiles(readable["height"]),
        "different_sizes": len(sizes),
        "common_sizes": [
            {"width": row["width"], "height": row["height"], "images": row["count_all"]}
            for row in common.slice(0, _MOST_SIZES).to_pylist()
        ],
    }


def _tally(values: pa.Array | pa.ChunkedArray) -> dict[str, int]:
    """How often each value occurs, the most frequent first."""
    counted = {entry["values"]: entry["counts"] for entry in values.value_counts().to_pylist()}
    return dict(sorted(counted.items(), key=lambda item: (-item[1], item[0])))


def _quantiles(values: pa.ChunkedArray) -> dict[str, float] | None:
    """Least, 5 %, median, 95 % and largest value; None where there is none."""
    if not len(values):
        return None
    found = np.quantile(values.to_numpy(), (0, 0.05, 0.5, 0.95, 1))
    return {
        name: round(float(value), 4) for name, value in zip(("min", "p5", "median", "p95", "max"), found, strict=True)
    }
