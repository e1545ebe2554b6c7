"""A new config takes over whole once it is ready, and what cannot be served changes nothing and is told."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from btray.core.errors import UserError
from btray.model.bundle import Bundle, load_bundle
from btray.model.classifier import Classifier
from btray.serving import models as served_models
from btray.storage import StorageError
from tests.helpers.serving_helpers import bundle_at, running, scan
from tools.processes import until

CLASSIFY = "/v1/classify"
JPEG = "image/jpeg"


def test_a_new_bundle_takes_over_while_the_old_one_answers(model: str, tmp_path: Path) -> None:
    other = bundle_at(tmp_path, "other", seed=7)
    wanted = Classifier.load(other).model_id
    with running(model=model) as service:
        first = service.served()
        stop = threading.Event()
        answers: list[tuple[int, str]] = []

        def hammer() -> None:
            while not stop.is_set():
                answer = service.post(CLASSIFY, scan(), JPEG)
                answers.append((answer.status_code, answer.json().get("model_id")))

        with ThreadPoolExecutor(2) as pool:
            hammers = [pool.submit(hammer) for _ in range(2)]
            service.configure(model=other)
            assert service.switched()["state"] == "done"
            seen = len(answers)
            while len(answers) < seen + 10:
                time.sleep(0.01)
            stop.set()
            for future in hammers:
                future.result()
        assert {status for status, _ in answers} == {200}
        assert service.served() == [wanted] != first
        assert answers[-1][1] == wanted


def test_a_bad_bundle_leaves_the_old_one_serving_and_says_why(model: str, tmp_path: Path) -> None:
    broken = bundle_at(tmp_path, "broken", seed=8)
    weights = Path(broken) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with running(model=model) as service:
        before = service.served()
        for config, why in (
            ({"model": broken}, "model.safetensors was changed"),
            ({"model": str(tmp_path / "nothing")}, "not a model bundle"),
            ({"model": model, "model_id": "0" * 32}, "not the pinned"),
            ({"model": model, "canary": {"model": broken, "share": 0.5}}, "model.safetensors was changed"),
            ({"model": model, "keys": str(tmp_path / "no keys")}, "no keys"),
        ):
            service.configure(**config)
            switch = service.switched()
            assert switch["state"] == "refused"
            assert why in switch["detail"]
            assert service.served() == before
            assert service.post(CLASSIFY, scan(), JPEG).status_code == 200
        with pytest.raises(UserError, match="changed"), running(model=broken):
            pass


def test_what_is_told_is_what_became_of_the_latest_config(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = bundle_at(tmp_path, "other", seed=9)
    go_on = threading.Event()

    def slow(*arguments: Any, **options: Any) -> Bundle:
        assert go_on.wait(30)
        return load_bundle(*arguments, **options)

    with running(model=model) as service:
        monkeypatch.setattr(served_models, "load_bundle", slow)
        service.configure(model=other)
        service.service.models.refuse("a config that is none", UserError("no such field"))
        go_on.set()
        until(lambda: service.served() == [Classifier.load(other).model_id])
        assert service.switched() == {"state": "refused", "detail": "no such field"}
        service.configure(model=model, keys=str(tmp_path / "no keys"))
        assert "no keys" in service.switched()["detail"]
        service.configure(model=model)
        assert service.switched() == {"state": "done", "detail": ""}


def test_a_bundle_whose_store_is_away_is_tried_again_until_it_is_there_or_another_is_wanted(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, third = (bundle_at(tmp_path, name, seed=seed) for name, seed in (("other", 9), ("third", 10)))
    away = {other: 2, third: 10**6}

    def unreliable(uri: str, **options: Any) -> Bundle:
        away[uri] = away.get(uri, 0) - 1
        if away[uri] >= 0:
            raise StorageError("unavailable", uri)
        return load_bundle(uri, **options)

    monkeypatch.setattr(served_models, "load_bundle", unreliable)
    monkeypatch.setattr(served_models, "_FIRST_PAUSE", 0.05)
    with running(model=model) as service:
        service.configure(model=other)
        assert service.switched() == {"state": "done", "detail": ""}
        assert service.served() == [Classifier.load(other).model_id]
        monkeypatch.setattr(served_models, "_FIRST_PAUSE", 60.0)
        service.configure(model=third)

        def backoff_delays() -> None:
            until(lambda: "tried again" in service.get("/v1/models").json()["switch"]["detail"])
            away[third] = 0  # it is there again, and nobody wants it any more

        backoff_delays()
        service.configure(model=str(tmp_path / "nothing"))
        assert "not a model bundle" in service.switched()["detail"]
        assert service.served() == [Classifier.load(other).model_id]
        away[third] = 10**6
        service.configure(model=third)
        backoff_delays()
        service.configure(model=model)
        assert service.switched() == {"state": "done", "detail": ""}
        assert service.served() == [Classifier.load(model).model_id]


def test_the_latest_of_several_configs_wins(model: str, tmp_path: Path) -> None:
    others = [bundle_at(tmp_path, f"m{seed}", seed=seed) for seed in (11, 12, 13)]
    with running(model=model) as service:
        for other in others:
            service.configure(model=other)
        assert service.switched()["state"] == "done"
        assert service.served() == [Classifier.load(others[-1]).model_id]


def test_a_canary_answers_its_share_and_says_so(model: str, tmp_path: Path) -> None:
    other = bundle_at(tmp_path, "other", seed=9)
    with running(model=model, canary={"model": other, "share": 0.3}) as service:
        main, canary = service.served()
        answers = [service.post(CLASSIFY, scan(), JPEG).json() for _ in range(200)]
        share = sum(answer["model_id"] == canary for answer in answers) / len(answers)
        assert 0.15 < share < 0.45
        expected = {uri: Classifier.load(uri).predict([scan()])[0] for uri in (model, other)}
        for answer in answers:
            prediction = expected[model if answer["model_id"] == main else other]
            assert answer["results"][0]["label"] == prediction.label
        service.configure(model=model, canary={"model": other, "share": 1.0})
        assert service.switched()["state"] == "done"
        assert {service.post(CLASSIFY, scan(), JPEG).json()["model_id"] for _ in range(10)} == {canary}
        service.configure(model=other)
        assert service.switched()["state"] == "done"
        assert service.served() == [canary]
