"""deploy/compose is what Compose accepts, opens no more than the docs say, and runs commands that exist."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from btray.bulk.config import ClassifyConfig
from btray.launch import read_config
from btray.pacs.report.config import ReportConfig
from btray.serving.config import ServeConfig
from tests.conftest import ROOT
from tests.helpers.debian import install

FOLDER = ROOT / "deploy" / "compose"
CONFIGS: dict[str, Any] = {
    "jobs/serve.py": ServeConfig,
    "jobs/classify.py": ClassifyConfig,
    "jobs/report.py": ReportConfig,
}


def services() -> dict[str, dict[str, Any]]:
    return dict(yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"])


def test_compose_accepts_the_file_with_the_settings_of_the_example() -> None:
    if not install("docker-compose", "docker-compose"):
        pytest.skip("DOCKER-COMPOSE ABSENT: that deploy/compose is valid is NOT shown here")
    command = ["docker-compose", "-f", str(FOLDER / "compose.yaml"), "--env-file", str(FOLDER / "example.env")]
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    without = subprocess.run([*command, "config"], capture_output=True, text=True, env=kept, check=False)
    assert without.returncode != 0
    assert "choose a password" in without.stderr, "an Orthanc without a password must not start"
    given = kept | {"ORTHANC_PASSWORD": "secret"}
    done = subprocess.run([*command, "config"], capture_output=True, text=True, env=given, check=False)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["services"].keys() == services().keys()


def test_only_orthanc_publishes_ports_and_btray_shares_its_network() -> None:
    ports = {name: service.get("ports", []) for name, service in services().items()}
    assert {name for name, published in ports.items() if published} == {"orthanc"}
    assert all(port.startswith(("127.0.0.1:", "${DICOM_ADDRESS:-127.0.0.1}:4242")) for port in ports["orthanc"])
    for name, service in services().items():
        if name != "orthanc":
            assert service["network_mode"] == "service:orthanc", name
            assert service["read_only"], name
            assert service["cap_drop"] == ["ALL"], name
    settings = json.loads((FOLDER / "orthanc.json").read_text())
    assert settings["AuthenticationEnabled"]
    assert settings["RegisteredUsers"] == {"btray": "${ORTHANC_PASSWORD}"}
    (endpoint,) = settings["DicomWeb"]["Servers"].values()
    assert endpoint["Url"] == "http://127.0.0.1:8000/dicomweb/"


def test_the_commands_are_those_of_the_jobs(tmp_path: Path) -> None:
    commands = [services()["endpoint"]["command"]]
    commands += [shlex.split(line) for line in services()["nightly"]["command"][-1].splitlines()]
    assert [command[1] for command in commands] == list(CONFIGS)
    for _, script, *flags in commands:
        config = read_config(CONFIGS[script], flags)
        assert "dicomweb+http://127.0.0.1:8042/dicom-web" in str(config), script
    endpoint = read_config(ServeConfig, commands[0][2:])
    assert endpoint.port == 8000
    assert endpoint.limits.max_images >= 500, "Orthanc sends a whole series in one body"
