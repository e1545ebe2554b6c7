"""The Kubernetes resources of deploy/kuberay and their pod templates."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import ROOT

DEPLOY = ROOT / "deploy"


def documents(path: Path) -> list[dict[str, Any]]:
    """Yield all resources of a file, including those in its ConfigMaps."""
    found = [document for document in yaml.safe_load_all(path.read_text(encoding="utf-8")) if document]
    inner = [yaml.safe_load(text) for document in found if document["kind"] == "ConfigMap"
             for name, text in document["data"].items() if name.endswith(".yaml")]  # fmt: skip
    return found + inner


def resources() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted((DEPLOY / "kuberay").glob("*.yaml")):
        for document in documents(path):
            yield path.name, document


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every pod template, at any depth."""

    def within(value: Any) -> Iterator[dict[str, Any]]:
        if isinstance(value, dict):
            if "template" in value and "spec" in value["template"]:
                yield value["template"]
            for inner in value.values():
                yield from within(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from within(inner)

    for name, document in resources():
        for template in within(document):
            yield name, template
