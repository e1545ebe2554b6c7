"""Pack an archive of many small objects into few Parquet shards with Ray Data; run again it packs what is new.

A frame pack is made by the same run over the archive: only what an actor makes of an object's bytes differs.
"""

from __future__ import annotations

import hashlib
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from btray import storage
from btray.bulk.config import PackConfig
from btray.bulk.driver import ArchiveJob, run_archive
from btray.bulk.erasure.erased import ErasedObjects
from btray.bulk.erasure.traces import copy_manifest
from btray.bulk.listing.key_files import CLASSIFIED, RECORD, KeySource, Records, concatenated
from btray.bulk.listing.tasks import Tasks
from btray.bulk.progress import summarize_counts
from btray.bulk.report import PartTally, RunReport
from btray.bulk.runs import Run
from btray.bulk.table import RETRIED
from btray.bulk.worker import Batch, Prefetcher, Row, Seconds
from btray.bulk.worklist import PartLimits
from btray.core.errors import UserError
from btray.data import packs
from btray.data.config import PreprocessConfig
from btray.data.frames import FrameSource, Rejection
from btray.data.key_set import Keys
from btray.data.labelled import MANIFESTS, holds_labels
from btray.data.manifests import kind_of
from btray.data.preprocess import preprocessing_key
from btray.data.scans import ScanLimits
from btray.model.bundle_files import read_manifest
from btray.model.shipped import locate
from btray.storage import FileInfo, StorageError
from btray.storage.parquet import set_aside
from btray.storage.read_many import ReadResult


def pack(config: PackConfig) -> str:
    """Pack what is new in the archive and return the URI of the pack.

    An object that could not be read has a row that says why, so that readers of the pack get the same error. Raises
    UserError for unusable input, for a pack of another archive, and if another run is writing to this output,
    ThresholdExceeded above `max_rejected`, after writing.
    """
    return run_archive(PackJob(config))


class PackJob(ArchiveJob):
    """Shards of a packed archive, and at the end its description."""

    name = "pack"
    schema = packs.SCHEMA

    def __init__(self, config: PackConfig) -> None:
        """Examine input and output. Raises UserError if the input is a pack, or the output one of something else."""
        super().__init__(config, group="pack")
        self.frames_by: PreprocessConfig | None = None
        if config.frames:
            self.frames_by = read_manifest(locate(config.model)).preprocess if config.model else config.preprocess
            self.schema = packs.FRAMES_SCHEMA
            # Their frames may take ten times what the objects do, and an actor holds those of a part.
            self.part_limits = PartLimits(objects=4096, bytes=32 << 20)
        self.preprocessing = preprocessing_key(self.frames_by) if self.frames_by else ""
        if self.preprocessing:
            self.group = f"frames-{self.preprocessing}"  # a run of other frames is never resumed
        self.source = config.input
        self.damaged: list[str] = []
        names_others = kind_of(self.source) is not None or storage.is_file(self.source)
        self.root = self.source.rpartition("/")[0] if names_others else self.source
        inside = (storage.join(self.source, name) for name in MANIFESTS if self.frames_by)
        labels = (self.source, *filter(storage.exists, inside))
        # A labelled manifest within the folder is no image: of a pack of files it is a member, else it must be copied.
        self.labels = next((uri for uri in labels if holds_labels(uri)), None)
        if packs.is_pack(self.source):
            raise UserError(f"--input {self.source} is a packed archive already; give what was packed")
        if packs.is_pack(self.output):
            before, now = packs.describe_pack(self.output, unfinished=True), self._pack()
            if before.root != now.root:
                raise UserError(
                    f"--output {self.output} is a pack of {before.root}, not of {now.root}; name another output"
                )
            if before.preprocessing != now.preprocessing:
                raise UserError(
                    f"--output {self.output} is a pack of {before.content}, not of {now.content}; name another output"
                )

    def _pack(self) -> packs.Pack:
        """Return the description of the pack, with the name of the copy of the labelled manifest."""
        manifest = f"_manifest{Path(self.labels).suffix.lower()}" if self.labels else None
        return packs.Pack(self.root, manifest, self.frames_by, self.preprocessing)

    def begin(self) -> None:
        """Say what is packed here, so that nothing else is, though this run may be interrupted."""
        if not packs.is_pack(self.output):
            packs.write_description(self.output, replace(self._pack(), manifest=None), finished=False)

    def folder(self, run_date: str) -> str:
        """Return the folder of the shards."""
        return self._pack().folder

    def outcomes(self, tasks: Tasks) -> Sequence[KeySource]:
        """Return that what the pack holds is completed."""
        keys = packs.packed_keys(self.output, self._pack().folder, self.damaged)
        return [tasks.keep(records) for records in concatenated(map(_packed, keys))]

    def processor(self) -> Callable[[Run, int], PartPacker]:
        """Return what makes the packer of an actor."""
        # A labelled manifest may name what lies elsewhere, and splits go by the order of all paths.
        root = "" if self.labels == self.source else self.root
        arguments = (root, self.config.threads, self.config.patience)
        if self.frames_by:
            return partial(FramePacker, self.frames_by, self.preprocessing, *arguments)
        return partial(PartPacker, *arguments)

    def conclude(self, run: Run, report: RunReport) -> RunReport:
        """Copy the manifest and describe the pack; print what was packed."""
        pack = self._pack()
        if self.labels:
            copy_manifest(self.labels, pack, self.output, ErasedObjects(self.output))
        for shard in self.damaged:
            set_aside(shard)  # now that what it held is packed anew
        packs.write_description(self.output, pack)
        print(summarize_counts(report, "packed"), flush=True)
        return report


