"""What a rule is: how far a bounded change can travel through one kind of layer. docs/theory.md, sections 1 and 3.

A rule never sees a sample. It sees a `State`: bounds that hold for every perturbed input at once, as float64 tensors of any common
shape (one entry per sample and radius tried), and returns the state after its layer. What it needs of the weights it asks
`Context.constant` for, which computes each guaranteed constant once for given weights.
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

# More than the few products of one rule can lose by underflow.
VANISHED = 64 * SMALLEST


@dataclass(frozen=True)
class State:
    """Bounds on all tokens t of the activations between two layers, for every perturbation in the threat.

    norm: ‖x'_t‖₂ ≤ norm for the perturbed activations, in exact arithmetic and as executed.
    change: ‖x'_t − x_t‖ ≤ change in the norm `space`, exact arithmetic.
    rounding: ‖executed − exact‖₂ ≤ rounding, at the clean input and at every perturbed one.
    space: 'l2', or 'l1' / 'linf' before the first layer that mixes coordinates.
    tokens, width: how many vectors a sample has here, and how many numbers each.
    whole: the shape of a sample that is still bounded as one vector of all its numbers, (C, H, W) or (T, D); None where bounds are by token.
    """

    norm: Tensor
    change: Tensor
    rounding: Tensor
    space: str
    tokens: int
    width: int
    whole: tuple[int, ...] | None = None

    def by_token(self, layer: nn.Module) -> State:
        """The same bounds by token (T, D): no token changes by more than the whole. Raises BadInput for images, which have no tokens yet."""
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
    """What holds for a whole certification: the arithmetic, the perturbation of the weights, the store of constants.

    dtype: of the program that is covered. weight_radius: None, or the radius of a WeightBall (any shape that fits the states);
    relative: whether it is a fraction of each matrix's spectral norm.
    clean: by layer, (by token?, largest norm (N,)) of its output in the clean pass as executed, where one was traced (certifiers.trace).
    after: executed margins have to stay above it: what a function of the logits that the program ends with can lose (graph.final).
    """

    store: dict[tuple[int, str], Any]
    weight_radius: Tensor | None = None
    relative: bool = True
    clean: Mapping[int, tuple[bool, Tensor]] = field(default_factory=dict)
    final_error: float = 0.0

    def constant(self, layer: nn.Module, name: str, compute: Callable[[], Any]) -> Any:
        """compute(), remembered for this layer as long as the model's weights stay the same (see certifiers.constants)."""
        key = (self.store.get((id(layer), "twin of"), id(layer)), name)
        if key not in self.store:
            self.store[key] = compute()
        return self.store[key]

    def twins(self, model: nn.Module, twin: nn.Module) -> None:
        """From now on the layers of `twin`, a copy with the same weights in float64, have the constants of the model's."""
        for layer, copy in zip(model.modules(), twin.modules(), strict=True):
            self.store[id(copy), "twin of"] = id(layer)

    def weight_change(self, sigma: float) -> Tensor | float:
        """A bound of ‖E‖₂ for a matrix with σ(W) ≤ sigma."""
        if self.weight_radius is None:
            return 0.0
        return self.weight_radius * sigma if self.relative else self.weight_radius

    def tighten(self, layer: nn.Module, state: State) -> State:
        """‖x'_t‖ ≤ ‖x_t‖ + change, whatever the layers in front could do: the clean norms that were seen shrink the domain.

        Executed and exact clean values differ by `rounding`, and so do the perturbed ones: twice that is added.
        """
        seen = self.clean.get(id(layer))
        if seen is None or seen[0] != (state.whole is None and state.tokens > 1):
            return state
        return replace(state, norm=torch.minimum(state.norm, up(seen[1] + state.in_l2().change + 2 * state.rounding)))

    def divided(self, state: State, by: float) -> State:
        """The state with infinite rounding where a processor may take what was divided by for zero."""
        return replace(state, rounding=self.infinite_if_flushed(state.rounding, by))

    def finite(self, state: State, largest: Tensor | None = None) -> State:
        """The state with infinite rounding where a number could overflow the covered dtype. largest: of any intermediate value, if above norm."""
        largest = state.norm if largest is None else torch.maximum(state.norm, largest)
        return replace(state, rounding=self.infinite_if_overflow(state.rounding, largest))


class Rule:
    """The rule of one layer class. Subclasses prove `step`; a contract test in tests/test_rules_contract.py checks it."""

    def step(self, layer: Any, state: State, context: Context) -> State:
        """Bounds after the layer, given bounds before it. Must be monotone in state.norm, state.change and the weight radius."""
        raise NotImplementedError


_RULES: dict[type, Rule] = {}


def register(*layers: type) -> Callable[[type[Rule]], type[Rule]]:
    """Class decorator: this rule speaks for exactly these layer classes (not for subclasses, whose forward may differ)."""

    def add(rule: type[Rule]) -> type[Rule]:
        for layer in layers:
            _RULES[layer] = rule()
        return rule

    return add


_FAMILIES: list[tuple[Callable[[nn.Module], bool], Rule]] = []


def register_family(belongs: Callable[[nn.Module], bool]) -> Callable[[type[Rule]], type[Rule]]:
    """Class decorator: this rule speaks for all layers of a family of operations whose facts `robustlip.ops` holds."""

    def add(rule: type[Rule]) -> type[Rule]:
        _FAMILIES.append((belongs, rule()))
        return rule

    return add


def known_layers() -> tuple[type, ...]:
    """The layer classes with a rule."""
    return (*_RULES, *NORMALIZATIONS, *elementwise_layers(), *moving_layers())


def rule_for(layer: nn.Module) -> Rule:
    """The rule of a layer. Raises UnsupportedLayer for a class without one, and for hooks, which can change what a layer computes."""
    rule = _RULES.get(type(layer)) or next((rule for belongs, rule in _FAMILIES if belongs(layer)), None)
    if rule is None:
        known = ", ".join(sorted(t.__name__ for t in known_layers()))
        raise UnsupportedLayer(f"expected layers with a proved rule ({known}), got {type(layer).__name__}; replace it or add a rule")
    check_plain(layer)
    return rule


def apply_rule(layer: nn.Module, state: State, context: Context) -> State:
    """The state after one layer, its domain tightened by the clean pass where that is known."""
    behind = rule_for(layer).step(layer, state, context)
    # A product of small numbers can vanish, and what stands after may be large: a change that is not 0 stays above 0.
    change = torch.where(state.change > 0, behind.change + VANISHED, behind.change)
    return context.tighten(layer, replace(behind, change=change))


def run_rules(layers: Iterable[nn.Module], state: State, context: Context) -> State:
    """The state after a chain of layers."""
    for layer in layers:
        state = apply_rule(layer, state, context)
    return state
