"""Hashes that identify a model: of its weights, and of its structure."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from robustlip.modes import out_of_place

_BY_CHANNEL = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


def weights_sha256(model: nn.Module) -> str:
    """`tensors_sha256` of the state dict."""
    return tensors_sha256(model.state_dict())


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of named tensors, sorted by name. Independent of the device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        t = tensor.detach().cpu().contiguous()
        digest.update(f"{name}\0{t.dtype}\0{tuple(t.shape)}\0".encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def architecture_sha256(model: nn.Module) -> str:
    """SHA-256 of the model's printed structure: scales, divisors and residual weights change the function as weights do.

    An in-place layer is printed as the same layer out of place, because it is evaluated out of place.
    """
    with out_of_place(model):
        return hashlib.sha256(printed(model).encode()).hexdigest()


def joint_sha256(programs: Mapping[int, str]) -> str:
    """One SHA-256 for programs of texts of several lengths: the common hash if all are equal, or else a hash of all hashes and lengths."""
    distinct = set(programs.values())
    if len(distinct) == 1:
        return distinct.pop()
    return hashlib.sha256("".join(f"{length}\0{sha}\0" for length, sha in sorted(programs.items())).encode()).hexdigest()


def printed(module: nn.Module | None) -> str:
    """repr(module) as torch 2.13 prints it, with every version of torch, so that certificates stay valid."""
    if module is None or type(module).__repr__ is not nn.Module.__repr__:
        return repr(module)
    options = _options(module)
    lines = options.split("\n") if options else []
    children = [f"({name}): " + printed(child).replace("\n", "\n  ") for name, child in module._modules.items()]
    if len(lines) <= 1 and not children:
        return f"{module._get_name()}({options})"
    return f"{module._get_name()}(\n  " + "\n  ".join(lines + children) + "\n)"


def _options(module: nn.Module) -> str:
    # torch 2.9 does not print whether there is a bias.
    if type(module) is nn.LayerNorm:
        bias = module.bias is not None
        return f"{module.normalized_shape}, eps={module.eps}, elementwise_affine={module.elementwise_affine}, bias={bias}"
    if type(module) is nn.GroupNorm:
        bias = module.bias is not None
        return f"{module.num_groups}, {module.num_channels}, eps={module.eps}, affine={module.affine}, bias={bias}"
    if type(module) in _BY_CHANNEL:
        size, eps, momentum, bias = module.num_features, module.eps, module.momentum, module.bias is not None
        return f"{size}, eps={eps}, momentum={momentum}, affine={module.affine}, bias={bias}, track_running_stats={module.track_running_stats}"
    return module.extra_repr()
