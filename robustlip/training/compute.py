"""How the training forward pass is computed: in bfloat16 with float32 weights, compiled or not. Nothing else is: evaluation, constraints and
certificates see the model itself, in float32 and layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from robustlip.errors import BadInput
from robustlip.training.recipe import Recipe


def _compile_in_place(block: nn.Module) -> None:
    """Training passes of `block` become one graph; evaluation stays as it was.

    Its forward alone: what gathers a block's weights hangs on the module's call, and would be a break in the graph.
    """
    plain = block.forward
    fast = torch.compile(plain, fullgraph=True, dynamic=False)

    def forward(x: Tensor) -> Tensor:
        return (fast if block.training else plain)(x)

    block.forward = forward  # type: ignore[method-assign]


class Forward:
    """x → the logits of `model`, float32, with its gradients: autocast to bfloat16 and compiled where the recipe's [run] says so.

    Weights, gradients and optimisers stay in float32; autocast rounds inputs and weights of each product to bfloat16 and back, and the
    loss is of float32 logits. example: inputs like those of every step, on the device; with compile = true one forward and backward pass
    of them is compiled now: as one graph, or, where `blocks` of the model are given, each of them as one graph and the rest not at all, for
    weights that are there only while their block runs (fsdp). Raises BadInput when that fails: nothing falls back to the pass that was not
    asked for.
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
        except Exception as error:  # each stage of the compiler has its own, and so has the C++ compiler that it calls
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:160]
            raise BadInput(
                f"expected a forward pass that torch.compile can compile here, got {type(error).__name__} ({reason}); "
                f"install the C++ compiler that it needs, or leave out run.compile"
            ) from error
        finally:
            model.zero_grad(set_to_none=True)

    def __call__(self, x: Tensor) -> Tensor:
        if not self._bfloat16:
            return self._run(x)
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            return self._run(x).float()
