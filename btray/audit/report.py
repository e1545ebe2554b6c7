"""The audit's page for people: what was found, with the pictures of duplicate groups side by side."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from btray.audit.analysis import conflicting_groups, leaking_members
from btray.audit.findings import GRADES, AuditReport
from btray.audit.inspection import NOT_MRI, contents
from btray.data.fingerprint import reduced, representative
from btray.data.scans import ScanLimits, ScanRejected, decode
from btray.data.splits import SPLIT_ORDER
from btray.reports.page import data_uri, render_page
from btray.storage import StorageError
from btray.storage.read_many import ReadResult, read_many

_SIDE = 132  # pixels; the edge of a picture on the page
# How many the page shows: members of a group, strays, and names in the table of unreadable files.
_MOST_MEMBERS = 6
_MOST_STRAYS = 24
_MOST_NAMED = 20


@dataclass(frozen=True)
class Picture:
    """A picture on the page, with its name and the lines below it."""

    source: str
    """A data URI, or empty if the file cannot be read any more."""
    name: str
    lines: Sequence[str]
    marked: bool = False


@dataclass(frozen=True)
class Group:
    """A duplicate group on the page."""

    number: int
    size: int
    marks: Sequence[str]
    pictures: Sequence[Picture]


def render_audit(
    report: AuditReport, table: pa.Table, inspected: pa.Table, members: pa.Table, *, most_groups: int
) -> str:
    """Return one self-contained HTML page. Reads the files whose pictures are shown.

    Args:
        report: the content of audit.json.
        table: the labelled files.
        inspected: what is known of each (`inspection.INSPECTED`).
        members: those in groups, as from `analysis.group`.
        most_groups: how many groups are shown at most.
    """
    suspects = inspected.filter(pc.greater(pc.utf8_length(inspected["not_mri"]), 0)).slice(0, _MOST_STRAYS)
    rejected = inspected.filter(pc.not_equal(inspected["code"], "")).slice(0, _MOST_NAMED)
    unreadable = table["uri"].take(rejected["row"]), rejected["code"], rejected["message"]
    lines = [[reason] for reason in suspects["not_mri"].to_pylist()]
    return render_page(
        "btray.audit",
        "report.html",
        title="Audit of a labelled data set",
        audit=report,
        grades=GRADES,
        split_order=SPLIT_ORDER,
        groups=_groups(members, most_groups),
        strays=_pictures(table["uri"].take(suspects["row"]).to_pylist(), lines, [False] * len(lines)),
        stray_rules=NOT_MRI,
        rejected=list(zip(*(column.to_pylist() for column in unreadable), strict=True)),
    )


def _groups(members: pa.Table, most: int) -> list[Group]:
    """Return at most `most` duplicate groups, those with conflicting labels first, then leaks."""
    ids, leaking = members["group_id"].to_numpy(), leaking_members(members)
    numbers = np.unique(ids)  # groups number 0, 1, ...
    conflicting = np.isin(numbers, conflicting_groups(members)["group_id"].to_numpy())
    leaky = np.isin(numbers, ids[leaking])
    columns = members.append_column("leaking", pa.array(leaking))
    shown = []
    for number in np.argsort(-(2 * conflicting + leaky.astype(int)), kind="stable")[:most].tolist():
        part = columns.filter(ids == number)
        kept = part.take(_telling(part["leaking"].to_numpy())).to_pylist()
        lines = [
            [" · ".join(filter(None, (file["split"], file["label"]))), f"{file['grade']} · {file['score']:.3f}"]
            for file in kept
        ]
        pictures = _pictures([file["uri"] for file in kept], lines, [file["leaking"] for file in kept])
        marks = ["labels differ"] * bool(conflicting[number]) + ["leak"] * bool(leaky[number])
        shown.append(Group(number, len(part), marks, pictures))
    return shown


def _telling(leaking: npt.NDArray[np.bool_]) -> list[int]:
    """Return the positions of the members of a group that are shown: of a large group, both sides of a leak."""
    leaks, others = np.flatnonzero(leaking).tolist(), np.flatnonzero(~leaking).tolist()
    kept = leaks[: max(_MOST_MEMBERS // 2, _MOST_MEMBERS - len(others))]
    return sorted([*kept, *others[: _MOST_MEMBERS - len(kept)]])


def _pictures(uris: Sequence[str], lines: Sequence[Sequence[str]], marked: Sequence[bool]) -> list[Picture]:
    """Read files and return their pictures, each named by the file and its folder."""
    scans = read_many(uris, max_bytes=ScanLimits.max_bytes)
    return [
        Picture(_thumbnail(data), "/".join(uri.rsplit("/", 2)[-2:]), below, mark)
        for uri, data, below, mark in zip(uris, scans, lines, marked, strict=True)
    ]


def _thumbnail(data: ReadResult) -> str:
    """Return a small picture as a data URI; empty if the file cannot be read any more, or may name the patient."""
    try:
        scan = decode(contents(data))
    except (StorageError, ScanRejected):
        return ""
    if any(info.burned_in for info in scan.slices or ()):
        return ""
    picture = Image.fromarray(reduced(representative(scan.frames)))
    picture.thumbnail((_SIDE, _SIDE))
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=80)
    return data_uri(stream.getvalue(), "jpeg")
