"""Rules: how far a bounded change can grow in one kind of layer. docs/theory.md, sections 1 and 3.

A rule does not see samples. It maps a `State`, bounds that hold for every perturbed input at once, to the state after its layer. The bounds are
float64 tensors of any common shape (one entry for each sample and tried radius). Constants of the weights come from `Context.constant`, which
computes each guaranteed constant once. In all rules, `fresh` is the rounding error that the layer adds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from robustlip.errors import BadInput, UnsupportedLayer
from robustlip.execution import check_plain
from robustlip.numerics.arithmetic import Arithmetic
from robustlip.numerics.rounding import SMALLEST, up
from robustlip.ops import elementwise_layers
from robustlip.ops.moves import moving_layers
from robustlip.ops.normalization import NORMALIZATIONS
from robustlip.threats import l2_factor

# More than the underflow error of the few products in one rule.
VANISHED = 64 * SMALLEST


@dataclass(frozen=True)
class State:
    """Bounds for all tokens t of the activations between two layers, for every perturbation in the threat.

    norm: ≥ ‖x'_t‖₂ of the perturbed activations, in exact arithmetic and as executed.
    change: ≥ ‖x'_t − x_t‖ in the norm `space`, in exact arithmetic.
    rounding: ≥ ‖executed − exact‖₂, at the clean input and at every perturbed input.
    space: 'l2', or 'l1' / 'linf' before the first layer that mixes coordinates.
    tokens, width: the number of vectors of a sample, and of entries of each.
    whole: the shape of a sample that is bounded as one vector of all its entries, (C, H, W) or (T, D); None where bounds are by token.
    """

    norm: Tensor
    change: Tensor
    rounding: Tensor
    space: str
    tokens: int
    width: int
    whole: tuple[int, ...] | None = None

    def by_token(self, layer: nn.Module) -> State:
        """The same bounds by token (T, D): no token changes by more than the whole sample. Raises BadInput for images, which have no tokens."""
        if self.whole is None:
            return self
        if len(self.whole) != 2:
            raise BadInput(
                f"expected vectors or tokens before {type(layer).__name__}, got samples of shape {self.whole}; put Flatten or Patchify before it"
            )
        return replace(self, tokens=self.whole[0], width=self.whole[1], whole=None)

    def in_l2(self) -> State:
        """The same bounds with `change` in ℓ2: ‖·‖₂ ≤ ‖·‖₁ and ‖·‖₂ ≤ √width·‖·‖_∞."""
        if self.space == "l2":
            return self
        return replace(self, change=self.change * l2_factor(self.space, self.width), space="l2")


@dataclass(frozen=True)
class Context(Arithmetic):
    """The constants of one certification: the arithmetic, the perturbation of the weights, the cache of constants.

    dtype: of the certified program. store: the cache. weight_radius: None, or the radius of a WeightBall (any shape that broadcasts with the states);
    relative: whether it is a fraction of each matrix's spectral norm.
    clean: for each traced layer, (by token?, largest norm (N,)) of its output in the executed clean pass (certifiers.trace).
    final_error: executed margins have to exceed it: the error of a function of the logits, such as softmax, at the end of the program (graph.final).
    """

    store: dict[tuple[int, str], Any]
    weight_radius: Tensor | None = None
    relative: bool = True
    clean: Mapping[int, tuple[bool, Tensor]] = field(default_factory=dict)
    final_error: float = 0.0

    def constant(self, layer: nn.Module, name: str, compute: Callable[[], Any]) -> Any:
        """compute(), cached for this layer as long as the model's weights do not change (see certifiers.constants)."""
        key = (self.store.get((id(layer), "twin of"), id(layer)), name)
        if key not in self.store:
            self.store[key] = compute()
        return self.store[key]

    def share_constants(self, model: nn.Module, twin: nn.Module) -> None:
        """Makes the layers of `twin`, a float64 copy with the same weights, share the cached constants of the model's layers."""
        for layer, copy in zip(model.modules(), twin.modules(), strict=True):
            self.store[id(copy), "twin of"] = id(layer)

    def weight_change(self, sigma: float) -> Tensor | float:
        """A bound of ‖E‖₂ for a matrix with σ(W) ≤ sigma; 0.0 without a weight threat."""
        if self.weight_radius is None:
            return 0.0
        return self.weight_radius * sigma if self.relative else self.weight_radius

    def tighten(self, layer: nn.Module, state: State) -> State:
        """The state with its norm bounded by ‖x_t‖ + change, where ‖x_t‖ is the traced clean norm: this shrinks the domain.

        Executed and exact values differ by `rounding`, for clean and for perturbed inputs: twice that is added.
        """
        seen = self.clean.get(id(layer))
        if seen is None or seen[0] != (state.whole is None and state.tokens > 1):
            return state
        return replace(state, norm=torch.minimum(state.norm, up(seen[1] + state.in_l2().change + 2 * state.rounding)))

    def guard_flush(self, state: State, by: float) -> State:
        """The state, with infinite rounding where a processor may replace the divisor `by` by zero."""
        return replace(state, rounding=self.infinite_if_flushed(state.rounding, by))

    def guard_overflow(self, state: State, largest: Tensor | None = None) -> State:
        """The state, with infinite rounding where a value could overflow in the certified dtype. largest: ≥ any intermediate value, if above norm."""
        largest = state.norm if largest is None else torch.maximum(state.norm, largest)
        return replace(state, rounding=self.infinite_if_overflow(state.rounding, largest))


