"""How a run over an archive ends: whatever fails at its end or on the way is told in one line, with its exit code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from ray.exceptions import RayTaskError

from btray import storage
from btray.bulk import classify as bulk
from btray.bulk import driver, runs, table
from btray.bulk import worklist as segments
from btray.bulk.lots import objects_of
from btray.bulk.part_files import write_part
from btray.bulk.runs import Run
from btray.core.errors import Failed, UserError
from btray.model.drift import Profile
from btray.model.prediction import Prediction
from btray.storage import StorageError
from tests.bulk.test_classify import report_of
from tests.helpers.classify_helpers import job, plain_rows
from tests.helpers.tiny_bundle import saved_bundle
from tests.public.test_results import NIGHT


@pytest.fixture
def night(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The classify job on one new scan a call, with the parts done here and not by Ray's actors."""
    monkeypatch.setattr(driver, "connected", lambda **options: nullcontext())
    monkeypatch.setattr(bulk, "_dataset", lambda config, run: SimpleNamespace(iter_batches=lambda **how: parts_of(run)))
    saved_bundle(str(tmp_path / "model"))
    output = str(tmp_path / "out")
    numbers = iter(range(9))

    def classify(**changes: Any) -> str:
        storage.write_bytes(str(tmp_path / "scans" / f"{next(numbers)}.jpg"), b"x")
        bulk.classify(job(str(tmp_path / "model"), str(tmp_path / "scans"), output, **changes))
        return output

    return classify


def parts_of(run: Run) -> Iterator[pa.Table]:
    for part in segments.parts(run.worklist):
        objects = objects_of(part.to_pylist()[0])
        said = Prediction(index=0, label="glioma", confidence=0.75, probabilities={"glioma": 0.75, "no_tumor": 0.25})
        rows = [table.row_of(said, info, run_id=run.run_id, classified_at=NIGHT) for info in objects]
        counts = {
            "objects": len(rows),
            "frames": len(rows),
            "bytes": 1,
            "labels": {"glioma": len(rows)},
            "rejected": {},
        }
        tally = counts | {"profile": Profile.of(rows).to_json(), "least_certain": [], "seconds": {}, "reused": False}
        write_part(run.part_uri(part["part"][0].as_py()), rows, table.SCHEMA, tally)
        yield pa.table({"part": part["part"], "tally": [json.dumps(tally)]})


def test_a_run_whose_summary_fails_ends_and_the_next_night_lists_what_is_new(
    night: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(bulk, "compare", lambda *arguments: 1 / 0)
        output = night(metrics_to=str(tmp_path / "last.prom"))
    report = report_of(output)
    assert (report["state"], report["summary_failed"]) == ("finished", "ZeroDivisionError: division by zero")
    assert "1 objects in" in capsys.readouterr().out
    night()
    assert not report_of(output)["resumed"]
    assert len(plain_rows(output)) == 2
    assert "summary_failed" not in report_of(output)


def test_a_run_that_cannot_be_concluded_fails_and_ends(night: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(bulk, "summary", lambda report: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            night()
    output = night()
    assert (report_of(output)["objects"], report_of(output)["unchanged"]) == (1, 1)


def test_a_run_that_is_stopped_while_it_concludes_is_taken_up(night: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bulk, "compare", stopped)
        with pytest.raises(KeyboardInterrupt):
            night()
    assert report_of(night())["resumed"]


@pytest.mark.parametrize("in_a_worker", [False, True])
@pytest.mark.parametrize(("code", "kind"), [("unavailable", Failed), ("throttled", Failed), ("forbidden", UserError)])
def test_a_store_that_may_come_back_is_a_failure_and_one_that_refuses_a_mistake(
    night: Any, monkeypatch: pytest.MonkeyPatch, code: str, kind: type[Exception], in_a_worker: bool
) -> None:
    error: Exception = StorageError(code, "s3://bucket/out", "what the store said")
    if in_a_worker:
        error = RayTaskError("read", "a traceback\nof many lines", error).as_instanceof_cause()

    def failing(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(runs, "begin", failing)
    with pytest.raises(kind, match=r"^s3://bucket/out: .*what the store said") as caught:
        night()
    assert "\n" not in str(caught.value)


def test_what_a_worker_says_to_the_user_is_said_without_its_traceback() -> None:
    for told in (UserError("--output is another folder"), Failed("part 3 seems to kill its worker")):
        with pytest.raises(type(told)) as caught, driver._in_own_words():
            raise RayTaskError("read", "a traceback\nof many lines", told).as_instanceof_cause()
        assert str(caught.value) == str(told)
