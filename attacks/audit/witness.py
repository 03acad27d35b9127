"""Files with the results of an audit, and functions that measure them again."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from robustlip.attacks import formulas
from robustlip.attacks.audit.measure import Map, map_of, measure
from robustlip.attacks.audit.result import Audit, WorstLayer
from robustlip.checkpoints import load_tensors, save_tensors
from robustlip.errors import BadInput, RobustlipError
from robustlip.hashing import architecture_sha256, weights_sha256
from robustlip.layers import Attention, ScaledGELU, as_chain


def save_witness(path: Path, result: Audit, box: tuple[float, float] | None = None) -> None:
    """Write the pair of inputs and its claimed result to a safetensors file that `recheck` reads."""
    header = {
        "kind": "audit-witness", "formula": result.formula, "claimed": result.claimed, "found": result.found, "units": result.units,
        "domain": result.domain, "space": result.space, "box": box, "weights_sha256": result.weights_sha256,
        "architecture_sha256": result.architecture_sha256, "starts": result.starts, "seed": result.seed,
    }  # fmt: skip
    save_tensors(path, {"x": result.x, "x_prime": result.x_prime}, header)


def recheck(path: Path, model: nn.Module) -> Audit:
    """Measures the pair in a witness file again, on this model, with the claim computed again.

    Raises BadInput if the file is not a witness, belongs to other weights, leaves its domain, or does not show what its header states.
    """
    tensors, header = load_tensors(path)
    chain = as_chain(model)
    name = path.name
    if header.get("kind") != "audit-witness" or set(tensors) != {"x", "x_prime"} or tensors["x"].shape != tensors["x_prime"].shape:
        raise BadInput(f"expected a witness written by `robustlip audit`, got {name} with other contents; name the file that audit saved")
    mine = {"weights_sha256": weights_sha256(chain), "architecture_sha256": architecture_sha256(chain)}
    for what, value in mine.items():
        if header.get(what) != value:
            word = "weights" if what == "weights_sha256" else "architecture"
            raise BadInput(f"expected the witness's {word} {str(header.get(what))[:12]}…, got a model with {value[:12]}…; audit this model again")
    try:
        formula, claimed, found = str(header["formula"]), float(header["claimed"]), float(header["found"])
        units, domain, box = str(header["units"]), header["domain"], header["box"]
        if not (formula.isprintable() and units.isprintable()):
            raise ValueError("formula: it contains control characters")
        domain = None if domain is None else float(domain)
        box = None if box is None else (float(box[0]), float(box[1]))
        starts, seed = int(header["starts"]), int(header["seed"])
        if formula in formulas.FORMULAS:
            claim = formulas.claim_of(chain, formula).in_units(units)
        else:
            claim = formulas.stated(chain, claimed, units, domain)
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        if isinstance(error, RobustlipError):
            raise
        raise BadInput(f"expected a complete witness header in {name}, got one without a valid {error}; the file was altered") from None
    same = claim.domain == domain if domain is None or claim.domain is None else math.isclose(claim.domain, domain, rel_tol=1e-9)
    if not same or not math.isclose(claim.value, claimed, rel_tol=1e-9):
        raise BadInput(f"expected the claim {claim.value:.9g} that {formula} makes of this model, got {claimed:.9g} in {name}; the file was altered")
    a, b = tensors["x"].double(), tensors["x_prime"].double()
    tokens = chain.embedding_depth > 0
    shape = tuple(a.shape)
    device = next(chain.parameters()).device
    f = map_of(chain, domain, shape, box)
    a, b = (t.to(device)[None] if tokens else t.to(device).reshape(1, 1, -1) for t in (a, b))
    if not bool(f.inside(a).all() and f.inside(b).all()):
        raise BadInput(f"expected two inputs inside the claim's domain, got others in {name}; the file was altered")
    try:
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            _, again, change, distance, rounding, kind = measure(f, a, b)
    except RuntimeError as error:
        raise BadInput(f"expected inputs of the model's shape in {name}, got {shape} ({str(error).splitlines()[0]}); the file was altered") from None
    again *= claim.unit()
    if not math.isclose(again, found, rel_tol=1e-6):
        raise BadInput(f"expected a pair with the ratio {found:.6g}, got one with {again:.6g} in {name}; the file was altered")
    result = Audit(
        formula=formula, claimed=claim.value, found=again, units=units, domain=domain, space="embedding" if tokens else "input",
        x=tensors["x"], x_prime=tensors["x_prime"], distance=distance, change=change, rounding=rounding, rounding_kind=kind,
        starts=starts, seed=seed, layers=claim.layers,
        weights_sha256=mine["weights_sha256"], architecture_sha256=mine["architecture_sha256"],
    )  # fmt: skip
    return replace(result, why=formulas.explain(chain, claim)) if result.violated else result


def save_worst(path: Path, worst: WorstLayer) -> None:
    """Write the adversarial weights of one layer, with the pair of inputs, to a safetensors file that `recheck_worst` reads."""
    # Tensors are numbered, because `recheck_worst` builds the layers without their names in the model.
    weights = {f"module.{name}": value for name, value in nn.Sequential(*worst.module).state_dict().items()}
    header = {"kind": "audit-worst-weights", **worst.to_json_dict(), "tokens": worst.tokens, "layers": [_describe(layer) for layer in worst.module]}
    save_tensors(path, {"x": worst.x, "x_prime": worst.x_prime, **weights}, header)


def _describe(layer: nn.Module) -> dict[str, Any]:
    if type(layer) is Attention:
        if not layer.is_papers:
            got = layer.extra_repr()
            raise BadInput(f"expected attention in the paper's form in a file of worst weights, got {got}; audit the weights as they are")
        distances = 0 if layer.distance_bias is None else layer.distance_bias.shape[1]
        keys = ("width", "heads", "scale", "causal", "rope", "output_scale")
        return {"type": "Attention", **{k: getattr(layer, k) for k in keys}, "distance_bias": distances}
    if type(layer) is nn.Linear:
        return {"type": "Linear", "in_features": layer.in_features, "out_features": layer.out_features, "bias": layer.bias is not None}
    if type(layer) is ScaledGELU:
        return {"type": "ScaledGELU", "divisor": layer.divisor, "approximate": layer.approximate}
    if type(layer) not in _BUILDERS.values():
        known = ", ".join(_BUILDERS)
        raise BadInput(f"expected layers that a file of worst weights can name ({known}), got {type(layer).__name__}; audit the weights as they are")
    return {"type": type(layer).__name__} | ({"approximate": layer.approximate} if isinstance(layer, nn.GELU) else {})


_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "Attention": Attention, "Linear": nn.Linear, "ScaledGELU": ScaledGELU, "GELU": nn.GELU, "ReLU": nn.ReLU, "Tanh": nn.Tanh,
    "Flatten": nn.Flatten, "Identity": nn.Identity,
}  # fmt: skip


def recheck_worst(path: Path) -> WorstLayer:
    """Builds the layers of a worst-weights file, computes the formula for them again and measures the pair again.

    Raises BadInput if the file is not one, leaves its domain, or does not show what its header states.
    """
    tensors, header = load_tensors(path)
    name = path.name
    try:
        if header["kind"] != "audit-worst-weights":
            raise KeyError("kind")
        described = [dict(d) for d in header["layers"]]
        module = nn.Sequential(*(_BUILDERS[d.pop("type")](**d) for d in described)).double().eval()
        module.load_state_dict({k.removeprefix("module."): v for k, v in tensors.items() if k.startswith("module.")})
        formula, layer, part, kept = (str(header[k]) for k in ("formula", "layer", "part", "kept"))
        claimed, found, units, tokens = float(header["claimed"]), float(header["found"]), str(header["units"]), bool(header["tokens"])
        a, b = tensors["x"].double(), tensors["x_prime"].double()
        domain = None if header["domain"] is None else float(header["domain"])
        whole = not tokens or domain is None
        claim = (formulas.claim_of(module, formula) if whole else formulas.layer_claim(module, formula, domain or 0.0)).in_units(units)
        f = Map(copy.deepcopy(module), tuple(a.shape) if tokens else (a.numel(),), tokens=tokens, domain=claim.domain)
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            again = measure(f, a[None], b[None])[1] * claim.unit()
    except BadInput:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise BadInput(f"expected a worst-weights file of `robustlip audit`, got {name} ({error}); name the file that audit saved") from None
    if not (math.isclose(claim.value, claimed, rel_tol=1e-9) and math.isclose(again, found, rel_tol=1e-6)):
        shown = f"{again:.6g} for a claim of {claim.value:.6g}"
        raise BadInput(f"expected a file with the ratio {found:.6g} for a claim of {claimed:.6g}, got {shown} in {name}; the file was altered")
    return WorstLayer(formula, layer, part, kept, claim.value, again, units, domain, tokens, module, a, b)
