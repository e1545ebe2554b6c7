"""Keys let in who has one, can be revoked while the service runs, and cannot be read out of their file."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from btray.core.errors import UserError
from btray.serving import access, gate
from btray.serving.access import KeyRing, make_key, revoke_key
from btray.serving.config import ServeConfig, is_loopback
from tests.helpers.serving_helpers import Running, problem, running, scan
from tools.processes import until

JPEG = "image/jpeg"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.txt"


@pytest.fixture
def guarded(model: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Running, str]]:
    monkeypatch.setattr(access, "REREAD", 0.2)
    key = make_key(str(file), "first")
    with running(model=model, keys=str(file)) as service:
        yield service, key


def with_key(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_the_file_holds_no_key_and_several_names(file: Path) -> None:
    keys = [make_key(str(file), name) for name in ("a", "b", "c")]
    text = file.read_text()
    assert len(set(keys)) == 3
    assert all(len(key) > 43 and key not in text for key in keys)
    ring = KeyRing.of(str(file))
    assert all(ring.accepts(key) for key in keys)
    for wrong in ("", keys[0][:-1], keys[0] + "x", text.split()[-1], "\udc80"):
        assert not ring.accepts(wrong)
    revoke_key(str(file), "b")
    assert [KeyRing.of(str(file)).accepts(key) for key in keys] == [True, False, True]


def test_mistakes_with_the_file_are_named(file: Path) -> None:
    make_key(str(file), "a")
    with pytest.raises(UserError, match="named a already"):
        make_key(str(file), "a")
    with pytest.raises(UserError, match="no key named b"):
        revoke_key(str(file), "b")
    file.write_text("a secret\n")
    with pytest.raises(UserError, match="line 1"):
        KeyRing.of(str(file))


def test_without_a_key_nothing_but_the_page_and_health_is_answered(guarded: tuple[Running, str]) -> None:
    service, key = guarded
    for path in gate.OPEN_PATHS:
        assert service.get(path).status_code == 200, path
    for path in ("/v1/models", "/metrics", "/openapi.json", "/v2", "/v2/models/btray", "/nothing"):
        answer = service.get(path)
        problem(answer, 401, "unauthorized")
        assert answer.headers["WWW-Authenticate"].startswith("Bearer")
    for headers in ({}, with_key("wrong"), with_key(""), {"Authorization": f"Basic {key}"}, {"X-API-Key": "no"}):
        problem(service.post("/v1/classify", scan(), JPEG, headers=headers), 401, "unauthorized")
    for headers in (with_key(key), {"X-API-Key": key}, {"Authorization": f"bearer {key}"}):
        assert service.post("/v1/classify", scan(), JPEG, headers=headers).status_code == 200


def test_a_key_is_revoked_and_another_made_while_the_service_runs(guarded: tuple[Running, str], file: Path) -> None:
    service, key = guarded
    second = make_key(str(file), "second")
    until(lambda: service.get("/v1/models", headers=with_key(second)).status_code == 200)
    revoke_key(str(file), "first")
    until(lambda: service.get("/v1/models", headers=with_key(key)).status_code == 401)
    assert service.get("/v1/models", headers=with_key(second)).status_code == 200
    file.unlink()
    until(lambda: service.get("/v1/models", headers=with_key(second)).status_code == 401)


def test_a_store_that_is_away_does_not_lock_everyone_out(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = make_key(str(file), "a")
    ring = KeyRing.of(str(file))
    monkeypatch.setattr(access, "REREAD", 0.0)

    def away(uri: str) -> str:
        raise access.StorageError("unavailable", uri, "connection refused")

    monkeypatch.setattr(access.storage, "read_text", away)
    time.sleep(0.01)
    ring.refresh()
    assert ring.accepts(key)


def test_a_store_that_does_not_answer_holds_nobody_up(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, answers, asked = make_key(str(file), "a"), threading.Event(), list[str]()
    ring = KeyRing.of(str(file))
    monkeypatch.setattr(access, "REREAD", -1.0)
    monkeypatch.setattr(access, "_PATIENCE", 0.01)

    def slow(uri: str) -> list[bytes]:
        asked.append(uri)
        assert answers.wait(60)
        return []

    monkeypatch.setattr(access, "_digests_in", slow)
    scope = {"type": "http", "headers": [(b"x-api-key", key.encode())]}

    async def ask() -> None:
        for _ in range(20):
            await access.Access(ring, insecure=False).check(scope)

    asyncio.run(ask())
    assert len(asked) == 1
    answers.set()
    until(lambda: not ring.accepts(key))


def test_without_keys_only_this_machine_by_its_own_name_is_answered(model: str) -> None:
    with running(model=model) as service:
        for host in (
            "localhost",
            "127.0.0.1:80",
            "[::1]",
            "[::1]:8000",
            "LOCALHOST",
            "LocalHost:8000",
            "localhost.",
            "localhost.:1",
        ):
            assert service.get("/v1/models", headers={"Host": host}).status_code == 200, host
        for host in (
            "example.org",
            "localhost.example.org",
            "127.0.0.1.example.org",
            "10.0.0.1",
            "",
            "localhost..",
            ".",
            "[::2]:80",
        ):
            problem(service.get("/v1/models", headers={"Host": host}), 403, "forbidden")
        # uvicorn takes this header from a proxy on the same machine
        problem(service.get("/v1/models", headers={"X-Forwarded-For": "203.0.113.9"}), 403, "forbidden")
    with running(model=model, insecure=True) as service:
        assert service.get("/v1/models", headers={"Host": "example.org"}).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::", "example.org"])
def test_another_address_without_keys_is_refused_unless_insecure_is_said(host: str) -> None:
    with pytest.raises(ValidationError, match="--insecure"):
        ServeConfig(model="m", host=host)
    assert ServeConfig(model="m", host=host, insecure=True)
    assert ServeConfig(model="m", host=host, keys="keys.txt")
    assert not is_loopback(host)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost", "LOCALHOST", "localhost."])
def test_loopback_needs_no_key(host: str) -> None:
    assert is_loopback(host)
    assert ServeConfig(model="m", host=host)


def test_the_command_prints_the_key_once_and_revokes_it(file: Path) -> None:
    start = "from btray.cli import main; main()"
    command = [sys.executable, "-c", start, "key", "--file", str(file), "--name", "radiology"]
    made = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    key = made.stdout.strip()
    assert KeyRing.of(str(file)).accepts(key)
    again = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert again.returncode == 2
    assert "radiology" in again.stderr
    subprocess.run([*command, "--revoke"], capture_output=True, check=True, timeout=60)
    assert not KeyRing.of(str(file)).accepts(key)
