"""Every walk over layers refuses a layer that it does not name: one that nobody has looked at is never the identity, nor its parent class.

Two made-up layers are handed to each walk, and put into its table of known layers where it has one: `Tripled`, which is three times the identity,
and a subclass of a known layer, whose forward is another.
"""

from __future__ import annotations

import runpy
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from formulas import ELEMENTWISE, NORMS
from torch import nn

from robustlip.attacks import formulas, weight_space, worst_weights
from robustlip.attacks.audit import witness
from robustlip.certifiers import bounds, trace
from robustlip.certifiers.sequence import sequence_radii
from robustlip.constraints.targets import targets_of
from robustlip.domains.expansion import Scope, dual, expand, unsupported
from robustlip.domains.expansion import base as local_base
from robustlip.domains.expansion import elementwise as local_elementwise
from robustlip.domains.expansion import normalization as local_normalization
from robustlip.domains.expansion import sorting as local_sorting
from robustlip.domains.expansion import structure as local_structure
from robustlip.domains.lines import crown as linear
from robustlip.domains.lines import dense as mlp_network
from robustlip.domains.lines import relaxations as curves
from robustlip.domains.norms import Context, State, normalization, rule_for
from robustlip.domains.norms import state as rules_base
from robustlip.domains.quadratic import constraints as sdp_quadratic
from robustlip.domains.quadratic import lagrangian as quadratic
from robustlip.domains.quadratic import layers as sdp_network
from robustlip.domains.quadratic import multipliers as mlp_dual
from robustlip.errors import BadInput, UnsupportedLayer
from robustlip.layers import (
    AddPositions,
    Attention,
    Chain,
    Channels,
    Clamp,
    Concatenate,
    Constant,
    Flip,
    GroupSort,
    Householder,
    Lookup,
    MaxMin,
    MeanTokens,
    NextTokenChain,
    Normalize,
    Patchify,
    Permute,
    PrependToken,
    Residual,
    Scale,
    ScaledGELU,
    Select,
    Shift,
    Slice,
    Sum,
    View,
    as_chain,
)
from robustlip.layers.formulas import Formula, WrittenNorm
from robustlip.layers.joins import Maximum, Minimum, Product
from robustlip.ops import elementwise_layers, elementwise_of, maps
from robustlip.ops import normalization as ops_normalization
from robustlip.ops.convolution import CONVOLUTIONS, MAXIMA, MEANS, TRANSPOSED
from robustlip.ops.moves import moving_layers
from robustlip.ops.resampling import UPSAMPLES
from robustlip.threats import InputBall
from robustlip.training import ibp, losses, reparametrize

REFUSED = (UnsupportedLayer, BadInput)


class Tripled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * x


