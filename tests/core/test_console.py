"""A run's output is for people: one live line on a terminal, btray's own lines, and the rest for --verbose alone."""

from __future__ import annotations

import io
import json
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from btray.core import console, logs
from btray.core.console import ProgressLine, show_worker_lines


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def ray_passes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have Ray's logger as it is after `take_over`."""
    monkeypatch.setattr(logging.getLogger("ray"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("ray"), "level", logging.INFO)


def a_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Make stderr a terminal of 40 columns. No fixture: pytest sets stderr again when the test begins."""
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    return stream


def lines_of_a_worker(monkeypatch: pytest.MonkeyPatch, style: logs.LogFormat) -> list[str]:
    """What a worker writes: two lines of btray's, one of them on progress, and one of Ray's."""
    stream = io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr("sys.stderr", stream)
        logs.begin_in_worker(style, run_id="r")
        logging.getLogger("btray.some").info("epoch ended", extra={"epoch": 1, "_progress": "epoch 1/2"})
        logging.getLogger("btray.some").warning("two\nlines")
        logging.getLogger("urllib3").warning("of a library")
        logging.getLogger("urllib3").info("chatter of a library")
    return [*stream.getvalue().split("\n")[:-1], "raw output of Ray"]


def shown(lines: list[str], **batch: Any) -> None:
    show_worker_lines({"pid": 7, "actor_name": "RayTrainWorker", "lines": lines, **batch})


def test_in_a_pipe_progress_is_a_line_on_stdout_and_ray_says_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = lines_of_a_worker(monkeypatch, "text")
    logs.begin()
    shown(lines)
    assert capsys.readouterr() == ("epoch 1/2\n", "two\nlines\nof a library\n")


def test_verbose_shows_the_rest_with_its_source(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = lines_of_a_worker(monkeypatch, "text")
    logs.begin(verbose=True)
    shown(lines)
    assert capsys.readouterr().err.splitlines()[-1] == "(RayTrainWorker pid=7) raw output of Ray"


@pytest.mark.parametrize("verbose", [False, True])
def test_a_json_log_holds_nothing_but_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verbose: bool
) -> None:
    lines = lines_of_a_worker(monkeypatch, "json")
    logs.begin("json", verbose=verbose)
    shown(lines)
    out, err = capsys.readouterr()
    records = [json.loads(line) for line in err.splitlines()]
    assert out == ""
    assert [record["message"] for record in records][:3] == ["epoch ended", "two\nlines", "of a library"]
    assert (records[0]["epoch"], records[0]["run_id"], "_progress" in records[0]) == (1, "r", False)
    assert [record["message"] for record in records[3:]] == ["(RayTrainWorker pid=7) raw output of Ray"] * verbose


def test_a_line_of_a_process_that_logs_text_is_wrapped_for_a_json_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = lines_of_a_worker(monkeypatch, "text")
    logs.begin("json")
    shown(lines[1:])
    messages = [json.loads(line)["message"] for line in capsys.readouterr().err.splitlines()]
    assert messages == ["two", "lines", "of a library"]


def test_a_cluster_that_cannot_grow_is_worth_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [":event_summary:Error: No available node types can fulfill {'GPU': 1.0}", ":event_summary:Adding 1 node",
             "======== Autoscaler status: ========"]  # fmt: skip
    for verbose in (False, True):
        logs.begin(verbose=verbose)
        shown(lines, pid="autoscaler", actor_name=None)
        said = capsys.readouterr().err.splitlines()
        assert said[0] == "cluster: Error: No available node types can fulfill {'GPU': 1.0}"
        assert said[1:] == ["cluster: Adding 1 node"] * verbose


def test_what_ray_logs_in_this_process_is_one_of_our_lines_or_stays_in_its_files(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logger = logging.getLogger("ray.some")
    logger.propagate = False
    logger.setLevel(logging.DEBUG)
    logger.addHandler(logging.StreamHandler())
    to_file = io.StringIO()
    logger.addHandler(logging.StreamHandler(to_file))
    logs.begin()
    logs.take_over("ray.some")
    logger.warning("worth it")
    logger.error("for Ray's own file", extra={"hide": True})
    logger.info("chatter")
    assert capsys.readouterr().err == "worth it\n"
    assert to_file.getvalue().splitlines() == ["worth it", "for Ray's own file", "chatter"]


def test_what_the_core_says_is_one_of_our_lines_and_what_is_no_trouble_is_for_verbose(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = ["A worker died:\nout of memory", "WARNING: 8 PYTHON worker processes have been started on node: ab",
             "Task ServeController.graceful_shutdown failed. There are infinite retries remaining"]  # fmt: skip
    for verbose in (False, True):
        logs.begin(verbose=verbose)
        shown(lines, pid="raylet", actor_name=None)
        said = capsys.readouterr().err.splitlines()
        assert said[0] == "Ray: A worker died: out of memory"
        assert len(said) == 1 + 2 * verbose


def test_a_line_that_speaks_for_all_workers_is_not_rewritten_by_one_of_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with ProgressLine("starting", of_workers=False):
        shown([f"{logs.PROGRESS}epoch 1/2"])
        console.show_progress("trial 1  epoch 1/2")
    shown([f"{logs.PROGRESS}epoch 2/2"])
    assert capsys.readouterr().out == "trial 1  epoch 1/2\nepoch 2/2\n", "where there is no terminal"
    terminal = a_terminal(monkeypatch)
    with ProgressLine("starting", of_workers=False) as line:
        line._drawn = 0.0
        shown([f"{logs.PROGRESS}epoch 1/2"])
        console.show_progress("trial 1")
    assert "epoch" not in terminal.getvalue()
    assert "trial 1" in terminal.getvalue()


def test_the_live_line_is_rewritten_below_other_output_and_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = a_terminal(monkeypatch)
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    logs.begin()
    long = "3 of 9, 10 images/s and so on, longer than the terminal is wide"
    with ProgressLine("starting") as line:
        assert "starting" in terminal.getvalue()
        for done in range(100):
            now.seconds += 0.02
            line.update(f"{done} of 9")
        assert 6 <= terminal.getvalue().count("of 9") <= 9, "four times per second at most"
        logging.getLogger("btray.some").warning("meanwhile")
        now.seconds += 1
        line.update(long)
        assert "and so on, longer than the terminal" not in terminal.getvalue(), "one line while it lives"
    said = terminal.getvalue()
    assert "meanwhile\n" in said
    assert said.rindex("meanwhile") < said.rindex("3 of 9")
    assert long in " ".join(said[said.rindex("3 of 9") :].split()), "what stays is whole"
    assert said.count("\x1b[?25l") == said.count("\x1b[?25h"), "the cursor is back"


def test_a_line_that_makes_way_for_a_summary_is_gone_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = a_terminal(monkeypatch)
    with ProgressLine("starting", keep=False):
        pass
    assert "starting" in terminal.getvalue()
    assert terminal.getvalue().rindex("\x1b[2K") > terminal.getvalue().rindex("starting"), "it is wiped"


def test_progress_of_a_worker_moves_the_live_line_and_is_not_printed_besides(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = a_terminal(monkeypatch)
    lines = lines_of_a_worker(monkeypatch, "text")
    logs.begin()
    with ProgressLine():
        shown(lines)
    shown(lines)  # came late
    assert terminal.getvalue().count("epoch 1/2") <= 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("style", ["text", "json"])
def test_nothing_is_drawn_without_a_terminal_or_in_a_json_log(
    style: logs.LogFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Terminal() if style == "json" else io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    logs.begin(style)
    with ProgressLine("starting") as line:
        line.update("3 of 9")
    assert stream.getvalue() == ""
