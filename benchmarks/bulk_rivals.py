"""Other ways to classify an archive with the same network; benchmarks/bulk.py compares the job with them.

python benchmarks/bulk_rivals.py PIPELINE MODEL ENGINE OUT < LIST        # LIST: one URI per line

bare        two processes that loop Classifier.predict over half of the objects each and write nothing
documented  read_images -> one actor per core -> write_parquet, as in Ray Data's documentation; the network eager
dataloader  a torch DataLoader with two workers that read and decode; the main process predicts and writes Parquet
daft        Daft: download and a batch method in two processes -> write_parquet

Each prints one JSON object: `images`, and `steady`, images per second between the first and the last batch, if the
pipeline exposes them.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np

BATCH = 64
WORKERS = 2


def _predictions(model: str, engine: Any, uris: list[str]) -> tuple[int, float, float]:
    import torch

    from btray.model.classifier import Classifier

    torch.set_num_threads(1)
    classifier = Classifier.load(model, engine=engine)
    batches = [uris[start : start + BATCH] for start in range(0, len(uris), BATCH)]
    count = len(classifier.predict(batches[0]))
    started = time.time()
    for batch in batches[1:]:
        count += len(classifier.predict(batch))
    return count, started, time.time()


def bare(model: str, engine: str, uris: list[str], out: str) -> dict[str, float]:
    """Run the upper bound: no table, no listing, no bookkeeping."""
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn")) as pool:
        halves = [uris[number::WORKERS] for number in range(WORKERS)]
        done = list(pool.map(_predictions, [model] * WORKERS, [engine] * WORKERS, halves))
    counted = len(uris) - WORKERS * BATCH
    return {
        "images": sum(count for count, _, _ in done),
        "steady": counted / (max(end for _, _, end in done) - min(start for _, start, _ in done)),
    }


class _Eager:
    """The model actor of Ray's documentation."""

    def __init__(self, model: str) -> None:
        from btray.model.classifier import Classifier

        self.classifier = Classifier.load(model, engine="eager")

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        predictions = self.classifier.predict([np.asarray(image).mean(2).astype(np.uint8) for image in batch["image"]])
        return {
            "path": batch["path"],
            "label": np.array([prediction.label for prediction in predictions]),
            "confidence": np.array([prediction.confidence for prediction in predictions]),
        }


def documented(model: str, engine: str, uris: list[str], out: str) -> dict[str, float]:
    """Run the pipeline of https://docs.ray.io/en/latest/data/batch_inference.html ."""
    import ray

    from btray import storage

    filesystem = storage.arrow_filesystem(uris[0])[0]
    paths = [uri.removeprefix("s3://") for uri in uris]
    images = ray.data.read_images(paths, mode="RGB", include_paths=True, filesystem=filesystem)
    labelled = images.map_batches(
        _Eager, fn_constructor_args=(model,), batch_size=BATCH, concurrency=WORKERS, num_cpus=0.5
    )
    labelled.write_parquet(out)
    return {"images": len(uris)}


class _Frames:
    """A dataset of preprocessed frames."""

    def __init__(self, uris: list[str], preprocess: Any) -> None:
        from btray.data.frames import FrameSource

        self.uris = uris
        self.source = FrameSource(preprocess)

    def __len__(self) -> int:
        return len(self.uris)

    def __getitem__(self, index: int) -> Any:
        from btray import storage

        frames = self.source.from_bytes(storage.read_bytes(self.uris[index]))
        return frames[0] if isinstance(frames, list) else np.zeros((self.source.preprocess.size,) * 2, np.uint8)


def dataloader(model: str, engine: Any, uris: list[str], out: str) -> dict[str, float]:
    """Run the loop that most groups write by hand."""
    import pyarrow as pa
    import pyarrow.parquet
    import torch
    from torch.utils.data import DataLoader

    from btray.model.classifier import Classifier

    torch.set_num_threads(WORKERS)
    classifier = Classifier.load(model, engine=engine)
    frames_of: Any = _Frames(uris, classifier.manifest.preprocess)
    loader: Any = DataLoader(frames_of, BATCH, num_workers=WORKERS)
    labels: list[str] = []
    confidences: list[float] = []
    started = None
    for frames in loader:
        probabilities = classifier.calibrated(
            classifier.answer(frames.numpy()).logits, classifier.manifest.calibration.temperature
        )
        labels += [classifier.classes[index] for index in probabilities.argmax(1)]
        confidences += probabilities.max(1).tolist()
        started = started or time.time()
    steady = (len(uris) - BATCH) / (time.time() - (started or 0))
    pa.parquet.write_table(pa.table({"uri": uris, "label": labels, "confidence": confidences}), f"{out}.parquet")
    return {"images": len(labels), "steady": steady}


def daft(model: str, engine: Any, uris: list[str], out: str) -> dict[str, float]:
    """Run the pipeline of https://docs.daft.ai/en/stable/custom-code/cls/ ."""
    import daft
    from daft import DataType, Series

    @daft.cls(max_concurrency=WORKERS, use_process=True)
    class Labeller:
        def __init__(self) -> None:
            import torch

            from btray.model.classifier import Classifier

            torch.set_num_threads(1)
            self.classifier = Classifier.load(model, engine=engine)

        @daft.method.batch(return_dtype=DataType.string(), batch_size=BATCH)
        def label(self, data: Series) -> list[str | None]:
            return [prediction.label for prediction in self.classifier.predict(data.to_pylist())]

    labeller = Labeller()
    frame = daft.from_pydict({"uri": [uri if "://" in uri else f"file://{uri}" for uri in uris]})
    frame = frame.with_column("data", frame["uri"].download(on_error="null"))
    frame = frame.with_column("label", labeller.label(frame["data"])).exclude("data")
    frame.write_parquet(out)
    return {"images": len(uris)}


def main(arguments: list[str]) -> None:
    """Run one pipeline over the URIs on standard input."""
    pipeline, model, engine, out = arguments
    lines: Iterator[str] = iter(sys.stdin)
    uris = [line.rstrip("\n") for line in lines]
    pipelines = {function.__name__: function for function in (bare, documented, dataloader, daft)}
    print(json.dumps(pipelines[pipeline](model, engine, uris, out)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