def other(known: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a known layer that computes three times as much."""
    return type(f"Other{known.__name__}", (known,), {"forward": lambda self, x: 3 * known.forward(self, x)})


OtherLinear, OtherReLU, OtherGELU, OtherDropout, OtherIdentity, OtherSequential, OtherFlatten, OtherResidual = (
    other(kind) for kind in (nn.Linear, nn.ReLU, nn.GELU, nn.Dropout, nn.Identity, nn.Sequential, nn.Flatten, Residual)
)
# name → what stands between two Linear layers (6, 8) and (8, 3), on vectors of 8 numbers.
STRANGE = {
    "made-up": Tripled,
    "linear": lambda: OtherLinear(8, 8),
    "relu": OtherReLU,
    "gelu": OtherGELU,
    "dropout": lambda: OtherDropout(0.0),
    "identity": OtherIdentity,
    "flatten": OtherFlatten,
    "sequential": lambda: OtherSequential(nn.ReLU()),
    "residual": lambda: OtherResidual(nn.ReLU()),
    "sorting": other(MaxMin),
    "groups": lambda: other(GroupSort)(2),
    "inside a residual": lambda: Residual(nn.Sequential(nn.Linear(8, 8), Tripled())),
    "inside a chain": lambda: nn.Sequential(nn.ReLU(), Tripled()),
}


def around(layer: nn.Module) -> Chain:
    torch.manual_seed(0)
    return as_chain(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), layer, nn.Linear(8, 3)).eval().requires_grad_(False))


def context() -> Context:
    return Context(torch.float64, {})


X, Y = torch.linspace(0, 1, 12).view(2, 6), torch.tensor([0, 1])

# name → a walk over the layers of a model: it has to raise.
WALKS = {
    "rules": lambda model: [rule_for(layer) for layer in flat(model)],
    "traced norms": lambda model: trace.scores_and_norms(model, X),
    "bounds of a model": lambda model: bounds.bound_of_chain(model, context()),
    "dense matrices": lambda model: mlp_network.network_of(model.double(), (6,), context()),
    "quadratic constraints": lambda model: sdp_network.network_of(model.double()),
    "expansions": lambda model: local_structure.ChainExpansion(list(model.double()), X.double()[:, None], Scope(context())),
    "interval training": lambda model: ibp.interval_margins(model, X, Y, 0.1, "linf"),
    "margin training": lambda model: losses.body_constant(list(model)[:-1], X),
    "the product of norms": formulas.product,
    "the worst weights": lambda model: worst_weights.worst_mlp(nn.Sequential(*model)),
    "files of worst weights": lambda model: [witness._describe(layer) for layer in model],
}


def flat(model: nn.Module) -> list[nn.Module]:
    return [m for layer in model for m in layer.modules()]


@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("name", STRANGE)
def test_a_walk_refuses_a_layer_that_it_does_not_name(name, walk) -> None:
    model = around(STRANGE[name]())
    with pytest.raises(REFUSED, match="expected"):
        WALKS[walk](model)


@pytest.mark.parametrize("walk", sorted(WALKS.keys() - {"quadratic constraints"}))  # which does not know the last two kinds
def test_the_same_walks_accept_what_they_name(walk) -> None:
    """The refusals above are not caused by something else in the model."""
    WALKS[walk](around(nn.Tanh()))


def test_quadratic_constraints_accept_what_they_name() -> None:
    WALKS["quadratic constraints"](around(MaxMin()))


# name → the sentence that a method gives for a model, '' where it applies.
REASONS = {
    "linear": lambda model: mlp_network.why_not(model, InputBall("l2")),
    "sdp": lambda model: mlp_dual.sdp_why_not(model, InputBall("l2")),
    "lipsdp": lambda model: sdp_network.why_not_chain(model, InputBall("l2"), "LipSDP", 1000),
    "dual": lambda model: dual.dual_why_not(model, InputBall("l2")),
}


@pytest.mark.parametrize("method", REASONS)
@pytest.mark.parametrize("name", STRANGE)
def test_a_method_does_not_apply_to_a_layer_that_it_does_not_name(name, method) -> None:
    assert REASONS[method](around(STRANGE[name]())) != ""
    assert REASONS[method](around(nn.ReLU())) == ""


@pytest.mark.parametrize("made", [Tripled, other(MaxMin), lambda: OtherDropout(0.0)], ids=["made-up", "sorting", "dropout"])
def test_pairs_of_a_layer_that_reflects_none_are_refused(made) -> None:
    model = around(made())
    with pytest.raises(UnsupportedLayer, match=type(model[2]).__name__):
        local_sorting.pairs_of(model[2], 8, X.double())


@pytest.mark.parametrize(
    "maker",
    [local_structure._identity, local_sorting.ReflectionExpansion, local_elementwise.ElementwiseExpansion,
     local_normalization.NormalizationExpansion],
    ids=["identity", "reflection", "elementwise", "normalisation"],
)
def test_an_expansion_of_another_layer_is_refused(maker, monkeypatch) -> None:
    """The table of expansions names a layer whose expansion is that of others."""
    layer = Tripled()
    monkeypatch.setitem(rules_base._RULES, Tripled, rule_for(nn.Identity()))
    monkeypatch.setitem(local_base._EXPANSIONS, Tripled, local_base.TableEntry(maker))
    assert unsupported(layer) == ""
    with pytest.raises((UnsupportedLayer, AttributeError)) as raised:
        expand(layer, X.double()[:, None], Scope(context()))
    assert raised.type is UnsupportedLayer


def test_rules_of_normalisation_are_of_two_layers() -> None:
    strange = other(nn.LayerNorm)(6)
    with pytest.raises(UnsupportedLayer, match="OtherLayerNorm"):
        ops_normalization.local_lipschitz(strange, X, 0.1, ops_normalization.Groups(1, 6, 1e-5))
    with pytest.raises(UnsupportedLayer, match="OtherLayerNorm"):
        normalization.NormalizationRule().step(strange, State(torch.ones(1), torch.ones(1), torch.zeros(1), "l2", 1, 6), context())


def test_curves_and_constraints_are_of_named_layers() -> None:
    for layer in (Tripled(), OtherGELU(), OtherReLU(), other(ScaledGELU)()):
        with pytest.raises(UnsupportedLayer, match=type(layer).__name__):
            curves.activation_of(layer)
        with pytest.raises(UnsupportedLayer, match=type(layer).__name__):
            sdp_quadratic.constraint_of(layer, 8)
        with pytest.raises(UnsupportedLayer, match=type(layer).__name__):
            elementwise_of(layer)
        with pytest.raises(UnsupportedLayer, match=type(layer).__name__):
            maps.map_of(layer, (8,))
        with pytest.raises(UnsupportedLayer, match=type(layer).__name__):
            mlp_network._Builder((8,), torch.device("cpu")).sort(layer)
    sizes = other(GroupSort)(1)
    with pytest.raises(UnsupportedLayer, match="OtherGroupSort"):
        sdp_quadratic.constraint_of(sizes, 8)


def test_the_quadratic_dual_takes_no_other_curve_for_relu() -> None:
    """The form itself is for relu only, independently of `sdp_why_not`."""
    model = around(nn.Tanh()).double()
    net = mlp_network.network_of(model, (6,), context())
    ball = linear.Ball(X.double(), torch.full((2,), 0.1, dtype=torch.float64), "l2")
    with pytest.raises(UnsupportedLayer, match="ReLU"):
        quadratic.form_of(net, ball, linear.linear_boxes(net, ball), Y)


def test_tokens_of_layers_that_nobody_named_may_move() -> None:
    """A layer that changes tokens before the last one is not covered by the method for single tokens."""

    def chain(*layers: nn.Module) -> Chain:
        parts = {"embed_tokens": nn.Embedding(7, 4), **{f"layer{i}": layer for i, layer in enumerate(layers)}, "head": nn.Linear(4, 7)}
        return NextTokenChain(OrderedDict(parts)).eval()

    assert dual.is_causal(chain(Attention(4, 1), nn.LayerNorm(4), Residual(nn.Sequential(nn.Linear(4, 4), nn.GELU()))))
    for layer in (Attention(4, 1, causal=False), MeanTokens(), Tripled(), OtherIdentity(), Residual(Tripled()), other(Attention)(4, 1)):
        model = chain(layer)
        assert not dual.is_causal(model)
        with pytest.raises(UnsupportedLayer):
            sequence_radii(model, torch.tensor([0, 1, 2]))


def test_bounds_of_a_model_see_flatten_inside_other_layers() -> None:
    flat = as_chain(nn.Sequential(nn.Linear(6, 6), Residual(nn.Sequential(nn.Flatten(), nn.Linear(6, 6))), nn.Linear(6, 2)).double())
    with pytest.raises(BadInput, match="number of tokens"):
        bounds.lipschitz_bound(flat)


class OwnMatrix(nn.Module):
    """A layer with a matrix of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.mixing


class OwnTable(Attention):
    """An attention layer with another matrix beside the four that are known."""

    def __init__(self) -> None:
        super().__init__(8, 2)
        self.mixing = nn.Parameter(torch.randn(8, 8))


@pytest.mark.parametrize("made", [OwnMatrix, OwnTable, lambda: nn.ConvTranspose1d(8, 8, 1)], ids=["made-up", "attention", "transposed"])
def test_matrices_of_layers_that_nobody_named_are_not_left_out(made) -> None:
    model = nn.Sequential(nn.Linear(6, 8), made(), nn.Linear(8, 3))
    with pytest.raises(REFUSED, match="expected"):
        weight_space.matrices_of(model)
    with pytest.raises(REFUSED, match="expected"):
        targets_of(model, 1.0)
    with pytest.raises(REFUSED, match="expected"):
        reparametrize.reparametrize(model, "spectral-norm")
    with pytest.raises(REFUSED, match="expected"):
        ibp.ibp_initialize(model)


def small(layer: type[nn.Module]) -> nn.Module:
    """A layer of a class of the rule table, on 8 numbers."""
    options: dict[type, tuple] = {
        nn.Linear: (8, 8), nn.LayerNorm: (8,), nn.RMSNorm: (8, 1e-3), nn.BatchNorm1d: (8,), nn.BatchNorm2d: (8,), nn.Embedding: (8, 8),
        nn.GroupNorm: (2, 8), **dict.fromkeys(ops_normalization.INSTANCE_NORMS, (8,)),
        Lookup: ([], [], 8), Householder: (8,), Attention: (8, 2),
        AddPositions: (4, 8), Patchify: (2,), Residual: (nn.Identity(),), Sum: (nn.Identity(),), Concatenate: (nn.Identity(),), Channels: (0, 8),
        Normalize: ([0.0], [1.0]), Scale: (2.0,), Shift: (1.0,), nn.ZeroPad2d: (1,), nn.Threshold: (0.0, 0.0), nn.Hardshrink: (0.0,), Clamp: (0.0,),
        PrependToken: (torch.ones(8),), Constant: (torch.ones(8),), nn.BatchNorm3d: (8,), **dict.fromkeys((*CONVOLUTIONS, *TRANSPOSED), (8, 8, 1)),
        **dict.fromkeys((*MEANS, *MAXIMA, *UPSAMPLES), (1,)),
        View: (8,), Permute: (0, 1), Select: (1, 0), Slice: (1, 0, 8), nn.Unflatten: (1, (2, 4)),
        **{kind: (1, 0.5) if "Constant" in kind.__name__ else (1,) for kind in moving_layers() if "Pad" in kind.__name__},
        **dict.fromkeys((Product, Maximum, Minimum), (nn.Identity(), nn.Identity())),
        **dict.fromkeys((nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, Flip), (1,)),
    }  # fmt: skip
    written = {Formula: lambda: ELEMENTWISE["gelu-new"], WrittenNorm: lambda: NORMS["written-rms"](8, 1e-3)}
    return written[layer]() if layer in written else layer(*options.get(layer, ()))


def test_tables_of_slope_one_have_slope_one() -> None:
    """Training assumes that these layers are 1-Lipschitz and monotone; their rules confirm it."""
    one = torch.ones(1, dtype=torch.float64)
    for kind in {*losses._ONE, *ibp._MONOTONE}:
        layer = small(kind).double()
        behind = rule_for(layer).step(layer, State(one, one, 0 * one, "l2", 1, 8), context())
        assert float(behind.change) <= 1 + 1e-12, kind
    z = torch.linspace(-5, 5, 1001, dtype=torch.float64)
    for kind in ibp._MONOTONE:
        assert bool((kind()(z).diff() >= 0).all()), kind


def test_every_activation_with_a_constraint_has_a_case() -> None:
    """tests/test_lipsdp.py attacks the constraints of a table of activations. The others are elementwise: slopes, which test_ops.py attacks."""
    root = Path(__file__).parent
    table = runpy.run_path(str(root / "test_lipsdp.py"))["ACTIVATIONS"]
    covered = {type(build(8)) for build in table.values()}
    known = {kind for kind in rules_base.supported_layers() if sdp_quadratic.has_constraint(small(kind))}
    assert covered <= known and known - covered <= set(elementwise_layers())


def test_a_constraint_does_not_hold_a_matrix_that_is_used_otherwise() -> None:
    with pytest.raises(BadInput, match=r"1\.weight"):
        targets_of(nn.Sequential(nn.Linear(6, 8), OtherLinear(8, 8)), 1.0)
    with pytest.raises(BadInput, match=r"0\.weight"):
        targets_of(nn.Sequential(other(nn.Embedding)(6, 8)), 1.0)
