"""Ray Data in this process, for tests of what jobs do with its rows: no cluster, no actor, one block after another."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pytest
import ray
import ray.data

from btray.audit import job as audit_job
from btray.evaluation import job as evaluate_job
from btray.evaluation import scoring
from btray.registry import requirement
from btray.training import job, prepare


class LocalData:
    """As much of a `ray.data.Dataset` as the jobs use."""

    def __init__(self, blocks: Sequence[pa.Table]) -> None:
        self.blocks = list(blocks)

    def map_batches(self, task: Any, *, fn_constructor_args: Sequence[Any] = (), **options: Any) -> Self:
        call = task(*fn_constructor_args) if inspect.isclass(task) else task
        made: list[pa.Table] = []
        for block in self.blocks:
            done = call(block if options.get("batch_format") == "pyarrow" else _columns(block))
            made += [_table(part) for part in ([done] if isinstance(done, pa.Table | dict) else done)]
        return type(self)(made)

    def select_columns(self, names: Sequence[str]) -> Self:
        return type(self)([block.select(names) for block in self.blocks])

    def iter_internal_ref_bundles(self) -> Iterator[SimpleNamespace]:
        blocks = [SimpleNamespace(ref=block, metadata=SimpleNamespace(num_rows=len(block))) for block in self.blocks]
        yield SimpleNamespace(blocks=blocks)

    def iter_batches(self, **_: Any) -> Iterator[pa.Table]:
        return iter(self.blocks)


def run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let jobs on labelled data read, decode and classify in this process; training itself is not replaced."""
    monkeypatch.setattr(ray.data, "from_arrow", LocalData)
    monkeypatch.setattr(ray.data, "from_arrow_refs", LocalData)
    monkeypatch.setattr(ray, "put", lambda block: block)
    monkeypatch.setattr(ray, "get", lambda blocks: blocks)
    monkeypatch.setattr(ray, "remote", lambda **_: lambda function: SimpleNamespace(remote=function))
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(prepare, "cpus", lambda: 2.0)
    monkeypatch.setattr(scoring, "cpus", lambda: 2.0)
    for module in (job, audit_job, evaluate_job, requirement):
        monkeypatch.setattr(module, "connected", lambda **_: nullcontext())


def _columns(block: pa.Table) -> dict[str, Any]:
    return {name: np.array(block[name].to_pylist()) for name in block.column_names}


def _table(part: pa.Table | dict[str, Any]) -> pa.Table:
    return (
        part
        if isinstance(part, pa.Table)
        else pa.table({name: list(values) for name, values in part.items() if name != "frame"})
    )
