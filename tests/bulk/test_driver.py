"""However a run over an archive ends, whatever fails at its end or on the way is reported in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayTaskError

from btray import storage
from btray.bulk import classify as classify_module
from btray.bulk import driver, runs, summary
from btray.core.errors import Failed, UserError
from btray.storage import StorageError
from tests.helpers.classify_helpers import job, plain_rows, report_of, without_reading
from tests.helpers.tiny_bundle import saved_bundle


@pytest.fixture
def nightly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The classify job on one new scan per call, with the parts processed here and not by Ray's actors."""
    without_reading(monkeypatch)
    saved_bundle(str(tmp_path / "model"))
    output = str(tmp_path / "out")
    numbers = iter(range(9))

    def classify(**changes: Any) -> str:
        storage.write_bytes(str(tmp_path / "scans" / f"{next(numbers)}.jpg"), b"x")
        classify_module.classify(job(str(tmp_path / "model"), str(tmp_path / "scans"), output, **changes))
        return output

    return classify


def test_a_run_whose_summary_fails_ends_and_the_next_one_lists_what_is_new(
    nightly: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(summary, "compare", lambda *arguments: 1 / 0)
        output = nightly(metrics_to=str(tmp_path / "last.prom"))
    report = report_of(output)
    assert (report["state"], report["summary_failed"]) == ("finished", "ZeroDivisionError: division by zero")
    assert "1 objects in" in capsys.readouterr().out
    nightly()
    assert not report_of(output)["resumed"]
    assert len(plain_rows(output)) == 2
    assert "summary_failed" not in report_of(output)


def test_a_run_that_cannot_be_concluded_fails_and_ends(nightly: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(classify_module, "summarize", lambda report: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            nightly()
    output = nightly()
    assert (report_of(output)["objects"], report_of(output)["unchanged"]) == (1, 1)


def test_a_run_that_is_stopped_while_it_concludes_is_resumed(nightly: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(summary, "compare", stopped)
        with pytest.raises(KeyboardInterrupt):
            nightly()
    assert report_of(nightly())["resumed"]


@pytest.mark.parametrize("in_a_worker", [False, True])
@pytest.mark.parametrize(("code", "exit_code"), [("unavailable", 1), ("throttled", 1), ("forbidden", 2)])
def test_a_store_that_may_come_back_is_a_failure_and_one_that_refuses_a_mistake(
    nightly: Any, monkeypatch: pytest.MonkeyPatch, code: str, exit_code: int, in_a_worker: bool
) -> None:
    error: Exception = StorageError(code, "s3://bucket/out", "what the store said")
    if in_a_worker:
        error = RayTaskError("read", "a traceback\nof many lines", error).as_instanceof_cause()

    def failing(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(runs, "begin", failing)
    with pytest.raises(StorageError, match=r"^s3://bucket/out: .*what the store said") as caught:
        nightly()
    assert caught.value.exit_code == exit_code
    assert "\n" not in str(caught.value)


def test_an_error_of_a_worker_for_the_user_is_shown_without_its_traceback() -> None:
    for error in (UserError("--output is another folder"), Failed("part 3 seems to kill its worker")):
        with pytest.raises(type(error)) as caught, driver._readable_errors():
            raise RayTaskError("read", "a traceback\nof many lines", error).as_instanceof_cause()
        assert str(caught.value) == str(error)


def test_a_night_with_nothing_new_loads_neither_torch_nor_ray(nightly: Any, tmp_path: Path) -> None:
    output = nightly()
    code = (
        "import sys\n"
        "from btray.bulk.classify import classify\n"
        "from btray.bulk.config import ClassifyConfig\n"
        f"folder = {str(tmp_path)!r}\n"
        f"classify(ClassifyConfig(model=folder + '/model', input=folder + '/scans', output={output!r}))\n"
        "print(sorted({'torch', 'ray', 'pandas', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "1 unchanged" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
