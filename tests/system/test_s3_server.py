"""The S3 server of the tests and the demo is a real one: it checks keys, keeps data and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pyarrow import fs

from tools import s3_server
from tools.s3_server import S3Server

pytestmark = pytest.mark.s3


def client(server: S3Server, secret_key: str | None = None) -> fs.S3FileSystem:
    return fs.S3FileSystem(
        access_key=server.access_key,
        secret_key=secret_key or server.secret_key,
        endpoint_override=server.endpoint,
        region="us-east-1",
    )


def test_data_survive_a_kill_and_a_restart_at_the_same_endpoint(tmp_path: Path) -> None:
    content = os.urandom(100_000)
    with S3Server(tmp_path / "store") as server:
        server.make_bucket("kept")
        with client(server).open_output_stream("kept/folder/object") as stream:
            stream.write(content)
        endpoint = server.endpoint
        server.kill()
        assert server.pid is None
        server.start()
        assert server.endpoint == endpoint
        with client(server).open_input_stream("kept/folder/object") as stream:
            assert stream.read() == content


def test_a_wrong_secret_is_refused(s3: S3Server, bucket: str) -> None:
    path = bucket.removeprefix("s3://") + "/secret"
    with pytest.raises(OSError, match="SIGNATURE_DOES_NOT_MATCH"):
        client(s3, secret_key="wrong" * 8).open_output_stream(path).close()
    assert client(s3).get_file_info(path).type == fs.FileType.NotFound


def test_two_servers_share_no_port_and_no_data(s3: S3Server, bucket: str, tmp_path: Path) -> None:
    with S3Server(tmp_path) as other:
        assert other.endpoint != s3.endpoint
        listed = client(other).get_file_info(fs.FileSelector("", recursive=False))
        assert [info.path for info in listed] == []


def test_the_environment_points_at_the_server_alone(s3: S3Server) -> None:
    merged = s3.environment_over({"AWS_PROFILE": "clinic", "AWS_SESSION_TOKEN": "t", "HOME": "/h", "NO_PROXY": "a.b"})
    assert merged["HOME"] == "/h"
    assert merged["NO_PROXY"] == "a.b,127.0.0.1"
    assert {name for name in merged if name.startswith("AWS_")} == set(s3.environment)
    assert os.environ["AWS_ENDPOINT_URL"] == s3.endpoint


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux signals a process when its parent dies")
def test_the_server_dies_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    program = (
        "import os, pathlib, signal, sys\n"
        "from tools.s3_server import S3Server\n"
        "server = S3Server(pathlib.Path(sys.argv[1]))\n"
        "server.start()\n"
        "print(server.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
        timeout=120,
    )
    assert result.returncode == -signal.SIGKILL, result.stderr
    pid = int(result.stdout)
    deadline = time.monotonic() + 20
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(pid)


def test_a_server_that_cannot_start_shows_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = s3_server._flags
    monkeypatch.setattr(s3_server, "_flags", lambda port: [*flags(port), "-s3.config=absent.json"])
    monkeypatch.setattr(s3_server, "START_ATTEMPTS", 1)
    with pytest.raises(s3_server.S3ServerError, match=r"did not start.*weed\.log:\n(.|\n)*absent\.json"):
        S3Server(tmp_path).start()


def is_running(pid: int) -> bool:
    """Return whether the process runs; a zombie that waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
