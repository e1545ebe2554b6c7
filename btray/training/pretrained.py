"""Weights to start from: ImageNet's, a bundle, safetensors, or a torch state dict, of which only tensors are read."""

from __future__ import annotations

import importlib.resources
import io
import logging

import safetensors.torch
import torch
from torch import Tensor

from btray import storage
from btray.core.errors import UserError
from btray.model.bundle import load_bundle
from btray.model.config import MANIFEST, NetworkConfig
from btray.model.mobile import PACKAGE
from btray.model.network import build_network, load_matching
from btray.training.config import IMAGENET

_log = logging.getLogger(__name__)


def read_initial_weights(uri: str, network: NetworkConfig, classes: int) -> dict[str, Tensor]:
    """Read tensors by name, of which at least one must fit the network.

    `uri` is a bundle or weights file (local or s3://), or IMAGENET for the weights of `btray.model.mobile.PACKAGE`.

    Raises UserError if there is nothing to read, if the file would have to be unpickled, or if nothing fits.
    """
    weights = _read(uri)
    probe = build_network(network, classes)
    copied = load_matching(probe, weights)
    if not copied:
        raise UserError(
            f"--init-from {uri}: not one of its {len(weights)} tensors fits --network.architecture "
            f"{network.architecture}; name the architecture that the weights are of"
        )
    _log.info("starting from %s: %d of %d tensors copied", uri, len(copied), len(probe.state_dict()))
    return weights


def _read(uri: str) -> dict[str, Tensor]:
    if uri == IMAGENET:
        (path,) = (importlib.resources.files(PACKAGE) / "models").glob("*.pth")  # type: ignore[attr-defined]
        data = path.read_bytes()
    elif storage.exists(storage.join(uri, MANIFEST)):
        return load_bundle(uri).weights
    else:
        data = storage.read_bytes(uri)
    try:
        if uri.endswith(".safetensors"):
            return safetensors.torch.load(data)
        loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes make torch's unpickler raise nearly anything: KeyError, IndexError, ...
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--init-from {uri} is neither a safetensors file nor a plain state dict: {reason}") from error
    # Lightning and many training scripts wrap the state dict.
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    named = state.items() if isinstance(state, dict) else ()
    tensors = {name: value for name, value in named if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"--init-from {uri} holds no tensors by name; give a state dict")
    return tensors
