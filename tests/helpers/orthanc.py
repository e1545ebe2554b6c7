"""A real PACS on loopback: Debian's Orthanc with its DICOMweb plugin, a password, and all that it holds in one folder.

    with Orthanc(folder) as pacs:
        pacs.upload(files)
        DicomWeb(pacs.root, PacsConfig(**pacs.credentials))

Orthanc 1.10 knows no address to bind to, so `bind()` is replaced: no other machine reaches it. What it has acknowledged
survives `kill`; `start` then serves the same at the same address.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import secrets
import socket
import subprocess
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
import requests

from tests.helpers.debian import install
from tools.processes import until

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
_READY_SECONDS = 60.0
# Without libc's headers, so that the compiler is all that it takes. 2 and 10: AF_INET and AF_INET6.
_LOOPBACK = """
typedef unsigned char byte;
extern void *dlsym(void *, const char *);
int bind(int socket, const byte *address, unsigned length) {
    static int (*real)(int, const byte *, unsigned);
    byte own[128];
    unsigned at;
    if (!real) real = (int (*)(int, const byte *, unsigned))dlsym((void *)-1, "bind");
    if (length > sizeof own) return real(socket, address, length);
    for (at = 0; at < length; at++) own[at] = address[at];
    if (own[0] == 2 && length >= 8) { own[4] = 127; own[5] = own[6] = 0; own[7] = 1; }
    if (own[0] == 10 && length >= 24) for (at = 8; at < 24; at++) own[at] = at == 23;
    return real(socket, own, length);
}
"""


def require_orthanc() -> None:
    """Install Orthanc if it is absent; skip the test with a message if that cannot be done."""
    packages = "orthanc orthanc-dicomweb gcc libc6-dev"
    if not (install(packages, "Orthanc") and install(packages, "gcc") and PLUGIN.exists()):
        pytest.skip("ORTHANC ABSENT: what this test shows of a real PACS is NOT shown here")


class Orthanc:
    """One Orthanc whose data, configuration and log lie in `folder`; `settings` replace those of its configuration."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        require_orthanc()
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.user, self.password = "btray", "planted-" + secrets.token_hex(16)
        self.port, self.dicom_port = _free_port(), _free_port()
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None
        self.session = requests.Session()
        self.session.trust_env = False
        self.session.auth = (self.user, self.password)
        self.session.verify = False

    @property
    def url(self) -> str:
        """Of its own REST API."""
        return f"{'https' if self._settings.get('SslEnabled') else 'http'}://127.0.0.1:{self.port}"

    @property
    def root(self) -> str:
        """URL of DICOMweb."""
        return f"{self.url}/dicom-web"

    @property
    def address(self) -> str:
        """As an --input or --to, without a query."""
        return self.root.replace("https://", "dicomweb://").replace("http://", "dicomweb+http://")

    @property
    def credentials(self) -> dict[str, str]:
        """Settings of PacsConfig."""
        return {"pacs_user": self.user, "pacs_password": self.password}

    @property
    def environment(self) -> dict[str, str]:
        """The same as environment variables."""
        return {f"BTRAY_{name.upper()}": value for name, value in self.credentials.items()}

    @property
    def pid(self) -> int | None:
        """The process id, None if it does not run."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def start(self) -> None:
        """Start it and return once it answers."""
        configuration = {
            "Name": "btray",
            "StorageDirectory": str(self.folder / "data"),
            "IndexDirectory": str(self.folder / "data"),
            "HttpPort": self.port,
            "RemoteAccessAllowed": True,  # else it asks no password; the preloaded bind() keeps others out
            "AuthenticationEnabled": True,
            "RegisteredUsers": {self.user: self.password},
            "DicomServerEnabled": True,
            "DicomAet": "ORTHANC",
            "DicomPort": self.dicom_port,
            "DicomCheckCalledAet": False,
            "DicomAlwaysAllowStore": True,
            "Plugins": [str(PLUGIN)],
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/", "EnableWado": False},
            **self._settings,
        }
        path = self.folder / "orthanc.json"
        path.write_text(json.dumps(configuration), encoding="utf-8")
        # TCP_NODELAY: else Debian's takes 40 ms for each object that C-STORE brings
        environment = os.environ | {"LD_PRELOAD": str(_loopback()), "TCP_NODELAY": "1"}
        with (self.folder / "orthanc.log").open("ab") as log:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", "Orthanc", str(path)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        atexit.register(self.kill)
        until(self._answers, "Orthanc", _READY_SECONDS)

    def _answers(self) -> bool:
        if self.pid is None:
            log = (self.folder / "orthanc.log").read_text(errors="replace").splitlines()
            raise RuntimeError("Orthanc did not start:\n" + "\n".join(log[-15:]))
        with suppress(requests.RequestException):
            return self.session.get(f"{self.root}/studies?limit=1", timeout=5).status_code in (200, 204)
        return False

    def kill(self) -> None:
        """End it as a crash would (SIGKILL); no error if it does not run."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        atexit.unregister(self.kill)

    def upload(self, files: Iterable[bytes]) -> None:
        """Put files into it, by its own API, which is the quickest way."""
        for data in files:
            answer = self.session.post(f"{self.url}/instances", data=data, timeout=30)
            answer.raise_for_status()

    def remove(self, uid: str) -> None:
        """Remove what has a UID: a study, a series or an instance."""
        for found in self.session.post(f"{self.url}/tools/lookup", data=uid, timeout=30).json():
            self.session.delete(f"{self.url}{found['Path']}", timeout=30).raise_for_status()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()


@functools.cache
def _loopback() -> Path:
    """Compile what is preloaded, once for each process of tests."""
    folder = Path(tempfile.mkdtemp(prefix="btray-loopback-"))
    atexit.register(lambda: [path.unlink() for path in folder.iterdir()] and folder.rmdir())
    (folder / "loopback.c").write_text(_LOOPBACK, encoding="utf-8")
    command = ["gcc", "-shared", "-fPIC", "-O1", "-o", "loopback.so", "loopback.c"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder / "loopback.so"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
