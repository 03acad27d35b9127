"""Files of weights: safetensors with the configuration in the header, and a TOML card in the same folder. Never pickle.

Files are not trusted: the header is checked before the tensors, the tensors are compared with the model that the header names, and the
hash in the header with the tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustlip.checks import check_finite_weights
from robustlip.errors import BadInput
from robustlip.files import atomic, is_file
from robustlip.hashing import weights_sha256
from robustlip.limits import PARAMETERS, TENSORS, number
from robustlip.modes import random_state_kept
from robustlip.numerics.rounding import NAMES

FORMAT = "robustlip-1"
Build = Callable[[dict[str, Any]], nn.Module]


def save_tensors(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Write tensors and a JSON header to a safetensors file, atomically."""
    from safetensors.torch import save_file

    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    with atomic(path) as temporary:
        save_file(plain, temporary, metadata={"robustlip": json.dumps({"format": FORMAT, **header})})


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a file written by `save_tensors`. Raises BadInput for anything else: missing, truncated, of another format."""
    return _read(path, lambda file: {name: file.get_tensor(name) for name in file.keys()})


def load_shapes(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """Shapes and header, without reading tensors. Raises BadInput as `load_tensors`."""
    found: dict[str, tuple[int, ...]] = {}

    def look(file: Any) -> dict[str, Tensor]:
        names = file.keys()
        if len(names) <= TENSORS:
            found.update({name: tuple(file.get_slice(name).get_shape()) for name in names})
        else:
            raise BadInput(f"expected at most {TENSORS} tensors in {path.name}, got {len(names)}; split the file")
        return {}

    return found, _read(path, look)[1]


def load_header(path: Path) -> dict[str, Any]:
    """The header, without reading tensors. Raises BadInput as `load_tensors`."""
    return _read(path, lambda file: {})[1]


def _read(path: Path, tensors_of: Callable[[Any], dict[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    if not is_file(path):
        raise BadInput(f"expected a .safetensors file, got {path}, which does not exist; check the path")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata, tensors = file.metadata() or {}, tensors_of(file)
    except BadInput:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise BadInput(f"expected a complete safetensors file, got {path.name}, which cannot be read ({error}); copy or train it again") from None
    try:
        header = json.loads(metadata["robustlip"])
        if header["format"] != FORMAT:
            raise KeyError(header["format"])
    except (KeyError, TypeError, ValueError, RecursionError):  # no header, not JSON, an integer with thousands of digits, nesting that is too deep
        raise BadInput(f"expected a safetensors file written by robustlip, got {path.name} without its header; export it with save_model") from None
    return tensors, header


def save_model(path: Path, model: nn.Module) -> None:
    """Write a model with a `config` to a file that `robustlip.load` reads. Raises BadInput for a model that cannot be built from a config."""
    config = getattr(model, "config", None)
    if config is None:
        raise BadInput(f"expected a model with a config, got {type(model).__name__}; build it with robustlip.models.build")
    save_tensors(path, model.state_dict(), {"config": config, "weights_sha256": weights_sha256(model)})


def planned(build: Build, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights that `build` would create, without allocating them. Raises BadInput as `build`, and for too many parameters."""
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in build(config).state_dict().items()}
    if (count := sum(math.prod(shape) for shape in shapes.values())) > PARAMETERS:
        raise BadInput(f"expected a model of at most {PARAMETERS} parameters, got one with {number(count)}; make it smaller")
    return shapes


def tensors_of(build: Build, config: dict[str, Any]) -> int:
    """The number of tensors that `build` would create, extrapolated from models with one and with two layers, in constant time."""
    widths, blocks = config.get("widths"), config.get("blocks")
    if isinstance(widths, list) and len(widths) > 3:
        repeats, cut = len(widths) - 1, {n: config | {"widths": widths[: n + 1]} for n in (1, 2)}
    elif type(blocks) is int and blocks > 2:
        repeats, cut = blocks, {n: config | {"blocks": n} for n in (1, 2)}
    else:
        return len(planned(build, config))
    one, two = (len(planned(build, cut[n])) for n in (1, 2))
    return one + (repeats - 1) * (two - one)


@random_state_kept()
def load_into(path: Path, build: Build) -> nn.Module:
    """The model of a file, in eval mode. build: makes an untrained model from a config (robustlip.models.build).

    Raises BadInput if tensors are missing, superfluous, of another shape or not finite, or if the hash differs.
    """
    got, header = load_shapes(path)
    config = header.get("config")
    if not isinstance(config, dict):
        raise BadInput(f"expected a model file, got {path.name}, which has no model configuration; name a model, not a training state")
    # Cheap checks first: a few bytes of configuration can request more layers than can be built in a day, or more memory than there is.
    if (count := tensors_of(build, config)) != len(got):
        mismatch = f"expected the tensors of a {config.get('kind')} model in {path.name}, {number(count)} of them, got {len(got)}"
        raise BadInput(f"{mismatch}; the file was altered")
    wanted = planned(build, config)
    if wanted != got:
        odd = sorted(k for k in wanted.keys() | got.keys() if wanted.get(k) != got.get(k))
        raise BadInput(f"expected the tensors of a {config.get('kind')} model in {path.name}, got others for {odd[:3]}; the file was altered")
    tensors, header = load_tensors(path)
    model = build(config)
    dtypes = {v.dtype for v in tensors.values() if v.is_floating_point()}
    if foreign := dtypes - set(NAMES.values()):
        raise BadInput(f"expected weights of a dtype among {', '.join(NAMES)} in {path.name}, got {foreign.pop()}; cast them first")
    if len(dtypes) == 1:
        model.to(dtypes.pop())
    model.load_state_dict(tensors)
    check_finite_weights(model, path.name)
    if weights_sha256(model) != header.get("weights_sha256"):
        stated = str(header.get("weights_sha256"))[:12]
        raise BadInput(f"expected weights with SHA-256 {stated}… in {path.name}, got others; the file was altered")
    return model.eval()
