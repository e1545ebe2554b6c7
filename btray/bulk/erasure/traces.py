"""What an output holds of erased objects besides its rows: pictures, pages and reports, a labelled manifest."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from btray import storage
from btray.bulk.erasure.erased import ErasedObjects
from btray.bulk.erasure.rows import without_frames
from btray.bulk.explanations import FOLDER as EXPLAINED
from btray.bulk.report import ClassifiedFrame
from btray.bulk.runs import RUN, SUMMARY, folders
from btray.data.manifests import copy_rows, parts_of, read_manifest
from btray.data.packs import Pack
from btray.data.rejections import as_csv

_ELEMENT = re.compile(
    '<figure data-picture="(?P<picture>[^"]*)">.*?</figure>\n?|<section data-study="(?P<study>[^"]*)">.*?</section>\n?',
    re.DOTALL,
)
"""Of summary.html: a picture, or a study with its pictures."""


def erase_pictures(output: str, erased: ErasedObjects, *, dry_run: bool) -> int:
    """Remove pictures of `--explain`, and their lines in the files beside them; return how many there are."""
    count = 0
    with storage.suppress_missing():
        for info in storage.list_files(storage.join(output, EXPLAINED)):
            if not info.uri.endswith(".csv"):
                continue
            header, *lines = csv.reader(io.StringIO(storage.read_text(info.uri)))
            gone = erased.hold([line[0] for line in lines]).tolist()
            count += sum(gone)
            if any(gone) and not dry_run:
                folder = info.uri.rpartition("/")[0]
                pairs = list(zip(lines, gone, strict=True))
                storage.delete_many([storage.join(folder, line[-1]) for line, erase in pairs if erase])
                storage.write_bytes(info.uri, as_csv(header, [line for line, erase in pairs if not erase]))
    return count


def erase_from_reports(output: str, erased: ErasedObjects, studies: Collection[str], *, dry_run: bool) -> int:
    """Remove frames of erased objects, and `studies`, from run.json and summary.html; return how many runs show any.

    What a run keeps of its inventory goes too: it counts objects as completed whose rows go, and somebody may have them
    taken again by removing the file of hashes.
    """
    count = 0
    for folder in folders(output):
        report_uri, page_uri = storage.join(folder, RUN), storage.join(folder, SUMMARY)
        report = storage.read_json(report_uri, missing_ok=True) or {}
        frames = [
            ClassifiedFrame(**frame) for frame in (*report.get("least_certain", ()), *report.get("most_tumor", ()))
        ]
        gone = erased.hold([frame.uri for frame in frames]).tolist()
        pictures = {frame.picture_name for frame, erase in zip(frames, gone, strict=True) if erase}
        page = left = ""
        with storage.suppress_missing():
            page = storage.read_text(page_uri)
            left = _without(page, pictures, studies)
        count += any(gone) or left != page
        # The page first: without run.json nobody would know which of its pictures are meant.
        if left != page and not dry_run:
            storage.write_text(page_uri, left)
        if (report.pop("inventory", None) or any(gone)) and not dry_run:
            storage.write_json(report_uri, without_frames(report, erased))
    return count


def _without(page: str, pictures: set[str], studies: Collection[str]) -> str:
    def kept(element: re.Match[str]) -> str:
        if element["picture"] is not None:
            return "" if element["picture"] in pictures else element[0]
        inside = re.findall('data-picture="([^"]*)"', element[0])
        return "" if element["study"] in studies or not pictures.isdisjoint(inside) else element[0]

    return _ELEMENT.sub(kept, page)


def copy_manifest(source: str, pack: Pack, output: str, erased: ErasedObjects) -> None:
    """Copy the labelled manifest `source` into the pack `output`, without the rows of erased objects."""
    for part in parts_of(source):
        copy = storage.join(output, str(pack.manifest)) + part.removeprefix(source)
        gone = _erased_rows(part, pack, erased)
        if gone.any():
            copy_rows(part, (~gone).tolist(), copy)
        else:
            storage.write_bytes(copy, storage.read_bytes(part))


def erase_from_manifest(output: str, pack: Pack, erased: ErasedObjects, *, dry_run: bool) -> int:
    """Remove the rows of erased objects from a pack's copy of a labelled manifest; return how many there are."""
    count = 0
    for part in parts_of(storage.join(output, pack.manifest)) if pack.manifest else ():
        gone = _erased_rows(part, pack, erased)
        count += int(gone.sum())
        if gone.any() and not dry_run:
            copy_rows(part, (~gone).tolist(), part)
    return count


def _erased_rows(part: str, pack: Pack, erased: ErasedObjects) -> npt.NDArray[np.bool_]:
    rows = read_manifest(part, ("uri",), required=("uri",), folder=pack.root)
    return erased.hold([str(values[0]) for _, values in rows])
