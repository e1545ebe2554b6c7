"""Models are promoted on purpose: one promoter wins, the history stays, and a kill leaves one state or the other."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from btray import storage
from btray.core.errors import UserError
from btray.model import promotion
from btray.model.bundle_files import read_files
from btray.registry.config import ModelsConfig
from tests.helpers.registry_helpers import IDS, models, new_bundle, promoted


@pytest.fixture
def registry(place: str) -> str:
    """An empty registry, local and in a bucket."""
    return storage.join(place, "models", "brain-mri")


@pytest.fixture
def two(registry: str, tmp_path: Path) -> str:
    """A registry in which model 1 was promoted, then model 2."""
    for seed in (1, 2):
        models("promote", registry, model=new_bundle(str(tmp_path), seed), why=f"model {seed} is better")
    return registry


# ---- promote, roll back


def test_a_bundle_that_is_promoted_is_added_and_its_history_says_who_when_and_why(two: str) -> None:
    assert promoted(two) == IDS[2]
    assert promotion.resolve(f"{two}@production") == (storage.join(two, IDS[2]), IDS[2])
    first, second = promotion.history(two, "production")
    assert (first.model_id, first.previous, first.by, first.why) == (IDS[1], None, "ada@ward", "model 1 is better")
    assert (second.number, second.previous) == (2, IDS[1])
    assert first.at <= second.at
    assert {IDS[1], IDS[2]} <= set(storage.list_names(two)), "bundles by id, which nothing changes"


def test_a_roll_back_promotes_the_one_before_and_a_second_one_goes_further_back(two: str, tmp_path: Path) -> None:
    third = new_bundle(str(tmp_path), 3)
    assert models("promote", two, model=third, why="newer") == storage.join(two, IDS[3])
    models("roll-back", two, why="too many false alarms")
    assert promoted(two) == IDS[2]
    models("roll-back", two, why="still too many")
    assert promoted(two) == IDS[1]
    with pytest.raises(UserError, match="no earlier promotion"):
        models("roll-back", two, why="and again")
    models("promote", two, model=IDS[3][:8], why="it was the scanner")
    assert promoted(two) == IDS[3]
    assert len(promotion.history(two, "production")) == 6


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"action": "promote", "model": "1" * 32}, "--why"),
        ({"action": "promote", "why": "because"}, "--model"),
        ({"action": "show"}, "--model"),
        ({"action": "roll-back", "why": " "}, "--why"),
        ({"action": "promote", "model": "x", "why": "two\nlines"}, "one line"),
    ],
    ids=str,
)
def test_what_is_missing_is_named(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        ModelsConfig(registry="/models/x", **settings)


def test_of_an_unknown_action_the_known_ones_are_named_and_no_flag_that_is_none() -> None:
    with pytest.raises(UserError, match=r"^ACTION: 'lits' is refused: .*'list', 'show'.*'roll-back'$"):
        ModelsConfig.from_command_line(["lits", "--registry", "models"], "btray models")


def test_a_mistake_is_one_line_and_changes_nothing(two: str, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"model": "f" * 32}, "0 models of"),
        ({"model": IDS[2]}, "is already model"),
        ({"model": str(tmp_path / "nothing")}, "not a model bundle"),
    ]
    for settings, reason in cases:
        with pytest.raises(UserError, match=reason) as caught:
            models("promote", two, why="because", **settings)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"--against f+: "):
        models("compare", two, model=IDS[1], against="f" * 32)
    with pytest.raises(UserError, match="no model is there"):
        models("list", f"{two}-misspelt")
    with pytest.raises(UserError, match="without @STAGE"):
        models("list", f"{two}@production")
    with pytest.raises(UserError, match="no model is promoted"):
        promotion.resolve(f"{two}@trial")
    assert len(promotion.history(two, "production")) == 2


# ---- two at once, and kills


def test_of_two_promoters_at_once_one_wins_and_the_other_is_told(two: str, tmp_path: Path) -> None:
    for seed in (4, 5):
        new_bundle(two, seed)
        models("promote", two, model=storage.join(two, f"run-{seed}"), why="to have it here", stage="trial")
    for _ in range(3):
        gate = threading.Barrier(2)

        def promote(seed: int, gate: threading.Barrier = gate) -> str:
            gate.wait()
            try:
                models("promote", two, model=IDS[seed], why=f"{seed} at once")
            except UserError as error:
                return str(error)
            return "won"

        before = len(promotion.history(two, "production"))
        with ThreadPoolExecutor(2) as pool:
            ends = list(pool.map(promote, (4, 5)))
        made = promotion.history(two, "production")[before:]
        # the second may have looked after the first had won, and then it follows it
        assert ends.count("won") == len(made)
        assert ends.count("won") == 2 or [end for end in ends if "another promotion came first" in end]
        assert [entry.number for entry in promotion.history(two, "production")] == list(
            range(1, before + len(made) + 1)
        )
        models("promote", two, model=IDS[1], why="for the next round")


def test_decided_upon_the_same_state_exactly_one_of_many_wins(two: str) -> None:
    before = promotion.current(two, "production")
    assert before

    def record(number: int) -> bool:
        entry = promotion.Promotion(
            3, IDS[1], "2027-01-01T00:00:00+00:00", f"promoter {number}", "now", before.model_id
        )
        try:
            promotion.record(two, "production", entry)
        except UserError as error:
            assert "another promotion came first (" in str(error)  # noqa: PT017
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(record, range(8))) == 1
    assert len(promotion.history(two, "production")) == 3


def test_a_store_that_heeds_no_condition_is_refused(two: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(uri: str, data: bytes) -> bool:
        storage.write_bytes(uri, data)
        return True

    monkeypatch.setattr(storage, "write_new", careless)
    with pytest.raises(UserError, match="If-None-Match"):
        models("promote", two, model=IDS[1], why="because")


class _KilledError(BaseException):
    """Ends a promoter as SIGKILL would: nothing of it runs afterwards."""


def test_a_promoter_that_is_killed_between_any_two_steps_leaves_the_old_state_or_the_new_one(
    registry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file is one put: the promoter ends before or after the n-th, for every n, a local one by a real SIGKILL."""
    models("promote", registry, model=new_bundle(str(tmp_path), 1), why="first")
    new, put, step = new_bundle(str(tmp_path), 2), storage.write_new, 0
    while promoted(registry) != IDS[2]:
        step += 1
        child = os.fork() if not storage.is_remote(registry) else None  # S3's client does not survive a fork
        count = itertools.count(1)

        def dies(uri: str, data: bytes, child: int | None = child, step: int = step, count: Any = count) -> bool:
            number = next(count)
            for moment in (2 * number - 1, 2 * number):
                result = put(uri, data) if moment == 2 * number else False
                if moment == step:
                    if child == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    raise _KilledError
            return result

        if not child:
            try:
                monkeypatch.setattr(storage, "write_new", dies)
                with suppress(_KilledError):
                    models("promote", registry, model=new, why="second")
            finally:
                if child == 0:
                    os._exit(1)
            monkeypatch.setattr(storage, "write_new", put)
        else:
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert promoted(registry) in (IDS[1], IDS[2])
        read_files(promotion.resolve(f"{registry}@production")[0], model_id=promoted(registry))
    assert step > 10, "many steps were cut"
    assert [entry.model_id for entry in promotion.history(registry, "production")] == [IDS[1], IDS[2]]


def test_a_pin_beside_the_stage_is_a_second_opinion(two: str, tmp_path: Path) -> None:
    assert promotion.resolve(f"{two}@production", IDS[2])[1] == IDS[2]
    with pytest.raises(UserError, match=f"is model {IDS[2]} now, not the pinned --model-id {IDS[1]}"):
        promotion.resolve(f"{two}@production", IDS[1])
