"""Jobs, service and reports use the model that was promoted when they began, and a data set may refuse a promotion."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from btray import storage
from btray.bulk.classify import ClassifyJob
from btray.bulk.config import ClassifyConfig
from btray.core.errors import ThresholdExceeded, UserError
from btray.evaluation.config import EvaluateConfig
from btray.model import promotion
from btray.serving import job as serving_job
from btray.serving.config import ServeConfig, ServiceConfig
from btray.serving.deployment import SharedConfigs
from tests.helpers.local_data import run_here
from tests.helpers.registry_helpers import IDS, models, new_bundle, promoted
from tests.helpers.serving_helpers import TextsInMemory
from tests.helpers.tiny_bundle import saved_bundle
from tests.helpers.training_helpers import write_tree


@pytest.fixture
def registry(tmp_path: Path) -> str:
    """An empty registry."""
    return str(tmp_path / "models" / "brain-mri")


@pytest.fixture
def two(registry: str, tmp_path: Path) -> str:
    """A registry in which model 1 was promoted, then model 2."""
    for seed in (1, 2):
        models("promote", registry, model=new_bundle(str(tmp_path), seed), why=f"model {seed} is better")
    return registry


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


def test_accuracy_by_source_is_that_of_the_bundle(registry: str, capsys: pytest.CaptureFixture[str]) -> None:
    models("promote", registry, model="brain-mri", why="it ships")
    capsys.readouterr()
    models("show", registry, model=str(promoted(registry)))
    shown = capsys.readouterr().out
    assert re.search(r"^source brain-tumor-mri: \d+ images, macro-F1 0\.\d+", shown, re.MULTILINE)
    assert "accuracy 0." in shown


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


def test_a_replica_that_is_added_later_takes_the_model_of_those_that_run(two: str) -> None:
    given = ServiceConfig(model=f"{two}@production")
    running_one, late = SharedConfigs(""), SharedConfigs("")
    running_one.texts = late.texts = TextsInMemory()  # type: ignore[assignment]
    assert running_one.pin(given).model_id == IDS[2]
    models("roll-back", two, why="between two replicas")
    assert late.pin(given).model_id == IDS[2]
    other = given.model_copy(update={"max_batch": 3})
    assert late.pin(other).model_id == IDS[1], "another config means what is promoted now"
    assert running_one.pin(given).model_id == IDS[1], "and so does the first one when it comes back"


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


def test_a_model_that_a_data_set_says_is_worse_is_refused_unless_it_is_forced_with_a_reason(
    registry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_here(monkeypatch)
    data = write_tree(str(tmp_path / "data"), {"glioma": 6, "no_tumor": 6})
    first, other = (str(tmp_path / f"random-{seed}") for seed in (1, 2))
    ids = [saved_bundle(uri, seed=seed).manifest.model_id for seed, uri in enumerate((first, other))]
    models("promote", registry, model=first, why="first")
    asked: dict[str, Any] = {"model": other, "require": data, "at_least": 1.0}
    with pytest.raises(ThresholdExceeded, match=r"not promoted: on 12 images of .*--force --why"):
        models("promote", registry, why="it is newer", **asked)
    assert promoted(registry) == ids[0]
    models("promote", registry, why="the old one is of another scanner", force=True, **asked)
    entry = promotion.current(registry, "production")
    assert entry
    assert (entry.model_id, entry.forced, entry.evidence["data"]) == (ids[1], True, data)


# ---- MLflow


def test_mlflow_gets_a_copy_and_one_that_fails_changes_nothing(
    two: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # what the light client can write without a server
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    server = str(tmp_path / "mlflow")
    models("roll-back", two, why="to see it there", mlflow=server)
    name = storage.name(two)
    version = MlflowClient(tracking_uri=server, registry_uri=server).get_model_version_by_alias(name, "production")
    assert (version.tags["model_id"], version.source) == (IDS[1], storage.join(two, IDS[1]))
    assert not (tmp_path / "mlflow.db").exists(), "nothing is written where the command was given"
    (tmp_path / "a file").write_text("")
    models("promote", two, model=IDS[2], why="again", mlflow=str(tmp_path / "a file"))
    assert "has no copy of this promotion" in caplog.text
    assert promoted(two) == IDS[2]
