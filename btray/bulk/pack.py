"""Pack an archive of many small objects into few Parquet shards with Ray Data; run again it packs what is new."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from btray import storage
from btray.bulk.config import PackConfig
from btray.bulk.driver import ArchiveJob, run_archive
from btray.bulk.erasure.erased import ErasedObjects
from btray.bulk.erasure.traces import copy_manifest
from btray.bulk.progress import summarize_counts
from btray.bulk.report import PartTally, RunReport
from btray.bulk.runs import Run
from btray.bulk.table import RETRIED
from btray.bulk.worker import Prefetcher, Row, Seconds
from btray.core.errors import UserError
from btray.data import packs
from btray.data.key_set import Keys
from btray.data.labelled import holds_labels
from btray.data.manifests import kind_of
from btray.data.scans import ScanLimits
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
        """Examine input and output. Raises UserError if the input is a pack, or the output one of another archive."""
        super().__init__(config, group="pack")
        self.source = config.input
        self.damaged: list[str] = []
        names_others = kind_of(self.source) is not None or storage.is_file(self.source)
        self.root = self.source.rpartition("/")[0] if names_others else self.source
        # the copy of a labelled manifest within the pack
        self.manifest = f"_manifest{Path(self.source).suffix.lower()}" if holds_labels(self.source) else None
        if packs.is_pack(self.source):
            raise UserError(f"--input {self.source} is a packed archive already; give what was packed")
        if packs.is_pack(self.output) and (before := packs.describe_pack(self.output).root) != self.root:
            raise UserError(f"--output {self.output} is a pack of {before}, not of {self.root}; name another output")

    def folder(self, run_date: str) -> str:
        """Return the folder of the shards."""
        return packs.SHARDS

    def completed_keys(self) -> Iterator[Keys]:
        """Yield the keys of what the pack holds."""
        return packs.packed_keys(self.output, self.damaged)

    def processor(self) -> Callable[[Run, int], PartPacker]:
        """Return what makes the packer of an actor."""
        return partial(PartPacker, self.root, self.config.threads, self.config.patience)

    def conclude(self, run: Run, report: RunReport) -> RunReport:
        """Copy the manifest and describe the pack; print what was packed."""
        description = packs.Pack(self.root, self.manifest)
        if self.manifest:
            copy_manifest(self.source, description, self.output, ErasedObjects(self.output))
        for shard in self.damaged:
            set_aside(shard)  # now that what it held is packed anew
        packs.write_description(self.output, description)
        print(summarize_counts(report, "packed"), flush=True)
        return report


class PartPacker:
    """Makes rows of a shard."""

    schema = packs.SCHEMA
    write_options = packs.WRITE_OPTIONS
    tally_type = PartTally
    tally = staticmethod(PartTally.of)

    def __init__(self, root: str, threads: int, patience: float, run: Run, cpus: int) -> None:
        """Read `threads` objects at a time; paths in the shard start from `root`."""
        self._prefetcher = Prefetcher(threads=threads, patience=patience, max_bytes=ScanLimits().max_bytes)
        self._below = root.rstrip("/") + "/"

    def lots(self, objects: Sequence[FileInfo], seconds: Seconds) -> Iterator[Any]:
        """Begin to read `objects`, and return what yields them with their bytes."""
        return self._prefetcher.batches(objects, seconds)

    def rows(
        self, objects: Sequence[FileInfo], lot: tuple[Sequence[FileInfo], Sequence[ReadResult]], seconds: Seconds
    ) -> list[Row]:
        """Return one row per object of a lot."""
        rows: list[Row] = []
        for info, result in zip(*lot, strict=True):
            path = info.uri.removeprefix(self._below).removeprefix("s3://").lstrip("/")
            row: Row = {"uri": info.uri, "path": path, "etag": info.etag, "size": info.size, "error_code": None}
            if isinstance(result, StorageError):
                retryable = result.retryable or result.code in RETRIED
                row |= {"error_code": result.code, "error": result.detail, "retryable": retryable}
            else:
                row |= {"data": result, "retryable": False}
            rows.append(row)
        return rows
