"""The table of studies: one row for each series and study, made of the current rows of a model's frames.

It consists of a few files whose names never change, each with the studies of one share of the UIDs, so that replacing
one by one put keeps every study in the table exactly once, whenever the job is killed. Made anew, a row is the same
unless its frames changed; so a run that is resumed, or repeated, ends with the same table.
"""

from __future__ import annotations

import io
import tempfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from btray import storage
from btray.bulk.report import StudyCounts
from btray.bulk.table import table_files
from btray.model.studies import FrameAnswers, Reader, Verdict, judge_series, judge_study
from btray.storage import FileInfo
from btray.storage.parquet import read_undamaged
from btray.storage.read_many import in_threads

SCHEMA = pa.schema(
    [
        pa.field("level", pa.string(), nullable=False),
        pa.field("study_uid", pa.string()),
        pa.field("series_uid", pa.string()),
        pa.field("rule", pa.string(), nullable=False),
        *(
            pa.field(name, pa.int32(), nullable=False)
            for name in ("frames", "rejected", "abstained_frames", "ood_frames")
        ),
        pa.field("label", pa.string()),
        pa.field("confidence", pa.float32()),
        pa.field("probabilities", pa.map_(pa.string(), pa.float32())),
        pa.field("agreement", pa.float32()),
        pa.field("abstained", pa.bool_(), nullable=False),
        pa.field(
            "key_frames",
            pa.list_(
                pa.struct(
                    [
                        ("uri", pa.string()),
                        ("frame", pa.int32()),
                        ("series_uid", pa.string()),
                        ("instance_uid", pa.string()),
                        ("position_mm", pa.float32()),
                        ("tumor", pa.float32()),
                    ]
                )
            ),
            nullable=False,
        ),
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("classified_at", pa.timestamp("us", "UTC"), nullable=False),
    ]
)
"""Columns of the files, in their order; `model_id` stands in their paths. `series_uid` is null in the row of a study;
`run_id` and `classified_at` are those of its latest frame."""

_FRAME = (
    "uri", "etag", "frame", "study_uid", "series_uid", "instance_uid", "position_mm", "status", "error_code",
    "probabilities", "abstained", "out_of_distribution", "run_id", "classified_at",
)  # fmt: skip
_SHOWN = ("uri", "frame", "series_uid", "instance_uid", "position_mm")
_STATE = "_state.json"
_FILES = 16
_PILES = 16  # of each file: what is held in memory at a time
_SMALL = 4 << 20  # bytes: files below it are read whole, with one request

Codes = npt.NDArray[np.int64]


def update_studies(output: str, model_id: str, studies: str, reader: Reader, *, any_new: bool) -> StudyCounts | None:
    """Bring the table `studies` up to date with the frames of a model in the results table `output`.

    Nothing is read if the results table and the rule are those of the last time; nor if there was no last time and the
    run has found no series (`any_new`). Returns None if there is no table of studies then. Needs the lease of `output`.
    """
    folder = storage.join(studies, f"model_id={model_id}")
    state_uri = storage.join(studies, "_" + model_id, _STATE)
    state = storage.read_json(state_uri, missing_ok=True)
    if state is None and not any_new:
        return None
    files = list(table_files(storage.join(output, f"model_id={model_id}")))
    source = {"files": len(files), "newest": max((info.uri for info in files), default=""), "rule": str(reader)}
    if state is None:
        storage.write_json(state_uri, {"source": None})  # if this fails half-way, the next run makes good for it
    if state is None or state["source"] != source or any_new:
        counts = _make_table(files, folder, reader)
        state = {"source": source, "counts": counts.model_dump()}
        storage.write_json(state_uri, state)
    return StudyCounts(**state["counts"])


