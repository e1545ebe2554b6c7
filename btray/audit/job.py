"""The audit job: find what makes figures of a labelled data set untrue, before anything is trained on it.

Two passes of Ray Data. The first reads every file once and brings back digests, a fingerprint and a few numbers;
pictures stay where they are decoded. The second reads again only what may be the same image by its fingerprint, and
compares it.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
import ray.data

from btray import storage
from btray.audit.analysis import Twins, group, summarise
from btray.audit.config import AuditConfig
from btray.audit.findings import AuditReport, findings_present
from btray.audit.inspection import correlate_block, inspect_block
from btray.audit.report import render_audit
from btray.core.cluster import connected
from btray.core.console import ProgressLine
from btray.core.errors import ThresholdExceeded
from btray.data.duplicates import Pairs, components, near_pairs, numbered, verified_pairs
from btray.data.fingerprint import SAME_IMAGE, unpack
from btray.data.labelled import list_labelled
from btray.data.labels import require_classes
from btray.data.rejections import as_csv, rejections_csv, require_found

# Files per block: some seconds' work for one core, so that the cost of starting a task does not count.
_BLOCK_ROWS = 128
_BLOCK_PAIRS = 256
# Fingerprints of pictures that correlate by SAME_IMAGE lie no further apart.
_FARTHEST = float(np.sqrt(2 - 2 * SAME_IMAGE)) + 1e-4  # the rounding of half precision, in which they are kept


def audit(config: AuditConfig) -> str:
    """Audit the labelled data of `config.data` and write the findings to `config.out`.

    Writes audit.json, duplicates.parquet, report.html, unreadable.csv, left_out.csv, not_mri.csv and config.yaml.

    Returns:
        The URI of that folder.

    Raises:
        UserError: the input is unusable.
        ThresholdExceeded: there is a finding of `fail_on`; raised after all is written.
    """
    out = storage.resolve(config.out)
    data = list_labelled(config.data, config.classes)
    table = data.table
    require_classes(config.classes, table["label"].to_pylist(), f"nothing in {config.data}")
    storage.require_writable(out, "--out")
    with connected(), ProgressLine(f"inspecting {len(table)} images", keep=False) as line:
        rows = pa.table({"row": np.arange(len(table)), "uri": table["uri"]})
        inspected = _map_blocks(rows, inspect_block, _BLOCK_ROWS).sort_by("row")
        require_found(inspected["code"].to_pylist(), len(table), config.data)
        readable = inspected.filter(pc.equal(inspected["code"], ""))
        line.update(f"comparing {len(readable)} images with one another")
        twins = find_twins(readable, table["uri"])
    members = group(table, readable, twins)
    report = summarise(config.data, data, inspected, twins, members)
    duplicates = io.BytesIO()
    pyarrow.parquet.write_table(members.drop_columns("row"), duplicates)
    suspects = readable.filter(pc.not_equal(readable["not_mri"], ""))
    suspect_uris = table["uri"].take(suspects["row"]).to_pylist()
    files = {
        "audit.json": report.to_json(),
        "duplicates.parquet": duplicates.getvalue(),
        "unreadable.csv": rejections_csv(inspected.filter(pc.not_equal(inspected["code"], "")), table),
        "left_out.csv": as_csv(("path", "reason"), data.left_out.items()),
        "not_mri.csv": as_csv(("uri", "reason"), zip(suspect_uris, suspects["not_mri"].to_pylist(), strict=True)),
        "report.html": render_audit(report, table, inspected, members, most_groups=config.report_groups).encode(),
        "config.yaml": config.to_yaml().encode(),
    }
    for name, body in files.items():
        storage.write_bytes(storage.join(out, name), body)
    print(summary(report), flush=True)
    if failed := [f"{name}: {text}" for name, text in findings_present(report).items() if name in config.fail_on]:
        raise ThresholdExceeded(f"--fail-on {'; '.join(failed)}; see {storage.join(out, 'report.html')}")
    return out


def find_twins(readable: pa.Table, uris: pa.ChunkedArray) -> Twins:
    """Find which of the readable files (rows of INSPECTED) show the same image. Needs Ray."""
    pixels = numbered(readable["pixel_digest"])
    # One file of each set of equal pixels stands for all of them, so that they cost nothing.
    _, first = np.unique(pixels, return_index=True)
    standing = readable.take(first)
    candidates, _ = near_pairs(unpack(standing["fingerprint"].to_pylist()), within=_FARTHEST)
    files = uris.take(standing["row"])

    def correlate(pairs: Pairs) -> npt.NDArray[np.float32]:
        # Pairs of one crowd stand together, so that each file is read about once.
        order = np.lexsort((pairs[:, 0], components(len(standing), pairs)[pairs[:, 0]]))
        first, second = pairs[order].T
        columns = {"place": order, "first": first, "second": second}
        rows = pa.table({**columns, "first_uri": files.take(first), "second_uri": files.take(second)})
        return _map_blocks(rows, correlate_block, _BLOCK_PAIRS).sort_by("place")["correlation"].to_numpy()

    pairs, correlations, compared = verified_pairs(len(standing), candidates, correlate)
    return Twins(pixels, pairs, correlations, len(candidates), compared)


def _map_blocks(rows: pa.Table, task: Callable[[pa.Table], pa.Table], size: int) -> pa.Table:
    """Return what `task` makes of all `rows`, `size` at a time, on Ray; nothing but its results comes back."""
    blocks = [rows.slice(start, size) for start in range(0, len(rows), size)]
    done = ray.data.from_arrow(blocks).map_batches(task, batch_size=None, batch_format="pyarrow", zero_copy_batch=True)
    return pa.concat_tables(done.iter_batches(batch_size=None, batch_format="pyarrow")).combine_chunks()


def summary(report: AuditReport) -> str:
    """Return a few lines for a terminal."""
    present, duplicates = findings_present(report), report.duplicates
    splits = ", ".join(f"{name} {split.images}" for name, split in report.splits.items())
    grades = ", ".join(f"{name} {count}" for name, count in duplicates.by_grade.items())
    not_looked_for = "not looked for, since the data do not have two splits"
    none_named = "none named, so slices of one may lie in several splits"
    return "\n".join([
        f"{report.images} images of {len(report.classes)} classes ({splits})",
        f"duplicates: {duplicates.images} images in {duplicates.groups} groups ({grades})",
        f"leakage: {present.get('leak', 'none found') if report.leakage else not_looked_for}",
        f"label conflicts: {present.get('conflict', 'none found')}",
        f"patients: {present.get('patient', 'none found') if report.patients.named else none_named}",
        f"not MRI: {present.get('not_mri', 'none found')}",
        f"unreadable: {present.get('unreadable', 'none found')}",
        f"left out: {', '.join(f'{reason} {count}' for reason, count in report.left_out.by_reason.items()) or 'none'}",
        *(f"layout: {warning}" for warning in report.warnings),
    ])  # fmt: skip
