"""Layers that turn images into tokens and tokens into one vector, and the preprocessing of images."""

from __future__ import annotations

from typing import Any

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


class Tokens(nn.Module):
    """Images (N, C, H, W) → tokens (N, H·W, C), one per pixel; (N, C, …) → (N, product of the rest, C)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() < 3:
            raise BadInput(f"expected samples of channels and places (N, C, …), got {tuple(x.shape)}; give it images")
        return x.flatten(2).transpose(1, 2)


class SelectToken(nn.Module):
    """One token: (N, T, D) → (N, D). index: from 0, or −1 for the last."""

    def __init__(self, index: int = 0) -> None:
        super().__init__()
        self.index = int(index)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 3:
            raise BadInput(f"expected tokens (N, T, D), got {tuple(x.shape)}; add the missing dimension")
        if not -x.shape[1] <= self.index < x.shape[1]:
            raise BadInput(f"expected a token among {x.shape[1]}, got index {self.index}; count from 0")
        return x[:, self.index]

    def extra_repr(self) -> str:
        return f"index={self.index}"


class PrependToken(nn.Module):
    """Constant tokens before the others, the same for every sample: (N, T, D) → (N, k + T, D).

    value: (D,), (k, D) or (1, k, D), a buffer that shares its memory with what is given.
    """

    value: torch.Tensor

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        held = value.detach()
        held = held[0] if held.dim() == 3 and len(held) == 1 else held
        held = held.unsqueeze(0) if held.dim() == 1 else held
        if held.dim() != 2 or not len(held) or not held.is_floating_point() or not bool(torch.isfinite(held).all()):
            raise BadInput(f"expected finite tokens (D,), (k, D) or (1, k, D) in PrependToken, got {tuple(value.shape)}, {value.dtype}; give those")
        self.register_buffer("value", held)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 3 or x.shape[-1] != self.value.shape[-1]:
            raise BadInput(f"expected tokens (N, T, {self.value.shape[-1]}) before PrependToken, got {tuple(x.shape)}; match the widths")
        return torch.cat([self.value.expand(len(x), -1, -1), x], dim=1)

    def extra_repr(self) -> str:
        return f"{len(self.value)}, {self.value.shape[-1]}"


class Lookup(nn.Module):
    """Token ids (N, T) → embeddings (N, T, width), by recorded operations of torch: tables of words and of positions that depend on the ids.

    steps: (operation of torch.ops.aten, overload, its arguments by name), in order; {"value": i} is the result of step i, 0 the ids, {"tensor": i}
    one of `tensors`, {"samples": None} the number of samples. It stands before an embedding ball, so that no rule reads it.
    """

    def __init__(self, steps: list[tuple[str, str, Any]], tensors: list[torch.Tensor], width: int) -> None:
        super().__init__()
        self.steps, self.embedding_dim = steps, width
        self.names: list[str] = []
        for i, tensor in enumerate(tensors):
            self.names.append(f"tensor{i}")
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(self.names[i], tensor)
            else:
                self.register_buffer(self.names[i], tensor)
        tables = [tensors[a["weight"]["tensor"]].shape[0] for name, _, a in steps if name == "embedding" and a["indices"] == {"value": 0}]
        self.num_embeddings = min(tables, default=0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = [x]

        def read(value: Any) -> Any:
            if isinstance(value, list):
                return [read(part) for part in value]
            if not isinstance(value, dict):
                return value
            if "samples" in value:
                return len(x)
            if "rows" in value:
                table = getattr(self, self.names[value["rows"]])
                return table.expand(len(x), *table.shape[1:])
            return values[value["value"]] if "value" in value else getattr(self, self.names[value["tensor"]])

        for name, overload, arguments in self.steps:
            values.append(getattr(getattr(torch.ops.aten, name), overload)(**{key: read(value) for key, value in arguments.items()}))
        return values[-1]

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, steps={self.steps}"
