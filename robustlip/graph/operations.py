"""The layer for each torch operation: one function per operation. The forward pass of the layer calls that operation with the same arguments.

`capture` compares the outputs of Chain and module bit by bit, so a wrong entry here leads to a refusal, not to a false certificate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from robustlip.errors import BadInput, UnsupportedLayer, first_line
from robustlip.graph.program import VIEWS, Node
from robustlip.layers import (
    Abs,
    Channels,
    Clamp,
    Constant,
    Flip,
    Formula,
    GroupSort,
    Maximum,
    MaxMin,
    MeanTokens,
    Minimum,
    Permute,
    Product,
    Scale,
    Select,
    SelectToken,
    Shift,
    Slice,
    Tokens,
    View,
    WrittenNorm,
)
from robustlip.layers.sorting import channels_at
from robustlip.ops.convolution import CONVOLUTIONS, GLOBAL_MEANS, MAXIMA, MEANS, TRANSPOSED
from robustlip.ops.normalization import BATCH_NORMS, INSTANCE_NORMS

Maker = Callable[[Node], nn.Module]
LAYERS: dict[str, Maker] = {}
# Joins of several values, which `lower` translates.
JOINS = ("add", "sub", "cat", "mul", "multiply", "maximum", "minimum", "max", "min", "fmax", "fmin")
# Operations of two terms, either of which may be the constant.
_TERMS = ("add", "sub", "mul", "subtract", "multiply", "rsub")
_EXTREMES = ("maximum", "minimum", "max", "min", "fmax", "fmin")


def operation(*names: str) -> Callable[[Maker], Maker]:
    """Function decorator: the function makes the layer for nodes with these operations."""

    def add(make: Maker) -> Maker:
        for name in names:
            LAYERS[name] = make
        return make

    return add


def refuse(node: Node, why: str, remedy: str = "use other operations, or attack the model, which needs no layers") -> UnsupportedLayer:
    return UnsupportedLayer(f"expected operations for which a layer has a proved rule, got {node.where()}: {why}; {remedy}")


_NOT_ATTENTION = (
    "it is not a supported self-attention: tokens (N, T, D) whose queries, keys and values are linear functions of the same tokens for each "
    "head, with a constant mask"
)


def layer_of(node: Node) -> nn.Module:
    """The layer that computes a node with one input. Raises UnsupportedLayer if there is none."""
    make = LAYERS.get(node.op)
    if make is None:
        raise refuse(node, _NOT_ATTENTION if node.op in ("scaled_dot_product_attention", "softmax", "matmul", "bmm") else "no layer computes it")
    if len(node.inputs) > 1 and node.op in (*_TERMS, "div", "divide", "true_divide"):
        raise refuse(node, "both of its terms depend on the input")
    for name, value in node.arguments.items():
        if isinstance(value, Node) and name not in ("self", "input", "tensors", "indices") and node.op not in (*_TERMS, *_EXTREMES):
            raise refuse(node, f"its {name} depends on the input")
    try:
        return make(node).eval()
    except UnsupportedLayer:
        raise
    except (BadInput, ValueError, TypeError, AssertionError, RuntimeError) as error:
        raise refuse(node, f"with these arguments there is no layer ({type(error).__name__}: {first_line(error)[:200]})") from error


def is_identity(node: Node) -> bool:
    """Whether a node returns its first argument unchanged, bit by bit."""
    a = node.arguments
    if node.op in ("contiguous", "clone", "alias", "detach", "lift_fresh_copy"):
        return True
    if node.op in ("dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout"):
        return a["train"] is False or a["p"] == 0
    source = source_of(node)
    if source is None:
        return False
    if node.op in ("to", "_to_copy", "type_as"):  # to a dtype that the value already has
        return node.dtype == source.dtype and node.shape == source.shape
    if node.refusal or source.refusal:  # their shape is not known
        return False
    if node.op == "slice":
        whole = node.shape == source.shape and a["step"] == 1
        samples = a["dim"] % (len(source.shape) + 1) == 0
        return whole and (not samples or (a["start"] in (0, None) and (a["end"] is None or a["end"] == 2**63 - 1)))
    if node.op in ("mul", "div") and not isinstance(a["other"], Tensor | Node) and a["other"] == 1:
        return node.dtype == source.dtype and a.get("rounding_mode") is None
    if node.op in VIEWS or node.op in ("expand", "expand_as"):
        return node.shape == source.shape
    return False


def source_of(node: Node) -> Node | None:
    """The first argument, if it depends on the input."""
    source = node.arguments.get("self", node.arguments.get("input"))
    return source if isinstance(source, Node) else None


def own(value: Tensor | None) -> nn.Parameter | None:
    """A weight: the module's own parameter, or a constant as a parameter that is not trained."""
    if value is None or isinstance(value, nn.Parameter):
        return value
    return nn.Parameter(value.detach(), requires_grad=False)


