"""The audit's page for people: what was found, with the pictures of duplicate groups side by side."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from btray.audit.findings import GRADES, ORDER, conflicting_groups, effective_splits, leaking_rows
from btray.audit.inspection import NOT_MRI
from btray.data.fingerprint import reduced, representative
from btray.data.scans import ScanLimits, ScanRejected, decode
from btray.reports.page import Section, data_uri, images, percent, render_page
from btray.storage import StorageError
from btray.storage.read_many import read_many

# Edge of a picture on the page, in pixels, and how many are shown of one group, of strays, and of names in a table.
_SIDE = 132
_MOST_MEMBERS = 6
_MOST_STRAYS = 24
_MOST_NAMED = 20
_COMMON_SIZES = 8
_LEVELS = {
    "mean": "mean gray",
    "deviation": "standard deviation",
    "black": "black (1st percentile)",
    "white": "white (99th percentile)",
}

_NOTICE = (
    "This page shows pictures of the audited data. Groups are found by comparing pictures, which can err: look at them "
    "before you delete anything."
)


@dataclass(frozen=True)
class Shown:
    """A picture on the page with what is said of it."""

    source: str
    """A data URI, or empty where the file cannot be read any more."""
    name: str
    lines: Sequence[str]
    marked: bool = False


def render_audit(
    findings: Mapping[str, Any], table: pa.Table, found: pa.Table, members: pa.Table, *, most_groups: int
) -> str:
    """Return one self-contained HTML page.

    `findings` are the contents of audit.json; `table` are the labelled files, `found` (inspection.FOUND) what is known
    of them, `members` the files in groups. Reads the files whose pictures are shown, at most `most_groups` groups.
    """
    groups, left_out = _groups(table, members, most_groups)
    strays = _strays(table, found)
    return render_page(
        "btray.audit",
        "report.html",
        title="Audit of a labelled data set",
        notice=_NOTICE,
        cards=_cards(findings),
        notes=_notes(findings),
        leakage=_leakage_rows(findings["leakage"]),
        several_splits=bool(findings["leakage"]),
        groups=groups,
        left_out=left_out,
        grades=[(name, meaning, findings["duplicates"]["by_grade"][name]) for name, meaning in GRADES.items()],
        strays=strays,
        stray_rules=NOT_MRI,
        stray_count=findings["not_mri"]["images"],
        sections=_sections(findings, table, found),
        facts=_facts(findings),
        facts_title="How this was found",
    )


def _cards(findings: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(name, value, how it was computed) of each headline figure."""
    duplicates, leakage = findings["duplicates"], findings["leakage"]
    readable = findings["images"] - findings["unreadable"]["images"]
    cards = [
        (f"Leakage into {split}", percent(entry["share"]),
         f"{entry['with_twin']} of {images(entry['images'])} have a twin in {' or '.join(entry['in'])}")
        for split, entry in leakage.items()
    ]  # fmt: skip
    conflicts = findings["label_conflicts"]
    twins = f"of {readable} readable ones, in {duplicates['groups']} groups"
    contradicting = f"groups of one image with several labels, {images(conflicts['images'])} in all"
    return [
        ("Images", str(findings["images"]), f"{readable} could be read, in {len(findings['classes'])} classes"),
        *cards,
        ("In duplicate groups", str(duplicates["images"]), twins),
        ("Label conflicts", str(conflicts["groups"]), contradicting),
        ("Probably not MRI", str(findings["not_mri"]["images"]), f"of {images(readable)}, by simple rules given below"),
        ("Unreadable", str(findings["unreadable"]["images"]), f"of {findings['images']} files"),
    ]


def _notes(findings: Mapping[str, Any]) -> list[str]:
    notes = []
    for split, entry in findings["leakage"].items():
        if entry["with_twin"]:
            notes.append(
                f"{entry['with_twin']} of {entry['images']} {split} images ({percent(entry['share'])}) show an image "
                f"that is also in {' or '.join(entry['in'])}: accuracy on this split partly measures memory."
            )
    if not findings["leakage"]:
        notes.append("The data have no two splits: leakage between splits was not looked for.")
    patients = findings["patients"]
    if patients["in_several_splits"]:
        notes.append(
            f"{patients['in_several_splits']} of {patients['named']} patients have images in several splits "
            f"({images(patients['images_of_these'])} in all)."
        )
    if not patients["named"]:
        notes.append(
            "No patients are named: slices of one patient may lie in several splits, which nobody can see here."
        )
    conflicts = findings["label_conflicts"]["groups"]
    if conflicts:
        notes.append(f"{conflicts} groups of the same image have several labels, of which one at most is right.")
    return notes


