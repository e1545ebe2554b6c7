"""What an exported model is and takes, in words and numbers: enough to run it without btray. Free of torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from btray.core.notice import NOTICE
from btray.model.manifest import Manifest

INPUT = "images"
FORMAT_VERSION = 1


def describe(manifest: Manifest, file: str, digest: str, outputs: Sequence[str]) -> dict[str, Any]:
    """Return the content of export.json, but for its example.

    Args:
        manifest: of the model.
        file: name of the exported file.
        digest: its SHA-256.
        outputs: names of its outputs.
    """
    size = manifest.preprocess.size
    meaning = {
        "probabilities": {
            "shape": ["n", len(manifest.classes)],
            "meaning": "calibrated probability of each class, in the order of `classes`; each row sums to 1",
        },
        "ood_score": {
            "shape": ["n", 1],
            "meaning": "how unlike the training images the input is, about 1 for these; above `thresholds.ood_score` "
            "no answer can be trusted",
        },
    }
    return {
        "format_version": FORMAT_VERSION,
        "notice": NOTICE,
        "model_id": manifest.model_id,
        "file": file,
        "sha256": digest,
        "classes": list(manifest.classes),
        "input": {
            "name": INPUT,
            "dtype": "float32",
            "shape": ["n", 1, size, size],
            "meaning": "preprocessed slices, each with mean 0 and standard deviation 1; n may be any number",
        },
        "outputs": [{"name": name, "dtype": "float32", **meaning[name]} for name in outputs],
        "thresholds": {
            **manifest.thresholds.model_dump(),
            "meaning": "below `abstain_below` the model abstains; null: never",
        },
        "preprocessing": {
            "settings": manifest.preprocess.model_dump(),
            "digest": manifest.preprocess_digest,
            "steps": [],
        },
    }
