"""From what is known of each file to the findings: groups of the same image, leakage, conflicts, tallies.

Everything here works on columns: nothing is opened, and nothing is kept that grows faster than the list of files.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from btray.audit import findings
from btray.data.duplicates import Numbers, Pairs, components, numbered
from btray.data.fingerprint import SAME_IMAGE
from btray.data.labelled import Labelled
from btray.data.splits import SPLIT_ORDER, group_occurrence, have_earlier_twin

_MOST_SIZES = 20


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


def group(table: pa.Table, readable: pa.Table, twins: Twins) -> pa.Table:
    """Return the files in a group of two or more: columns row, uri, split, label, group_id, grade, score.

    They ascend by group and row; groups are numbered in the order of their first files.

    Args:
        table: the labelled files.
        readable: the readable rows of `inspection.INSPECTED`, ascending by row.
        twins: which of them show the same image.
    """
    pictures = int(twins.pixels.max(initial=-1)) + 1
    of_file = components(pictures, twins.pairs)[twins.pixels]
    best = np.zeros(pictures, np.float32)
    for side in (0, 1):
        np.maximum.at(best, twins.pairs[:, side], twins.correlations)
    bytes_of = numbered(readable["byte_digest"])
    in_bytes, in_pixels, in_group = (np.bincount(ids)[ids] > 1 for ids in (bytes_of, twins.pixels, of_file))
    grade = np.select([in_bytes, in_pixels], ["same_bytes", "same_pixels"], "same_image")
    # Correlations of equal thumbnails exceed 1 by a rounding error.
    score = np.where(in_pixels, np.float32(1), np.minimum(best[twins.pixels], np.float32(1)))
    member = np.flatnonzero(in_group)
    rows = readable["row"].to_numpy()[member]
    columns = {
        "row": rows,
        "uri": table["uri"].take(rows),
        "split": effective_splits(table["split"]).take(rows),
        "label": table["label"].take(rows),
        "group_id": numbered(pa.array(of_file[member])),
        "grade": grade[member],
        "score": score[member],
    }
    return pa.table(columns).sort_by([("group_id", "ascending"), ("row", "ascending")])


def effective_splits(splits: pa.ChunkedArray) -> pa.Array:
    """Return splits as text; files with none count as train if others have one, as in training."""
    named = splits.combine_chunks()
    return named if named.null_count == len(named) else named.fill_null("train")


def summarise(
    source: str, data: Labelled, inspected: pa.Table, twins: Twins, members: pa.Table
) -> findings.AuditReport:
    """Return the content of audit.json.

    Args:
        source: URI of the data.
        data: the labelled files.
        inspected: what is known of each (`inspection.INSPECTED`), in the same order.
        twins: which of the readable ones show the same image.
        members: those in groups, as from `group`.
    """
    table = data.table
    splits, labels, patients = effective_splits(table["split"]), table["label"].combine_chunks(), table["patient_id"]
    is_readable = pc.equal(inspected["code"], "")
    readable, rejected = inspected.filter(is_readable), inspected.filter(pc.invert(is_readable))
    suspects = readable.filter(pc.not_equal(readable["not_mri"], ""))
    named = pa.table({"patient": patients, "source": table["source"], "split": splits}).filter(pc.is_valid(patients))
    per_patient = named.group_by(["source", "patient"]).aggregate([("split", "count_distinct"), ([], "count_all")])
    several = per_patient.filter(pc.greater(per_patient["split_count_distinct"], 1))
    conflicts = conflicting_groups(members)
    combinations = Counter(tuple(sorted(names)) for names in conflicts["label_distinct"].to_pylist())
    return findings.AuditReport(
        data=source,
        images=len(table),
        classes=sorted(labels.unique().to_pylist()),
        splits=_count_splits(splits, labels),
        left_out=findings.LeftOut(
            files=len(data.left_out), by_reason=dict(Counter(data.left_out.values()).most_common())
        ),
        warnings=list(data.warnings),
        unreadable=findings.Unreadable(images=len(rejected), by_code=_tally(rejected["code"])),
        duplicates=_count_duplicates(len(readable), twins, members),
        leakage=_find_leakage(splits, labels, np.asarray(is_readable), members),
        label_conflicts=findings.LabelConflicts(
            groups=len(conflicts),
            images=pc.sum(conflicts["count_all"]).as_py() or 0,
            between=[
                findings.Contradiction(labels=list(names), groups=count) for names, count in combinations.most_common()
            ],
        ),
        patients=findings.Patients(
            named=len(per_patient),
            images=len(named),
            in_several_splits=len(several),
            images_of_these=pc.sum(several["count_all"]).as_py() or 0,
        ),
        not_mri=findings.Suspects(images=len(suspects), by_reason=_tally(suspects["not_mri"])),
        files=_describe_files(readable),
        intensity=findings.Intensity(
            **{field.name: _spread(readable[field.name]) for field in fields(findings.Intensity)}
        ),
    )


def leaking_members(members: pa.Table) -> npt.NDArray[np.bool_]:
    """Return, bool [members], which files of groups have a twin in an earlier split than their own."""
    return have_earlier_twin(_ranks(members["split"]), members["group_id"].to_numpy())


def conflicting_groups(members: pa.Table) -> pa.Table:
    """Return the groups with several labels, ascending: columns group_id, label_distinct, count_all (files)."""
    groups = members.group_by("group_id").aggregate([("label", "distinct"), ([], "count_all")]).sort_by("group_id")
    return groups.filter(pc.greater(pc.list_value_length(groups["label_distinct"]), 1))


def _ranks(splits: pa.Array | pa.ChunkedArray) -> Numbers:
    """Return the place of each split in SPLIT_ORDER, -1 if it has none."""
    places = pc.index_in(splits, pa.array(SPLIT_ORDER)).fill_null(-1)
    return np.asarray(places, np.int64)


def _count_splits(splits: pa.Array, labels: pa.Array) -> dict[str, findings.SplitCounts]:
    named = splits.fill_null("all")
    by_split = {split: labels.filter(pc.equal(named, split)) for split in (*SPLIT_ORDER, "all")}
    return {
        split: findings.SplitCounts(images=len(own), by_class=dict(sorted(_tally(own).items())))
        for split, own in by_split.items()
        if len(own)
    }


def _count_duplicates(readable: int, twins: Twins, members: pa.Table) -> findings.Duplicates:
    sizes = np.bincount(members["group_id"].to_numpy())
    grades = _tally(members["grade"])
    return findings.Duplicates(
        groups=len(sizes),
        images=len(members),
        share=len(members) / readable if readable else None,
        redundant=len(members) - len(sizes),
        by_grade={name: grades.get(name, 0) for name in findings.GRADES},
        group_sizes={str(size): count for size, count in sorted(Counter(sizes.tolist()).items())},
        least_correlation=SAME_IMAGE,
        pairs_considered=twins.candidates,
        pairs_compared=twins.compared,
    )


def _find_leakage(
    splits: pa.Array, labels: pa.Array, readable: npt.NDArray[np.bool_], members: pa.Table
) -> dict[str, findings.Leakage]:
    """Count, for test and val, the readable images with a twin in an earlier split, by that split and by class."""
    ranks, member_ranks = _ranks(splits), _ranks(members["split"])
    occurs, leaks = group_occurrence(member_ranks, members["group_id"].to_numpy()), leaking_members(members)
    leakage: dict[str, findings.Leakage] = {}
    for rank in (2, 1):
        own = readable & (ranks == rank)
        earlier = [number for number in range(rank) if (ranks == number).any()]
        if not (own.any() and earlier):
            continue
        mine = member_ranks == rank
        totals, leaked = _tally(labels.filter(own)), _tally(members["label"].filter(mine & leaks))
        images, with_twin = int(own.sum()), int((mine & leaks).sum())
        leakage[SPLIT_ORDER[rank]] = findings.Leakage(
            images=images,
            with_twin=with_twin,
            share=with_twin / images,
            in_={SPLIT_ORDER[number]: int((mine & occurs[:, number]).sum()) for number in earlier},
            by_class={
                name: findings.ClassLeakage(images=total, with_twin=leaked.get(name, 0))
                for name, total in sorted(totals.items())
            },
        )
    return leakage


def _describe_files(readable: pa.Table) -> findings.Files:
    sizes = readable.group_by(["width", "height"]).aggregate([([], "count_all")])
    common = sizes.sort_by([("count_all", "descending"), ("width", "descending"), ("height", "descending")])
    return findings.Files(
        formats=_tally(readable["format"]),
        modes=_tally(readable["mode"]),
        several_frames=int(pc.sum(pc.greater(readable["frames"], 1)).as_py() or 0),
        width=_spread(readable["width"]),
        height=_spread(readable["height"]),
        different_sizes=len(sizes),
        common_sizes=[
            findings.SizeCount(width=row["width"], height=row["height"], images=row["count_all"])
            for row in common.slice(0, _MOST_SIZES).to_pylist()
        ],
    )


def _tally(values: pa.Array | pa.ChunkedArray) -> dict[str, int]:
    """Count how often each value occurs, the most frequent first."""
    return dict(Counter(sorted(values.to_pylist())).most_common())


def _spread(values: pa.ChunkedArray) -> findings.Spread | None:
    """Return how values spread, rounded to 4 decimals; None if there is none."""
    if not len(values):
        return None
    names = [field.name for field in fields(findings.Spread)]
    quantiles = np.quantile(values.to_numpy(), (0, 0.05, 0.5, 0.95, 1)).round(4).tolist()
    return findings.Spread(**dict(zip(names, quantiles, strict=True)))
