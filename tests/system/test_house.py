"""The layout of `btray/` holds: import rules, size of modules and folders, thin jobs."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.conftest import ROOT

LINT = Path(sys.executable).with_name("lint-imports")


def imports_of(path: Path) -> set[str]:
    """The modules of btray that a file imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "btray":
            found |= {f"btray.{alias.name}" for alias in node.names} if node.module == "btray" else {node.module}
    return found


@pytest.mark.parametrize(
    ("module", "forbidden", "contract"),
    [
        ("serving/batching.py", "from btray.training import job", "serving imports"),
        ("data/labels.py", "from btray.model import network", "data imports"),
        ("model/ood.py", "import ray", "no Ray where a laptop predicts"),
        ("core/errors.py", "from btray import launch", "core imports nothing of btray"),
        ("serving/service.py", "def lazy():\n    from btray.serving import app", "no circle between packages"),
    ],
)
def test_an_import_against_the_rules_fails_the_lint_and_names_the_rule(
    module: str, forbidden: str, contract: str, tmp_path: Path
) -> None:
    shutil.copytree(ROOT / "btray", tmp_path / "btray", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with open(tmp_path / "btray" / module, "a", encoding="utf-8") as file:
        file.write(f"\n{forbidden}\n")
    linted = subprocess.run(
        [LINT, "--no-cache", "--no-logo"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert linted.returncode == 1, linted.stdout + linted.stderr
    broken = re.findall(r"^(.+) BROKEN$", linted.stdout, re.MULTILINE)
    assert any(name.startswith(contract) for name in broken), broken


def test_no_module_is_longer_than_400_lines_and_no_folder_holds_more_than_20() -> None:
    modules = sorted((ROOT / "btray").rglob("*.py"))
    lengths = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8").count("\n") for path in modules}
    assert {name: lines for name, lines in lengths.items() if lines > 400} == {}
    crowded = {folder: count for folder, count in Counter(path.parent for path in modules).items() if count > 20}
    assert crowded == {}


def test_a_job_imports_how_it_is_started_its_config_and_one_module_that_does_it() -> None:
    for path in (ROOT / "jobs").glob("*.py"):
        others = imports_of(path) - {"btray.launch"}
        assert len(others) == 2, (path.name, others)
        assert sum(name.endswith(".config") for name in others) == 1, (path.name, others)


def test_how_a_job_is_started_needs_configs_alone() -> None:
    allowed = re.compile(r"btray\.(core|storage)\b|btray(\.\w+)+\.config$")
    assert [name for name in imports_of(ROOT / "btray" / "launch.py") if not allowed.match(name)] == []
