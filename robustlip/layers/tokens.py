"""Layers that turn images into tokens and tokens into one vector, and the preprocessing of images."""

from __future__ import annotations

import torch
from torch import nn

from robustlip.errors import BadInput


class Normalize(nn.Module):
    """(x − mean)/std per channel of images (N, C, H, W), or of the last dimension of anything else.

    mean, std: one number or one per channel; std > 0. Kept inside the model, so that radii stay in raw input units.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean: float | list[float] = 0.0, std: float | list[float] = 1.0) -> None:
        super().__init__()
        # Looked at on the CPU: a model may be built on the device that holds no numbers, for its shapes.
        shift, scale = (torch.atleast_1d(torch.as_tensor(value, dtype=torch.float32, device="cpu")) for value in (mean, std))
        if not bool((scale > 0).all()):
            raise BadInput(f"expected std above 0 in every channel, got {scale.tolist()}; leave constant channels at 1")
        self.register_buffer("mean", shift.to(torch.get_default_device()))
        self.register_buffer("std", scale.to(torch.get_default_device()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (-1, 1, 1) if x.dim() == 4 else (-1,)
        return (x - self.mean.view(shape)) / self.std.view(shape)


class Patchify(nn.Module):
    """Images (N, C, H, W) → tokens (N, (H/p)(W/p), C·p·p): every pixel once, so an isometry."""

    def __init__(self, patch: int) -> None:
        super().__init__()
        self.patch = patch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 4 or x.shape[-1] % self.patch or x.shape[-2] % self.patch:
            raise BadInput(f"expected images (N, C, H, W) with H and W divisible by {self.patch}, got {tuple(x.shape)}; resize them")
        n, c, h, w = x.shape
        p = self.patch
        return x.view(n, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5).reshape(n, (h // p) * (w // p), c * p * p)

    def extra_repr(self) -> str:
        return f"patch={self.patch}"


class AddPositions(nn.Module):
    """Adds a learned vector to each token: (N, T, D) → (N, T, D), T at most `length`."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(length, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 3:
            raise BadInput(f"expected tokens (N, T, D), got {tuple(x.shape)}; add the missing dimension")
        if x.shape[-2] > self.positions.shape[0]:
            raise BadInput(f"expected at most {self.positions.shape[0]} tokens, got {x.shape[-2]}; shorten the input")
        return x + self.positions[: x.shape[-2]]


class MeanTokens(nn.Module):
    """The mean over tokens: (N, T, D) → (N, D)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 3:
            raise BadInput(f"expected tokens (N, T, D), got {tuple(x.shape)}: without a batch dimension the mean would be over samples; add it")
        return x.mean(dim=-2)
