"""Products and maxima of two branches: tightness of remainders, attacks on gates, refused shapes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustlip import capture
from robustlip.attacks import MinimumRadius
from robustlip.certifiers import certify
from robustlip.domains.expansion import Ball, Scope, decrease, expand
from robustlip.domains.lines import crown
from robustlip.domains.lines.dense import network_of
from robustlip.domains.lines.relaxations import Products
from robustlip.domains.lines.secants import gains, lipschitz_margins
from robustlip.domains.norms import Context, State, rule_for
from robustlip.errors import BadInput, UnsupportedLayer
from robustlip.layers import Channels, Concatenate, Maximum, Minimum, Product, Residual, Scale, Shift, Sum, as_chain
from robustlip.threats import InputBall, WeightBall


def remainder(layer: nn.Module, x: Tensor, step: Tensor, g: Tensor, whole: tuple[int, ...] | None) -> tuple[float, float]:
    """(what a step adds beyond the first order to ⟨g, ·⟩, what the expansion allows a step of that size), of one sample."""
    expansion = expand(layer, x.flatten()[None, None], Scope(Context(torch.float64, {}), "l2", whole))
    radius = step.norm()[None, None]
    bounds = expansion.advance(Ball.of(radius)).bounds
    back, weights = expansion.adjoint(g.flatten()[None, None, None])
    found = ((layer(x + step) - layer(x)) * g).sum() - (back.flatten() * step.flatten()).sum()
    return abs(float(found.detach())), float(decrease(torch.zeros(1, 1, dtype=torch.float64), weights, bounds))


@pytest.mark.parametrize("name", ["square", "linear", "image", "gate"])
def test_the_remainder_of_a_product_is_reached(name) -> None:
    """The worst step, by gradient ascent from one that is known: a bound that is smaller by a factor of any kind is exceeded."""
    torch.manual_seed(0)
    shape: tuple[int, ...] = (3, 4, 5) if name in ("image", "gate") else (6,)
    whole = shape if len(shape) == 3 else None
    first, second = nn.Linear(6, 6, bias=False).double(), nn.Linear(6, 6, bias=False).double()
    first.weight.data, second.weight.data = (torch.diag(torch.tensor([size, 1, 1, 1, 1, 1])).double() for size in (3.0, 2.0))
    layer = {
        "square": lambda: Product(nn.Identity(), nn.Identity()), "linear": lambda: Product(first, second),
        "image": lambda: Product(nn.Identity(), nn.Identity()), "gate": lambda: Product(nn.Identity(), nn.AdaptiveAvgPool2d(1)),
    }[name]()  # fmt: skip
    x = torch.randn(1, *shape, dtype=torch.float64)
    g, step = torch.zeros_like(x), torch.zeros_like(x)
    if name == "gate":
        g[0, 1], step[0, 1] = 1.0, 1.0
    else:
        g.view(-1)[0], step.view(-1)[0] = 1.0, 1.0
    g = g + 0.02 * torch.rand_like(g)
    raw = (step + 0.1 * torch.randn_like(step)).requires_grad_()
    optimizer = torch.optim.Adam([raw], lr=0.02)
    best = allowed = 0.0
    for radius in (1e-3, 0.5):
        for _ in range(150):
            moved = radius * raw / raw.norm()
            beyond = ((layer(x + moved) - layer(x) - torch.func.jvp(layer, (x,), (moved,))[1]) * g).sum() / radius**2
            optimizer.zero_grad()
            (-beyond).backward()
            optimizer.step()
        best, allowed = remainder(layer, x, (radius * raw / raw.norm()).detach(), g, whole)
        assert 0.95 * allowed < best <= allowed


def test_the_rule_of_a_product_is_reached_too() -> None:
    """‖a'b' − ab‖ of two numbers, and of a gate beside a channel, whose norm and largest number both count."""
    one = torch.ones(1, dtype=torch.float64)
    for size, change in ((3.0, 1e-6), (3.0, 2.0)):
        behind = rule_for(Product(nn.Identity(), nn.Identity())).step(
            Product(nn.Identity(), nn.Identity()), State(size * one, change * one, 0 * one, "l2", 1, 4), Context(torch.float64, {})
        )
        assert size**2 - (size - change) ** 2 <= float(behind.change) <= 2 * size * change * (1 + 1e-9)
        assert float(behind.norm) == pytest.approx(size**2)
    square = Product(nn.Identity(), nn.Identity())
    arrived = rule_for(square).step(square, State(3 * one, 0 * one, 0.5 * one, "l2", 1, 4), Context(torch.float64, {}))
    assert 3**2 - 2.5**2 <= float(arrived.rounding) <= 3.0 * (1 + 1e-9)  # executed 3, exact 2.5
    layer = Product(nn.Identity(), nn.AdaptiveAvgPool2d(1)).double()
    behind = rule_for(layer).step(layer, State(5 * one, 1e-6 * one, 0 * one, "l2", 1, 60, (3, 4, 5)), Context(torch.float64, {}))
    x = torch.zeros(1, 3, 4, 5, dtype=torch.float64)
    x[0, 0] = 5 / math.sqrt(20)
    found = float((layer(x) - layer(x * (1 - 1e-6 / 5))).norm() / 1e-6)
    assert found <= float(behind.change) / 1e-6 <= 1.01 * found


def test_a_gate_counts_with_its_largest_number() -> None:
    """A sigmoid is at most 1, whatever its ℓ2 norm: between 64 of them a change grows by 1, not by 8."""
    layer = Product(nn.Identity(), nn.Sequential(nn.Linear(64, 64), nn.Sigmoid()))
    nn.init.zeros_(layer.branches[1][0].weight)
    one = torch.ones(1, dtype=torch.float64)
    behind = rule_for(layer).step(layer, State(10 * one, one, 0 * one, "l2", 1, 64), Context(torch.float32, {}))
    assert 1.0 <= float(behind.change) < 1.01 and float(behind.norm) < 10.1


class Net(nn.Module):
    def __init__(self, forward, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.written = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.written(self, x)


def linears(**widths: tuple[int, int]) -> dict[str, nn.Module]:
    return {name: nn.Linear(*width) for name, width in widths.items()}


def squeezed(m: nn.Module, x: Tensor) -> Tensor:
    h = torch.relu(m.c(x))
    gate = torch.sigmoid(m.up(torch.relu(m.down(F.adaptive_avg_pool2d(h, 1)))))
    return m.d((h * gate).flatten(1))


# name → (module, shape of a sample, the same as layers)
NETS = {
    "swiglu": (
        lambda: Net(lambda m, x: m.d(F.silu(m.g(x)) * m.u(x)), **linears(g=(6, 16), u=(6, 16), d=(16, 3))), (6,),
        lambda m: nn.Sequential(Product(nn.Sequential(m.g, nn.SiLU()), m.u), m.d),
    ),
    "glu": (
        lambda: Net(lambda m, x: m.d(F.glu(m.g(x))), **linears(g=(6, 16), d=(8, 3))), (6,),
        lambda m: nn.Sequential(m.g, Product(Channels(0, 8), nn.Sequential(Channels(8, 16), nn.Sigmoid())), m.d),
    ),
    "squeezed": (
        lambda: Net(squeezed, c=nn.Conv2d(2, 6, 3), down=nn.Conv2d(6, 3, 1), up=nn.Conv2d(3, 6, 1), d=nn.Linear(96, 4)), (2, 6, 6),
        lambda m: nn.Sequential(
            m.c, nn.ReLU(), Product(nn.Identity(), nn.Sequential(nn.AdaptiveAvgPool2d(1), m.down, nn.ReLU(), m.up, nn.Sigmoid())), nn.Flatten(), m.d,
        ),
    ),
    "squared relu": (
        lambda: Net(lambda m, x: m.d(torch.relu(m.g(x)) ** 2), **linears(g=(6, 16), d=(16, 3))), (6,),
        lambda m: nn.Sequential(m.g, nn.ReLU(), Product(nn.Identity(), nn.Identity()), m.d),
    ),
    "cubed": (
        lambda: Net(lambda m, x: m.d(m.g(x).pow(3)), **linears(g=(6, 16), d=(16, 3))), (6,),
        lambda m: nn.Sequential(m.g, Product(Product(nn.Identity(), nn.Identity()), nn.Identity()), m.d),
    ),
    "maxout": (
        lambda: Net(lambda m, x: m.d(torch.maximum(m.g(x), m.u(x))), **linears(g=(6, 16), u=(6, 16), d=(16, 3))), (6,),
        lambda m: nn.Sequential(Maximum(m.g, m.u), m.d),
    ),
    "minimum of branches": (
        lambda: Net(lambda m, x: m.d(torch.min(m.g(x), torch.tanh(m.u(x)))), **linears(g=(6, 16), u=(6, 16), d=(16, 3))), (6,),
        lambda m: nn.Sequential(Minimum(m.g, nn.Sequential(m.u, nn.Tanh())), m.d),
    ),
    "highway": (
        lambda: Net(
            lambda m, x: m.d(torch.sigmoid(m.g(x)) * torch.tanh(m.u(x)) + (1 - torch.sigmoid(m.g(x))) * x), **linears(g=(6, 6), u=(6, 6), d=(6, 3))
        ), (6,),
        lambda m: nn.Sequential(
            Sum(
                Product(nn.Sequential(m.g, nn.Sigmoid()), nn.Sequential(m.u, nn.Tanh())),
                Product(nn.Sequential(m.g, nn.Sigmoid(), Scale(-1.0), Shift(1.0)), nn.Identity()),
            ), m.d,
        ),
    ),
}  # fmt: skip


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return NETS[name][0]().eval(), torch.rand(4, *NETS[name][1], generator=torch.Generator().manual_seed(1)) * 2 - 0.5


@pytest.mark.parametrize("name", NETS)
def test_captured_gates_are_attacked_inside_their_radii(name) -> None:
    module, x = made(name)
    chain, by_hand = capture(module, x), NETS[name][2](module).eval()
    assert torch.equal(chain(3 * x), module(3 * x))
    y = module(x).argmax(-1)
    for threat in (InputBall("l2"), InputBall("linf")):
        broken = MinimumRadius()(module, x, y, threat).radius
        for method in ("global", "local", "dual", "ibp", "local-lipschitz", "crown"):
            radius = certify(chain, x, y, threat, method).radius
            assert (radius <= broken).all() and (radius > 0).any()
            if threat.norm == "linf" and method in ("global", "dual", "crown"):
                assert radius.tolist() == certify(by_hand, x, y, threat, method).radius.tolist()
        assert (radius > 0.15 * broken).all()


def boxes() -> tuple[Products, Tensor, Tensor, Tensor, Tensor]:
    """(the curve of a product, a square, and its second factor; low, high; points z and z⁰ of the box), boxes of all sizes and places."""
    curve, g = Products(1.0, 0.0, torch.tensor([2, 1, 2])), torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    middle, half = 6 * drawn(400, 3) - 3, 10 ** (4 * drawn(400, 3) - 3)
    z, z0 = (middle + half * (2 * drawn(40, 400, 3) - 1) for _ in range(2))
    corners = torch.tensor([[a, b, c] for a in (-1, 1) for b in (-1, 0, 1) for c in (-1, 1)], dtype=torch.float64)
    z[:12] = middle + half * corners[:, None]
    return curve, middle - half, middle + half, z, z0


def test_planes_of_products_hold_and_touch() -> None:
    """z_n·z_p between its two planes on the whole box, each of which touches it at a corner; a square between tangent and chord."""
    curve, low, high, z, _ = boxes()
    lower, below, upper, above = curve.lines(low, high)
    cross = curve.partner_lines(low, high)
    assert cross is not None and float(cross.slope[:, 1].abs().max()) == 0.0
    added, value = cross.slope * z[..., curve.partner], curve.value(z)
    over, under = upper * z + added + above - value, value - (lower * z + added + below)
    for n in (0, 1):
        size = 1e-12 * (1 + value[..., n].abs().amax(0))
        assert bool((over[..., n] >= 0).all()) and bool((under[..., n] >= 0).all())
        assert bool((over[..., n].amin(0) <= size).all()) and bool((under[..., n].amin(0) <= size).all())
    floor, ceiling = curve.value_range(low, high)
    for n in (0, 1):
        assert bool((floor[:, n] <= value[..., n]).all()) and bool((value[..., n] <= ceiling[:, n]).all())
        assert bool((ceiling[:, n] - value[..., n].amax(0) <= 1e-9).all())


def test_secants_of_products_hold() -> None:
    """z_nz_p − z⁰_nz⁰_p = s(z_n − z⁰_n) + t(z_p − z⁰_p), with s and t in the intervals that are said, and both ends of each taken."""
    curve, low, high, z, z0 = boxes()
    (a, b), across = curve.secant_slopes((z0, z0), low, high), curve.partner_slopes((z0, z0), low, high)
    assert across is not None
    s, t = (z + z0)[..., curve.partner] / 2, (z + z0) / 2
    s[..., 1], t[..., 1] = (z + z0)[..., 1], 0.0
    made = s * (z - z0) + t * (z - z0)[..., curve.partner]
    for n in (0, 1):
        assert float((curve.value(z) - curve.value(z0) - made)[..., n].abs().max()) < 1e-12
        for inside, (least, most) in ((s, (a, b)), (t, across)):
            assert bool((least[..., n] <= inside[..., n]).all()) and bool((inside[..., n] <= most[..., n]).all())
        assert bool(((s - a)[..., n].amin(0) < 1e-9).all()) and bool(((b - s)[..., n].amin(0) < 1e-9).all())


def test_networks_of_stages_compute_nested_gates() -> None:
    """Products inside of branches of others, with rows held past them, against the layers themselves; and their boxes, against random points."""
    torch.manual_seed(0)
    gate = Product(nn.Sequential(nn.Linear(5, 5), nn.SiLU()), Residual(Product(nn.Identity(), nn.Linear(5, 5))))
    inner = Concatenate(Maximum(nn.Linear(5, 3), nn.Linear(5, 3)), nn.Sequential(gate, Product(nn.Identity(), nn.Identity())), nn.Identity())
    model = as_chain(nn.Sequential(Residual(gate, skip=0.5, weight=-1.5), inner, nn.Linear(13, 3)).double())
    x = torch.randn(3, 5, dtype=torch.float64)
    network = network_of(model, (5,), Context(torch.float64, {}))
    assert network.has_products and not network.piecewise_linear
    torch.testing.assert_close(network.forward(x)[-1], model(x), rtol=1e-12, atol=1e-12)
    ball = crown.Ball(x, torch.full((3,), 0.1, dtype=torch.float64), "l2")
    interval, linear = crown.interval_boxes(network, ball), crown.linear_boxes(network, ball)
    step = torch.randn(500, 3, 5, dtype=torch.float64)
    points = x + 0.1 * step / step.norm(dim=-1, keepdim=True)
    there = network.forward(points.flatten(0, 1))
    for found in (interval, linear):
        for low, high, z in zip(found.low, found.high, there, strict=False):
            assert bool((low <= z.unflatten(0, (500, 3))).all()) and bool((z.unflatten(0, (500, 3)) <= high).all())
    assert all(float((b - a).max()) <= float((d - c).max()) for a, b, c, d in zip(linear.low, linear.high, interval.low, interval.high, strict=True))


def test_local_slopes_of_both_factors_count() -> None:
    """a·b at (1, 1) in an ℓ∞ ball: it moves by 2ε + ε², of which each factor's slope gives a half beyond the first order."""
    pick = [nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)]
    head = nn.Linear(1, 2, bias=False)
    for layer, weight in zip((*pick, head), ([[1.0, 0.0]], [[0.0, 1.0]], [[1.0], [0.0]]), strict=True):
        layer.weight.data = torch.tensor(weight)
    model = as_chain(nn.Sequential(Product(*pick), head).double())
    x, y, context = torch.ones(1, 2, dtype=torch.float64), torch.tensor([0]), Context(torch.float64, {})
    network = network_of(model, (2,), context, dense=True)
    for epsilon in (0.01, 0.5):
        ball = crown.Ball(x, torch.full((1,), epsilon, dtype=torch.float64), "linf")
        low, moved = lipschitz_margins(network, ball, crown.linear_boxes(network, ball), y, gains(network, "linf", context, model))
        assert 2 * epsilon + epsilon**2 <= float(moved[0, 1]) <= 2 * epsilon + 1.5 * epsilon**2
        assert float(low[0, 1]) <= (1 - epsilon) ** 2


