"""Measures the change of a float64 copy of the layers between two inputs of the domain, minus the rounding error."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from robustlip.domains.norms import Context, State, run_rules
from robustlip.errors import BadInput
from robustlip.geometry import safe_divide
from robustlip.layers import Chain, as_chain
from robustlip.numerics.rounding import U64, gamma, norm_up

INSIDE = 1e-12  # relative margin to the boundary of the domain, so that norms summed in any order stay within it


class Map:
    """A float64 map of batches of inputs (S, T, D) → (S, U, V), and its domain; vectors and images are one token, T = 1.

    shape: of one input of the layers. domain: ‖x_t‖₂ ≤ domain, None for all inputs; box: low ≤ every coordinate ≤ high, or None.
    """

    def __init__(
        self, layers: nn.Sequential, shape: tuple[int, ...], *, tokens: bool, domain: float | None, box: tuple[float, float] | None = None
    ) -> None:
        self.layers = layers.double().eval().requires_grad_(False)
        self.shape, self.tokens, self.domain, self.box = shape, tokens, domain, box
        self.single: nn.Sequential | None = None

    def __call__(self, x: Tensor) -> Tensor:
        y = self.layers(x.reshape(-1, *self.shape) if not self.tokens else x)
        return y if y.dim() == 3 and self.tokens else y.reshape(len(y), 1, -1)

    def project(self, x: Tensor, slack: Tensor | float = 0.0) -> Tensor:
        """Projects x (S, T, D) into the domain, at least `slack` (S, 1, 1) away from its boundary."""
        if self.box is not None:
            x = x.clamp(*self.box)
        if self.domain is not None:
            limit = torch.as_tensor((self.domain - slack) * (1 - INSIDE), dtype=x.dtype, device=x.device).clamp_min(0.0)
            x = x * safe_divide(limit, x.norm(dim=-1, keepdim=True)).clamp_max(1.0)
        return x

    def inside(self, x: Tensor) -> Tensor:
        """(S,) whether all tokens of x (S, T, D) lie in the domain, with the rounding error of the norm."""
        good = torch.isfinite(x).flatten(1).all(1)
        if self.box is not None:
            good &= ((x >= self.box[0]) & (x <= self.box[1])).flatten(1).all(1)
        if self.domain is not None:
            good &= (norm_up(x).amax(-1) <= self.domain * (1 + 1e-13)).to(x.device)
        return good

    def proved_rounding(self, norm: Tensor) -> Tensor | None:
        """‖executed − exact‖₂ (S,) of each output token for token norms ≤ norm (S,), from the rules; None if a layer has no rule."""
        layers = [m for m in self.layers]
        rows, width = (self.shape[0], self.shape[1]) if self.tokens else (1, math.prod(self.shape))
        zero = torch.zeros_like(norm)
        state = State(norm, zero, zero, "l2", rows, width, None if self.tokens or len(self.shape) == 1 else self.shape)
        try:
            return run_rules(layers, state, Context(dtype=torch.float64, store={})).rounding
        except BadInput:
            return None

    def estimated_rounding(self, x: Tensor) -> Tensor:
        """(S,) an estimate of the rounding error: the error of a float32 run, scaled to float64 and multiplied by 64."""
        if self.single is None:
            self.single = copy.deepcopy(self.layers).float()
        exact = self(x.float().double())
        y = self.single(x.float().reshape(-1, *self.shape) if not self.tokens else x.float()).double().reshape_as(exact)
        return 64 * 2.0**-29 * (y - exact).norm(dim=-1).amax(-1)

    def ratios(self, a: Tensor, b: Tensor, *, estimate: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pairs (S, T, D) → (found, change, distance, rounding), each (S,), in ℓ2: found = (change − rounding)/distance, 0 outside the domain."""
        difference = self(b) - self(a)
        change = difference.norm(dim=-1).amax(-1)
        distance = (b - a).norm(dim=-1).amax(-1) * (1 + gamma(a.shape[-1] + 8, U64))
        if estimate:
            rounding = self.estimated_rounding(a) + self.estimated_rounding(b)
        else:
            proved = self.proved_rounding(torch.maximum(norm_up(a).amax(-1), norm_up(b).amax(-1)).cpu())
            rounding = 2 * proved.to(a.device) if proved is not None else torch.full_like(change, torch.inf)
        rounding = rounding + gamma(difference.shape[-1] + 8, U64) * change
        found = safe_divide((change - rounding).clamp_min(0.0), distance)
        good = self.inside(a) & self.inside(b) & torch.isfinite(found)
        return torch.where(good, found, 0.0), change, distance, rounding


def map_of(chain: Chain, domain: float | None, shape: tuple[int, ...], box: tuple[float, float] | None) -> Map:
    double = as_chain(copy.deepcopy(chain))
    for module in double.modules():  # of the copy: its inputs are measured and differentiated
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]
    layers = nn.Sequential(*list(double)[chain.embedding_depth :])
    return Map(layers, shape, tokens=chain.embedding_depth > 0, domain=domain, box=box)


def measure(f: Map, a: Tensor, b: Tensor) -> tuple[int, float, float, float, float, str]:
    """(index, found, change, distance, rounding, kind of rounding) of the best pair, all in ℓ2."""
    with torch.no_grad():
        results = {"proved": f.ratios(a, b, estimate=False)}
        top = int(results["proved"][0].argmax())
        found, change, distance, rounding = (float(column[top]) for column in results["proved"])
        if rounding <= 1e-6 * change:
            return top, found, change, distance, rounding, "proved"
        # The proved rounding error of many layers can be larger than the change; then the estimate is used.
        estimated = f.ratios(a, b, estimate=True)
        other = int(estimated[0].argmax())
        if float(estimated[0][other]) <= found:
            return top, found, change, distance, rounding, "proved"
        found, change, distance, rounding = (float(column[other]) for column in estimated)
        return other, found, change, distance, rounding, "estimated"
