"""The console script `btray`: every job as a command, and `predict`, `key` and `models`, which are commands alone.

btray train --data ../data/brain-tumor-mri --out runs/first   # as python jobs/train.py, with no checkout
btray predict scan.jpg folder/ s3://bucket/scan.png           # by the shipped model; --model takes your own
btray key --file keys.txt --name radiology
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

from btray.core.errors import UserError
from btray.core.notice import NOTICE, percent
from btray.launch import read_config, run_command
from btray.model.config import PredictConfig
from btray.model.shipped import announce
from btray.serving.config import KeyConfig, ServeConfig

if TYPE_CHECKING:
    from btray.model.prediction import Prediction
    from btray.model.studies import Decision, Reader

# Scans held in memory at a time: a folder of any size goes through.
_AT_A_TIME = 32
_KEY_FRAMES = 3  # that are named
_ONE_FRAME = (".jpg", ".jpeg", ".png", ".bmp")


def main() -> None:
    """Run the command of the command line; see `launch.run_job` for the exit codes."""
    # A file name that is not UTF-8 is printed with escapes.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        run_command("btray", f"Brain-tumor classification of MRI slices. {NOTICE}")
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough; without this Python complains when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def serve(config: ServeConfig) -> str:
    """Serve until told to end and return the URL; SIGHUP reads the config again."""
    from btray.serving.job import run_service

    return run_service(config, lambda: read_config(ServeConfig))


def predict(config: PredictConfig) -> None:
    """Print a line for each frame of each scan, as they are read, then one for each series and study (DICOM).

    Raises UserError if no scan could be classified.
    """
    from btray.model.classifier import Classifier
    from btray.model.prediction import as_record
    from btray.model.promotion import pinned
    from btray.model.studies import Reader, StudyCollector

    config = pinned(config)
    classifier = Classifier.load(
        config.model, model_id=config.model_id, abstain_below=config.abstain_below, precision=config.precision
    )
    announce(config.model, classifier.model_id)
    print(NOTICE, file=sys.stderr, flush=True)
    inputs = _scans(config.files, classifier.model_id)
    if not config.json_lines:  # names are listed twice, so that one width suits the first line and the last
        width = max((_width(scan) for scan in _scans(config.files, classifier.model_id)), default=0)
    reader = Reader.of(classifier.manifest)
    studies = StudyCollector(reader)
    total = classified = 0
    while chunk := list(islice(inputs, _AT_A_TIME)):
        predictions: list[Prediction] = []
        for kind, group in groupby(chunk, type):
            given: list[Any] = list(group)
            predictions += classifier.predict(given) if kind is str else given
        if config.json_lines:
            lines = [json.dumps(as_record(prediction), allow_nan=False) for prediction in predictions]
        else:
            lines = _table(predictions, classifier.classes, width, header=total == 0)
        print("\n".join(lines), flush=True)
        studies.add(predictions)
        total += len(predictions)
        classified += sum(prediction.status == "ok" for prediction in predictions)
    for decision in studies.decisions():
        if config.json_lines:
            print(json.dumps(_study_record(decision, reader, classifier.model_id), allow_nan=False))
        else:
            print(_study_line(decision, reader))
    if total == 0:
        raise UserError(f"{config.files[0]} holds no file; name a scan, or a folder of scans")
    if classified == 0:
        raise UserError(f"not one of {total} scans could be classified; each line above says why")


def key(config: KeyConfig) -> None:
    """Make an API key and print it, or revoke one. Raises UserError if the file cannot be used."""
    from btray.serving.access import make_key, revoke_key

    if config.revoke:
        revoke_key(config.file, config.name)
        print(f"revoked {config.name}: the service refuses it within seconds", file=sys.stderr)
    else:
        print(make_key(config.file, config.name))
        print(f"the key of {config.name}; it is not kept: {config.file} has its digest", file=sys.stderr)


def _scans(files: Sequence[str], model_id: str) -> Iterator[str | Prediction]:
    """Yield every file, those of folders one by one; a folder that cannot be listed gives a rejected prediction."""
    from btray import storage
    from btray.data.frames import Rejection
    from btray.model.prediction import Prediction

    for file in files:
        uri = storage.resolve(file)
        try:
            if storage.is_folder(uri):
                yield from (info.uri for info in storage.list_files(uri))
            else:
                yield file
        except storage.StorageError as error:
            rejection = Rejection(error.code, str(error), error.retryable)
            yield Prediction.of_rejection(rejection, index=0, uri=file, model_id=model_id)


def _table(predictions: Sequence[Prediction], classes: Sequence[str], width: int, *, header: bool) -> list[str]:
    """Return a table whose first column is `width` wide, by lines; a rejected scan has its code and what was found."""
    from btray import storage

    label_width = max(len("rejected"), *(len(label) for label in classes))
    widths = [max(len(label), 5) for label in classes]
    lines = []
    if header:
        titles = "  ".join(f"{label:>{wide}}" for label, wide in zip(classes, widths, strict=True))
        lines.append(f"{'file':<{width}}  {'label':<{label_width}}  {'confidence':>10}  {titles}")
    for prediction in predictions:
        name = f"{_shown_name(prediction.uri, prediction.frame):<{width}}"
        if prediction.status == "ok":
            shares = (prediction.probabilities[label] for label in classes)
            values = "  ".join(f"{share:>{wide}.3f}" for share, wide in zip(shares, widths, strict=True))
            said = f"{name}  {prediction.label:<{label_width}}  {prediction.confidence:>10.3f}  {values}"
            lines.append("  ".join([said, *_marks(prediction, classes)]))
        else:
            # After all columns; a storage error begins with the name, which the row begins with too.
            reason = str(prediction.error).removeprefix(f"{storage.resolve(str(prediction.uri))}: ")
            empty = " " * (10 + sum(2 + wide for wide in widths))
            lines.append(f"{name}  {'rejected':<{label_width}}  {empty}  {prediction.error_code}: {reason}")
    return lines


def _study_record(decision: Decision, reader: Reader, model_id: str) -> dict[str, Any]:
    """Return what is said of a series or study, with the columns of the table of studies."""
    names = {"level": decision.level, "study_uid": decision.study_uid, "series_uid": decision.series_uid}
    key_frames = [{"uri": uri, "frame": frame} for uri, frame in decision.key_frames]
    return names | {"model_id": model_id, "rule": str(reader)} | asdict(decision.verdict) | {"key_frames": key_frames}


def _study_line(decision: Decision, reader: Reader) -> str:
    """Return the same for people."""
    verdict = decision.verdict
    frames = f"{verdict.frames} frames" + (f", {verdict.rejected} rejected" if verdict.rejected else "")
    name = f"{decision.level} {decision.series_uid or decision.study_uid}: "
    if verdict.label is None:
        return f"{name}no answer ({frames})"
    said = f"{verdict.label} {verdict.confidence:.3f}{' ABSTAINED' if verdict.abstained else ''}"
    shown = ", ".join(_shown_name(uri, frame) for uri, frame in decision.key_frames[:_KEY_FRAMES])
    return f"{name}{said} ({frames}, {percent(verdict.agreement or 0.0, 0)} agree; {reader}); most tumor: {shown}"


def _marks(prediction: Prediction, classes: Sequence[str]) -> Iterator[str]:
    """Yield why not to rely on the label, the gravest reason first."""
    if prediction.out_of_distribution:
        yield f"UNLIKE THE TRAINING IMAGES (ood_score {prediction.ood_score:.1f})"
    if prediction.abstained:
        yield "ABSTAINED"
    if 1 < len(prediction.label_set) < len(classes):  # a set of one, or of all, adds nothing to the label
        yield "one of: " + ", ".join(prediction.label_set)


def _shown_name(uri: str | None, frame: int) -> str:
    """Return the file, on one line, with the number of the frame from the second one on."""
    name = " ".join(str(uri).splitlines())
    return f"{name} frame {frame}" if frame else name


def _width(scan: str | Prediction) -> int:
    """Return how wide the name is, with the number of a frame if the file may have several."""
    name = " ".join((scan if isinstance(scan, str) else str(scan.uri)).splitlines())
    return len(name) + (0 if name.lower().endswith(_ONE_FRAME) else len(" frame 99"))
