"""Models are promoted on purpose: one promoter wins, the history stays, and a job uses one model from start to end."""

from __future__ import annotations

import json
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from btray import storage
from btray.bulk.classify import ClassifyJob
from btray.bulk.config import ClassifyConfig
from btray.core.errors import ThresholdExceeded, UserError
from btray.evaluation.config import EvaluateConfig
from btray.model import promotion
from btray.model.bundle import load_bundle
from btray.registry.config import ModelsConfig
from btray.registry.job import manage
from btray.serving import job as serving_job
from btray.serving.config import ServeConfig
from tests.conftest import ROOT
from tests.helpers.tiny_bundle import saved_bundle
from tests.helpers.training_helpers import write_tree

IDS: dict[int, str] = {}


def models(action: str, registry: str, **settings: Any) -> str | None:
    return manage(ModelsConfig(action=action, registry=registry, **{"by": "ada@ward", **settings}))


def new_bundle(folder: str, seed: int, **options: Any) -> str:
    """Write a bundle to `folder`/SEED and return its URI; IDS has its model_id."""
    uri = storage.join(folder, f"run-{seed}")
    IDS[seed] = saved_bundle(uri, seed=seed, **options).manifest.model_id
    return uri


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


def promoted(registry: str) -> str | None:
    entry = promotion.current(registry, "production")
    return entry.model_id if entry else None


# ---- promote, roll back, list, show


def test_a_bundle_that_is_promoted_is_added_and_its_history_says_who_when_and_why(two: str) -> None:
    assert promoted(two) == IDS[2]
    assert load_bundle(f"{two}@production").manifest.model_id == IDS[2]
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


def test_list_show_and_compare_say_what_is_there(two: str, capsys: pytest.CaptureFixture[str]) -> None:
    models("promote", two, model=IDS[1], why="as a trial", stage="trial")
    capsys.readouterr()
    models("list", two)
    shown = capsys.readouterr().out
    lines = {line.split()[0]: line for line in shown.splitlines() if line}
    assert lines[IDS[2]].endswith("<- production")
    assert lines[IDS[1]].endswith("<- trial")
    assert "promoted" in lines["2"]
    assert lines["2"].endswith("by ada@ward: model 2 is better")
    models("show", two, model=IDS[1][:6])
    assert IDS[1] in capsys.readouterr().out
    models("compare", two, model=IDS[1])
    assert {IDS[1], IDS[2]} <= set(capsys.readouterr().out.split())


def test_accuracy_by_source_is_that_of_the_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    registry = str(tmp_path / "brain-mri")
    models("promote", registry, model=str(ROOT / "btray" / "pretrained" / "brain-mri"), why="it ships")
    capsys.readouterr()
    models("show", registry, model=str(promoted(registry)))
    shown = capsys.readouterr().out
    assert "brain-tumor-mri" in shown
    assert "accuracy 0." in shown


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


def test_a_mistake_is_one_line_and_changes_nothing(two: str, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"model": "f" * 32}, "0 models of"),
        ({"model": IDS[2]}, "already"),
        ({"model": str(tmp_path / "nothing")}, "not a model bundle"),
    ]
    for settings, reason in cases:
        with pytest.raises(UserError, match=reason) as caught:
            models("promote", two, why="because", **settings)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="without @STAGE"):
        models("list", f"{two}@production")
    with pytest.raises(UserError, match="no model is promoted"):
        load_bundle(f"{two}@trial")
    assert len(promotion.history(two, "production")) == 2


# ---- two at once, and kills


def test_of_two_promoters_at_once_one_wins_and_the_other_is_told(two: str, tmp_path: Path) -> None:
    for seed in (4, 5):
        new_bundle(two, seed)
        os_free_add(two, seed)
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


def os_free_add(registry: str, seed: int) -> None:
    """Put the bundle of `seed` in the registry under its id, as promote does."""
    source = storage.join(registry, f"run-{seed}")
    models("promote", registry, model=source, why="to have it here", stage="trial")


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


def test_a_promoter_that_is_killed_between_any_two_steps_leaves_the_old_state_or_the_new_one(
    registry: str, tmp_path: Path
) -> None:
    """Each file is one put: the child ends by SIGKILL before or after the n-th, for every n."""
    models("promote", registry, model=new_bundle(str(tmp_path), 1), why="first")
    new = new_bundle(str(tmp_path), 2)
    step, done = 0, False
    while not done:
        step += 1
        child = os.fork()
        if child == 0:
            try:
                storage.reconnect()
                dies_at(step)
                models("promote", registry, model=new, why="second")
            finally:
                os._exit(0)
        done = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert promoted(registry) in ((IDS[2],) if done else (IDS[1], IDS[2]))
        assert load_bundle(f"{registry}@production").manifest.model_id == promoted(registry)
        if promoted(registry) == IDS[2]:
            break
    assert step > 3, "several steps were cut"
    assert [entry.model_id for entry in promotion.history(registry, "production")] == [IDS[1], IDS[2]]


