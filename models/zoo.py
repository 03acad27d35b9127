"""The zoo: trained models with one card each; and `load`, which loads a model by its name, file or callable."""

from __future__ import annotations

import copy
import importlib
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustlip.checkpoints import load_into
from robustlip.checks import check_finite_weights, check_weights_are_there
from robustlip.errors import BadInput, first_line
from robustlip.files import read_toml
from robustlip.layers import as_chain, chain_or_module
from robustlip.models.build import build
from robustlip.modes import random_state_kept
from robustlip.onnx import read_onnx
from robustlip.pretrained import read_hugging_face, read_timm
from robustlip.target import check_values
from robustlip.user_errors import described, place

FOLDER = Path(__file__).parent / "zoo"
CARD_AGREEMENT = 1e-9  # relative: another order of summation changes the last digits of a bound


def names() -> list[str]:
    """The names of the zoo's models, in order."""
    return sorted(path.stem for path in FOLDER.glob("*.safetensors"))


def card(name: str) -> dict[str, Any]:
    """The card of a zoo model: data, recipe, seed, accuracy, bound, hash, paper and caveats. Raises BadInput for an unknown name."""
    path = FOLDER / f"{name}.toml"
    if name not in names() or not path.is_file():
        raise BadInput(f"expected a zoo model among {', '.join(names()) or '(none)'}, got {name!r}; see `robustlip zoo list`")
    return read_toml(path, "a card")


def sound_bound(name: str) -> dict[str, float | str]:
    """The guaranteed Lipschitz constant of a zoo model to its logits, computed from its weights.

    'l2': ℓ2 → ℓ2 of the input; for token models per output token, with the largest token norm of the input. 'rms_inf': in the paper's units,
    ∞-RMS → RMS for token models and RMS → RMS for inputs of one vector. 'domain': the largest ‖x_t‖₂ of an embedding for which both hold, or
    'all'. See robustlip.certifiers.lipschitz_bound. Raises BadInput if the model's card states another bound.
    """
    from robustlip.certifiers import lipschitz_bound

    bound, stated = lipschitz_bound(load(name)), card(name).get("bound", {})
    for key, value in bound.items():
        claim = stated.get(key)
        agree = claim == value if isinstance(value, str) else isinstance(claim, (int, float)) and math.isclose(claim, value, rel_tol=CARD_AGREEMENT)
        if not agree:
            raise BadInput(f"expected the card of {name} to state the bound {key} = {value} of its weights, got {claim}; make the card again")
    return {"rms_inf": bound["rms"], "l2": bound["l2"], "domain": bound["domain"]}


def _from_callable(spec: str) -> nn.Module:
    module_name, _, attribute = spec.partition(":")
    try:
        module = importlib.import_module(module_name)
    except KeyboardInterrupt:
        raise
    except SystemExit as error:  # a script without a main guard; otherwise a gate would end with its exit code
        raise BadInput(
            f"expected a module that can be imported, got {spec!r}, which ends the process with {error.code!r}{place(error, spec)}; "
            f"put its script under a main guard"
        ) from None
    except BaseException as error:  # a user's module may raise anything
        why = f"{described(error)}{place(error, spec)}"
        raise BadInput(f"expected package.module:callable, got {spec!r}, whose import ends in {why}; check the name and that file") from error
    try:
        made = getattr(module, attribute)
    except AttributeError as error:
        raise BadInput(f"expected package.module:callable, got {spec!r} ({first_line(error)}); check the name") from None
    if isinstance(made, nn.Module):  # a copy, because it is moved to a device and set to eval mode
        check_weights_are_there(made, spec)
        try:
            return copy.deepcopy(made)
        except Exception:  # a module that cannot be copied is used as it is
            return made
    if not callable(made):
        raise BadInput(f"expected a callable that returns an nn.Module, got {type(made).__name__} at {spec!r}; name a function")
    try:
        model = made()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a user's function may raise anything
        raise BadInput(f"expected {spec!r} to return an nn.Module, got {described(error)}{place(error, spec)}; call it to see why") from error
    if not isinstance(model, nn.Module):
        raise BadInput(f"expected {spec!r} to return an nn.Module, got {type(model).__name__}; return the model")
    check_weights_are_there(model, spec)
    return model


@random_state_kept()
def load(name: str | Path, *, device: str | torch.device = "cpu") -> Any:
    """A model in eval mode whose forward takes raw inputs (images in [0, 1] or vectors, or token ids) and returns logits.

    The global random states of torch, numpy and Python are not changed.
    name: of the zoo; a .safetensors file written by `robustlip train` or `save_model`; an .onnx file (or .onnx.gz; `robustlip.onnx`); hf:FOLDER and
    timm:FOLDER (`robustlip.pretrained`); or 'package.module:callable', a function that returns a module, or the module itself; it is imported and
    run, so only name code that you trust. The result is a Chain, except for other modules (hence the type Any), which are attacked as they are, and
    certified if `robustlip.capture` can translate them.
    Raises BadInput if there is no such model, or if its weights do not match their card or hash, or are not finite.
    """
    text = str(name)
    if text.endswith(".safetensors"):
        return as_chain(load_into(Path(text), build)).to(device)
    if text.endswith((".onnx", ".onnx.gz")):
        network = read_onnx(Path(text)).to(device)
        check_finite_weights(network, text)
        return network
    for prefix, read in (("hf:", read_hugging_face), ("timm:", read_timm)):
        if text.startswith(prefix):
            found = read(Path(text.removeprefix(prefix)).expanduser()).to(device)
            check_finite_weights(found, text)
            return found
    if ":" in text:
        model = chain_or_module(_from_callable(text)).to(device)
        model.eval()
        check_values(model)
        check_finite_weights(model, text)  # `load_into` has checked this for our files
        return model
    known = card(text)
    model = as_chain(load_into(FOLDER / f"{text}.safetensors", build))
    from robustlip.hashing import weights_sha256

    if weights_sha256(model) != known.get("weights_sha256"):
        raise BadInput(f"expected the weights that the card of {text} names, got others; restore the file from the repository")
    return model.to(device)
