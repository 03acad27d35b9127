"""What identifies a model: a hash of its weights and a hash of how they are used."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def weights_sha256(model: nn.Module) -> str:
    """`tensors_sha256` of the state dict."""
    return tensors_sha256(model.state_dict())


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of named tensors, in order of names. Independent of device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        t = tensor.detach().cpu().contiguous()
        digest.update(f"{name}\0{t.dtype}\0{tuple(t.shape)}\0".encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def architecture_sha256(model: nn.Module) -> str:
    """SHA-256 of the model's printed structure: scales, divisors and residual weights change the function as weights do."""
    return hashlib.sha256(repr(model).encode()).hexdigest()
