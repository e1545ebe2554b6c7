"""Changes a saved bundle as someone would who can make every digest right again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from btray.model import manifest as manifests
from btray.model.bundle_files import WEIGHTS
from btray.model.config import MANIFEST


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None], *, reseal: bool = True) -> None:
    """Change the content of bundle.json; `reseal`: with the right digest, as a forger would."""
    content = json.loads((folder / MANIFEST).read_text())
    change(content)
    text = json.dumps({**content, manifests._SEAL: manifests._NO_SEAL} if reseal else content, indent=2)
    if reseal:
        text = text.replace(manifests._NO_SEAL, hashlib.sha256(text.encode()).hexdigest())
    (folder / MANIFEST).write_text(text)


def forge_weights(folder: Path, body: bytes) -> None:
    """Put other weights in, with every digest right."""
    (folder / WEIGHTS).write_bytes(body)

    def change(content: dict[str, Any]) -> None:
        content["weights_sha256"] = hashlib.sha256(body).hexdigest()
        identity = {key: content[key] for key in manifests._IDENTITY}
        content["model_id"] = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]

    rewrite(folder, change)


def forge_file(folder: Path, name: str, body: bytes) -> None:
    """Put another file in the place of a listed one, with its digest right."""
    (folder / name).write_bytes(body)
    rewrite(folder, lambda content: content["files"].update({name: hashlib.sha256(body).hexdigest()}))
