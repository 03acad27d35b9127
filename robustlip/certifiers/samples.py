"""Checks of models, inputs and labels that every certifier makes first."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from robustlip.checks import check_fit
from robustlip.data.lengths import NO_LABEL
from robustlip.domains.norms import rule_for
from robustlip.errors import BadInput, UnsupportedLayer
from robustlip.execution import check_program, check_weights, execution_of, lower_precision
from robustlip.layers import Chain, Lookup
from robustlip.modes import in_eval_mode, out_of_place
from robustlip.numerics.rounding import UNIT
from robustlip.threats import InputBall, Threat


def check_model(model: Chain) -> torch.dtype:
    """The dtype of the weights.

    Raises BadInput for weights of several dtypes or devices, empty weights, and dtypes whose rounding is not bounded. Raises UnsupportedLayer for a
    layer without a rule (every layer is checked, the last one too) and for whatever `check_program` refuses.
    """
    check_weights(model)
    for layer in model:
        rule_for(layer)
    check_program(model)
    for name, parameter in model.named_parameters():
        if parameter.numel() == 0:
            raise BadInput(f"expected weights in every layer, got {name} of shape {tuple(parameter.shape)}; give the layer at least one output")
    dtypes = {p.dtype for p in model.parameters()}
    if len(dtypes) != 1 or not next(iter(dtypes)).is_floating_point:
        raise BadInput(f"expected weights of one floating dtype, got {sorted(map(str, dtypes))}; cast the model with .to(dtype)")
    devices = {p.device for p in model.parameters()}
    if len(devices) != 1:
        raise BadInput(f"expected weights on one device, got {sorted(map(str, devices))}; move the model with .to(device)")
    execution_of(device_type(model))
    dtype = dtypes.pop()
    if dtype not in UNIT:
        raise BadInput(f"expected weights in float64, float32, bfloat16 or float16, got {dtype}; cast the model with .to(dtype)")
    return dtype


def check_arithmetic(model: Chain, covered: torch.dtype) -> None:
    """Raises BadInput where torch's settings lower the precision of products below the certified dtype: another program would compute the logits."""
    if lower := lower_precision(device_type(model), covered):
        raise BadInput(
            f"expected {str(covered).removeprefix('torch.')} products in {str(covered).removeprefix('torch.')}, got {lower}; turn it off "
            f"(torch.set_float32_matmul_precision('highest'), no autocast, no such variable), and cast the model for a lower dtype"
        )


def device_type(model: nn.Module) -> str:
    """The type of the device that holds the weights: 'cpu', 'cuda', …"""
    return next(model.parameters()).device.type


def train_mode_reason(model: nn.Module) -> str | None:
    """Why no sample can be certified in the model's present mode, or None. In train mode dropout is random and batch norm mixes samples."""
    active = (isinstance(m, _BatchNorm) or (isinstance(m, _DropoutNd) and m.p > 0) for m in model.modules() if m.training)
    return "the model is in train mode; call model.eval()" if any(active) else None


def check_in_place(model: Chain, x: Tensor) -> None:
    """Raises UnsupportedLayer where an in-place layer changes the model's outputs, because its input is read again after the layer overwrote it.

    The outputs with and without inplace=True are compared on at most 64 of the samples x, in the dtype and on the device of the model.
    """
    if not any(getattr(m, "inplace", False) is True for m in model.modules()):
        return
    first = next(model.parameters())
    some = x[:64].to(first.device, first.dtype if x.is_floating_point() else None)
    with torch.no_grad(), in_eval_mode(model):
        executed = model.scores(some.clone())
        with out_of_place(model):
            separate = model.scores(some.clone())
    if not torch.equal(executed.nan_to_num(), separate.nan_to_num()):
        raise UnsupportedLayer(
            "expected in-place layers whose input is not read again, got logits that differ without inplace=True; set inplace=False"
        )


def outside_range(model: Chain, x: Tensor) -> Tensor:
    """(N,) bool on the CPU: samples with a value outside model.input_range; all False where the model has no range."""
    if model.input_range is None or not x.is_floating_point():
        return torch.zeros(len(x), dtype=torch.bool)
    low, high = model.input_range
    flat = x.detach().flatten(1).double()
    return ((flat < low) | (flat > high)).any(-1).cpu()


def check_entry(model: Chain, x: Tensor, threat: Threat) -> None:
    """Raises BadInput for integer inputs under an input threat, and for integer inputs of a model that has no embedding layer for token ids."""
    if x.is_floating_point():
        return
    if isinstance(threat, InputBall):
        raise BadInput(
            f"expected floating-point inputs for the threat {threat.name}, got {x.dtype}; "
            f"convert images, or use an embedding or weight threat for token ids"
        )
    if type(model[0]) not in (nn.Embedding, Lookup) or x.dim() != 2:
        raise BadInput(
            f"expected token ids (N, T) before an Embedding, or floating-point inputs, got {x.dtype} of shape {tuple(x.shape)} "
            f"before {type(model[0]).__name__}; convert the inputs"
        )


def check_samples(model: Chain, x: Tensor, y: Tensor) -> None:
    """Raises BadInput for inputs that are not finite or do not fit the model, and for labels that do not match the inputs."""
    if x.shape[0] == 0:
        raise BadInput("expected at least one sample, got none; check the data's limit")
    if y.dim() == 2 or model.task == "token-classification":
        by_token = model.position is not None or model.task == "token-classification"
        if not by_token or y.shape != x.shape or not bool((y != NO_LABEL).any(1).all()):
            raise BadInput(
                f"expected labels {tuple(x.shape)} of a classifier of tokens, at least one in each text ({NO_LABEL} where a token has none), or "
                f"one a sample, got {tuple(y.shape)} of a model for {model.task}; give labels of the model's kind"
            )
    elif y.dim() != 1 or y.shape[0] != x.shape[0]:
        raise BadInput(f"expected one label for each of {x.shape[0]} samples, got labels of shape {tuple(y.shape)}; match them")
    if y.dtype.is_floating_point or y.dtype == torch.bool:
        raise BadInput(f"expected integer labels, got {y.dtype}; convert them to class numbers")
    model.check_inputs(x)
    check_fit(model, x)


def check_labels(y: Tensor, classes: int) -> None:
    """Raises BadInput for labels outside [0, classes − 1], and for fewer than two classes."""
    if classes < 2:
        raise BadInput(f"expected a model with at least 2 classes, got {classes}; a prediction needs a rival")
    if bool(((y < 0) | (y >= classes)).any()):
        raise BadInput(f"expected labels in [0, {classes - 1}], got {int(y.min())} to {int(y.max())}; use the model's own classes")


def batches(count: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` samples that cover 0, …, count − 1."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
