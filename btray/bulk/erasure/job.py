"""Erase objects from a results table or a packed archive: every row and picture, file by file, and for good.

First the hashes of the objects are kept, so that no later run takes them again, then what is derived of the rows goes,
and the rows last: an erasure that was interrupted finds in the rows what is left to do. A file is replaced by one put,
so that a reader sees it as it was or as it is to be.
"""

from __future__ import annotations

import logging
import secrets
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa

from btray import storage
from btray.bulk import runs, table
from btray.bulk.clinical.pseudonyms import Pseudonyms, check_table
from btray.bulk.clinical.studies import erase_studies
from btray.bulk.config import EraseConfig
from btray.bulk.erasure.erased import ErasedObjects
from btray.bulk.erasure.rows import held, read_files, select_uris, take_out
from btray.bulk.erasure.traces import erase_from_manifest, erase_from_reports, erase_pictures
from btray.bulk.listing.completed import COLUMNS, forget, records_of
from btray.bulk.table import table_files
from btray.core.errors import UserError
from btray.data import packs
from btray.data.key_set import keys_of
from btray.data.manifests import kind_of, named_in_list, named_in_manifest
from btray.storage import FileInfo, lease

_log = logging.getLogger(__name__)

_UIDS = ("study_uid", "series_uid")
_SET_ASIDE = "/_damaged/"
"""In the URIs of damaged files, which may hold anything."""


@dataclass(kw_only=True)
class Erasure:
    """What is erased, as it is told and kept in OUTPUT/_erased."""

    objects: int = 0
    """That were named or chosen."""
    without_rows: int = 0
    """Of these, objects that no row speaks of: none was written yet, or they were erased before."""
    rows: int = 0
    files: int = 0
    """That are written again."""
    studies: int = 0
    """Rows of the table of studies, which the next run makes anew of the frames that are left."""
    pictures: int = 0
    """Explanations."""
    reports: int = 0
    """Runs that show them in run.json or summary.html."""
    unfinished: int = 0
    """Runs that were interrupted and are ended, since their worklist may name them."""
    damaged: int = 0
    """Damaged files, which cannot be searched and are removed; the next run reads their other objects again."""

    def __str__(self) -> str:
        return (
            f"{self.objects} objects ({self.without_rows} without a row): {self.rows} rows in {self.files} files, "
            f"{self.studies} rows of series and studies, {self.pictures} pictures, {self.reports} reports, "
            f"{self.unfinished} unfinished runs, {self.damaged} damaged files"
        )


def erase(config: EraseConfig) -> str:
    """Erase objects from `config.output`; return the URI of a report that names none (dry run: that of the output).

    Raises UserError for an output that is neither a table nor a pack, for a wrong key or condition, and if a run is
    writing to the output.
    """
    config.check()
    with storage.retry_timeout(config.patience):
        pseudonyms = Pseudonyms.from_file(config.pseudonymize) if config.pseudonymize else None
        check_table(config.output, pseudonyms)
        pack = packs.describe_pack(config.output, unfinished=True) if packs.is_pack(config.output) else None
        if pack is None and next(table_files(config.output), None) is None:
            raise UserError(f"--output {config.output} holds no results table and no packed archive")
        with nullcontext() if config.dry_run else lease.hold(config.output):
            erased = ErasedObjects(config.output)
            uris = _chosen(config, pseudonyms, is_pack=pack is not None)
            if not uris and not erased.interrupted:
                raise UserError(f"no row of {config.output} is chosen, and no object is named; nothing was erased")
            name = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(4)}"
            erased.add(uris, name=name, keep=not config.dry_run)
            done = _erase(config, pack, erased, Erasure(objects=len(uris)))
            print(f"{done}. Nothing was erased." if config.dry_run else f"erased {done}", flush=True)
            if config.dry_run:
                return config.output
            told = asdict(done) | {"erased_at": datetime.now(UTC).isoformat(timespec="seconds")}
            return erased.conclude(name, told)


def _chosen(config: EraseConfig, pseudonyms: Pseudonyms | None, *, is_pack: bool) -> set[str]:
    """Return the objects to erase, by the URIs that they have in the output."""
    if config.uris:
        read = named_in_manifest if kind_of(config.uris) == "manifest" else named_in_list
        named = {info.uri for info in read(config.uris)}
        return {pseudonyms.name(uri) for uri in named} if pseudonyms else named
    schema = packs.SCHEMA if is_pack else table.SCHEMA
    condition = config.where or ""
    if config.study:
        uid = pseudonyms.uid(config.study) if pseudonyms else config.study
        condition = f"study_uid = '{uid.replace(chr(39), 2 * chr(39))}'"
        if "study_uid" not in schema.names:
            raise UserError(f"--output {config.output} is a packed archive, which knows no studies; give --uris")
    columns = [name for name in schema.names if name != "data"]
    return select_uris(table_files(config.output), condition, columns)


def _erase(config: EraseConfig, pack: packs.Pack | None, erased: ErasedObjects, done: Erasure) -> Erasure:
    """Erase everything of `erased` from the output, or count it; return `done` with the counts."""
    output, dry_run = config.output, config.dry_run
    if not dry_run:
        done.unfinished = runs.abandon_unfinished(output, pack.schema if pack else table.SCHEMA)
    damaged: list[str] = []

    def matching(info: FileInfo, rows: pa.Table) -> tuple[FileInfo, pa.Table]:
        return info, rows.filter(pa.array(held(rows["uri"], erased)))

    searched = read_files(table_files(output), [*COLUMNS, *_UIDS], matching, damaged)
    hits = [(info, rows) for info, rows in searched if len(rows)]
    found = {uri for _, rows in hits for uri in rows["uri"].to_pylist()}
    done.rows, done.files = sum(len(rows) for _, rows in hits), len(hits)
    done.without_rows = max(0, done.objects - len(found))
    if pack is None:
        columns = [rows[name] for _, rows in hits for name in _UIDS if name in rows.column_names]
        uids = {uid for column in columns for uid in column.to_pylist() if uid}
        for studies in _studies_of(config):
            done.studies += erase_studies(studies, uids, erased.hold, dry_run=dry_run)
        done.pictures = erase_pictures(output, erased, dry_run=dry_run)
        done.reports = erase_from_reports(output, erased, uids, dry_run=dry_run)
        if not dry_run:
            keys = [records_of(batch)["key"] for _, rows in hits for batch in rows.to_batches()]
            forget(output, np.concatenate([keys_of([]), *keys]))
    else:
        done.rows += erase_from_manifest(output, pack, erased, dry_run=dry_run)
    aside = [info.uri for info in storage.list_files(output) if _SET_ASIDE in info.uri]
    done.damaged = len(damaged) + len(aside)
    if not dry_run:
        storage.delete_many([*damaged, *aside])
        for number, (info, _) in enumerate(hits, start=1):
            take_out(info, erased)
            _log.info("%d of %d files", number, len(hits))
    return done


def _studies_of(config: EraseConfig) -> set[str]:
    """Return the tables of studies that runs on the output have written."""
    uris = [storage.join(folder, runs.RUN) for folder in runs.folders(config.output)]
    reports = [storage.read_json(uri, missing_ok=True) or {} for uri in uris]
    named = {report.get("config", {}).get("studies") for report in reports}
    return {config.studies or f"{config.output}-studies", *named} - {None}
