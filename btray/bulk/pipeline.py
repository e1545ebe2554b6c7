"""The parts of a run's worklist through actors, with Ray Data: in one stage, or in two for GPUs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pyarrow as pa
import ray.data
from ray.data.block import BlockMetadata

from btray import storage
from btray.bulk import runs, worklist
from btray.bulk.runs import Run
from btray.bulk.worker import PartActor, PartProcessor, PartReader, ReadActor
from btray.core.cluster import cpus, gpus, require_gpus, started_ray_here

# Less than a CPU each, so that the task that reads the worklist always finds room, on one CPU too.
_ACTOR_CPUS = 0.9
_READER_CPUS = 0.05

_FEED = {
    "target_max_block_size": 1,  # bytes: each row its own block, or the first parts would wait for 128 MiB of them
    "raise_original_map_exception": True,
    "override_object_store_memory_limit_fraction": 0.2,  # for what is decoded and not yet classified
}
# With two stages, parts that an actor works on at a time: it reads one while it decodes another, and writes one while
# it classifies another.
_AT_A_TIME = 2
# An actor that classifies makes rows on a CPU, as fast as so many others decode.
_CPUS_OF_AN_ACTOR = 8
_MOST_AT_A_GPU = 4
_IN_FLIGHT = 4  # parts of an actor, so that one that needs 30 ms for each does not wait for the next poll


class WorklistSource(ray.data.Datasource):
    """One read task that follows the worklist while it is written."""

    def __init__(self, run: Run, patience: float) -> None:
        """Follow the worklist of `run`; wait `patience` seconds for a store that does not answer."""
        super().__init__()
        self.run = run
        self.patience = patience

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: ray.data.DataContext | None = None
    ) -> list[ray.data.ReadTask]:
        """Return the one read task; called by Ray."""
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ray.data.ReadTask(self._parts, unknown)]

    def estimate_inmemory_data_size(self) -> int | None:
        """Return None, called by Ray: nobody knows before the archive is listed."""
        return None

    def _parts(self) -> Iterator[pa.Table]:
        with storage.retry_timeout(self.patience):
            runs.require_visible(self.run)
            yield from worklist.read_parts(self.run.worklist, lambda: runs.has_ended(self.run.folder))


def count_actors(limit: int | None, gpu_share: float = 0.0, *, stages: int = 1) -> tuple[int, int | None]:
    """Return how many actors that write to begin with, and at most; None for as many as will fit. Needs Ray.

    `limit` (--actors) is capped by what the cluster holds now, one per CPU (per two of them, if they are the second of
    two stages) or as many as its GPUs hold at `gpu_share`, if this job started its Ray itself; a cluster that it joined
    may grow to hold more, from no CPU at all.
    """
    fitting = max(1, math.floor(require_gpus() / gpu_share) if gpu_share else int(cpus() / stages))
    first = min(limit or fitting, fitting)
    return first, first if started_ray_here() else limit


def fitting_gpu_share() -> float:
    """Return the share of a GPU for each actor: so many share one that its CPUs can feed. Needs Ray."""
    return 1 / min(_MOST_AT_A_GPU, max(1, int(cpus() / max(1, gpus()) / _CPUS_OF_AN_ACTOR)))


def process_parts(
    make_processor: Callable[[Run, int], PartProcessor],
    run: Run,
    *,
    actors: int | None,
    patience: float,
    gpu_share: float = 0.0,
    make_reader: Callable[[Run], PartReader] | None = None,
) -> ray.data.Dataset:
    """Return the columns part and tally, one row per part of the worklist as it is written, made by actors. Needs Ray.

    `make_processor` is called in each actor with the run and the CPUs that the actor may keep busy. With `make_reader`,
    which is called with the run, actors of their own read and decode the parts, one on each CPU that is left. Ray Data
    stops these while its share of the object store is full of what they have decoded.
    """
    first, most = count_actors(actors, gpu_share, stages=2 if make_reader else 1)
    reading = max(1, int(cpus() - first))
    each = min(_ACTOR_CPUS, _ACTOR_CPUS * cpus() / (reading if make_reader else first))
    if make_reader and not gpu_share:
        most = actors or first  # what takes neither a GPU nor a CPU would always fit
    context = ray.data.DataContext.get_current()
    before = {name: getattr(context, name) for name in _FEED}
    for name, value in _FEED.items():
        setattr(context, name, value)
    try:
        parts = ray.data.read_datasource(WorklistSource(run, patience), num_cpus=_READER_CPUS, override_num_blocks=1)
        if make_reader:
            parts = parts.map_batches(
                ReadActor,
                fn_constructor_args=(make_reader, run, patience),
                batch_size=1,
                batch_format="pyarrow",
                num_cpus=each,
                compute=_pool(reading, reading if started_ray_here() else None, calls=_AT_A_TIME),
            )
        return parts.map_batches(
            PartActor,
            fn_constructor_args=(make_processor, run, patience, first, gpu_share),
            batch_size=1,  # a part; Ray does not allow None, which would do, for actors with GPUs
            batch_format="pyarrow",
            # The second of two stages takes no CPU: readers could hold them all, and wait for it for ever.
            num_cpus=0 if make_reader else each,
            num_gpus=gpu_share or None,
            compute=_pool(first, most, calls=_AT_A_TIME if make_reader else 1),
        )
    finally:
        for name, value in before.items():
            setattr(context, name, value)


def _pool(first: int, most: int | None, *, calls: int) -> ray.data.ActorPoolStrategy:
    return ray.data.ActorPoolStrategy(
        min_size=1,
        initial_size=first,
        max_size=most,
        max_tasks_in_flight_per_actor=_IN_FLIGHT,
        max_concurrent_calls_per_actor=calls,
        enable_true_multi_threading=calls > 1,
    )
