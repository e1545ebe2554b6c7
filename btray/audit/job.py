"""What makes figures of a data set untrue, found before anything is trained: `jobs/audit`.

Two passes of Ray Data. The first reads every file once and brings back digests, a fingerprint and a few numbers;
pictures stay where they are decoded. The second reads again only what may be the same image by its fingerprint, and
compares it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
import ray.data

from btray import storage
from btray.audit.config import AuditConfig
from btray.audit.findings import Twins, crossings, distinct, effective_splits, group, summarise
from btray.audit.inspection import CorrelateBlock, InspectBlock, unpacked_fingerprints
from btray.audit.report import render_audit
from btray.core.cluster import connected
from btray.core.errors import ThresholdExceeded
from btray.data.duplicates import Pairs, components, near_pairs, verified_pairs
from btray.data.fingerprint import SAME_IMAGE
from btray.data.labelled import read_labelled
from btray.data.rejections import as_csv, rejections_csv
from btray.data.scans import ScanLimits

# Files a block: some seconds' work for one core, so that what starting a task costs does not count.
_BLOCK_ROWS = 128
_BLOCK_PAIRS = 256
# Fingerprints of pictures that correlate by SAME_IMAGE lie no further apart.
_FARTHEST = float(np.sqrt(2 - 2 * SAME_IMAGE)) + 1e-4  # they are kept in half precision
_LIMITS = ScanLimits()


def audit(config: AuditConfig) -> str:
    """Audit the labelled data of `config.data`; write what was found to `config.out` and return that URI.

    Writes audit.json, duplicates.parquet, report.html, unreadable.csv, not_mri.csv and config.yaml. Raises UserError
    for unusable input and ThresholdExceeded, after writing, where something of `fail_on` was found.
    """
    out = storage.resolve(config.out)
    table = read_labelled(config.data, least_classes=1)
    storage.require_writable(out, "--out")
    with connected():
        found = inspect_files(table["uri"])
        readable = found.filter(pc.equal(found["code"], ""))
        twins = find_twins(readable, table["uri"])
    members = group(readable, twins)
    findings = summarise(config.data, table, found, twins, members)
    files = {
        "audit.json": json.dumps(findings, indent=2, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace"),
        "duplicates.parquet": _duplicates_parquet(table, members),
        "unreadable.csv": rejections_csv(found.filter(pc.not_equal(found["code"], "")), table),
        "not_mri.csv": _not_mri_csv(readable, table),
        "report.html": render_audit(findings, table, found, members, most_groups=config.report_groups).encode(),
        "config.yaml": config.to_yaml().encode(),
    }
    for name, body in files.items():
        storage.write_bytes(storage.join(out, name), body)
    print(summary(findings), flush=True)
    crossed = crossings(findings)
    failed = [f"{name}: {crossed[name]}" for name in config.failing if name in crossed]
    if failed:
        raise ThresholdExceeded(f"--fail-on {'; '.join(failed)}; see {storage.join(out, 'report.html')}")
    return out


def inspect_files(uris: pa.ChunkedArray) -> pa.Table:
    """What is known of each file, as `inspection.FOUND`, in the order of `uris`. Needs a connection to Ray."""
    rows = pa.table({"row": np.arange(len(uris)), "uri": uris})
    found = _on_ray(rows, InspectBlock(_LIMITS), _BLOCK_ROWS)
    return found.sort_by("row")


def find_twins(readable: pa.Table, uris: pa.ChunkedArray) -> Twins:
    """Which of the readable files (rows of FOUND) show the same image. Needs a connection to Ray.

    One file of each set of equal pixels stands for all of them, so that they cost nothing.
    """
    pixels = distinct(readable["pixel_digest"])
    _, first = np.unique(pixels, return_index=True)
    standing = readable.take(first)
    candidates, _ = near_pairs(unpacked_fingerprints(standing), within=_FARTHEST)
    files = uris.take(standing["row"])

    def correlate(pairs: Pairs) -> npt.NDArray[np.float32]:
        return _correlate(pairs, files, len(standing))

    pairs, correlations, compared = verified_pairs(len(standing), candidates, correlate)
    return Twins(pixels, pairs, correlations, len(candidates), compared)


def _correlate(pairs: Pairs, uris: pa.ChunkedArray, count: int) -> npt.NDArray[np.float32]:
    """Correlations [p] of pairs [p, 2] of `count` files, read by Ray.

    Pairs of one crowd stand together, so that each file is read about once.
    """
    order = np.lexsort((pairs[:, 0], components(count, pairs)[pairs[:, 0]]))
    first, second = pairs[order].T
    columns = {"place": order, "first": first, "second": second}
    wanted = pa.table({**columns, "first_uri": uris.take(first), "second_uri": uris.take(second)})
    return _on_ray(wanted, CorrelateBlock(_LIMITS), _BLOCK_PAIRS).sort_by("place")["correlation"].to_numpy()


def _on_ray(rows: pa.Table, task: InspectBlock | CorrelateBlock, size: int) -> pa.Table:
    """What `task` makes of all `rows`, `size` at a time; nothing but its results comes back."""
    blocks = [rows.slice(start, size) for start in range(0, len(rows), size)]
    done = ray.data.from_arrow(blocks).map_batches(task, batch_size=None, batch_format="pyarrow", zero_copy_batch=True)
    return pa.concat_tables(done.iter_batches(batch_size=None, batch_format="pyarrow")).combine_chunks()


def summary(findings: Mapping[str, Any]) -> str:
    """A few lines for a terminal."""
    duplicates, splits = findings["duplicates"], findings["splits"]
    parts = ", ".join(f"{name} {entry['images']}" for name, entry in splits.items())
    grades = ", ".join(f"{name} {count}" for name, count in duplicates["by_grade"].items())
    crossed = crossings(findings)
    lines = [
        f"{findings['images']} images of {len(findings['classes'])} classes ({parts})",
        f"duplicates: {duplicates['images']} images in {duplicates['groups']} groups ({grades})",
    ]
    names = {
        "leak": "leakage",
        "conflict": "label conflicts",
        "patient": "patients",
        "not_mri": "not MRI",
        "unreadable": "unreadable",
    }
    lines += [f"{title}: {crossed.get(name, 'none found')}" for name, title in names.items()]
    if not findings["leakage"]:
        lines[2] = "leakage: not looked for, since the data have no two splits"
    if not findings["patients"]["named"]:
        lines[4] = "patients: none named, so slices of one may lie in several splits"
    return "\n".join(lines)


def _duplicates_parquet(table: pa.Table, members: pa.Table) -> bytes:
    rows = members["row"].combine_chunks()
    columns = {
        "uri": table["uri"].take(rows),
        "split": pa.chunked_array([effective_splits(table["split"]).take(rows)]),
        "label": table["label"].take(rows),
        "group_id": members["group_id"],
        "grade": members["grade"],
        "score": members["score"].cast(pa.float32()),
    }
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pa.table(columns), stream)
    return stream.getvalue()


def _not_mri_csv(readable: pa.Table, table: pa.Table) -> bytes:
    suspects = readable.filter(pc.not_equal(readable["not_mri"], ""))
    uris = table["uri"].take(suspects["row"]).to_pylist()
    return as_csv(("uri", "reason"), zip(uris, suspects["not_mri"].to_pylist(), strict=True))