def _leakage_rows(leakage: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for split, entry in leakage.items():
        inside = "; ".join(f"{count} in {name}" for name, count in entry["in"].items())
        rows.append(
            [f"{split}, all classes", str(entry["images"]), f"{entry['with_twin']} ({inside})", percent(entry["share"])]
        )
        rows += [
            [f"{split}, {label}", str(own["images"]), str(own["with_twin"]), percent(own["with_twin"] / own["images"])]
            for label, own in entry["by_class"].items()
        ]
    return rows


def _groups(table: pa.Table, members: pa.Table, most: int) -> tuple[list[dict[str, Any]], int]:
    """What is shown of duplicate groups, conflicts and leaks first, and how many groups are not shown."""
    ids = members["group_id"].to_numpy()
    count = int(ids.max(initial=-1)) + 1
    conflicting = np.isin(np.arange(count), sorted(conflicting_groups(table, members)))
    leaking = leaking_rows(table, members)
    leaky = np.isin(np.arange(count), ids[leaking])
    chosen = np.argsort(-(2 * conflicting + leaky.astype(int)), kind="stable")[:most]
    starts = np.searchsorted(ids, np.arange(count + 1))
    columns = members.append_column("leaking", pa.array(leaking)).append_column(
        "split", effective_splits(table["split"]).take(members["row"].combine_chunks())
    )
    shown = []
    for number in chosen.tolist():
        group = columns.slice(starts[number], starts[number + 1] - starts[number])
        kept = _telling(group["leaking"].to_numpy())
        shown.append(
            {
                "number": number,
                "size": len(group),
                "marks": ["labels differ"] * bool(conflicting[number]) + ["leak"] * bool(leaky[number]),
                "pictures": _members(table, group.take(kept)),
                "hidden": len(group) - len(kept),
            }
        )
    return shown, count - len(shown)


def _telling(leaking: npt.NDArray[np.bool_]) -> list[int]:
    """The members of a group that are shown, as positions: of a large one, both sides of a leak."""
    leaks, others = np.flatnonzero(leaking).tolist(), np.flatnonzero(~leaking).tolist()
    kept = leaks[: max(_MOST_MEMBERS // 2, _MOST_MEMBERS - len(others))]
    return sorted([*kept, *others[: _MOST_MEMBERS - len(kept)]])


def _members(table: pa.Table, group: pa.Table) -> list[Shown]:
    files = table.take(group["row"])
    pictures = _pictures(files["uri"].to_pylist())
    return [
        Shown(
            source,
            _short(uri),
            [
                f"{member['split']} · {label}" if member["split"] else label,
                f"{member['grade']} · {member['score']:.3f}",
            ],
            member["leaking"],
        )
        for (uri, source), label, member in zip(pictures, files["label"].to_pylist(), group.to_pylist(), strict=True)
    ]


def _strays(table: pa.Table, found: pa.Table) -> list[Shown]:
    suspects = found.filter(pc.greater(pc.utf8_length(found["not_mri"]), 0)).slice(0, _MOST_STRAYS)
    pictures = _pictures(table["uri"].take(suspects["row"]).to_pylist())
    return [
        Shown(source, _short(uri), [reason])
        for (uri, source), reason in zip(pictures, suspects["not_mri"].to_pylist(), strict=True)
    ]


def _short(uri: str) -> str:
    """The file and its folder."""
    return "/".join(uri.rsplit("/", 2)[-2:])


def _pictures(uris: Sequence[str]) -> list[tuple[str, str]]:
    """(URI, data URI of a small picture) of each file."""
    limits = ScanLimits()
    return [
        (uri, "" if isinstance(data, StorageError) else _thumbnail(data, limits))
        for uri, data in zip(uris, read_many(uris, max_bytes=limits.max_bytes), strict=True)
    ]


def _thumbnail(data: bytes, limits: ScanLimits) -> str:
    try:
        frame = reduced(representative(decode(data, limits=limits).frames))
    except ScanRejected:
        return ""
    picture = Image.fromarray(frame)
    picture.thumbnail((_SIDE, _SIDE))
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=80)
    return data_uri(stream.getvalue(), "jpeg")


def _sections(findings: Mapping[str, Any], table: pa.Table, found: pa.Table) -> list[Section]:
    return [
        *([_conflict_section(findings["label_conflicts"])] if findings["label_conflicts"]["groups"] else []),
        _balance_section(findings["splits"], findings["classes"]),
        *_file_sections(findings),
        *([_unreadable_section(findings, table, found)] if findings["unreadable"]["images"] else []),
    ]


def _conflict_section(conflicts: Mapping[str, Any]) -> Section:
    return Section(
        title="Labels that contradict each other",
        text=f"{conflicts['groups']} groups, {images(conflicts['images'])}: one image stands under several labels.",
        columns=("labels", "groups"),
        rows=[[" / ".join(entry["labels"]), str(entry["groups"])] for entry in conflicts["between"]],
        numbers=True,
    )


def _balance_section(splits: Mapping[str, Any], classes: Sequence[str]) -> Section:
    rows = []
    for name in classes:
        counts = [entry["by_class"].get(name, 0) for entry in splits.values()]
        rows.append(
            [
                name,
                *(
                    f"{count} ({percent(count / entry['images'])})"
                    for count, entry in zip(counts, splits.values(), strict=True)
                ),
            ]
        )
    rows.append(["all", *(str(entry["images"]) for entry in splits.values())])
    return Section(
        title="Class balance",
        text="Files as listed, unreadable ones too; in brackets the share of the split.",
        columns=("class", *splits),
        rows=rows,
        numbers=True,
    )


def _file_sections(findings: Mapping[str, Any]) -> list[Section]:
    files, readable = findings["files"], findings["images"] - findings["unreadable"]["images"]
    if not readable:
        return []
    kinds = {f"format {name}": count for name, count in files["formats"].items()}
    kinds |= {f"pixels stored as {name}": count for name, count in files["modes"].items()}
    common = files["common_sizes"][:_COMMON_SIZES]
    kinds |= {f"{size['width']} x {size['height']} pixels": size["images"] for size in common}
    kinds["more than one frame"] = files["several_frames"]
    pixels = {f"{name}, pixels": files[name] for name in ("width", "height")}
    rows = [[title, *(f"{value:g}" for value in spread.values())] for title, spread in pixels.items()]
    rows += [
        [title, *(f"{value:.3f}" for value in findings["intensity"][name].values())] for name, title in _LEVELS.items()
    ]
    return [
        Section(
            title="Kinds of files",
            text=f"Over {images(readable)}; {files['different_sizes']} different sizes, the most frequent are shown.",
            columns=("what", "images"),
            rows=[[name, str(count)] for name, count in kinds.items()],
            numbers=True,
        ),
        Section(
            title="Sizes and gray levels",
            text=f"Over {images(readable)}. Gray levels are shares of full white, taken of each image (of the middle "
            "frame where there are several); the columns say how these figures spread over the images.",
            columns=("figure", "least", "5 % below", "median", "5 % above", "largest"),
            rows=rows,
            numbers=True,
        ),
    ]


def _unreadable_section(findings: Mapping[str, Any], table: pa.Table, found: pa.Table) -> Section:
    rejected = found.filter(pc.not_equal(found["code"], "")).slice(0, _MOST_NAMED).to_pylist()
    return Section(
        title="Files that cannot be read",
        text=f"{len(rejected)} of {findings['unreadable']['images']}; all are in unreadable.csv.",
        columns=("file", "code", "what was found"),
        rows=[[table["uri"][entry["row"]].as_py(), entry["code"], entry["message"]] for entry in rejected],
    )


def _facts(findings: Mapping[str, Any]) -> dict[str, str]:
    duplicates = findings["duplicates"]
    return {
        "Data": findings["data"],
        "Same image": "Two gray thumbnails of 48 x 48 pixels, of the whole picture, of its bright part, or of that "
        f"inside uniform borders, correlate by at least {duplicates['least_correlation']} in the best of 8 "
        "orientations. A group joins what is linked by such pairs, also through others.",
        "Search": f"Fingerprints were near enough in {duplicates['pairs_considered']} pairs of different pictures; "
        f"{duplicates['pairs_compared']} of these were compared, those that join groups, nearest first.",
        "Twin": f"Another member of the same group. A leak is a twin in an earlier split ({', '.join(ORDER)}); files "
        "with no split count as train where others have one.",
        "Redundant images": f"{duplicates['redundant']}: what would go if one of each group were kept.",
        "Not seen": "Neighbouring slices of one patient are different images and no duplicates; only patient "
        "identifiers tell them. Larger cuts, strong changes of contrast and slight rotations are not found either.",
    }
