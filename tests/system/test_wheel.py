"""A built wheel, installed into a folder of its own and run from another one, needs nothing of the checkout."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path

import pytest

from btray import phantoms
from btray.model.shipped import SHIPPED
from tests.helpers.forked_jobs import ROOT
from tests.helpers.tiny_bundle import saved_bundle
from tools.loopback_cluster import free_ports
from tools.processes import until


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from what git knows of the checkout: what lies there besides must not help."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                            capture_output=True, check=True).stdout.decode().split("\0")  # fmt: skip
    for name in filter(None, listed):
        if (name.startswith("btray/") or "/" not in name) and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    shipped = source / "btray" / "pretrained" / SHIPPED
    if not shipped.is_dir():
        saved_bundle(shipped)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
                    "--disable-pip-version-check", "--wheel-dir", out, source], check=True)  # fmt: skip
    (built,) = out.glob("btray-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel is installed into."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder,
                    "--disable-pip-version-check", wheel], check=True)  # fmt: skip
    return folder


class Elsewhere:
    """A working directory with a copy of jobs/ alone, where Python finds btray in the folder of the wheel only."""

    def __init__(self, folder: Path, installed: Path) -> None:
        self.folder = folder
        shutil.copytree(ROOT / "jobs", folder / "jobs")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("BTRAY_", "RAY_"))}
        self.environment = kept | {
            "PYTHONPATH": str(installed), "RAY_ADDRESS": "local", "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
        }  # fmt: skip

    def start(self, *command: object) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, *map(str, command)], cwd=self.folder, env=self.environment,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip

    def run(self, *command: object) -> list[str]:
        """Run to the end and return the lines of stdout."""
        process = self.start(*command)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-3000:]
        return out.splitlines()


@pytest.fixture
def elsewhere(tmp_path: Path, installed: Path) -> Elsewhere:
    return Elsewhere(tmp_path, installed)


def test_every_file_of_the_package_is_in_the_wheel(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("btray/")}
    listed = subprocess.run(["git", "ls-files", "btray"], cwd=ROOT, capture_output=True, text=True, check=True)
    files = {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}
    assert "btray/py.typed" in files
    assert any(name.startswith("btray/serving/static/") for name in files)
    assert files - held == set()


def test_the_installed_btray_is_the_wheels_and_predicts(elsewhere: Elsewhere) -> None:
    run = "from btray.cli import main; main()"
    where = elsewhere.run("-c", "import btray.cli, sys; print(btray.cli.__file__)")
    assert where == [f"{elsewhere.environment['PYTHONPATH']}/btray/cli.py"]
    assert elsewhere.run("-c", run, "--version")[0] == f"btray {importlib.metadata.version('btray')}"
    saved_bundle(elsewhere.folder / "model")
    (elsewhere.folder / "scan.jpg").write_bytes(phantoms.encoded_phantom("glioma", 1))
    header, row = elsewhere.run("-c", run, "predict", "--model", "model", "scan.jpg")
    assert header.split()[:2] == ["file", "label"]
    assert row.startswith("scan.jpg")
    header, row = elsewhere.run("-c", run, "predict", "scan.jpg")
    assert row.startswith("scan.jpg"), "by the model that ships, which is in the wheel"


@pytest.mark.soak
@pytest.mark.cluster
def test_the_installed_btray_trains(elsewhere: Elsewhere) -> None:
    phantoms.write_data_set(str(elsewhere.folder / "data"), per_class={"Training": 4, "Testing": 1}, seed=0)
    out = elsewhere.run(
        "jobs/train.py", "--data=data", "--out=model", "--epochs=1", "--batch-size=8", "--num-workers=1",
        "--refit-epochs=0", "--preprocess.size=32", "--network.widths=8", "--network.depths=1",
    )  # fmt: skip
    assert out[-1] == str(elsewhere.folder / "model")
    assert {"model.safetensors", "bundle.json", "MODEL_CARD.md", "report.html"} <= {
        path.name for path in (elsewhere.folder / "model").iterdir()
    }


@pytest.mark.cluster
def test_the_installed_btray_serves_its_page_and_ends_when_told(elsewhere: Elsewhere) -> None:
    (port,) = free_ports(1)
    service = elsewhere.start("jobs/serve.py", f"--port={port}", "--replicas.max-replicas=1")

    def get(path: str) -> bytes | None:
        assert service.poll() is None, service.communicate()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
                body: bytes = answer.read()
                return body or b"ready"
        except OSError:
            return None

    try:
        until(lambda: get("/v2/health/ready"), "the service", 120)
        page = get("/") or b""
        assert b"<html" in page.lower()
        service.send_signal(signal.SIGTERM)
        out, err = service.communicate(timeout=90)
    finally:
        service.kill()
    assert service.returncode == 0, err[-3000:]
    assert out.splitlines()[-1] == f"http://127.0.0.1:{port}"
    assert f"using the shipped model {SHIPPED} (" in err