def _packed(keys: Keys) -> Records:
    records = np.zeros(len(keys), RECORD)
    records["key"], records["outcome"] = keys, CLASSIFIED
    return records


class PartPacker:
    """Makes rows of a shard."""

    schema = packs.SCHEMA
    write_options = packs.write_options(packs.SCHEMA)
    tally_type = PartTally
    tally = staticmethod(PartTally.of)
    key_columns = ()

    def __init__(self, root: str, threads: int, patience: float, run: Run, cpus: int) -> None:
        """Read `threads` objects at a time; paths in the shard start from `root`."""
        self._prefetcher = Prefetcher(threads=threads, patience=patience, max_bytes=ScanLimits().max_bytes)
        self._below = root.rstrip("/") + "/"

    def lots(self, objects: Sequence[FileInfo], seconds: Seconds) -> Iterator[Any]:
        """Begin to read `objects`, and return what yields them with their bytes."""
        return self._prefetcher.batches(objects, seconds)

    def rows(self, objects: Sequence[FileInfo], lot: Batch, seconds: Seconds) -> list[Row]:
        """Return one row per object of a lot."""
        numbers, results = lot
        return list(map(self._row, [objects[number] for number in numbers], results))

    def records(self, rows: Sequence[Row]) -> Records:
        """Return none: what a pack holds is read from its shards."""
        return np.empty(0, RECORD)

    def _row(self, info: FileInfo, result: ReadResult) -> Row:
        path = info.uri.removeprefix(self._below).removeprefix("s3://").lstrip("/")
        row: Row = {"uri": info.uri, "path": path, "etag": info.etag, "size": info.size, "error_code": None}
        if isinstance(result, StorageError):
            retryable = result.retryable or result.code in RETRIED
            return row | {"error_code": result.code, "error": result.detail, "retryable": retryable}
        return row | {"retryable": False} | self.content(result)

    def content(self, data: bytes) -> Row:
        """Return the columns that an object's bytes become."""
        return {"data": data}


class FramePacker(PartPacker):
    """Makes rows of a shard of a frame pack."""

    schema = packs.FRAMES_SCHEMA
    write_options = packs.write_options(packs.FRAMES_SCHEMA)

    def __init__(self, preprocess: PreprocessConfig, key: str, *arguments: Any) -> None:
        """Make frames by `preprocess`, whose key must be `key`; `arguments` are those of PartPacker."""
        super().__init__(*arguments)
        if preprocessing_key(preprocess) != key:
            raise UserError(
                f"preprocessing {key} is {preprocessing_key(preprocess)} on the node {socket.gethostname()}: install "
                "the same versions of all libraries on all nodes"
            )
        self._key, self._source = key, FrameSource(preprocess)
        *_, cpus = arguments
        self._decoders = ThreadPoolExecutor(cpus)

    def rows(self, objects: Sequence[FileInfo], lot: Batch, seconds: Seconds) -> list[Row]:
        """Return one row per object of a lot; one that gives no frame says why."""
        started = time.perf_counter()
        numbers, results = lot
        rows = list(self._decoders.map(self._row, [objects[number] for number in numbers], results))
        seconds["decode"] += time.perf_counter() - started
        return rows

    def content(self, data: bytes) -> Row:
        """Return the frames of a scan and what is known of it, or its rejection."""
        row: Row = {"preprocessing": self._key, "scan": hashlib.sha256(data).hexdigest()}
        scan, most = self._source.decode(data), self._source.limits.max_volume_pixels
        if not isinstance(scan, Rejection) and len(scan.frames) * self._source.preprocess.size**2 > most:
            scan = Rejection("bomb", f"{len(scan.frames)} frames have more than {most} pixels: split it", False)
        if isinstance(scan, Rejection):
            slices = packs.slices_json([scan.info]) if scan.info else None
            return row | {"error_code": scan.code, "error": scan.message, "slices": slices}
        return row | packs.frames_row(self._source.frames_of(scan), scan)
