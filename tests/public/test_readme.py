"""The README's commands run in order, unchanged."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from btray.results import current

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
# Training with the defaults takes long; these shorten it to a minute without changing the commands.
QUICK = {
    "BTRAY_EPOCHS": "1",
    "BTRAY_PREPROCESS__SIZE": "48",
    "BTRAY_NETWORK__WIDTHS": "8,16",
    "BTRAY_NETWORK__DEPTHS": "1,1",
    "BTRAY_NUM_WORKERS": "1",
    "BTRAY_REFIT_EPOCHS": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",  # Ray Train looks at its workers every two seconds otherwise
}
QUICK_SEARCH = {"BTRAY_TRIALS": "2", "BTRAY_SEARCH": "random"}


def commands() -> list[str]:
    """Return the README's shell blocks after the marker."""
    tested = README.read_text(encoding="utf-8").split("<!-- every command below is run by")[1]
    return [block.strip() for block in re.findall(r"```sh\n(.*?)```", tested, re.DOTALL)]


def environment_of(command: str) -> dict[str, str]:
    """Return the environment with this Python first on PATH, the running Ray, one actor and quick training."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    running = {"PATH": path, "RAY_ADDRESS": ray.get_runtime_context().gcs_address, "BTRAY_ACTORS": "1"}
    quick = QUICK if "jobs/train.py" in command else QUICK | QUICK_SEARCH if "jobs/tune.py" in command else {}
    return os.environ | running | quick


@pytest.mark.slow
@pytest.mark.cluster
def test_the_commands_of_the_readme_run_one_after_the_other(ray_session: None, tmp_path: Path) -> None:
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    for command in commands():
        done = subprocess.run(
            ["bash", "-ec", command],
            cwd=tmp_path,
            env=environment_of(command),
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    metrics = json.loads((tmp_path / "reports" / "first" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["n"] == 5 * 10, "the report covers the test split of the README's data"
    assert len(current(str(tmp_path / "results"))) == 5 * 10
    for name in ("second", "tuned"):
        assert (tmp_path / "models" / name / "bundle.json").is_file()


def test_what_the_commands_write_is_neither_committed_nor_uploaded() -> None:
    text = README.read_text(encoding="utf-8")
    written = {*re.findall(r"--out(?:put)? ([\w-]+)", text), *re.findall(r"write_data_set\('([\w-]+)'", text)} - {
        "OUT",
        "s3",
    }
    assert {"scans", "dataset", "models"} <= written
    for file in (".gitignore", ".rayignore"):
        ignored = (ROOT / file).read_text(encoding="utf-8").splitlines()
        assert sorted(name for name in written if f"/{name}/" not in ignored) == [], file


def test_a_token_is_made_readable_for_its_owner_alone() -> None:
    of_docs = [path for top in ("docs", "deploy") for path in (ROOT / top).rglob("*.*") if path.suffix != ".png"]
    files = [README, ROOT / "cluster.yaml", *of_docs]
    lines = [line for path in files for line in path.read_text().splitlines() if "get-auth-token --generate" in line]
    assert len(lines) >= 3
    assert [line for line in lines if "(umask 077 && ray get-auth-token" not in line] == []


def test_every_job_stands_in_the_readme() -> None:
    text = README.read_text(encoding="utf-8")
    missing = [path.name for path in (ROOT / "jobs").glob("*.py") if f"jobs/{path.name}" not in text]
    assert missing == []


def test_every_file_that_the_readme_and_docs_link_to_is_there() -> None:
    for page in (README, *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_package_has_its_line_in_the_readme_and_no_other() -> None:
    section = README.read_text(encoding="utf-8").partition("## Where things are")[2]
    lines = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    assert sorted(lines) == sorted(path.parent.name for path in (ROOT / "btray").glob("*/__init__.py"))
