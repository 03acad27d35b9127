"""A constraint: a method and its weights, attached to an optimiser, and checks of the guarantee."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from robustlip.constraints.decay import SpectralWeightDecay, WeightDecay
from robustlip.constraints.hammer import SpectralHammer
from robustlip.constraints.hardcap import HardCap, HardCapMsign
from robustlip.constraints.method import Guarantee, Method, StepTaken, map_stack
from robustlip.constraints.normalize import SpectralNormalize
from robustlip.constraints.norms import fixed_vectors, probe
from robustlip.constraints.softcap import SoftCap
from robustlip.constraints.stiefel import Stiefel
from robustlip.constraints.targets import Target
from robustlip.errors import BadInput, RobustlipError
from robustlip.parallel import ALONE, Assignment, World, local

METHODS = (
    "none", "weight-decay", "spectral-weight-decay", "spectral-normalize", "stiefel", "spectral-hammer", "soft-cap", "hard-cap", "hard-cap-msign",
)  # fmt: skip

_LARGEST_STACK = 2**25


class ConstraintViolation(RobustlipError):
    """A weight exceeds the guarantee of its constraint: an assumption of the method was violated, or the method is wrong. Training stops."""


def make_method(name: str, *, strength: float | None = None, polynomial: str | None = None) -> Method | None:
    """The method of that name (METHODS), None for 'none'.

    strength: λ of the two decays, default 0.1. polynomial: for stiefel, see there. Raises BadInput for other names and for
    an option that the method does not have.
    """
    if name not in METHODS:
        raise BadInput(f"expected a constraint method among {', '.join(METHODS)}, got {name!r}; name one of them")
    if strength is not None and name not in ("weight-decay", "spectral-weight-decay"):
        raise BadInput(f"expected no strength for {name}, got {strength}; only weight-decay and spectral-weight-decay have one")
    if polynomial is not None and name != "stiefel":
        raise BadInput(f"expected no polynomial for {name}, got {polynomial!r}; only stiefel has one")
    if name == "spectral-weight-decay" and strength is not None and not 0 < strength < 1:
        raise BadInput(f"expected a strength in (0, 1) for spectral-weight-decay, got {strength}; it is the fraction removed at each step")
    decay = 0.1 if strength is None else strength
    table = {
        "none": lambda: None,
        "weight-decay": lambda: WeightDecay(decay),
        "spectral-weight-decay": lambda: SpectralWeightDecay(decay),
        "spectral-normalize": SpectralNormalize,
        "stiefel": lambda: Stiefel(polynomial),
        "spectral-hammer": SpectralHammer,
        "soft-cap": SoftCap,
        "hard-cap": HardCap,
        "hard-cap-msign": HardCapMsign,
    }
    return table[name]()


@dataclass
class _Group:
    """Targets with the same slice shape, dtype and device; those of one owner are mapped as one stack.

    numbers: of their parameter groups. caps: (K, 1, 1), for the K slices that this process owns. block: for these slices, see `probe`.
    """

    targets: list[Target]
    numbers: list[int]
    assignment: Assignment
    caps: Tensor
    block: Tensor | None = field(default=None)

    def mine(self) -> list[tuple[Target, int]]:
        return [(self.targets[i], self.numbers[i]) for i in self.assignment.mine]


class Constraint:
    """A method and the weights that it constrains; after `attach` an optimiser applies it after each of its steps.

    method: a name of METHODS or a Method. `guarantee` says what holds for every target after every step if it held before the first
    (`project`); rows are always divided to RMS norm ≤ w_max, with every method. A certain violation after a step raises
    ConstraintViolation: it is found with a lower bound of the norm, so there are no false alarms; `check` uses guaranteed upper bounds.

    world: the processes that share the work, each of which maps and measures its own matrices; weights may be DTensors sharded by rows. All
    processes then have to make the same calls, and an error in one is raised in all.
    """

    def __init__(self, targets: Iterable[Target], method: str | Method, world: World = ALONE) -> None:
        self.method = make_method(method) if isinstance(method, str) else method
        self.targets = list(targets)
        self.world = world

    @property
    def guarantee(self) -> Guarantee:
        """The method's guarantee for matrices. For rows every method except 'none' is hard."""
        return Guarantee(math.inf) if self.method is None else self.method.guarantee

    def limit(self, target: Target) -> float:
        """The largest norm (RMS units) that this target may have after a step, with rounding; inf without a guarantee."""
        factor = math.inf if self.method is None else 1.0 if target.rows else self.guarantee.factor
        return target.w_max * factor * (1 + target.rounding())

    def attach(self, *optimizers: torch.optim.Optimizer) -> None:
        """Apply the constraint to these optimisers' weights after each of their steps. Any torch optimiser can be used.

        An optimiser with `update_norm(lr)` states a bound of its steps (robustlip.muon.Muon); with others, methods that need it measure the step.
        Raises BadInput if a target belongs to none of the optimisers, because it would change without the constraint.
        """
        if self.method is None:
            return
        owned = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
        if astray := [target.name for target in self.targets if id(target.weight) not in owned]:
            raise BadInput(
                f"expected optimisers that own every constrained weight, got none with {', '.join(astray[:3])}"
                f"{f' and {len(astray) - 3} more' if len(astray) > 3 else ''}; attach all optimisers in one call, after adding parameter groups"
            )
        for optimizer in optimizers:
            self._attach(optimizer)

    def _attach(self, optimizer: torch.optim.Optimizer) -> None:
        # The index of the group, not the group, because load_state_dict replaces the dictionaries.
        owned = {id(p): number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
        mine = [(t, owned[id(t.weight)]) for t in self.targets if id(t.weight) in owned]
        if not mine:
            return
        groups = self._grouped([(t, n) for t, n in mine if not t.rows])
        rows = [t for t, _ in mine if t.rows]

        kind = mine[0][0].weight.device.type

        @torch.no_grad()
        def after_step(opt: torch.optim.Optimizer, args: object, kwargs: object) -> None:
            # A step inside torch.autocast would map in 16 bits.
            with torch.autocast(kind, enabled=False):
                for target in rows:
                    _cap_rows(target)
                norms = self._map(groups, [_step_of(group, opt) for group in groups])
                norms += [_largest_row(target) for target in rows]
                self._refuse_violations([*(t for group in groups for t in group.targets), *rows], norms)

        optimizer.register_step_post_hook(after_step)

    def _grouped(self, pairs: list[tuple[Target, int]], apart: bool = False) -> list[_Group]:
        """Targets whose slices can be mapped together, in stacks of bounded size, with their owners. apart: one group per target."""
        parts: dict[tuple[object, ...], list[list[tuple[Target, int]]]] = {}
        for i, (target, number) in enumerate(pairs):
            key = (target.shape(), target.weight.dtype, target.weight.device, i if apart else None)
            stacks = parts.setdefault(key, [[]])
            if sum(t.weight.numel() for t, _ in stacks[-1]) + target.weight.numel() > _LARGEST_STACK * self.world.size and stacks[-1]:
                stacks.append([])
            stacks[-1].append((target, number))
        batches = [members for stacks in parts.values() for members in stacks]
        assignments = self.world.assign([[(tuple(t.weight.shape), t.cost()) for t, _ in members] for members in batches])
        groups = []
        for members, assignment in zip(batches, assignments, strict=True):
            targets, numbers = [t for t, _ in members], [n for _, n in members]
            weight = targets[0].weight
            dtype = torch.float32 if weight.dtype.itemsize < 4 else weight.dtype
            caps = torch.tensor([targets[i].w_max for i in assignment.mine for _ in range(targets[i].slices)], dtype=dtype, device=weight.device)
            groups.append(_Group(targets, numbers, assignment, caps[:, None, None]))
        return groups

    def _map(self, groups: list[_Group], steps: list[StepTaken]) -> list[Tensor]:
        """Map the weights of groups in place; returns lower bounds of their new norms (RMS units), one per target, 0 for those of other processes."""
        parts = [[local(t.weight) for t in group.targets] for group in groups]
        whole = [group.assignment.collect(weights) for group, weights in zip(groups, parts, strict=True)]
        norms = self.world.on_all(lambda: [self._map_mine(*each) for each in zip(groups, whole, steps, strict=True)])
        for group, weights, mine in zip(groups, parts, whole, strict=True):
            for weight, mapped in zip(weights, group.assignment.distribute(mine, weights), strict=True):
                if mapped is not weight:
                    weight.copy_(mapped)
        return norms

    def _map_mine(self, group: _Group, whole: dict[int, Tensor], step: StepTaken) -> Tensor:
        """The same for the matrices of a group that this process owns, all of which are in `whole`."""
        assert self.method is not None
        out = group.caps.new_zeros(len(group.targets))
        if not whole:
            return out
        mine = [target for target, _ in group.mine()]
        scale = mine[0].rms_scale()
        stacks = [target.split(weight) for target, weight in zip(mine, whole.values(), strict=True)]
        dtype = stacks[0].dtype
        stack = stacks[0] * scale if len(stacks) == 1 else torch.cat(stacks).mul_(scale)
        # Polynomials of matrices need a higher precision than 16 bits.
        stack = map_stack(self.method, stack.float() if dtype.itemsize < 4 else stack, group.caps, step)
        if group.block is None:
            group.block = fixed_vectors(2, stack)
        norms, group.block = probe(stack, group.block)
        slices = [target.slices for target in mine]
        for target, weight, part in zip(mine, whole.values(), stack.split(slices), strict=True):
            torch.div(target.join(part), scale, out=weight)
        out[group.assignment.mine] = torch.stack([part.amax() for part in norms.split(slices)])
        return out

    def _refuse_violations(self, targets: list[Target], norms: list[Tensor]) -> None:
        found = self.world.largest(torch.cat([n.double().cpu() for n in norms])).tolist()
        for target, norm in zip(targets, found, strict=True):
            if not norm <= self.limit(target):
                raise self._violation(target, norm, "at least")

    def _violation(self, target: Target, norm: float, how: str) -> ConstraintViolation:
        name = "row normalisation" if target.rows or self.method is None else self.method.name
        promise = "hard" if target.rows else str(self.guarantee)
        if not math.isfinite(norm):
            return ConstraintViolation(
                f"expected finite weights under {name}, got {norm} in {target.name}; the step before was not finite: lower the learning rate"
            )
        return ConstraintViolation(
            f"expected {target.name} within its cap {target.w_max:.6g} ({name}, guarantee: {promise}), got a norm of {how} {norm:.6g} in RMS units; "
            f"call Constraint.project() if weights exceeded the cap before the step, and check the optimiser's update_norm"
        )

    @torch.no_grad()
    def apply(self, target: Target, update_norm: float | None = None, decay: float = 0.0, rate: float = 0.0) -> None:
        """Map one weight in place. update_norm: RMS→RMS norm of the last step, of the whole matrix, None if unknown; decay: λη; rate: η."""
        if self.method is None:
            return
        if target.rows:
            _cap_rows(target)
            return
        update = None if update_norm is None else (_of_slice(target, update_norm),) * target.slices
        step = StepTaken((target.w_max,) * target.slices, update, (decay,) * target.slices, (rate,) * target.slices)
        self._map(self._grouped([(target, 0)]), [step])

    @torch.no_grad()
    def project(self) -> None:
        """Bring every target within its cap once, by normalisation: for the initial weights, because guarantees assume it."""
        if self.method is None:
            return
        for target in self.targets:
            if target.rows:
                _cap_rows(target)
        inside = Constraint([], SpectralNormalize(), self.world)
        groups = inside._grouped([(t, 0) for t in self.targets if not t.rows], apart=True)
        inside._map(groups, [_unknown_step(group) for group in groups])

    def measured(self) -> dict[str, float]:
        """Guaranteed upper bounds of all constrained norms, in RMS units."""
        found = torch.zeros(len(self.targets), dtype=torch.float64)
        if not self.targets:
            return {}
        (assignment,) = self.world.assign([[(tuple(t.weight.shape), t.cost()) for t in self.targets]])
        whole = assignment.collect([local(t.weight.detach()) for t in self.targets])

        def measure() -> None:
            for i, weight in whole.items():
                found[i] = self.targets[i].measured(weight)

        self.world.on_all(measure)
        return dict(zip((t.name for t in self.targets), self.world.largest(found).tolist(), strict=True))

    def check(self) -> dict[str, float]:
        """`measured`, compared with the guarantee of the method. Raises ConstraintViolation."""
        measured = self.measured()
        for target in self.targets:
            if not measured[target.name] <= self.limit(target):
                raise self._violation(target, measured[target.name], "at most")
        return measured


def _of_slice(target: Target, update_norm: float) -> float:
    """A bound of the whole matrix's update, which bounds each slice's update too, in RMS units of the slice."""
    fan_out, fan_in = target.weight.shape
    return update_norm * math.sqrt(fan_out / fan_in) * target.rms_scale()


def _unknown_step(group: _Group) -> StepTaken:
    caps = [t.w_max for t, _ in group.mine() for _ in range(t.slices)]
    zeros = (0.0,) * len(caps)
    return StepTaken(tuple(caps), None, zeros, zeros)


def _step_of(group: _Group, optimizer: torch.optim.Optimizer) -> StepTaken:
    state = getattr(optimizer, "update_norm", None)
    caps: list[float] = []
    update: list[float] = []
    decay: list[float] = []
    rate: list[float] = []
    for target, number in group.mine():
        settings = optimizer.param_groups[number]
        lr = float(settings["lr"])
        caps += [target.w_max] * target.slices
        rate += [lr] * target.slices
        decay += [lr * settings.get("weight_decay", 0.0)] * target.slices
        if state is not None:
            update += [_of_slice(target, state(lr))] * target.slices
    return StepTaken(tuple(caps), tuple(update) if state is not None else None, tuple(decay), tuple(rate))


def _largest_row(target: Target) -> Tensor:
    """(1,) the largest RMS norm among the rows of this process, 0 if it has none."""
    norms = torch.linalg.vector_norm(local(target.weight), dim=-1) * target.rms_scale()
    return norms.amax(0, keepdim=True) if len(norms) else norms.new_zeros(1)


def _cap_rows(target: Target) -> None:
    weight = local(target.weight)
    norms = torch.linalg.vector_norm(weight, dim=-1, keepdim=True) * target.rms_scale()
    weight.div_((norms / target.w_max * (1 + 1e-6)).clamp_min(1.0))