def _filled(layer: nn.Module, **values: Tensor | None) -> nn.Module:
    """A layer made on the meta device, with its weights set. They are equal to those of the module."""
    for name, value in values.items():
        if name in layer._buffers:
            layer._buffers[name] = value
        else:
            layer.register_parameter(name, own(value))
    return layer


def _ints(value: Any, count: int) -> Any:
    found = (value,) if isinstance(value, int) else tuple(int(v) for v in value)
    return found * count if len(found) == 1 else found


@operation("linear")
def _linear(node: Node) -> nn.Module:
    weight, bias = node.arguments["weight"], node.arguments["bias"]
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    return _filled(made, weight=weight, bias=bias)


@operation("attention", "lookup")
def _made(node: Node) -> nn.Module:
    made: nn.Module = node.arguments["layer"]
    return made


@operation("embedding")
def _embedding(node: Node) -> nn.Module:
    a = node.arguments
    if not isinstance(a["weight"], Tensor) or a["scale_grad_by_freq"] or a["sparse"]:
        raise refuse(node, "its table depends on the input, or it has options that change gradients")
    made = nn.Embedding(int(a["weight"].shape[0]), int(a["weight"].shape[1]), device="meta")
    return _filled(made, weight=a["weight"])


@operation("conv1d", "conv2d", "conv3d")
def _convolution(node: Node) -> nn.Module:
    a, weight = node.arguments, node.arguments["weight"]
    n = weight.dim() - 2
    padding = a["padding"] if isinstance(a["padding"], str) else _ints(a["padding"], n)
    groups = int(a["groups"])
    make: Any = CONVOLUTIONS[n - 1]
    made = make(
        weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]), _ints(a["stride"], n), padding, _ints(a["dilation"], n), groups,
        a["bias"] is not None, a.get("mode", "zeros"), device="meta",
    )  # fmt: skip
    return _filled(made, weight=weight, bias=a["bias"])


