"""What an exported model is and takes, in words and numbers: enough to run it without btray. Free of torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from btray.core.notice import NOTICE
from btray.data.config import PreprocessConfig
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
            "steps": _steps(manifest.preprocess),
        },
    }


def _steps(config: PreprocessConfig) -> list[str]:
    """Return what `btray.data.preprocess` does, step by step; divisions marked // drop the remainder."""
    crop = [
        "Thumbnail: average whole squares of s x s pixels, s = max(1, round(longer side / 96)); map its 1st "
        "percentile to 0 and its 99th to 255 as in the step `gray levels`, with no level left out.",
        "Inner box: of the thumbnail take off rows and columns at all sides whose gray levels, between their 4th and "
        "96th percentile, span at most 20; repeat until nothing changes. The whole thumbnail if fewer than 8 rows or "
        "columns would be left.",
        "Head: background = median of the four corners of the inner box, each a tenth of a side, at least 2 pixels. "
        "Mask = pixels more than 22 from the background; erode and dilate it once with 3 x 3; keep the largest object"
        " (4 neighbours). If that is smaller than 8 % of the inner box, the inner box is cut out, without margin.",
        "White ground: if the background is above 128, fill the holes of the head, erode it once, enlarge that mask "
        "to the picture's size bilinearly, and make the picture 0 where it is at most half.",
        f"Crop: the box around the head in pixels of the picture, with a margin of {config.margin:g} of its longer "
        "side.",
    ]
    return [
        "Decode to one channel of 8 or 16 bit, [height, width]; colours by 0.299 R + 0.587 G + 0.114 B. btray decodes"
        " a JPEG at half, a quarter or an eighth of its size if enough pixels are left: whole, frames differ by a few"
        " levels.",
        *(crop if config.crop else ["There is no crop: the whole picture is used."]),
        "Resize, with antialiasing (a triangle as wide as two pixels of the result), so that the longer side has "
        f"{config.size} pixels and the aspect ratio stays. btray averages whole squares of pixels before that.",
        "Gray levels: of the histogram of the resized crop leave out its lowest level and what lies within 3 % of its"
        f" range above that. low and high are the first levels at which the rest reaches {config.low_percentile:g} % "
        f"and {config.high_percentile:g} %. Every pixel becomes (clip(level, low, high) - low) * 255 // max(high - "
        "low, 1).",
        f"Frame: centre the result on black, {config.size} x {config.size} pixels, 8 bit.",
        "Input: (frame - mean) / max(standard deviation, 1), both over all pixels of the frame, as float32.",
    ]