@pytest.mark.parametrize("method", ["eclipse", "lipsdp", "sdp"])
def test_methods_without_products_say_so(method) -> None:
    module, x = made("swiglu")
    with pytest.raises(UnsupportedLayer, match="Product"):
        certify(module, x, module(x).argmax(-1), InputBall("l2"), method)


@pytest.mark.parametrize("name", ["swiglu", "maxout"])
def test_weights_of_both_branches_may_move(name) -> None:
    """Attacked by random and by gradient-chosen changes of all matrices inside of the radius."""
    module, x = made(name)
    model, threat = NETS[name][2](module).eval(), WeightBall()
    y = model(x).argmax(-1)
    for method in ("global", "local"):
        radius = certify(model, x, y, threat, method).radius
        assert (radius > 0).any()
        for i in range(len(x)):
            for seed in range(4):
                g = torch.Generator().manual_seed(seed)
                weights = {n: p for n, p in model.named_parameters() if p.dim() > 1}
                errors = {n: torch.randn(p.shape, generator=g).requires_grad_() for n, p in weights.items()}
                for _ in range(12):
                    norms = {n: torch.linalg.matrix_norm(weights[n].detach(), 2) / torch.linalg.matrix_norm(e, 2) for n, e in errors.items()}
                    moved = {n: weights[n].detach() + 0.999 * float(radius[i]) * norms[n] * e for n, e in errors.items()}
                    logits = torch.func.functional_call(model, moved, (x[i : i + 1],))[0]
                    assert int(logits.argmax()) == int(y[i])
                    others = logits.clone()
                    others[y[i]] = -torch.inf
                    loss_of = logits[y[i]] - others.max()
                    grads = torch.autograd.grad(loss_of, list(errors.values()))
                    steps = [e - 10 * d / d.norm().clamp_min(1e-9) for e, d in zip(errors.values(), grads, strict=True)]
                    errors = {n: step.detach().requires_grad_() for n, step in zip(errors, steps, strict=True)}