@operation("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _transposed(node: Node) -> nn.Module:
    a, weight = node.arguments, node.arguments["weight"]
    n, groups = weight.dim() - 2, int(a["groups"])
    make: Any = TRANSPOSED[n - 1]
    made = make(
        weight.shape[0], weight.shape[1] * groups, tuple(weight.shape[2:]), _ints(a["stride"], n), _ints(a["padding"], n),
        _ints(a["output_padding"], n), groups, a["bias"] is not None, _ints(a["dilation"], n), device="meta",
    )  # fmt: skip
    return _filled(made, weight=weight, bias=a["bias"])


@operation("batch_norm")
def _batch_norm(node: Node) -> nn.Module:
    a = node.arguments
    if a["training"] or a["running_mean"] is None:
        raise refuse(node, "it normalises with statistics of the batch, which mixes samples", "call model.eval(), and keep running statistics")
    if len(node.shape) > 4:
        raise refuse(node, "its samples have more than four dimensions; supported are vectors, signals, images and volumes")
    kind: Any = BATCH_NORMS[max(0, len(node.shape) - 2)]
    made: nn.Module = kind(len(a["running_mean"]), eps=a["eps"], momentum=a["momentum"], affine=a["weight"] is not None, device="meta")
    made = _filled(made, weight=a["weight"], bias=a["bias"], running_mean=a["running_mean"], running_var=a["running_var"])
    made._buffers["num_batches_tracked"] = torch.zeros((), dtype=torch.int64)
    return made


@operation("group_norm")
def _group_norm(node: Node) -> nn.Module:
    a, source = node.arguments, source_of(node)
    assert source is not None
    made = nn.GroupNorm(int(a["num_groups"]), source.shape[0], a["eps"], a["weight"] is not None or a["bias"] is not None, device="meta")
    return _filled(made, weight=a["weight"], bias=a["bias"])


@operation("instance_norm")
def _instance_norm(node: Node) -> nn.Module:
    a = node.arguments
    if not a["use_input_stats"]:  # by running statistics: what batch norm in eval mode computes, the same kernel
        return _batch_norm(replace(node, arguments={**a, "training": False}))
    if a["running_mean"] is not None or a["running_var"] is not None:
        raise refuse(node, "it changes its running statistics", "call model.eval()")
    kind: Any = INSTANCE_NORMS[len(node.shape) - 2]
    made = kind(node.shape[0], a["eps"], a["momentum"], a["weight"] is not None or a["bias"] is not None, False, device="meta")
    return _filled(made, weight=a["weight"], bias=a["bias"])


@operation("layer_norm")
def _layer_norm(node: Node) -> nn.Module:
    a = node.arguments
    made = nn.LayerNorm([int(n) for n in a["normalized_shape"]], a["eps"], a["weight"] is not None, a["bias"] is not None, device="meta")
    return _filled(made, weight=a["weight"], bias=a["bias"])


@operation("rms_norm")
def _rms_norm(node: Node) -> nn.Module:
    a = node.arguments
    made = nn.RMSNorm([int(n) for n in a["normalized_shape"]], a["eps"], a["weight"] is not None, device="meta")
    return _filled(made, weight=a["weight"])


def _windows(node: Node) -> tuple[Any, Any, Any]:
    """(kernel, stride, padding) of a pooling operation, one number per dimension."""
    a, n = node.arguments, len(node.shape) - 1
    kernel = _ints(a["kernel_size"], n)
    return kernel, _ints(a["stride"], n) if a["stride"] else kernel, _ints(a["padding"], n)


@operation("max_pool1d", "max_pool2d", "max_pool3d")
def _maximum(node: Node) -> nn.Module:
    a, n = node.arguments, len(node.shape) - 1
    make: Any = MAXIMA[n - 1]
    made: nn.Module = make(*_windows(node), _ints(a["dilation"], n), ceil_mode=a["ceil_mode"])
    return made


@operation("avg_pool1d", "avg_pool2d", "avg_pool3d")
def _mean_of_windows(node: Node) -> nn.Module:
    a, n = node.arguments, len(node.shape) - 1
    make: Any = MEANS[n - 1]
    made: nn.Module = make(*_windows(node), a["ceil_mode"], a["count_include_pad"], *([a["divisor_override"]] if n > 1 else []))
    return made


@operation("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")
def _adaptive_mean(node: Node) -> nn.Module:
    n = len(node.shape) - 1
    size = _ints(node.arguments["output_size"], n)
    make: Any = GLOBAL_MEANS[n - 1]
    made: nn.Module = make(1 if size == (1,) * n else size)
    return made


@operation(*(f"upsample_{mode}{n}d" for n in (1, 2, 3) for mode in ("nearest", "linear", "bilinear", "trilinear")))
def _upsample(node: Node) -> nn.Module:
    a, n = node.arguments, len(node.shape) - 1
    size, factors = a.get("output_size"), a.get("scale_factors")
    mode = "nearest" if "nearest" in node.op else ("linear", "bilinear", "trilinear")[n - 1]
    corners = a.get("align_corners") if mode != "nearest" else None
    if size is not None:
        return nn.Upsample(tuple(int(s) for s in size), mode=mode, align_corners=corners)
    if factors is None:
        raise refuse(node, "it states neither sizes nor factors")
    return nn.Upsample(scale_factor=tuple(float(f) for f in factors), mode=mode, align_corners=corners)


@operation("mean")
def _mean(node: Node) -> nn.Module:
    source = source_of(node)
    assert source is not None
    if node.arguments.get("dtype") is not None:
        raise refuse(node, "it changes the dtype")
    rank = len(source.shape) + 1
    dims = node.arguments.get("dim")
    dims = sorted(d % rank for d in ([dims] if isinstance(dims, int) else dims or range(rank)))
    if rank in (3, 4, 5) and dims == list(range(2, rank)):
        make: Any = GLOBAL_MEANS[rank - 3]
        pool = make(1)
        return pool if node.arguments["keepdim"] else nn.Sequential(pool, nn.Flatten(1))
    if rank == 3 and dims == [1] and not node.arguments["keepdim"]:
        return MeanTokens()
    raise refuse(node, f"it is the mean over dimensions {dims} of {rank}; supported are means over pixels and over tokens")


@operation(*(name for name in VIEWS if name != "squeeze"))
def _flatten(node: Node) -> nn.Module:
    if not node.shape:
        raise refuse(node, "its result is one number per sample, not a vector")
    return nn.Flatten(1) if len(node.shape) == 1 else View(*node.shape)


@operation("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "mT", "t")
def _permute(node: Node) -> nn.Module:
    source = source_of(node)
    assert source is not None
    order = order_of(node, len(source.shape) + 1)
    if order is None or order[0] != 0:
        raise refuse(node, "it moves the batch dimension, or its order of dimensions is not supported")
    return Permute(*order)


def order_of(node: Node, rank: int) -> tuple[int, ...] | None:
    """The order of dimensions, batch dimension included, that a node makes; None for another operation or an unclear order."""
    a = node.arguments
    if node.op == "permute":
        return tuple(int(d) % rank for d in a["dims"])
    names = {"transpose": ("dim0", "dim1"), "swapaxes": ("axis0", "axis1"), "swapdims": ("dim0", "dim1")}.get(node.op)
    if names is not None or node.op in ("mT", "t"):
        first, second = (int(a[name]) % rank for name in names) if names else (rank - 2, rank - 1)
        order = list(range(rank))
        order[first], order[second] = second, first
        return tuple(order)
    return None


@operation("tokens")
def _tokens(node: Node) -> nn.Module:
    return Tokens()


@operation("select")
def _select(node: Node) -> nn.Module:
    source, index = source_of(node), node.arguments["index"]
    assert source is not None
    dim = node.arguments["dim"] % (len(source.shape) + 1)
    if dim == 0 or not isinstance(index, int):
        raise refuse(node, "it selects samples, or its index depends on values")
    if not node.shape:
        raise refuse(node, "its result is one number per sample, not a vector")
    return SelectToken(index) if dim == 1 and len(source.shape) == 2 else Select(dim, index)


@operation("flip")
def _flip(node: Node) -> nn.Module:
    dims, rank = node.arguments["dims"], len(node.shape) + 1
    if any(d % rank == 0 for d in dims):
        raise refuse(node, "it moves samples")
    return Flip(*dims)


@operation("pixel_shuffle")
def _pixel_shuffle(node: Node) -> nn.Module:
    return nn.PixelShuffle(node.arguments["upscale_factor"])


@operation("pixel_unshuffle")
def _pixel_unshuffle(node: Node) -> nn.Module:
    return nn.PixelUnshuffle(node.arguments["downscale_factor"])


@operation("channel_shuffle")
def _channel_shuffle(node: Node) -> nn.Module:
    return nn.ChannelShuffle(node.arguments["groups"])


def channel_dimension(rank: int) -> int:
    """The channel dimension of values of that rank (batch dimension included), counted from 0."""
    return channels_at(rank) % rank


def is_channel(dim: int, rank: int) -> bool:
    """Whether a dimension is the channel dimension of values of that rank (batch dimension included)."""
    return dim % rank == channel_dimension(rank)


def pads(node: Node) -> tuple[int, ...] | None:
    """(left, right, top, bottom) of a node that pads images, two numbers for signals, six for volumes; None if it also pads channels."""
    given, source = list(node.arguments["pad"]), source_of(node)
    if source is None or not 2 <= len(source.shape) <= 4 or len(given) > 2 * (len(source.shape) - 1):
        return None
    return tuple(given + [0] * (2 * (len(source.shape) - 1) - len(given)))


@operation("pad", "constant_pad_nd")
def _pad(node: Node) -> nn.Module:
    sides, mode, value = pads(node), node.arguments.get("mode", "constant"), node.arguments.get("value")
    if sides is None or mode not in ("constant", "reflect", "replicate", "circular"):
        raise refuse(node, "it pads other dimensions than those after the channels of signals, images or volumes")
    if mode == "constant" and value in (None, 0) and len(sides) == 4 and min(sides) >= 0:
        return nn.ZeroPad2d((sides[0], sides[1], sides[2], sides[3]))
    name = {"constant": "Constant", "reflect": "Reflection", "replicate": "Replication", "circular": "Circular"}[mode]
    make: Any = getattr(nn, f"{name}Pad{len(sides) // 2}d")
    made: nn.Module = make(sides, 0.0 if value is None else float(value)) if mode == "constant" else make(sides)
    return made


@operation("group_sort")
def _group_sort(node: Node) -> nn.Module:
    return GroupSort(node.arguments["group"])


def channel_slice(node: Node) -> tuple[int, int] | None:
    """(start, stop) of the channels that a node takes from its first argument, in order; None if it takes something else."""
    source, a = source_of(node), node.arguments
    if source is None or node.op not in ("narrow", "slice") or not is_channel(a["dim"], len(source.shape) + 1):
        return None
    if node.op == "narrow":
        return a["start"], a["start"] + a["length"]
    size = source.shape[a["dim"] % (len(source.shape) + 1) - 1]
    start, stop, step = slice(a["start"], a["end"], a["step"]).indices(size)
    return (start, stop) if step == 1 and start < stop else None


@operation("narrow", "slice")
def _channels(node: Node) -> nn.Module:
    cut, source, a = channel_slice(node), source_of(node), node.arguments
    if cut is not None:
        return Channels(*cut)
    assert source is not None
    dim = a["dim"] % (len(source.shape) + 1)
    if dim == 0:
        raise refuse(node, "it selects some of the samples")
    places = slice(a["start"], a["start"] + a["length"]) if node.op == "narrow" else slice(a["start"], a["end"], a["step"])
    start, stop, step = places.indices(source.shape[dim - 1])
    return Slice(dim, start, stop, step)


@operation("maxmin")
def _maxmin(node: Node) -> nn.Module:
    return MaxMin()


@operation("formula")
def _formula(node: Node) -> nn.Module:
    return Formula(node.arguments["expression"])


@operation("written_norm")
def _written_norm(node: Node) -> nn.Module:
    return WrittenNorm(node.shape[-1], node.arguments["expression"], own(node.arguments["weight"]))


# ---- elementwise: the class that computes the operation, with its options



def _elu(a: dict[str, Any]) -> nn.Module:
    if (a["scale"], a["input_scale"]) != (1, 1):
        raise BadInput(f"expected ELU with scales of 1, got {a['scale']} and {a['input_scale']}; use SELU or Scale")
    return nn.ELU(a["alpha"])


_ELEMENTWISE: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "relu": lambda a: nn.ReLU(),
    "tanh": lambda a: nn.Tanh(),
    "sigmoid": lambda a: nn.Sigmoid(),
    "gelu": lambda a: nn.GELU(approximate=a["approximate"]),
    "silu": lambda a: nn.SiLU(),
    "leaky_relu": lambda a: nn.LeakyReLU(a["negative_slope"]),
    "elu": _elu,
    "celu": lambda a: nn.CELU(a["alpha"]),
    "selu": lambda a: nn.SELU(),
    "softplus": lambda a: nn.Softplus(a["beta"], a["threshold"]),
    "softsign": lambda a: nn.Softsign(),
    "hardtanh": lambda a: nn.ReLU6() if (a["min_val"], a["max_val"]) == (0, 6) else nn.Hardtanh(a["min_val"], a["max_val"]),
    "relu6": lambda a: nn.ReLU6(),
    "hardswish": lambda a: nn.Hardswish(),
    "hardsigmoid": lambda a: nn.Hardsigmoid(),
    "mish": lambda a: nn.Mish(),
    "log_sigmoid": lambda a: nn.LogSigmoid(),
    "softshrink": lambda a: nn.Softshrink(a["lambd"]),
}


def _elementwise(node: Node) -> nn.Module:
    return _ELEMENTWISE[node.op](node.arguments)


for _name in _ELEMENTWISE:
    LAYERS[_name] = _elementwise


@operation("prelu")
def _prelu(node: Node) -> nn.Module:
    weight = node.arguments["weight"]
    return _filled(nn.PReLU(weight.numel(), device="meta"), weight=weight)


# ---- constants


def _by_channel(node: Node, value: Any) -> Tensor:
    """A constant as one number, one per channel (C,) or a table, in the dtype in which torch computes. Raises UnsupportedLayer for other shapes."""
    source = source_of(node)
    assert source is not None
    if isinstance(value, bool | complex) or not isinstance(value, Tensor | int | float):
        raise refuse(node, f"its constant is {value!r}; supported are numbers and tensors")
    if not isinstance(value, Tensor):
        return torch.tensor([float(value)], dtype=torch.float64)
    rank = len(source.shape) + 1
    channel = channel_dimension(rank)
    sizes = [1] * (rank - value.dim()) + list(value.shape)
    channels = source.shape[channel - 1]
    elsewhere = any(n != 1 for i, n in enumerate(sizes) if i != channel)
    fits = len(sizes) == rank and node.shape == source.shape and sizes[0] == 1
    if not fits or any(n not in (1, m) for n, m in zip(sizes[1:], source.shape, strict=True)):
        raise refuse(node, f"its constant has shape {tuple(value.shape)} for samples {source.shape}; supported are numbers and tables of one sample")
    if elsewhere or sizes[channel] not in (1, channels):
        return value.detach().reshape(sizes[1:]) if rank > 2 else value.detach().reshape(-1)
    return value.detach().reshape(-1)


def _typed(node: Node, value: Tensor) -> Tensor:
    """A plain number, converted as torch converts it for the dtype of the samples; a tensor of floating-point numbers is returned unchanged.

    Masks and whole numbers become the same numbers in the dtype of the samples, as in torch. Raises UnsupportedLayer if they do not fit.
    """
    if node.dtype is not None and not value.is_floating_point():
        if not torch.equal(value.to(node.dtype).double(), value.double()):
            raise refuse(node, f"its constant has whole numbers too large for {node.dtype}")
        return value.to(node.dtype)
    return value.to(node.dtype) if value.dtype == torch.float64 and node.dtype is not None else value


def power_of_two(value: Any) -> bool:
    """Whether a product with this number only changes the exponent."""
    return isinstance(value, int | float) and math.isfinite(value) and 2.0**-16 <= abs(value) <= 2.0**16 and abs(math.frexp(value)[0]) == 0.5


def _plain_terms(node: Node) -> tuple[Any, bool]:
    """(the constant of a node of two terms, whether it is the first term)."""
    first, second = node.arguments["self"], node.arguments["other"]
    if not power_of_two(node.arguments.get("alpha", 1)):
        raise refuse(node, f"it multiplies the second term by alpha={node.arguments['alpha']}, no power of 2")
    return (second, False) if isinstance(first, Node) else (first, True)


@operation("mul", "multiply")
def _mul(node: Node) -> nn.Module:
    value, _ = _plain_terms(node)
    return Scale(_typed(node, _by_channel(_facing(node), value)))


@operation("div", "divide", "true_divide")
def _div(node: Node) -> nn.Module:
    value, front = _plain_terms(node)
    if front or node.arguments.get("rounding_mode") is not None:
        raise refuse(node, "it divides by a value that depends on the input, or rounds the quotient")
    divisor = _typed(node, _by_channel(node, value))
    if not bool((divisor != 0).all()):
        raise refuse(node, "it divides by 0")
    return Scale(divisor, divide=True)


@operation("square", "pow")
def _power(node: Node) -> nn.Module:
    exponent = node.arguments.get("exponent", 2)
    if not isinstance(node.arguments["self"], Node) or isinstance(exponent, Tensor | Node) or exponent not in (2, 3):
        raise refuse(node, f"it raises to the power {exponent if not isinstance(exponent, Tensor | Node) else 'of a tensor'}; supported are 2 and 3")
    square = Product(nn.Identity(), nn.Identity())
    return square if exponent == 2 else Product(square, nn.Identity())


@operation("neg")
def _neg(node: Node) -> nn.Module:
    return Scale(_typed(node, torch.tensor([-1.0], dtype=torch.float64)))


@operation("add", "sub", "subtract", "rsub")
def _shift(node: Node) -> nn.Module:
    value, front = _plain_terms(node)
    constant = _typed(node, _by_channel(_facing(node), value))
    alpha = float(node.arguments.get("alpha", 1))  # of the second term; of rsub, other − alpha·self, the first
    of_input = alpha if front != (node.op == "rsub") else 1.0
    constant = constant if of_input != 1 or alpha == 1 else constant * alpha
    if node.op != "add" and front != (node.op == "rsub"):  # constant − x
        return nn.Sequential(Scale(_typed(node, torch.tensor([-of_input], dtype=torch.float64))), Shift(constant))
    shift = Shift(constant, subtract=node.op != "add")
    return shift if of_input == 1 else nn.Sequential(Scale(_typed(node, torch.tensor([of_input], dtype=torch.float64))), shift)


@operation("where", "masked_fill")
def _where(node: Node) -> nn.Module:
    """A value where a constant mask says so, a constant elsewhere: x·1 + 0 and x·0 + c, which are exact."""
    a = node.arguments
    fills = node.op == "masked_fill"
    mask, first, second = (a["mask"], a["value"], a["self"]) if fills else (a["condition"], a["self"], a["other"])
    if isinstance(mask, Node) or isinstance(first, Node) == isinstance(second, Node):
        raise refuse(node, "its mask depends on the input, or both of its values do")
    value = first if isinstance(second, Node) else second
    kept = ~mask if isinstance(second, Node) else mask
    facing = replace(node, arguments={"self": second if isinstance(second, Node) else first})
    masks = table(facing, kept.to(node.dtype)).value
    filled = table(facing, value.to(node.dtype) if isinstance(value, Tensor) else value).value
    return nn.Sequential(Scale(masks), Shift(torch.where(masks != 0, torch.zeros_like(filled), filled)))


def _facing(node: Node) -> Node:
    """The same node with its arguments swapped so that `self` depends on the input."""
    if isinstance(node.arguments["self"], Node):
        return node
    return replace(node, arguments={**node.arguments, "self": node.arguments["other"], "other": node.arguments["self"]})


def _bounded(node: Node, above: Any, below: Any) -> nn.Module:
    """min(max(x, above), below), either bound None: a clamp where both are numbers, else joins with constants."""

    def number(bound: Any) -> float | None:
        if not isinstance(bound, Tensor):
            return None if bound is None else float(bound)
        return float(bound) if bound.numel() == 1 else math.nan

    numbers = number(above), number(below)
    if math.nan not in [n if n is None or n == n else math.nan for n in numbers]:
        return Clamp(*numbers)
    joins = [kind(nn.Identity(), table(node, bound)) for kind, bound in ((Maximum, above), (Minimum, below)) if bound is not None]
    return joins[0] if len(joins) == 1 else nn.Sequential(*joins)


def table(node: Node, value: Any) -> Constant:
    """A constant in the shape of the samples in front of a node. Raises UnsupportedLayer if its shape does not fit, or its dtype is another."""
    source = source_of(node)
    assert source is not None
    if isinstance(value, Tensor) and value.dim() and value.dtype != node.dtype:
        raise refuse(node, f"its constant has dtype {value.dtype}, its samples {node.dtype}")
    shape = source.shape
    found = _by_channel(node, value).to(node.dtype)
    if found.dim() == 1 and len(found) > 1 and len(shape) == 3:
        found = found.view(-1, 1, 1)
    return Constant(found.expand(shape).contiguous())


@operation("clamp", "clamp_min", "clamp_max")
def _clamp(node: Node) -> nn.Module:
    return _bounded(node, node.arguments.get("min"), node.arguments.get("max"))


@operation("maximum", "minimum", "max", "min", "fmax", "fmin")
def _extreme(node: Node) -> nn.Module:
    """maximum or minimum of a value and a constant."""
    node = _facing(node) if "other" in node.arguments else node
    bound = node.arguments.get("other")
    if not isinstance(bound, Tensor) or not isinstance(node.arguments["self"], Node):
        raise refuse(node, "it acts along a dimension")
    return _bounded(node, bound, None) if "max" in node.op else _bounded(node, None, bound)


@operation("abs")
def _abs(node: Node) -> nn.Module:
    return Abs()
