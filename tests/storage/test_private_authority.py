"""A store with a certificate of a private authority: both clients know it, or the log says which one does not."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from btray import storage
from btray.storage import StorageError, s3_clients
from btray.storage.s3 import fetch_body
from tests.helpers.authority import private_authority
from tests.helpers.s3_proxy import Request, s3_proxy
from tools.s3_server import S3Server

pytestmark = pytest.mark.s3


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return private_authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def tls(authority: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority / "server.crt", authority / "server.key")
    return context


def test_both_clients_know_the_authority_that_botocore_is_told(
    s3: S3Server, bucket: str, authority: Path, tls: ssl.SSLContext, *, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    storage.write_bytes(f"{bucket}/other", b"more")
    monkeypatch.setenv("AWS_CA_BUNDLE", str(authority / "ca.crt"))
    with s3_proxy(s3, Request.forward, tls):
        assert storage.write_new(f"{bucket}/k", b"body")
        assert storage.read_bytes(f"{bucket}/k") == b"body"
        assert fetched(bucket) == b"body", "by the fast client, not by the slower one in its stead"
        assert storage.list_names(bucket) == ["k", "other"]
    assert "slower" not in caplog.text


def test_an_authority_that_nobody_was_told_is_an_error_that_names_it(
    s3: S3Server, bucket: str, tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)
    with (
        s3_proxy(s3, Request.forward, tls),
        storage.retry_timeout(0.1),
        pytest.raises(StorageError, match="certificate"),
    ):
        storage.read_bytes(f"{bucket}/k")


def test_that_the_slower_client_is_used_instead_stands_in_the_log_once(
    s3: S3Server, bucket: str, authority: Path, tls: ssl.SSLContext, *, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    storage.write_bytes(f"{bucket}/k", b"body")
    monkeypatch.setenv("AWS_CA_BUNDLE", str(authority / "ca.crt"))
    real = s3_clients.S3Store

    def forgetful(*arguments: object, client_options: dict[str, object], **options: object) -> object:
        del client_options["root_certificate"]
        return real(*arguments, client_options=client_options, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(s3_clients, "S3Store", forgetful)
    with s3_proxy(s3, Request.forward, tls):
        for _ in range(3):
            assert storage.read_bytes(f"{bucket}/k") == b"body"
        assert fetched(bucket) is None
        with storage.retry_timeout(0.1), pytest.raises(StorageError):
            storage.read_bytes(f"{bucket}/absent")
    lines = [record.message for record in caplog.records if "slower" in record.message]
    assert len(lines) == 1
    assert bucket in lines[0]
    assert "certificate" in lines[0].casefold()


def fetched(bucket: str) -> bytes | None:
    return fetch_body(bucket.removeprefix("s3://"), "k", lambda *_: None)
