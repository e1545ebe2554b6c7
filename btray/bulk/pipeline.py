"""The parts of a run's worklist as a source of Ray Data. Nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import ray.data
from ray.data.block import BlockMetadata

from btray import storage
from btray.bulk import runs
from btray.bulk import worklist as segments
from btray.bulk.runs import Run


class WorklistSource(ray.data.Datasource):
    """One read task that follows the worklist while it is written."""

    def __init__(self, run: Run, patience: float) -> None:
        super().__init__()
        self.run = run
        self.patience = patience

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: ray.data.DataContext | None = None
    ) -> list[ray.data.ReadTask]:
        """Called by Ray."""
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ray.data.ReadTask(self._parts, unknown)]

    def estimate_inmemory_data_size(self) -> int | None:
        """Called by Ray. Nobody knows before the archive is listed."""
        return None

    def _parts(self) -> Iterator[pa.Table]:
        with storage.retry_timeout(self.patience):
            runs.require_seen(self.run)
            yield from segments.parts(self.run.worklist, lambda: runs.has_ended(self.run.folder))
