"""What identifies a model: a hash of its weights and a hash of how they are used."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the state dict, in order of names. Independent of device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        t = tensor.detach().cpu().contiguous()
        digest.update(f"{name}\0{t.dtype}\0{tuple(t.shape)}\0".encode())
        digest.update(memoryview(t.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def architecture_sha256(model: nn.Module) -> str:
    """SHA-256 of the model's printed structure: scales, divisors and residual weights change the function as weights do."""
    return hashlib.sha256(repr(model).encode()).hexdigest()