def read_studies(studies: str, model_id: str, uids: Collection[str]) -> dict[str, dict[str, Any]]:
    """Return the rows of some studies by their UIDs."""
    folder = storage.join(studies, f"model_id={model_id}")
    found: dict[str, dict[str, Any]] = {}
    for number in sorted({_pile(uid) // _PILES for uid in uids}):
        body = storage.read_bytes(storage.join(folder, _file_name(number)))
        rows = pa.parquet.read_table(pa.BufferReader(body))
        chosen = pc.and_(pc.equal(rows["level"], "study"), pc.is_in(rows["study_uid"], pa.array(list(uids))))
        found |= {row["study_uid"]: row for row in rows.filter(chosen).to_pylist()}
    return found


def erase_studies(
    studies: str, uids: Collection[str], erased: Callable[[Sequence[str]], npt.NDArray[np.bool_]], *, dry_run: bool
) -> int:
    """Remove the rows of some series and studies, and those whose key frames are of objects that were erased.

    The next run of each model makes the rows anew of the frames that are left; needs the lease of the results.

    Args:
        studies: root of the table.
        uids: of series and studies.
        erased: returns which of some URIs were erased.
        dry_run: only count.

    Returns:
        The number of rows.
    """
    count = 0
    for info in table_files(studies):
        rows = pa.parquet.read_table(pa.BufferReader(storage.read_bytes(info.uri)))
        keys = rows["key_frames"].to_pylist()
        shown = np.array([erased([frame["uri"] for frame in frames]).any() for frames in keys], bool)
        named = pa.array(list(uids), pa.string())
        gone = pc.or_(pc.is_in(rows["study_uid"], named), pc.is_in(rows["series_uid"], named)).to_numpy() | shown
        count += int(gone.sum())
        if gone.any() and not dry_run:
            folder, _, model = info.uri.rpartition("/")[0].rpartition("/model_id=")
            storage.write_json(storage.join(folder, "_" + model, _STATE), {"source": None})
            storage.write_bytes(info.uri, _file_of(rows.filter(pa.array(~gone))))
    return count


def _file_of(rows: pa.Table) -> bytes:
    body = io.BytesIO()
    pa.parquet.write_table(rows, body, compression="zstd")
    return body.getvalue()


def _make_table(files: Iterable[FileInfo], folder: str, reader: Reader) -> StudyCounts:
    series = studies = 0
    with tempfile.TemporaryDirectory() as scratch:
        _sort_into_piles(files, Path(scratch))
        there = set(storage.list_names(folder, missing_ok=True))
        for number in range(_FILES):
            rows: list[dict[str, Any]] = []
            for pile in sorted(Path(scratch).glob(f"{number:02d}-*.arrow")):
                with pa.OSFile(str(pile)) as file:
                    rows += study_rows(pa.ipc.open_stream(file).read_all(), reader)
            name = _file_name(number)
            if rows or name in there:
                storage.write_bytes(storage.join(folder, name), _file_of(pa.Table.from_pylist(rows, SCHEMA)))
            studies += sum(row["level"] == "study" for row in rows)
            series += sum(row["level"] == "series" for row in rows)
    return StudyCounts(series=series, studies=studies, rule=str(reader))


def _file_name(number: int) -> str:
    return f"studies-{number:02d}.parquet"


def _pile(uid: str) -> int:
    return zlib.crc32(uid.encode()) % (_FILES * _PILES)


# ---- the frames


def _sort_into_piles(files: Iterable[FileInfo], scratch: Path) -> None:
    """Write the rows that belong to a series or study into files of `scratch`, all rows of a study into the same."""
    writers: dict[int, Any] = {}
    try:
        for rows in _read(files):
            uids = pc.coalesce(rows["study_uid"], rows["series_uid"]).combine_chunks().dictionary_encode()
            piles = np.array([_pile(uid) for uid in uids.dictionary.to_pylist()], np.int64)[uids.indices.to_numpy()]
            for pile in np.unique(piles).tolist():
                if pile not in writers:
                    path = scratch / f"{pile // _PILES:02d}-{pile % _PILES:02d}.arrow"
                    writers[pile] = pa.ipc.new_stream(str(path), rows.schema)
                writers[pile].write_table(rows.filter(pa.array(piles == pile)))
    finally:
        for writer in writers.values():
            writer.close()


def _read(files: Iterable[FileInfo]) -> Iterator[pa.Table]:
    """Return the rows of some files of the results table that belong to a series or study."""
    return (rows for _, rows in in_threads(_read_file, files) if rows is not None and len(rows))


def _read_file(info: FileInfo) -> pa.Table | None:
    def read(file: Any) -> pa.Table | None:
        parquet = pa.parquet.ParquetFile(file, pre_buffer=False)
        if "position_mm" not in parquet.schema_arrow.names:
            return None  # written before there were UIDs
        rows = parquet.read(list(_FRAME), use_threads=False).replace_schema_metadata(None)
        return rows.filter(pc.or_(pc.is_valid(rows["study_uid"]), pc.is_valid(rows["series_uid"])))

    return read_undamaged(info.uri, read, storage.read_bytes(info.uri) if info.size < _SMALL else None)


# ---- from frames to rows


def study_rows(frames: pa.Table, reader: Reader) -> list[dict[str, Any]]:
    """Return the rows of the series and studies that some rows of the results table belong to.

    Of an object that was read several times the latest version counts, and of each of its frames the latest row. Series
    that were left out by a choice are in no row.
    """
    pile = _Pile(_current(frames), reader)
    rows: list[dict[str, Any]] = []
    for of_study in _runs(pile.study, np.arange(len(pile.frames))):
        series = [pile.answers(of_series) for of_series in _runs(pile.series, of_study)]
        uid = pile.uids["study_uid"][of_study[0]]
        if uid is not None:  # frames that name no series are one of their own in it
            rows.append(pile.row("study", of_study, judge_study(series, reader)) | {"series_uid": None})
        for of_series, answers in zip(_runs(pile.series, of_study), series, strict=True):
            if pile.uids["series_uid"][of_series[0]] is not None:
                rows.append(pile.row("series", of_series, judge_series(answers, reader)))
    return rows


def _runs(codes: Codes, positions: Codes) -> list[Codes]:
    """Cut `positions` where the code there changes; of none there is no run."""
    return [] if not len(positions) else np.split(positions, np.flatnonzero(np.diff(codes[positions])) + 1)


class _Pile:
    """Current frames, those of a study and of its series next to each other."""

    def __init__(self, frames: pa.Table, reader: Reader) -> None:
        order = [(name, "ascending") for name in ("study_uid", "series_uid", "position_mm", "uri", "frame")]
        self.frames = frames.sort_by(order)
        self.uids = {name: self.frames[name].to_pylist() for name in ("study_uid", "series_uid")}
        self.study, self.series = _codes(self.frames["study_uid"]), _codes(self.frames["series_uid"])
        self._ok = pc.equal(self.frames["status"], "ok").to_numpy()
        shares = self.frames["probabilities"].combine_chunks()
        of_classes = [pc.map_lookup(shares, pa.scalar(label), "first").fill_null(0) for label in reader.classes]
        self._probabilities = np.stack([column.to_numpy() for column in of_classes], axis=1)
        self._tumor = reader.tumor(self._probabilities)
        self._abstained = self.frames["abstained"].to_numpy()
        self._ood = self.frames["out_of_distribution"].to_numpy()
        self._rule = str(reader)
        by_time = pc.sort_indices(self.frames, [("classified_at", "ascending"), ("run_id", "ascending")])
        self._rank = np.empty(len(self.frames), np.int64)
        self._rank[by_time.to_numpy()] = np.arange(len(self.frames))

    def answers(self, positions: Codes) -> FrameAnswers:
        """Return what the model says of some frames."""
        classified = positions[self._ok[positions]]
        return FrameAnswers(
            probabilities=self._probabilities[classified],
            abstained=self._abstained[classified],
            out_of_distribution=self._ood[classified],
            rejected=len(positions) - len(classified),
        )

    def row(self, level: str, positions: Codes, verdict: Verdict) -> dict[str, Any]:
        """Return the row of a series or study that consists of the frames at `positions`."""
        key_frames = positions[self._ok[positions]][list(verdict.key_frames)]
        shown = self.frames.select(list(_SHOWN)).take(pa.array(key_frames, pa.int64())).to_pylist()
        latest = int(positions[self._rank[positions].argmax()])
        return {
            "level": level,
            **{name: uids[positions[0]] for name, uids in self.uids.items()},
            **asdict(verdict),
            "rule": self._rule,
            "probabilities": None if verdict.probabilities is None else list(verdict.probabilities.items()),
            "key_frames": [row | {"tumor": float(self._tumor[at])} for row, at in zip(shown, key_frames, strict=True)],
            **{name: self.frames[name][latest].as_py() for name in ("run_id", "classified_at")},
        }


def _current(frames: pa.Table) -> pa.Table:
    """Return the latest row of each frame of the latest version of each object."""
    frames = frames.sort_by([("classified_at", "ascending"), ("run_id", "ascending")])
    uris, etags, numbers = (_codes(frames[name]) for name in ("uri", "etag", "frame"))
    latest_etag = np.zeros(uris.max(initial=-1) + 1, np.int64)
    latest_etag[uris] = etags  # of equal ones the last counts
    chosen = np.flatnonzero(latest_etag[uris] == etags)[::-1]
    _, first = np.unique(uris[chosen] * (numbers.max(initial=0) + 1) + numbers[chosen], return_index=True)
    frames = frames.take(np.sort(chosen[first]))
    return frames.filter(pc.not_equal(pc.fill_null(frames["error_code"], ""), "not_selected"))


def _codes(column: pa.ChunkedArray) -> Codes:
    """Return a number for each value, int64 [n]: equal ones for equal values, null among them."""
    encoded = column.combine_chunks().dictionary_encode(null_encoding="encode")
    return np.asarray(encoded.indices.to_numpy(), np.int64)
