"""Starting weights of a run: a model of the zoo, or a file of an earlier run."""

from __future__ import annotations

from torch import nn

from robustlip.errors import BadInput
from robustlip.hashing import architecture_sha256, weights_sha256
from robustlip.layers import Chain
from robustlip.models import zoo


def start_from(model: Chain, name: str, sha256: str | None) -> str:
    """Give `model` the weights of the model `name` (a zoo name or a .safetensors file); returns their SHA-256.

    sha256: the required hash, if the recipe has one. Raises BadInput for a model of another architecture or vocabulary, and for other weights.
    """
    if ":" in name:
        raise BadInput(f"expected a zoo name or a .safetensors file to start from, got {name!r}; save the model first")
    given = zoo.load(name)
    got = weights_sha256(given)
    if sha256 is not None and got != sha256:
        raise BadInput(f"expected weights with SHA-256 {sha256[:12]}… to start from, got {got[:12]}… in {name}; correct run.start_sha256 or the file")
    if architecture_sha256(given) != architecture_sha256(model) or _vocabulary(given) != _vocabulary(model):
        raise BadInput(f"expected a model with the architecture of the recipe to start from, got {name}, which has another one; correct [model]")
    model.load_state_dict(given.state_dict())
    return got


def _vocabulary(model: nn.Module) -> str | None:
    return getattr(model, "vocabulary", None)
