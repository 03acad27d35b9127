"""The training forward pass: in bfloat16 with float32 weights, compiled or not. Evaluation, constraints and certificates always use the model
itself, in float32 and uncompiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from robustlip.errors import BadInput
from robustlip.training.recipe import Recipe


def _compile_in_place(block: nn.Module) -> None:
    """Compile the training passes of `block` as one graph; evaluation is not changed.

    Only its forward is compiled: gathering a block's weights happens in hooks of the module's call, which would break the graph.
    """
    plain = block.forward
    fast = torch.compile(plain, fullgraph=True, dynamic=False)

    def forward(x: Tensor) -> Tensor:
        return (fast if block.training else plain)(x)

    block.forward = forward  # type: ignore[method-assign]


class Forward:
    """x → the logits of `model`, float32, with gradients: with autocast to bfloat16 and compiled if the recipe's [run] says so.

    Weights, gradients and optimisers stay in float32; autocast rounds inputs and weights of each product to bfloat16 and back, and the
    loss is computed from float32 logits. example: inputs like those of every step, on the device. With compile = true one forward and backward pass
    on them is compiled now: as one graph, or, if `blocks` of the model are given, each of them as one graph and nothing else (for fsdp, where weights
    exist only while their block runs). Raises BadInput if that fails; there is no silent fallback to the uncompiled pass.
    """

    def __init__(self, recipe: Recipe, model: nn.Module, example: Tensor, blocks: Sequence[nn.Module] = ()) -> None:
        self._bfloat16 = recipe.run.dtype == "bfloat16"
        self._run: Callable[[Tensor], Tensor] = model
        if not recipe.run.compile:
            return
        try:
            for block in blocks:
                _compile_in_place(block)
            if not blocks:
                self._run = torch.compile(model, fullgraph=True, dynamic=False)
            self(example).sum().backward()
        except Exception as error:  # each stage of the compiler, and the C++ compiler, raises its own exceptions
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:160]
            raise BadInput(
                f"expected a forward pass that torch.compile can compile here, got {type(error).__name__} ({reason}); "
                f"install a C++ compiler, or leave out run.compile"
            ) from error
        finally:
            model.zero_grad(set_to_none=True)

    def __call__(self, x: Tensor) -> Tensor:
        if not self._bfloat16:
            return self._run(x)
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            return self._run(x).float()
