"""The findings of an audit: the types that `audit.json` is written from, and what `--fail-on` may name."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from btray.data.fingerprint import SAME_IMAGE

GRADES = {
    "same_bytes": "another file of the group is this one, byte by byte",
    "same_pixels": "another file decodes to the same gray pixels, encoded anew or stored in colour",
    "same_image": f"another file's 48 x 48 gray thumbnail correlates with this one's by at least {SAME_IMAGE}: "
    "rescaled, compressed anew, mirrored, turned by 90 degrees, or slightly cropped or brightened",
}
"""How close a file is to the closest other one of its group; the first that holds counts."""


@dataclass(frozen=True, kw_only=True)
class SplitCounts:
    """Files of a split as listed, unreadable ones too."""

    images: int
    by_class: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Unreadable:
    """Files that could not be read."""

    images: int
    by_code: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """Files of the source that are not audited, no images or in no class folder."""

    files: int
    by_reason: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """Readable files in groups of the same image, and what finding them took."""

    groups: int
    images: int
    share: float | None
    """Of the readable files; None if there is none."""
    redundant: int
    """Files that would go if one of each group were kept."""
    by_grade: dict[str, int]
    group_sizes: dict[str, int]
    """Groups by the number of their files."""
    least_correlation: float
    """Correlation of thumbnails from which two pictures are the same image."""
    pairs_considered: int
    """Pairs of different pictures whose fingerprints were near enough to be worth a comparison."""
    pairs_compared: int


@dataclass(frozen=True, kw_only=True)
class ClassLeakage:
    """Readable images of a class in a split, and those with a twin in an earlier split."""

    images: int
    with_twin: int


@dataclass(frozen=True, kw_only=True)
class Leakage(ClassLeakage):
    """Readable images of a split, and those with a twin in an earlier split."""

    share: float
    in_: dict[str, int]
    """Images with a twin in each earlier split; one image may count in several."""
    by_class: dict[str, ClassLeakage]


@dataclass(frozen=True, kw_only=True)
class Contradiction:
    """A set of labels that groups of the same image have, and how many groups have it."""

    labels: list[str]
    groups: int


@dataclass(frozen=True, kw_only=True)
class LabelConflicts:
    """Groups of the same image with several labels, and the files in them."""

    groups: int
    images: int
    between: list[Contradiction]


@dataclass(frozen=True, kw_only=True)
class Patients:
    """Named patients, their images, and the patients that are in several splits, with their images."""

    named: int
    images: int
    in_several_splits: int
    images_of_these: int


@dataclass(frozen=True, kw_only=True)
class Suspects:
    """Readable files that are probably no MRI slices, by the first rule of `inspection.NOT_MRI` that holds."""

    images: int
    by_reason: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How a figure spreads over the readable files: least, 5th percentile, median, 95th percentile, largest."""

    min: float
    p5: float
    median: float
    p95: float
    max: float


@dataclass(frozen=True, kw_only=True)
class SizeCount:
    """Readable files of one size in pixels."""

    width: int
    height: int
    images: int


@dataclass(frozen=True, kw_only=True)
class Files:
    """Readable files by format, mode of their pixels, and size; the spreads are None if there is none."""

    formats: dict[str, int]
    modes: dict[str, int]
    several_frames: int
    width: Spread | None
    height: Spread | None
    different_sizes: int
    common_sizes: list[SizeCount]


@dataclass(frozen=True, kw_only=True)
class Intensity:
    """Gray levels as shares of full white; see `inspection.gray_levels`."""

    mean: Spread | None
    deviation: Spread | None
    black: Spread | None
    white: Spread | None


@dataclass(frozen=True, kw_only=True)
class AuditReport:
    """The content of `audit.json`; docs/audit.md explains its fields."""

    data: str
    images: int
    classes: list[str]
    splits: dict[str, SplitCounts]
    """By split; "all" if no file names one."""
    left_out: LeftOut
    warnings: list[str]
    """What is probably not meant so, folders that look like no class say, and what to do about it."""
    unreadable: Unreadable
    duplicates: Duplicates
    leakage: dict[str, Leakage]
    """Of the test and the val split; empty without two splits."""
    label_conflicts: LabelConflicts
    patients: Patients
    not_mri: Suspects
    files: Files
    intensity: Intensity
    format_version: int = 1
    """Rises when a key changes its meaning or goes."""

    def to_json(self) -> bytes:
        """Return `audit.json`, strict JSON; of file names that are not UTF-8 it has "?" for the bytes that are not."""
        # "in" is a key of the file, but cannot be an attribute.
        record = asdict(self, dict_factory=lambda items: {key.rstrip("_"): value for key, value in items})
        return json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")


def findings_present(report: AuditReport) -> dict[str, str]:
    """Return the findings that `--fail-on` may name and that are there, each with what was found and how often."""
    leaks = [
        f"{leak.with_twin} of {leak.images} {split} images have a twin in {' or '.join(leak.in_)}"
        for split, leak in report.leakage.items()
        if leak.with_twin
    ]
    conflicts, patients, duplicates = report.label_conflicts, report.patients, report.duplicates
    counted = {
        "conflict": (conflicts.groups, "groups of the same image have several labels"),
        "patient": (patients.in_several_splits, f"of {patients.named} patients are in several splits"),
        "duplicate": (duplicates.images, f"images are in {duplicates.groups} groups of the same image"),
        "not_mri": (report.not_mri.images, "images are probably no MRI slices"),
        "unreadable": (report.unreadable.images, f"of {report.images} files cannot be read"),
    }
    present = {"leak": " and ".join(leaks)} if leaks else {}
    return present | {name: f"{count} {message}" for name, (count, message) in counted.items() if count}
