"""The export job: a model as one file for other runtimes, and a description of what goes in and what comes out."""

from __future__ import annotations

import io
import json
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from btray import storage
from btray.core.errors import Failed
from btray.data.preprocess import Gray, head_pattern, make_frame, to_tensor
from btray.model.bundle import Bundle, load_bundle
from btray.model.classifier import Classifier
from btray.model.comparison import noise_frames
from btray.model.config import EXPORT, ExportConfig
from btray.model.export_description import INPUT, describe
from btray.model.manifest import sha256
from btray.model.shipped import announce

TOLERANCE = {"probabilities": 1e-4, "ood_score": 1e-3}
"""Largest differences from the classifier's own answers; of scores above 1, as a share of the score.

A score adds up hundreds of numbers divided by deviations of 0.001 and less, which float32 has few digits for."""
FILES = {"onnx": "model.onnx", "torch": "model.pt2"}
EXAMPLE, EXAMPLE_FRAME = "example.png", "example_frame.png"
_BATCHES = (1, 2, 5, 16)

Run = Callable[[Tensor], dict[str, npt.NDArray[np.float32]]]
"""Standardised images [n, 1, size, size] -> outputs by name."""


class Exported(nn.Module):
    """The network with what follows it: probabilities are calibrated, and the out-of-distribution score is computed."""

    mean: Tensor
    whitening: Tensor

    def __init__(self, bundle: Bundle) -> None:
        """Take the network, temperature and distribution of `bundle`."""
        super().__init__()
        self.network = bundle.network()
        self.temperature = bundle.manifest.calibration.temperature
        self.outputs = ["probabilities"]
        if bundle.ood is not None:
            self.outputs.append("ood_score")
            self.register_buffer("mean", torch.from_numpy(bundle.ood.mean))
            self.register_buffer("whitening", torch.from_numpy(bundle.ood.whitening()).float())
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Map standardised images [n, 1, size, size] to probabilities [n, classes] and, if it can, scores [n, 1]."""
        logits, features = self.network.with_summary(images)
        probabilities = (logits / self.temperature).softmax(1)
        if "ood_score" not in self.outputs:
            return (probabilities,)
        return probabilities, ((features - self.mean) @ self.whitening).square().mean(1, keepdim=True).sqrt()


def export(config: ExportConfig) -> str:
    """Write the model `config.model` to the folder `config.out` in `config.format`, and return the folder's URI.

    The file is run before it is written. Raises Failed if its answers differ from the classifier's by more than
    TOLERANCE.
    """
    config.check()
    bundle = load_bundle(config.model, model_id=config.model_id)
    announce(config.model, bundle.manifest.model_id)
    module, size = Exported(bundle), bundle.manifest.preprocess.size
    example = to_tensor(torch.from_numpy(noise_frames(2, size)))
    body, run = (_as_onnx if config.format == "onnx" else _as_program)(module, example)
    worst = largest_differences(bundle, run)
    found = ", ".join(f"{name} by {difference:.1e}" for name, difference in worst.items())
    if not all(difference <= TOLERANCE[name] for name, difference in worst.items()):
        raise Failed(f"{FILES[config.format]} answers differently from {bundle.uri}, {found}: it is not written")
    pattern = head_pattern(np.dtype(np.uint8))
    frame = make_frame(pattern, bundle.manifest.preprocess)
    answers = run(to_tensor(torch.from_numpy(frame)[None]))
    description = describe(bundle.manifest, FILES[config.format], sha256(body), module.outputs) | {
        "example": {
            "image": EXAMPLE,
            "frame": EXAMPLE_FRAME,
            **{name: values[0].round(6).tolist() for name, values in answers.items()},
        }
    }
    files = {
        EXAMPLE: _png(pattern),
        EXAMPLE_FRAME: _png(frame),
        FILES[config.format]: body,
        EXPORT: json.dumps(description, indent=2, ensure_ascii=False).encode() + b"\n",
    }
    for name, content in files.items():
        storage.write_bytes(storage.join(config.out, name), content)
    print(f"model {bundle.manifest.model_id}: {FILES[config.format]} differs from it in {found} at most", flush=True)
    return config.out


def largest_differences(bundle: Bundle, run: Run) -> dict[str, float]:
    """Return by how much each output of an exported model differs at most from the classifier's, over some batches."""
    classifier = Classifier(bundle, device="cpu", engine="eager")
    worst: dict[str, float] = defaultdict(float)
    for count in _BATCHES:
        frames = noise_frames(count, bundle.manifest.preprocess.size)
        answers, own = run(to_tensor(torch.from_numpy(frames))), classifier.answer(frames)
        expected = {"probabilities": Classifier.calibrated(own.logits, bundle.manifest.calibration.temperature)}
        if bundle.ood is not None:
            expected["ood_score"] = bundle.ood.scores(own.features)[:, None]
        for name, values in expected.items():
            difference = float((np.abs(answers[name] - values) / np.abs(values).clip(1)).max())
            worst[name] = float(np.maximum(worst[name], difference))  # which keeps what is not a number
    return worst


def _as_onnx(module: Exported, example: Tensor) -> tuple[bytes, Run]:
    """Return the model as an ONNX file, and a function that runs it with ONNX Runtime."""
    import onnxruntime

    graph = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):
        torch.onnx.export(
            module,
            (example,),
            graph,  # type: ignore[arg-type]  # the annotation knows paths only
            input_names=[INPUT],
            output_names=module.outputs,
            dynamic_axes={name: {0: "n"} for name in (INPUT, *module.outputs)},
            dynamo=False,  # the other one needs onnxscript
        )
    session: Any = onnxruntime.InferenceSession(graph.getvalue(), providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> dict[str, npt.NDArray[np.float32]]:
        return dict(zip(module.outputs, session.run(module.outputs, {INPUT: images.numpy()}), strict=True))

    return graph.getvalue(), run


def _as_program(module: Exported, example: Tensor) -> tuple[bytes, Run]:
    """Return the model as a file of torch.export, and a function that runs what is read from it."""
    program = torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim("n")},))
    saved = io.BytesIO()
    torch.export.save(program, saved)
    loaded = torch.export.load(io.BytesIO(saved.getvalue())).module()

    def run(images: Tensor) -> dict[str, npt.NDArray[np.float32]]:
        with torch.inference_mode():
            return dict(zip(module.outputs, (values.numpy() for values in loaded(images)), strict=True))

    return saved.getvalue(), run


def _png(gray: Gray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(gray).save(file, "png")
    return file.getvalue()