@pytest.mark.parametrize("kind", [Product, Maximum, Minimum])
def test_shapes_that_torch_would_spread_are_refused(kind) -> None:
    layer = kind(nn.Linear(4, 6), nn.Linear(4, 1))
    with pytest.raises(BadInput, match="put out one shape"):
        layer(torch.ones(2, 4))
    with pytest.raises(BadInput, match="put out one shape"):
        certify(nn.Sequential(Residual(nn.Linear(4, 4)), layer, nn.Linear(6, 2)), torch.ones(1, 4), torch.tensor([0]), InputBall("l2"), "global")
    one = torch.ones(1, dtype=torch.float64)
    with pytest.raises(BadInput, match="put out one shape"):
        rule_for(layer).step(layer, State(one, one, one, "l2", 1, 4), Context(torch.float32, {}))
    with pytest.raises(BadInput, match="put out one shape"):
        expand(layer.double(), torch.ones(1, 1, 4, dtype=torch.float64), Scope(Context(torch.float32, {})))
    inplace = kind(nn.ReLU(inplace=True), nn.Identity())
    with pytest.raises(BadInput, match="leave inplace out"):
        inplace(torch.ones(2, 4))


SPREAD = {
    "one column": lambda m, x: m.d(m.g(x) * m.g(x)[:, :1]),
    "rows of images": lambda m, x: m.d((x.view(-1, 1, 2, 3) * x.view(-1, 1, 2, 3).mean(-1, keepdim=True)).flatten(1)),
    "power of a half": lambda m, x: m.d(m.g(x).abs().pow(0.5)), "a number to a power": lambda m, x: m.d(torch.pow(2.0, m.g(x))),
    "a constant maximum": lambda m, x: m.d(torch.maximum(m.g(x)[:, :1], torch.ones(6))),
}  # fmt: skip


@pytest.mark.parametrize("name", SPREAD)
def test_products_of_other_shapes_and_powers_are_refused(name) -> None:
    module = Net(SPREAD[name], **linears(g=(6, 6), d=(6, 3))).eval()
    with pytest.raises(UnsupportedLayer, match="expected operations for which a layer has a proved rule"):
        capture(module, torch.randn(4, 6))
