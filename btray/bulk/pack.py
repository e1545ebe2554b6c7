"""Pack an archive of many small objects into few Parquet shards with Ray Data; run again it packs what is new."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from btray import storage
from btray.bulk.config import PackConfig
from btray.bulk.driver import Report, Work, actors_for, parts_through, run_archive
from btray.bulk.lots import Prefetcher
from btray.bulk.part_files import Product
from btray.bulk.progress import counts_of
from btray.bulk.runs import Run
from btray.bulk.table import RETRIED
from btray.bulk.worker import PartWorker, Row, Seconds
from btray.core.errors import UserError
from btray.data import packs
from btray.data.key_set import KeySet
from btray.data.labelled import holds_labels
from btray.data.scans import ScanLimits
from btray.storage import FileInfo, StorageError
from btray.storage.read_many import ReadResult

PRODUCT = Product(folder=lambda _: packs.SHARDS, schema=packs.SCHEMA, part_objects=512)
_GROUP = "pack"


def pack(config: PackConfig) -> str:
    """Pack what is new in the archive and return the URI of the pack.

    An object that could not be read has a row that says why, so that who reads the pack is told the same. Raises
    UserError for unusable input, for a pack of another archive, and where another run is writing to this output,
    ThresholdExceeded above `max_rejected`, after writing.
    """
    output, source = storage.resolve(config.output), storage.resolve(config.input)
    manifest = _manifest_name(source)
    root = source.rpartition("/")[0] if storage.is_file(source) else source
    if packs.is_pack(source):
        raise UserError(f"--input {source} is a packed archive already; give what was packed")
    if packs.is_pack(output) and packs.describe_pack(output).root != root:
        before = packs.describe_pack(output).root
        raise UserError(f"--output {output} is a pack of {before}, not of {root}; name another output")

    def conclude(run: Run, report: Report) -> None:
        if manifest:
            storage.write_bytes(storage.join(output, manifest), storage.read_bytes(source))
        packs.write_description(output, packs.Pack(root, manifest))
        print(counts_of(report, "packed"), flush=True)

    work = Work(
        name="pack",
        output=output,
        group=_GROUP,
        choices={},
        product=PRODUCT,
        done=lambda scratch: _packed_before(scratch, output),
        dataset=lambda run: parts_through(
            PartPacker,
            (run, root, config.threads, config.patience),
            run,
            actors=actors_for(config.actors),
            patience=config.patience,
        ),
        conclude=conclude,
    )
    run_archive(config, work)
    return output


def _manifest_name(source: str) -> str | None:
    """What the copy of a labelled manifest is called within the pack."""
    return f"_manifest{Path(source).suffix.lower()}" if storage.is_file(source) and holds_labels(source) else None


def _packed_before(scratch: Path, output: str) -> KeySet:
    done = KeySet(scratch)
    for keys in packs.packed_keys(output):
        done.add(keys)
    return done


class PartPacker(PartWorker):
    """Rows of a shard."""

    schema = packs.SCHEMA
    # scans are compressed already; a checksum a page is verified when they are read
    write_options = {  # noqa: RUF012 - never changed
        "compression": {name: "none" if name == "data" else "zstd" for name in packs.SCHEMA.names},
        "use_dictionary": [name for name in packs.SCHEMA.names if name != "data"],
        "write_statistics": [name for name in packs.SCHEMA.names if name != "data"],
        "write_page_checksum": True,
    }

    def __init__(self, run: Run, root: str, threads: int, patience: float) -> None:
        reader = Prefetcher(threads=threads, patience=patience, max_bytes=ScanLimits().max_bytes)
        super().__init__(run, reader, patience)
        self.below = root.rstrip("/") + "/"

    def rows(self, lot: Sequence[FileInfo], answers: Sequence[ReadResult], seconds: Seconds) -> list[Row]:
        """One an object."""
        return [self._row(info, answer) for info, answer in zip(lot, answers, strict=True)]

    def _row(self, info: FileInfo, answer: ReadResult) -> Row:
        failed = answer if isinstance(answer, StorageError) else None
        return {
            "data": None if failed else answer,
            "uri": info.uri,
            "path": info.uri.removeprefix(self.below).removeprefix("s3://").lstrip("/"),
            "etag": info.etag,
            "size": info.size,
            "error_code": failed.code if failed else None,
            "error": failed.detail if failed else None,
            "retryable": failed is not None and (failed.retryable or failed.code in RETRIED),
        }
