"""Adapter for attacks of the torchattacks library (Kim 2020), with the contract of `Attack`. Image models, l2 and linf balls.

Version 3.5.1 is wrapped, not patched: it seeds the global random state (the contract restores it), assumes
images in [0, 1] and float32 (FAB casts to it), reads the device from the first parameter, and Square writes into the logits.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from robustlip.attacks.base import Attack
from robustlip.attacks.spaces import InputSpace, Space
from robustlip.errors import BadInput
from robustlip.target import Target
from robustlip.threats import Threat

KINDS = ("PGD", "PGDL2", "AutoAttack")


class TorchAttack(Attack):
    """torchattacks.PGD (linf), PGDL2 (l2) or AutoAttack (either), with eps = the radius of the threat.

    options are torchattacks' own (steps, alpha, random_start, version …), except eps, norm, seed and n_classes, which the threat, the
    generator and the model determine. Default step length: 2.5·radius/steps. Its points stay in [0, 1], so it accepts only threats with that box.
    Raises BadInput without torchattacks, for inputs that are not images (N, C, H, W) in [0, 1], and for other threats or boxes.
    """

    name: ClassVar[str] = "torchattacks"

    def __init__(self, kind: str, **options: Any) -> None:
        if kind not in KINDS:
            raise BadInput(f"expected a torchattacks attack among {', '.join(KINDS)}, got {kind!r}; name one of them")
        taken = sorted({"eps", "norm", "seed", "n_classes"} & set(options))
        if taken:
            raise BadInput(f"expected options besides eps, norm, seed and n_classes, got {', '.join(taken)}; the threat and the model set them")
        self.kind, self.options = kind, options
        self.name = "autoattack" if kind == "AutoAttack" else f"torchattacks-{kind.lower()}"  # type: ignore[misc]

    @property
    def settings(self) -> dict[str, Any]:
        own = {"version": "standard"} if self.kind == "AutoAttack" else {"steps": 40, "alpha": "2.5·radius/steps", "random_start": True}
        return {"library": "torchattacks", **own, **self.options}

    def check_threat(self, threat: Threat) -> None:
        if threat.place == "input" and threat.box != (0.0, 1.0):
            got = "no box" if threat.box is None else f"the box [{threat.box[0]:g}, {threat.box[1]:g}]"
            raise BadInput(
                f"expected a threat with the box [0, 1] for {self.name!r}, whose points never leave it, got {got}; "
                f"give --clip 0,1 (in Python InputBall(…, clip=(0, 1)), in a suite clip = [0, 1]), or use 'pgd'"
            )

    def _run(self, space: Space, labels: torch.Tensor, radius: torch.Tensor | None, generator: torch.Generator) -> torch.Tensor:
        assert radius is not None  # needs_radius
        try:
            import torchattacks
        except ImportError as error:
            raise BadInput(f"expected torchattacks for the attack {self.name!r}, got {error}; pip install --no-deps torchattacks==3.5.1") from None
        norm = self._norm(space)
        seed = int(torch.randint(2**31 - 1, (), generator=generator, device=generator.device))
        images, eps = space.clean.float(), float(radius[0])
        wrapped = _Images(space.model, space.clean.dtype)
        torch.manual_seed(seed)
        options = dict(self.options)
        if self.kind == "AutoAttack":
            self._check_size(images, norm, options)
            options.update(norm=norm, seed=seed, n_classes=self._classes(wrapped, images[:1]))
        else:
            options.setdefault("steps", 40)
            options.setdefault("alpha", 2.5 * eps / options["steps"])
        try:
            attack = getattr(torchattacks, self.kind)(wrapped, eps=eps, **options)
        except TypeError as error:
            raise BadInput(f"expected options that torchattacks.{self.kind} has, got {self.options}; see its docstring ({error})") from None
        _set_device(attack, images.device)
        found = attack(images, labels)
        return found.detach().to(space.work) - space.clean.to(space.work)

    def _norm(self, space: Space) -> str:
        allowed = {"PGD": ("linf",), "PGDL2": ("l2",), "AutoAttack": ("l2", "linf")}[self.kind]
        if not isinstance(space, InputSpace) or space.norm not in allowed:
            got = space.threat.name if isinstance(space, InputSpace) else type(space).__name__
            raise BadInput(f"expected an input threat {' or '.join(allowed)} for {self.name!r}, got {got}; use 'pgd' for it")
        if space.clean.dim() != 4 or float(space.clean.min()) < 0 or float(space.clean.max()) > 1:
            raise BadInput(
                f"expected images (N, C, H, W) in [0, 1] for {self.name!r}, got shape {tuple(space.clean.shape)} with values in "
                f"[{float(space.clean.min()):.4g}, {float(space.clean.max()):.4g}]; put the scaling into the model (Normalize), or use 'pgd'"
            )
        return {"l2": "L2", "linf": "Linf"}[space.norm]

    def _classes(self, wrapped: nn.Module, image: torch.Tensor) -> int:
        with torch.no_grad():
            classes = wrapped(image).shape[1]
        if classes < 4:  # its DLR losses divide by the gap between the first and the third or fourth logit
            raise BadInput(f"expected a model of at least 4 classes for 'autoattack', got {classes}; use 'pgd' or 'min'")
        return classes

    def _check_size(self, images: torch.Tensor, norm: str, options: dict[str, Any]) -> None:
        if norm == "L2" and options.get("version", "standard") != "rand" and min(images.shape[-2:]) < 5:
            raise BadInput(f"expected images of at least 5 × 5 for 'autoattack' in l2 (Square), got {tuple(images.shape[-2:])}; use version='rand'")


class _Images(nn.Module):
    """The model as torchattacks expects one: float32 images → fresh float32 logits (N, C)."""

    def __init__(self, target: Target, dtype: torch.dtype) -> None:
        super().__init__()
        self.target, self.dtype = target, dtype  # not a submodule, because torchattacks would change its modes
        self.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.target.scores(images.to(self.dtype)).to(images.dtype).clone()


def _set_device(attack: Any, device: torch.device) -> None:
    """torchattacks reads the device from the first parameter, which may not exist; set it for the attack and its parts."""
    attack.set_device(device)
    for part in getattr(getattr(attack, "_autoattack", None), "attacks", ()):
        part.set_device(device)
