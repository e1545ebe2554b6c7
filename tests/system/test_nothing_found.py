"""A run whose input names files of which not one is there is wrong use, whatever the job."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from btray.acquire.config import AcquireConfig
from btray.acquire.job import acquire
from btray.audit.config import AuditConfig
from btray.audit.job import audit
from btray.bulk.classify import classify
from btray.bulk.config import ClassifyConfig, PackConfig
from btray.bulk.pack import pack
from btray.core.errors import UserError
from btray.evaluation.config import EvaluateConfig
from btray.evaluation.job import evaluate
from btray.training.config import TrainConfig
from btray.training.job import train
from tests.helpers.classify_helpers import without_ray
from tests.helpers.local_data import run_here
from tests.helpers.tiny_bundle import saved_bundle

Job = Callable[[str, str, str], Any]
JOBS: dict[str, Job] = {
    "acquire": lambda data, out, _: acquire(AcquireConfig(source=(data,), out=out)),
    "audit": lambda data, out, _: audit(AuditConfig(data=data, out=out)),
    "classify": lambda data, out, model: classify(ClassifyConfig(model=model, input=data, output=out, actors=1)),
    "evaluate": lambda data, out, model: evaluate(EvaluateConfig(model=model, data=data, out=out)),
    "pack": lambda data, out, _: pack(PackConfig(input=data, output=out, actors=1)),
    "train": lambda data, out, _: train(TrainConfig(data=data, out=out, epochs=1)),
}


@pytest.mark.parametrize("name", JOBS)
def test_nothing_found_is_wrong_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    run_here(monkeypatch)
    without_ray(monkeypatch)
    bundle = saved_bundle(str(tmp_path / "model"))
    classes = bundle.manifest.classes
    rows = [f"gone/{number}.jpg,{classes[number % 2]}" for number in range(8)]
    (tmp_path / "m.csv").write_text("\n".join(["uri,label", *rows]))
    with pytest.raises(UserError, match=r"m\.csv: (not one of the 8|none of its 8)") as caught:
        JOBS[name](str(tmp_path / "m.csv"), str(tmp_path / "out"), str(tmp_path / "model"))
    assert "\n" not in str(caught.value)
