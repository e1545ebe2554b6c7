"""Draw what a model looks at in phantoms, one of each class: Grad-CAM over the frames. No patient is in the picture.

python -m tools.heat_maps --out docs/images/heat_maps.png [--model brain-mri] [--seed 4]
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from PIL import Image

from btray.explain import heat_maps, overlay_png
from btray.model.classifier import Classifier
from btray.model.shipped import SHIPPED
from btray.phantoms import CLASSES, phantom
from btray.reports.plot_style import BLUE, MUTED, STYLE, VERMILLION


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="PNG file")
    parser.add_argument("--model", default=SHIPPED, help="a bundle, or the name of the shipped one")
    parser.add_argument("--seed", type=int, default=4, help="of the phantoms' head")
    arguments = parser.parse_args()
    classifier = Classifier.load(arguments.model, device="cpu")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        figure = _draw(classifier, arguments.seed)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=100)
    Image.open(file).convert("RGB").quantize(256).save(arguments.out, "png", optimize=True)


def _draw(classifier: Classifier, seed: int) -> Figure:
    pictures = [phantom(label, seed) for label in CLASSES]
    predictions = classifier.predict(pictures)
    frames = classifier.frames(pictures)
    figure = Figure(figsize=(9.4, 4.3), layout="constrained")
    axes = figure.subplots(2, len(CLASSES))
    for column, (label, (frame,), prediction) in enumerate(zip(CLASSES, frames, predictions, strict=True)):  # type: ignore[misc]
        (heat,) = heat_maps(classifier, frame[None])
        axes[0, column].imshow(frame, cmap="gray", vmin=0, vmax=255)
        axes[0, column].set_title(f"drawn as {label}", fontsize=9, color=MUTED)
        axes[1, column].imshow(Image.open(io.BytesIO(overlay_png(frame, heat))))
        colour = BLUE if prediction.label == label else VERMILLION
        axes[1, column].set_title(f"{prediction.label}, {prediction.confidence:.0%}", fontsize=10, color=colour)
    for panel in axes.ravel():
        panel.set_axis_off()
    return figure


if __name__ == "__main__":
    main()