def dies_at(step: int) -> None:
    """Let this process die by SIGKILL in the middle of a run of puts: the odd ones before it, the even ones after."""
    put, count = storage.write_new, 0

    def counted(uri: str, data: bytes) -> bool:
        nonlocal count
        count += 1
        if 2 * count - 1 == step:
            os.kill(os.getpid(), signal.SIGKILL)
        result = put(uri, data)
        if 2 * count == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    storage.write_new = counted


# ---- who uses it


def test_a_night_uses_the_model_that_was_promoted_when_it_began_whatever_is_promoted_then(
    two: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    (tmp_path / "scans").mkdir()
    night = ClassifyJob(
        ClassifyConfig(model=f"{two}@production", input=str(tmp_path / "scans"), output=str(tmp_path / "results"))
    )
    assert f"{two}@production is model {IDS[2]}, promoted" in caplog.text
    models("roll-back", two, why="while a night runs")
    assert promoted(two) == IDS[1]
    assert night.bundle.manifest.model_id == IDS[2]
    assert (night.config.model, night.config.model_id) == (storage.join(two, IDS[2]), IDS[2]), "its workers are told so"
    assert IDS[2] in night.folder("2027-01-01")


def test_the_service_takes_a_roll_back_when_it_is_told_to_read_its_config_again(two: str) -> None:
    config = ServeConfig(model=f"{two}@production")
    before = serving_job._verified(config)
    models("roll-back", two, why="while replicas run")
    after = serving_job._verified(config)
    assert [one.model_id for one in (before, after)] == [IDS[2], IDS[1]]
    assert before.model == storage.join(two, IDS[2])


def test_a_pin_beside_the_stage_is_a_second_opinion(two: str, tmp_path: Path) -> None:
    assert promotion.resolve(f"{two}@production", IDS[2])[1] == IDS[2]
    with pytest.raises(UserError, match=f"is model {IDS[2]} now, not the pinned --model-id {IDS[1]}"):
        promotion.resolve(f"{two}@production", IDS[1])


def test_a_report_that_is_made_again_by_another_promoted_model_is_not_overwritten(two: str, tmp_path: Path) -> None:
    config = EvaluateConfig(model=f"{two}@production", data=str(tmp_path), out=str(tmp_path / "report"))
    settings = promotion.pinned(config, log=False).model_dump(mode="json")
    storage.write_json(storage.join(config.out, "metrics.json"), {})
    storage.write_text(storage.join(config.out, "config.yaml"), json.dumps(settings))
    config.check()
    models("roll-back", two, why="after the report")
    with pytest.raises(UserError, match="another model"):
        config.check()


# ---- a data set says no


@pytest.mark.cluster
def test_a_model_that_a_data_set_says_is_worse_is_refused_unless_it_is_forced_with_a_reason(
    ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_tree(str(tmp_path / "data"), {"glioma": 6, "no_tumor": 6})
    registry = str(tmp_path / "models" / "brain-mri")
    models("promote", registry, model=new_bundle(str(tmp_path), 1), why="first")
    other = new_bundle(str(tmp_path), 2)
    models("compare", registry, model=other, require=data)
    said = capsys.readouterr().out
    difference = float(said.rpartition(": ")[2].split()[0])
    asked: dict[str, Any] = {"model": other, "require": data, "at_least": min(1.0, difference + 0.05)}
    with pytest.raises(ThresholdExceeded, match=r"not promoted: on 12 images of .*--force --why"):
        models("promote", registry, why="it is newer", **asked)
    assert promoted(registry) == IDS[1]
    models("promote", registry, why="the old one is of another scanner", force=True, **asked)
    entry = promotion.current(registry, "production")
    assert entry
    assert (entry.model_id, entry.forced, entry.evidence["data"]) == (IDS[2], True, data)
    models("roll-back", registry, why="to try again")
    models("promote", registry, why="as good", **asked | {"at_least": -1.0})
    assert not promotion.history(registry, "production")[-1].forced


# ---- MLflow


def test_mlflow_gets_a_copy_and_one_that_fails_changes_nothing(two: str, tmp_path: Path, caplog: Any) -> None:
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    server = str(tmp_path / "mlflow")
    models("roll-back", two, why="to see it there", mlflow=server)
    name = storage.name(two)
    version = MlflowClient(tracking_uri=server, registry_uri=server).get_model_version_by_alias(name, "production")
    assert (version.tags["model_id"], version.source) == (IDS[1], storage.join(two, IDS[1]))
    (tmp_path / "a file").write_text("")
    models("promote", two, model=IDS[2], why="again", mlflow=str(tmp_path / "a file"))
    assert "has no copy of this promotion" in caplog.text
    assert promoted(two) == IDS[2]