class Rule:
    """The rule of one layer class. Subclasses prove `step`; tests/test_rules_contract.py checks it."""

    def step(self, layer: Any, state: State, context: Context) -> State:
        """Bounds after the layer from bounds before it. Has to be monotone in state.norm, state.change and the weight radius."""
        raise NotImplementedError


_RULES: dict[type, Rule] = {}


def register(*layers: type) -> Callable[[type[Rule]], type[Rule]]:
    """Class decorator: the rule of exactly these layer classes (not of subclasses, whose forward may differ)."""

    def add(rule: type[Rule]) -> type[Rule]:
        for layer in layers:
            _RULES[layer] = rule()
        return rule

    return add


_FAMILIES: list[tuple[Callable[[nn.Module], bool], Rule]] = []


def register_family(belongs: Callable[[nn.Module], bool]) -> Callable[[type[Rule]], type[Rule]]:
    """Class decorator: the rule of all layers of a family of operations in `robustlip.ops`."""

    def add(rule: type[Rule]) -> type[Rule]:
        _FAMILIES.append((belongs, rule()))
        return rule

    return add


def supported_layers() -> tuple[type, ...]:
    """The layer classes with a rule."""
    return (*_RULES, *NORMALIZATIONS, *elementwise_layers(), *moving_layers())


def rule_for(layer: nn.Module) -> Rule:
    """The rule of a layer. Raises UnsupportedLayer for a class without a rule, and for hooks, which can change what a layer computes."""
    rule = _RULES.get(type(layer)) or next((rule for belongs, rule in _FAMILIES if belongs(layer)), None)
    if rule is None:
        known = ", ".join(sorted(t.__name__ for t in supported_layers()))
        raise UnsupportedLayer(f"expected layers with a proved rule ({known}), got {type(layer).__name__}; replace it or add a rule")
    check_plain(layer)
    return rule


def apply_rule(layer: nn.Module, state: State, context: Context) -> State:
    """The state after one layer, its domain tightened by the clean pass where this was traced."""
    after = rule_for(layer).step(layer, state, context)
    # A product of small numbers can underflow although later layers amplify it: a change that is not 0 stays above 0.
    change = torch.where(state.change > 0, after.change + VANISHED, after.change)
    return context.tighten(layer, replace(after, change=change))


def run_rules(layers: Iterable[nn.Module], state: State, context: Context) -> State:
    """The state after a chain of layers."""
    for layer in layers:
        state = apply_rule(layer, state, context)
    return state
