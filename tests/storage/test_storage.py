"""Storage takes names literally, loses nothing silently, writes whole files or none, and types failures in seconds."""

from __future__ import annotations

import errno
import hashlib
import http.server
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from btray import storage
from btray.core.errors import UserError
from btray.storage import StorageError
from btray.storage import s3 as client
from btray.storage.read_many import read_many
from tests.helpers.s3_proxy import Request, s3_proxy
from tools.s3_server import S3Server

_LONG_AGO = "Thu, 01 Jan 2026 00:00:00 GMT"

ODD_NAMES = (
    "a b.jpg",
    "50%20.jpg",
    "h#1.jpg",
    "q?versionId=1.jpg",
    "plus+&=.jpg",
    "日本/ünï.jpg",
    "noext",
    "a'\"(1).jpg",
)


@pytest.fixture(scope="module")
def shared_bucket(s3: S3Server) -> str:
    """One bucket for all tests here: SeaweedFS reserves seven of its volumes for each bucket and has room for seven."""
    s3.make_bucket("test-storage")
    return "s3://test-storage"


@pytest.fixture
def remote(shared_bucket: str) -> Iterator[str]:
    """An unused prefix, and a client that knows of the server before and of nothing after."""
    storage.reconnect()
    yield storage.join(shared_bucket, uuid.uuid4().hex)
    storage.reconnect()


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder and an unused prefix: what holds for the one holds for the other."""
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("remote")


def code_of(action: Callable[[], object]) -> str:
    with pytest.raises(StorageError) as caught:
        action()
    return caught.value.code


# ---- names


@pytest.mark.parametrize(
    "uri", ["", "http://x/y", "s3a://b/k", "S3://b/k", "file:///tmp/x", "s3://", "s3:///key", "a\0b"]
)
def test_what_is_no_path_is_refused_in_one_line_that_names_it(uri: str) -> None:
    with pytest.raises(UserError) as caught:
        storage.resolve(uri)
    assert "\n" not in str(caught.value)
    assert "s3://" in str(caught.value)


def test_resolved_names_are_absolute_literal_and_without_a_trailing_slash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.resolve("a/../b%20 #/") == f"{tmp_path}/b%20 #"
    assert storage.resolve(Path("x")) == f"{tmp_path}/x"
    assert storage.resolve("s3://b/k%20 #//x/") == "s3://b/k%20 #//x"
    assert storage.resolve("s3://b/") == "s3://b"
    assert storage.join("s3://b/", "k", "x y.jpg") == "s3://b/k/x y.jpg"
    assert storage.join("/", "k") == "/k"
    assert storage.name("s3://b/k/x y.jpg") == "x y.jpg"
    assert storage.name("s3://b") == "b"


# ---- the same locally and on S3


def test_odd_names_come_back_as_they_were_written(place: str) -> None:
    for name in ODD_NAMES:
        storage.write_bytes(storage.join(place, "f", name), name.encode())
    listed = {info.uri: info for info in storage.list_files(storage.join(place, "f"))}
    assert set(listed) == {storage.join(place, "f", name) for name in ODD_NAMES}
    for name in ODD_NAMES:
        uri = storage.join(place, "f", name)
        assert storage.read_bytes(uri) == name.encode()
        assert listed[uri].size == len(name.encode())
        assert listed[uri].etag
        assert abs(listed[uri].modified - time.time()) < 600
        assert storage.exists(uri)
        assert not storage.is_folder(uri)


def test_listing_leaves_out_hidden_parts_below_the_folder_but_not_above_it(place: str) -> None:
    root = storage.join(place, "_run", ".cache")
    for name in (
        "b/2.jpg",
        "b/10.jpg",
        "a.jpg",
        "_x/1.jpg",
        ".y/1.jpg",
        "b/_1.jpg",
        "b/.DS_Store",
        "c/d/e/f",
        "__MACOSX/1",
    ):
        storage.write_bytes(storage.join(root, name), b"x")
    names = [info.uri.removeprefix(root + "/") for info in storage.list_files(root)]
    assert names == ["_x/1.jpg", "a.jpg", "b/10.jpg", "b/2.jpg", "b/_1.jpg", "c/d/e/f"]
    assert storage.list_names(root) == [".y", "__MACOSX", "_x", "a.jpg", "b", "c"]


def test_what_is_missing_is_not_found_and_a_neighbours_prefix_is_no_folder(place: str) -> None:
    storage.write_bytes(storage.join(place, "folder-2", "a"), b"x")
    missing = storage.join(place, "folder")
    assert code_of(lambda: list(storage.list_files(missing))) == "not_found"
    assert code_of(lambda: storage.list_names(missing)) == "not_found"
    assert code_of(lambda: storage.read_bytes(missing)) == "not_found"
    assert not storage.exists(missing)
    assert not storage.is_folder(missing)
    assert storage.exists(storage.join(place, "folder-2"))
    storage.delete(missing)


def test_a_file_lists_itself_and_a_folder_is_not_read_as_a_file(place: str) -> None:
    uri = storage.join(place, "k", "a.jpg")
    storage.write_bytes(uri, b"abc")
    (info,) = storage.list_files(uri)
    assert (info.uri, info.size) == (uri, 3)
    assert code_of(lambda: storage.read_bytes(storage.join(place, "k"))) == "is_directory"
    assert code_of(lambda: storage.read_bytes(place)) == "is_directory"
    assert list(storage.list_files(place)) == [info]


def test_size_limits_admit_their_own_value(place: str) -> None:
    uri = storage.join(place, "a")
    storage.write_bytes(uri, b"12345")
    assert storage.read_bytes(uri, max_bytes=5) == b"12345"
    assert code_of(lambda: storage.read_bytes(uri, max_bytes=4)) == "too_large"


def test_many_reads_keep_order_and_give_each_failure_its_place(place: str) -> None:
    uris = [storage.join(place, f"{number}.bin") for number in range(60)]
    for uri in uris[::2]:
        storage.write_bytes(uri, uri.encode())
    answers = read_many(uris, threads=8)
    for number, (uri, answer) in enumerate(zip(uris, answers, strict=True)):
        if number % 2:
            assert isinstance(answer, StorageError)
            assert (answer.code, answer.uri) == ("not_found", uri)
        else:
            assert answer == uri.encode()
    assert read_many([]) == []


def test_text_and_json_make_the_round_trip_and_broken_ones_say_so(place: str) -> None:
    value = {"ä": [1, 2.5, None], "b": "日本"}
    storage.write_json(storage.join(place, "new", "x.json"), value)
    assert storage.read_json(storage.join(place, "new", "x.json")) == value
    assert storage.read_json(storage.join(place, "new", "y.json"), missing_ok=True) is None
    assert code_of(lambda: storage.read_json(storage.join(place, "new", "y.json"))) == "not_found"
    storage.write_bytes(storage.join(place, "bad"), b"\xff{")
    assert code_of(lambda: storage.read_text(storage.join(place, "bad"))) == "failed"
    storage.write_text(storage.join(place, "bad"), "{")
    assert code_of(lambda: storage.read_json(storage.join(place, "bad"))) == "failed"
    with pytest.raises(ValueError, match="JSON"):
        storage.write_json(storage.join(place, "nan.json"), {"x": float("nan")})
    assert not storage.exists(storage.join(place, "nan.json"))


def test_uploading_replaces_and_deleting_removes(place: str, tmp_path: Path) -> None:
    source = tmp_path / "source file.bin"
    source.write_bytes(os.urandom(100_000))
    target = storage.join(place, "up", "model.bin")
    storage.write_bytes(target, b"old")
    storage.upload_file(source, target)
    assert storage.read_bytes(target) == source.read_bytes()
    storage.delete(target)
    assert not storage.exists(target)
    assert code_of(lambda: storage.upload_file(tmp_path / "none", target)) == "not_found"


def test_arrow_reads_what_storage_wrote_and_the_other_way_round_also_after_pickling(place: str) -> None:
    uri = storage.join(place, "tables", "t 1%.parquet")
    storage.write_bytes(storage.join(place, "tables", "other"), b"x")
    filesystem, path = storage.arrow_filesystem(uri)
    filesystem.create_dir(path.rpartition("/")[0], recursive=True)
    pq.write_table(pa.table({"a": [1, 2]}), path, filesystem=filesystem)
    assert pq.read_table(pa.BufferReader(storage.read_bytes(uri)))["a"].to_pylist() == [1, 2]
    again = pickle.loads(pickle.dumps(filesystem))
    assert pq.read_table(path, filesystem=again)["a"].to_pylist() == [1, 2]
    storage.delete(uri)
    assert again.get_file_info(path).type == pa.fs.FileType.NotFound


# ---- local alone


def test_a_killed_or_failing_write_leaves_the_old_file_whole(tmp_path: Path) -> None:
    target = tmp_path / "out" / "table"
    storage.write_bytes(str(target), b"old" * 1000)
    program = (
        "import os, sys; from btray import storage\n"
        "os.fsync = lambda handle: os.kill(os.getpid(), 9)\n"
        f"storage.write_bytes({str(target)!r}, b'new' * 1000)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -9
    assert target.read_bytes() == b"old" * 1000
    assert [info.uri for info in storage.list_files(str(tmp_path))] == [str(target)]


def test_a_place_that_can_be_written_to_is_told_from_others_and_nothing_is_made(tmp_path: Path) -> None:
    storage.require_writable(str(tmp_path / "new" / "below"), "--out")
    (tmp_path / "file").write_text("mine")
    for place in ("file", "file/below"):
        with pytest.raises(UserError, match=r"^--out .*file is not a folder"):
            storage.require_writable(str(tmp_path / place), "--out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(UserError, match=r"^--out .*permissions"):
        storage.require_writable(str(tmp_path / "new"), "--out")


@pytest.mark.s3
def test_a_bucket_that_can_be_written_to_is_told_from_one_that_is_not_there(bucket: str) -> None:
    storage.require_writable(f"{bucket}/new", "--out")
    assert not storage.exists(f"{bucket}/new/_writable")
    with pytest.raises(UserError, match=r"^--storage s3://no-such-bucket-of-btray/runs: "):
        storage.require_writable("s3://no-such-bucket-of-btray/runs", "--storage")


def test_a_write_that_fails_leaves_no_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    assert code_of(lambda: storage.write_bytes(str(tmp_path / "folder"), b"x")) == "is_directory"
    assert code_of(lambda: storage.write_bytes(str(tmp_path / ("n" * 300)), b"x")) == "failed"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_new_files_get_the_permissions_of_ordinary_ones(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "a"), b"x")
    (tmp_path / "b").write_bytes(b"x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_the_local_etag_changes_with_the_content(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x")
    os.utime(path, ns=(1, 123_456_789_012))
    (info,) = storage.list_files(str(tmp_path))
    assert info.etag == "1-123456789012"


def test_links_are_followed_loops_end_and_broken_ones_are_listed(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (root / "a" / "x.jpg").write_bytes(b"x")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "y.jpg").write_bytes(b"yy")
    (root / "b").symlink_to(tmp_path / "elsewhere")
    (root / "a" / "loop").symlink_to(root)
    (root / "gone.jpg").symlink_to(root / "nothing")
    listed = {info.uri.removeprefix(f"{root}/"): info.size for info in storage.list_files(str(root))}
    assert listed == {"a/x.jpg": 1, "b/y.jpg": 2, "gone.jpg": 0}
    assert code_of(lambda: storage.read_bytes(str(root / "gone.jpg"))) == "not_found"


def test_a_named_pipe_is_listed_and_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (info,) = storage.list_files(str(tmp_path))
    assert code_of(lambda: storage.read_bytes(info.uri)) == "failed"


def test_a_name_that_is_no_utf8_is_listed_under_a_name_that_can_be_written_down(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / os.fsdecode(b"p\xff.jpg")).write_bytes(b"x")
    (info,) = storage.list_files(str(tmp_path))
    assert pa.array([info.uri]).to_pylist() == [str(tmp_path / "p\\xff.jpg")]
    assert "UTF-8" in caplog.text
    assert code_of(lambda: storage.read_bytes(info.uri)) == "not_found"


def test_what_may_not_be_read_is_forbidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(b"x")

    def refuse(*_: object, **__: object) -> object:  # as root, which tests may run as, no mode bits refuse anything
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    monkeypatch.setattr(os, "open", refuse)
    assert code_of(lambda: list(storage.list_files(str(tmp_path)))) == "forbidden"
    assert code_of(lambda: storage.read_bytes(str(tmp_path / "a" / "x"))) == "forbidden"


def test_a_network_folder_that_comes_back_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_bytes(b"x")
    real, failures = os.open, iter([errno.ESTALE, errno.EIO])

    def flaky(*arguments: object, **named: object) -> int:
        code = next(failures, None)
        if code is not None:
            raise OSError(code, os.strerror(code))
        return real(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", flaky)
    assert storage.read_bytes(str(tmp_path / "x")) == b"x"


def test_errors_survive_pickling_and_explain_themselves_in_one_line() -> None:
    error = pickle.loads(pickle.dumps(StorageError("throttled", "s3://b/k", "Slow\ndown")))
    assert (error.code, error.uri, error.retryable) == ("throttled", "s3://b/k", True)
    assert not StorageError("not_found", "x").retryable
    for code in (
        "not_found",
        "forbidden",
        "throttled",
        "unavailable",
        "changed",
        "is_directory",
        "too_large",
        "failed",
    ):
        for uri in ("/x", "s3://b/x"):
            line = str(StorageError(code, uri, "two\nlines"))
            assert uri in line
            assert "\n" not in line
    assert "AWS_SECRET_ACCESS_KEY" in str(StorageError("forbidden", "s3://b/x"))


# ---- a real S3 server


@pytest.mark.s3
def test_listings_longer_than_a_page_are_whole_sorted_and_carry_the_md5(remote: str) -> None:
    folder = storage.join(remote, "many")
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda i: storage.write_bytes(f"{folder}/{i:04}", b"%d" % i), range(1100)))
    listed = list(storage.list_files(folder))
    assert [info.uri for info in listed] == [f"{folder}/{i:04}" for i in range(1100)]
    assert all(info.etag == hashlib.md5(b"%d" % i).hexdigest() for i, info in enumerate(listed))
    assert storage.list_names(folder) == [f"{i:04}" for i in range(1100)]


@pytest.mark.s3
def test_markers_are_folders_and_not_files(remote: str) -> None:
    client.call(remote, "put_object", Key=client.split(f"{remote}/made/")[1], Body=b"")
    assert list(storage.list_files(f"{remote}/made")) == []
    assert storage.list_names(f"{remote}/made") == []
    assert storage.is_folder(f"{remote}/made")
    assert code_of(lambda: storage.read_bytes(f"{remote}/made/")) == "is_directory"
    assert list(storage.list_files(remote)) == []


@pytest.mark.s3
def test_a_missing_bucket_is_not_found_at_once_and_making_folders_does_not_make_it(remote: str) -> None:
    started = time.monotonic()
    missing = "s3://no-such-bucket-here"
    for uri in (missing, f"{missing}/k"):
        assert code_of(lambda uri=uri: list(storage.list_files(uri))) == "not_found"  # type: ignore[misc]
        assert not storage.exists(uri)
    assert code_of(lambda: storage.read_bytes(f"{missing}/k")) == "not_found"
    filesystem, path = storage.arrow_filesystem(f"{missing}/run")
    filesystem.create_dir(path, recursive=True)
    assert not storage.exists(missing)
    assert time.monotonic() - started < 5


@pytest.mark.s3
@pytest.mark.parametrize("variable", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_PROFILE", None])
def test_wrong_or_absent_credentials_are_forbidden_at_once(
    remote: str, monkeypatch: pytest.MonkeyPatch, variable: str | None
) -> None:
    storage.write_bytes(f"{remote}/k", b"x")
    if variable is None:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    else:
        monkeypatch.setenv(variable, "wrong")
    monkeypatch.setattr("btray.storage.retry.DEFAULT_TIMEOUT", 60.0)
    storage.reconnect()
    started = time.monotonic()
    assert code_of(lambda: storage.read_bytes(f"{remote}/k")) == "forbidden"
    assert code_of(lambda: list(storage.list_files(remote))) == "forbidden"
    assert code_of(lambda: storage.exists(f"{remote}/k")) == "forbidden"
    assert code_of(lambda: storage.write_bytes(f"{remote}/k", b"y")) == "forbidden"
    assert time.monotonic() - started < 30, "it was asked again, as if it could change"


@pytest.mark.s3
def test_a_killed_server_is_unavailable_within_seconds_for_one_and_for_many_and_read_again_once_back(
    remote: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    uris = [f"{remote}/{i}" for i in range(200)]
    storage.write_bytes(uris[0], b"x")
    s3.kill()
    try:
        monkeypatch.setattr("btray.storage.retry.DEFAULT_TIMEOUT", 1.0)
        started = time.monotonic()
        assert code_of(lambda: storage.read_bytes(uris[0])) == "unavailable"
        assert code_of(lambda: list(storage.list_files(remote))) == "unavailable"
        answers = read_many(uris, threads=8)
        assert {answer.code for answer in answers if isinstance(answer, StorageError)} == {"unavailable"}
        assert [answer.uri for answer in answers if isinstance(answer, StorageError)] == uris
        assert time.monotonic() - started < 10
    finally:
        s3.start()
    assert storage.read_bytes(uris[0]) == b"x"


@pytest.mark.s3
def test_a_server_that_comes_back_within_the_patience_goes_unnoticed(
    remote: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_bytes(f"{remote}/k", b"x")
    s3.kill()
    monkeypatch.setattr("btray.storage.retry.DEFAULT_TIMEOUT", 60.0)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(storage.read_bytes, f"{remote}/k")
        s3.start()
        assert answer.result() == b"x"


# ---- a server that misbehaves on demand, which a real one does not


class _Faulty(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    script: list[str] = []  # noqa: RUF012 - what the next requests meet; the class is made anew for each test
    body = b"0123456789" * 100

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.script.pop(0) if self.script else "ok"
        if fault == "ok":
            self._answer(200, self.body if self.command == "GET" else b"")
        elif fault == "cut":
            self._answer(200, self.body[:500], length=len(self.body))
            self.close_connection = True
        elif fault == "drop":
            self.close_connection = True
        else:
            status, code = fault.split(" ")
            self._answer(int(status), f"<Error><Code>{code}</Code><Message>m</Message></Error>".encode())

    do_PUT = do_GET  # noqa: N815 - the name that http.server looks for

    def _answer(self, status: int, body: bytes, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.send_header("Last-Modified", _LONG_AGO)
        self.send_header("ETag", '"tag"')
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Faulty]]:
    """The script of a loopback server that the AWS variables point at."""
    handler = type("Handler", (_Faulty,), {"script": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("btray.storage.retry.DEFAULT_TIMEOUT", 3.0)
    storage.reconnect()
    yield handler
    storage.reconnect()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    "fault",
    ["503 SlowDown", "429 TooManyRequests", "500 InternalError", "502 BadGateway", "400 RequestTimeout", "cut", "drop"],
)
def test_a_passing_fault_is_waited_out(faulty: type[_Faulty], fault: str) -> None:
    faulty.script += [fault, fault]
    assert storage.read_bytes("s3://bucket/k") == _Faulty.body
    assert not faulty.script


@pytest.mark.parametrize(
    ("fault", "code", "retryable"),
    [
        ("503 SlowDown", "throttled", True),
        ("503 ServiceUnavailable", "throttled", True),
        ("429 TooManyRequests", "throttled", True),
        ("500 InternalError", "unavailable", True),
        ("504 GatewayTimeout", "unavailable", True),
        ("cut", "unavailable", True),
        ("drop", "unavailable", True),
        ("403 AccessDenied", "forbidden", False),
        ("400 ExpiredToken", "forbidden", False),
        ("404 NoSuchBucket", "not_found", False),
        ("400 InvalidRequest", "failed", False),
        ("400 KMS.DisabledException", "withheld", False),
        ("403 InvalidObjectState", "archived", False),
    ],
)
def test_a_lasting_fault_has_its_code(
    faulty: type[_Faulty], monkeypatch: pytest.MonkeyPatch, fault: str, code: str, retryable: bool
) -> None:
    monkeypatch.setattr("btray.storage.retry.DEFAULT_TIMEOUT", 0.3)
    faulty.script += [fault] * 1000
    started = time.monotonic()
    with pytest.raises(StorageError) as caught:
        storage.read_bytes("s3://bucket/k")
    assert (caught.value.code, caught.value.retryable) == (code, retryable)
    assert time.monotonic() - started < 5
    if not retryable:
        assert len(faulty.script) == 998, "what will not change is asked for once by each client"


def test_a_write_waits_out_faults_too(faulty: type[_Faulty]) -> None:
    faulty.script += ["503 SlowDown", "drop"]
    storage.write_bytes("s3://bucket/k", b"x")
    assert not faulty.script


def test_too_large_an_object_is_refused_before_its_body_is_fetched(faulty: type[_Faulty]) -> None:
    faulty.script += ["cut"]
    assert code_of(lambda: storage.read_bytes("s3://bucket/k", max_bytes=999)) == "too_large"


def test_other_bytes_than_those_that_were_listed_are_told(place: str) -> None:
    uri = storage.join(place, "scan.png")
    storage.write_bytes(uri, b"before")
    listed = storage.describe(uri).etag
    assert storage.read_bytes(uri, etag=listed) == b"before"
    storage.write_bytes(uri, b"afterwards")
    assert code_of(lambda: storage.read_bytes(uri, etag=listed)) == "changed"
    (answer,) = read_many([uri], etags=[listed])
    assert isinstance(answer, StorageError)
    assert answer.code == "changed"
    assert not answer.retryable, "asking again at once gives the same"
    assert storage.read_bytes(uri, etag=storage.describe(uri).etag) == b"afterwards"


def test_an_archived_object_is_said_to_need_a_restore(faulty: type[_Faulty]) -> None:
    faulty.script += ["403 InvalidObjectState"] * 2
    with pytest.raises(StorageError, match="restore it first"):
        storage.read_bytes("s3://bucket/k")


# ---- stores of another kind, behind a proxy


def _use_every_client(uri: str) -> None:
    """Read, write and list by way of each client: s3fs, obstore, pyarrow; from threads that start at once, too."""
    assert set(read_many([uri] * 20)) == {b"x"}
    assert storage.describe(uri).size == 1
    assert [info.uri for info in storage.list_files(uri.rpartition("/")[0])] == [uri]
    filesystem, path = storage.arrow_filesystem(uri)
    assert filesystem.open_input_file(path).read() == b"x"
    assert not storage.write_new(uri, b"y")


@pytest.mark.s3
def test_no_client_needs_if_match_which_cephs_gateway_refuses(s3: S3Server, remote: str) -> None:
    def as_ceph(request: Request) -> None:
        if request.headers.get("If-Match", "").startswith('"'):
            request.refuse(412, "PreconditionFailed")
        else:
            request.forward()

    storage.write_bytes(f"{remote}/k", b"x")
    with s3_proxy(s3, as_ceph):
        _use_every_client(f"{remote}/k")
        with storage.open_ranges(f"{remote}/k") as file:
            assert file.read(1) == b"x"


@pytest.mark.s3
def test_a_bucket_in_another_region_costs_one_redirect_by_whatever_client(s3: S3Server, remote: str) -> None:
    storage.write_bytes(f"{remote}/k", b"x")
    redirected = []

    def in_europe(request: Request) -> None:
        if "/eu-west-1/s3/" in request.headers.get("Authorization", ""):
            request.forward()
        else:
            redirected.append(request.path)
            request.refuse(301, "PermanentRedirect", **{"x-amz-bucket-region": "eu-west-1"})

    with s3_proxy(s3, in_europe):
        _use_every_client(f"{remote}/k")
        assert client.fetch_body(*client.split(f"{remote}/k"), lambda *_: None) == b"x"
    assert len(redirected) == 1


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("AWS_NO_SIGN_REQUEST", "YES", (True, None)),
        ("AWS_SKIP_SIGNATURE", "true", (True, None)),
        ("AWS_REQUEST_PAYER", "requester", (False, "requester")),
        ("AWS_NO_SIGN_REQUEST", "false", (False, None)),
    ],
)
def test_public_buckets_are_read_unsigned_and_those_whose_requester_pays_at_their_cost(
    faulty: type[_Faulty], monkeypatch: pytest.MonkeyPatch, variable: str, value: str, expected: tuple[bool, str | None]
) -> None:
    seen = set()

    def look(handler: _Faulty) -> None:
        seen.add((handler.headers.get("Authorization") is None, handler.headers.get("x-amz-request-payer")))
        _Faulty.do_GET(handler)

    monkeypatch.setenv(variable, value)
    if expected[0]:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    for method in ("GET", "HEAD", "PUT"):
        monkeypatch.setattr(faulty, f"do_{method}", look, raising=False)
    storage.reconnect()
    for uri in ("s3://bucket/k", "s3://bucket//k"):  # by obstore and by s3fs
        assert storage.read_bytes(uri) == _Faulty.body
        storage.write_new(uri, b"x")
    assert client.fetch_body("bucket", "k", lambda *_: None) == _Faulty.body
    storage.describe("s3://bucket/k")
    assert seen - {(expected[0], None)} == {expected} - {(expected[0], None)}
    assert {unsigned for unsigned, _ in seen} == {expected[0]}


# ---- the lean client


@pytest.mark.s3
@pytest.mark.parametrize("name", ODD_NAMES)
def test_the_lean_client_fetches_bodies_under_any_name(remote: str, name: str) -> None:
    uri = storage.join(remote, name)
    storage.write_bytes(uri, name.encode())
    seen: list[tuple[int, str]] = []
    assert client.fetch_body(*client.split(uri), lambda *found: seen.append(found)) == name.encode()
    assert seen == [(len(name.encode()), storage.describe(uri).etag)]


@pytest.mark.s3
@pytest.mark.parametrize("name", ["a//b", "tab\tin it"])
def test_names_that_the_lean_client_would_change_are_left_to_the_other(remote: str, name: str) -> None:
    uri = f"{remote}/{name}"
    storage.write_bytes(uri, b"x")
    assert client.fetch_body(*client.split(uri), lambda *_: None) is None
    assert storage.read_bytes(uri) == b"x"


@pytest.mark.s3
def test_a_forked_process_reads_too(remote: str) -> None:
    uri = f"{remote}/x"
    storage.write_bytes(uri, b"x")
    assert storage.read_bytes(uri) == b"x"  # the lean client's threads run from here on
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(storage.read_bytes, (uri,)).get(30) == b"x"


# ---- Ray


@pytest.mark.s3
@pytest.mark.cluster
def test_ray_workers_and_their_threads_read_what_the_driver_wrote(ray_session: None, remote: str) -> None:
    import ray

    uris = [f"{remote}/{i}" for i in range(40)]
    for uri in uris:
        storage.write_bytes(uri, uri.encode())
    filesystem, path = storage.arrow_filesystem(f"{remote}/t.parquet")
    pq.write_table(pa.table({"a": [7]}), path, filesystem=filesystem)

    @ray.remote(num_cpus=0.5)
    def read(some: list[str], filesystem: object) -> tuple[list[bytes | StorageError], int, str]:
        missing = read_many([f"{some[0]}-missing"])[0]
        return read_many(some), pq.read_table(path, filesystem=filesystem)["a"][0].as_py(), repr(missing)

    for data, value, missing in ray.get([read.remote(uris, filesystem) for _ in range(2)]):
        assert data == [uri.encode() for uri in uris]
        assert value == 7
        assert "not_found" in missing


def test_written_json_is_plain_json(tmp_path: Path) -> None:
    storage.write_json(str(tmp_path / "x.json"), {"a": 1})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
