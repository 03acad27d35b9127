"""The executed program: checks that `model(x)` runs the arithmetic of the model's layers and nothing else, by kernels whose rounding is bounded.

A certificate holds for one program. `check_program` refuses everything that can change the program without changing the layers: hooks, replaced
methods, compiled calls, weights that are not plain tensors, torch modes that rewrite operations. `covered_kernels` selects the kernels whose rounding
is bounded (docs/theory.md, section 1); the certificate names them.
"""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._device import DeviceContext

from robustlip.errors import BadInput, UnsupportedLayer

# For each device type, the execution whose rounding is bounded. Certificates do not cover any other execution.
EXECUTIONS = {
    "cpu": "eager torch on a CPU: products summed in any order in the dtype or wider (oneDNN or native, no NNPACK), attention by torch's "
    "CPU kernels (flash or math)",
    "cuda": "eager torch on CUDA: products summed in any order in the dtype or wider, attention by SDPBackend.MATH, convolutions and "
    "normalisation without cuDNN, no TF32",
}
EXACT = "exact arithmetic"


def execution_of(device_type: str) -> str:
    """The execution that a certificate made on this device type ('cpu', 'cuda') covers. Raises BadInput for any other device type."""
    if device_type not in EXECUTIONS or (device_type == "cuda" and torch.version.hip is not None):
        got = "ROCm" if device_type == "cuda" else device_type
        raise BadInput(f"expected a model on a CPU or a CUDA device, whose kernels' rounding is bounded, got one on {got}; move it with model.cpu()")
    return EXECUTIONS[device_type]


@contextmanager
def covered_kernels(device_type: str) -> Iterator[None]:
    """A context in which torch runs the kernels that `execution_of(device_type)` names, without inference mode, in the caller's gradient mode."""
    differentiated = torch.is_grad_enabled()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(differentiated))  # leaving inference mode turns it on
        if device_type == "cuda":
            stack.enter_context(nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH))
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        elif torch.backends.nnpack.is_available():
            stack.enter_context(torch.backends.nnpack.flags(enabled=False))
        yield


@contextmanager
def proving(device_type: str) -> Iterator[None]:
    """`covered_kernels`, with default dtype float32 and default device CPU, in which proofs make their own tensors."""
    with ExitStack() as stack:
        stack.enter_context(covered_kernels(device_type))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        yield


# ---- what can come between model(x) and its layers

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_STATE_HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks")  # they change what is hashed
_CALLS = ("__call__", "_wrapped_call_impl", "_call_impl", "__getattr__", "state_dict", "_save_to_state_dict", "named_parameters", "named_buffers")
_BUILT_IN = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, types.GetSetDescriptorType)

# The functions that layers with a rule call. A replacement of any of them changes the program.
_FUNCTIONAL = (
    "linear", "conv2d", "embedding", "relu", "gelu", "silu", "layer_norm", "rms_norm", "batch_norm", "group_norm", "instance_norm",
    "scaled_dot_product_attention", "pad", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "dropout",
)  # fmt: skip
_TORCH = (
    "relu", "tanh", "sigmoid", "layer_norm", "rms_norm", "batch_norm", "group_norm", "instance_norm", "embedding", "maximum", "minimum", "cat",
    "sort", "mean", "max_pool2d", "flatten", "arange", "conv2d", "matmul", "addmm", "softmax",
)  # fmt: skip
_METHODS = (
    "__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__", "__neg__", "__getitem__", "view", "reshape", "permute",
    "transpose", "flatten", "unflatten", "chunk", "sort", "mean", "masked_fill", "to", "double", "sin", "cos", "abs", "clamp_max", "unsqueeze",
    "__matmul__", "__invert__", "__le__", "softmax", "split", "repeat_interleave", "expand", "__torch_function__",
)  # fmt: skip
# The operators that these functions run. A kernel that Python registered for one of them is not torch's.
_KERNELS = frozenset(
    "linear addmm mm matmul bmm baddbmm conv2d convolution _convolution embedding relu gelu silu tanh sigmoid layer_norm native_layer_norm rms_norm "
    "_fused_rms_norm batch_norm native_batch_norm group_norm native_group_norm instance_norm "
    "softmax _softmax scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu "
    "_scaled_dot_product_attention_math add sub mul div rsub maximum minimum cat sort mean sum max_pool2d max_pool2d_with_indices avg_pool2d "
    "_adaptive_avg_pool2d constant_pad_nd view reshape permute transpose masked_fill _to_copy sin cos clamp_max index select slice expand neg "
    "split split_with_sizes repeat_interleave bitwise_not le".split()
)
# Environment variables of the libraries below torch that lower the precision of products, or change how products are summed.
_ENVIRONMENT = {
    "cpu": ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"),
    "cuda": (
        "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUBLAS_EMULATE_SINGLE_PRECISION", "CUBLAS_EMULATE_DOUBLE_PRECISION",
        "CUBLAS_EMULATION_STRATEGY",
    ),
}  # fmt: skip
_OFF = ("", "0", "STRICT", "OFF", "FALSE", "NO")

_ROOTS = tuple(str(Path(str(sys.modules[name].__file__)).resolve().parent) for name in ("torch", "robustlip"))


def _refuse(got: str, remedy: str) -> UnsupportedLayer:
    return UnsupportedLayer(f"expected a program that runs only its layers' arithmetic, got {got}; {remedy}")


def check_plain(module: nn.Module) -> None:
    """Raises UnsupportedLayer for a module with hooks, with its own forward or with a compiled call: the rule of its class does not cover these."""
    own = vars(module)
    name = type(module).__name__
    if "forward" in own or any(getattr(module, hooks, None) for hooks in _HOOKS):
        raise UnsupportedLayer(f"expected a plain {name}, got one with hooks or its own forward; remove them before certifying")
    if own.get("_compiled_call_impl") is not None:
        raise _refuse(f"a {name} whose call was compiled (module.compile())", "certify it before compiling")
    if any(own.get(hooks) for hooks in _STATE_HOOKS):
        raise _refuse(f"a {name} with hooks on its state dict, which the hash of the weights reads", "remove them")


# Hooks of torch's old spectral_norm and weight_norm. They compute a weight before each call; a capture stores the computed weight.
_WEIGHT_HOOKS = (SpectralNorm, WeightNorm)


def check_capturable(model: nn.Module) -> None:
    """Raises UnsupportedLayer for a module whose calls may run something else than the code of its classes.

    That is: hooks, methods replaced on an object, compiled calls. The hooks of torch's old spectral_norm and weight_norm are accepted.
    """
    check_modes()
    for module in model.modules():
        if hasattr(module, "_orig_mod") or isinstance(module, torch.jit.ScriptModule):
            raise _refuse(f"a {type(module).__name__}, which runs compiled code", "certify the module that was compiled")
        hooks = [hook for kind in _HOOKS for hook in (getattr(module, kind, None) or {}).values()]
        if hooks and all(isinstance(hook, _WEIGHT_HOOKS) for hook in hooks):
            continue
        _check_object(module)


def _check_object(module: nn.Module) -> None:
    check_plain(module)
    kind, name = type(module), type(module).__name__
    for key, value in vars(module).items():
        if callable(value) and callable(getattr(kind, key, None)) and not isinstance(value, type):
            raise _refuse(f"a {name} with a {key} of its own", "remove it before certifying")
        if isinstance(value, Tensor):
            raise _refuse(f"a {name} whose tensor {key} is neither a parameter nor a buffer, so that it is not hashed", "register it")
    for held in (module._parameters, module._buffers, module._modules):
        for key, value in held.items():
            if value is not None and getattr(module, key, None) is not value:
                raise _refuse(f"a {name} whose {key} is not the one it registered", "remove the attribute that hides it")


def _check_class(kind: type) -> None:
    for method in ("forward", *_CALLS):
        if not _is_defined_there(kind, method):
            raise _refuse(f"{kind.__name__} with a replaced {method}", "undo that patch, or restart Python")
    if kind.__getattribute__ is not object.__getattribute__:
        raise _refuse(f"{kind.__name__} with a __getattribute__ of its own", "undo that patch, or restart Python")


def _is_defined_there(kind: type, method: str) -> bool:
    """Whether the method of this class comes from the file in which the class that defines it stands."""
    owner = next((c for c in kind.__mro__ if method in vars(c)), None)
    function = None if owner is None else vars(owner)[method]
    if owner is None or isinstance(function, _BUILT_IN):
        return owner is not None
    code = getattr(function, "__code__", None)
    module = sys.modules.get(owner.__module__)
    if code is None or module is None or getattr(module, "__file__", None) is None:
        # Not a plain function. (torch.nn.Module.__call__ is annotated as a variable, but it is a function.)
        return False
    same_file = os.path.realpath(code.co_filename) == os.path.realpath(str(module.__file__))
    wanted = "_wrapped_call_impl" if method == "__call__" and owner is nn.Module else method
    return same_file and getattr(code, "co_qualname", f"{owner.__qualname__}.{wanted}") == f"{owner.__qualname__}.{wanted}"


def _is_trusted(function: Any) -> bool:
    """Whether a function is built in, or defined in a file of torch or of robustlip."""
    if isinstance(function, _BUILT_IN):
        return True
    function = getattr(function, "__func__", function)  # unwraps a class method
    code = getattr(function, "__code__", None)
    return code is not None and os.path.realpath(code.co_filename).startswith(_ROOTS)


def _has_name(function: Any, name: str) -> bool:
    """Whether a function has that name, or a name that torch gives to a wrapper of it (TorchScript wrappers are called fn)."""
    return getattr(function, "__name__", name) in (name, "fn", f"_{name}", "wrapped", name.removeprefix("__r").removeprefix("__"))


def _check_functions() -> None:
    """Raises UnsupportedLayer where a torch function that layers call was replaced."""
    for where, names in ((F, _FUNCTIONAL), (torch, _TORCH), (Tensor, _METHODS)):
        for name in names:
            function = getattr(where, name, None)
            if function is not None and not (_is_trusted(function) and (where is Tensor or _has_name(function, name))):
                raise _refuse(f"a replaced {getattr(where, '__name__', 'torch')}.{name}", "undo that patch, or restart Python")


def _check_kernels() -> None:
    """Raises UnsupportedLayer where torch.library holds a Python kernel for an operator that layers run."""
    for key in getattr(torch.library, "_impls", ()):
        space, operator, dispatch = (key.split("/") + ["", ""])[:3]
        if space == "aten" and dispatch not in ("Meta", "MPS") and operator.split(".")[0].rstrip("_") in {k.rstrip("_") for k in _KERNELS}:
            raise _refuse(f"a registered Python kernel for aten::{operator} ({dispatch})", "remove the torch.library registration, or restart Python")


def check_modes() -> None:
    """Raises UnsupportedLayer while torch rewrites operations: global module hooks, function and dispatch modes, torch.func transforms, tracing."""
    globally = torch.nn.modules.module
    if globally._global_forward_hooks or globally._global_forward_pre_hooks:
        raise _refuse("hooks registered for all modules", "remove them before certifying")
    functions = [torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack())]
    foreign = [type(mode).__name__ for mode in functions if type(mode) is not DeviceContext]
    foreign += [type(torch._C._get_dispatch_stack_at(i)).__name__ for i in range(torch._C._len_torch_dispatch_stack())]
    if foreign:
        raise _refuse(f"the active mode {foreign[-1]}, which rewrites operations", "leave it before certifying")
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise _refuse("a call inside a torch.func transform", "certify outside of it")
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        raise _refuse("a call while torch traces or compiles", "certify outside of it")


def check_tensor(name: str, value: Tensor) -> None:
    """Raises BadInput for a weight that is not a plain dense tensor with values (lazy, meta, quantized, sparse, a tensor subclass, a lazy view)."""
    if torch.nn.parameter.is_lazy(value):
        raise BadInput(f"expected weights, got a lazy model whose {name} has no shape yet; run it once on a batch of data first")
    if type(value) not in (Tensor, nn.Parameter, nn.Buffer):
        raise BadInput(f"expected plain tensors as weights, got {name} of type {type(value).__name__}; convert it, e.g. with dequantize()")
    if value.is_quantized or value.layout != torch.strided:
        kind = "quantized" if value.is_quantized else str(value.layout).removeprefix("torch.")
        raise BadInput(f"expected dense weights, got {name} in the layout {kind}; convert it with dequantize() or to_dense()")
    if value.device.type == "meta":
        raise BadInput(f"expected weights with values, got {name} on the meta device; load the weights first (to_empty and load_state_dict)")
    if value.is_inference():
        raise BadInput(f"expected weights that can be differentiated, got {name} made under torch.inference_mode(); load them outside of it")
    if value.is_neg() or value.is_conj() or torch._C._functorch.is_functorch_wrapped_tensor(value):
        raise BadInput(f"expected plain tensors as weights, got {name} as a lazy view; assign a clone of it")


def check_weights(model: nn.Module) -> None:
    """Raises BadInput unless all parameters and buffers are plain tensors."""
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        check_tensor(name, value)


def check_program(model: nn.Module) -> None:
    """Raises UnsupportedLayer or BadInput where `model(x)` may run something else than the arithmetic of the model's layers.

    Checks the modules of the model, their classes, the functions they call, torch's registered kernels, torch's modes and the weights.
    `robustlip.domains.norms.rule_for` checks that every layer has a rule.
    """
    check_modes()
    for module in model.modules():
        _check_object(module)
    for kind in {type(module) for module in model.modules()}:
        _check_class(kind)
    _check_functions()
    _check_kernels()
    check_weights(model)


def lower_precision(device_type: str, dtype: torch.dtype) -> str:
    """The setting that lowers the precision of products of `dtype` on this device type; '' where there is none."""
    if torch.is_autocast_enabled(device_type):
        return "torch.autocast"
    variable = next((v for v in _ENVIRONMENT.get(device_type, ()) if os.environ.get(v, "").upper() not in _OFF), None)
    if variable is not None:
        return f"{variable}={os.environ[variable]}"
    if dtype != torch.float32:
        return ""
    backend = {"cpu": torch.backends.mkldnn, "cuda": torch.backends.cuda}.get(device_type)
    settings = {"torch.backends": torch.backends, f"the {device_type} backend": backend}
    settings |= {f"the {device_type} backend's {part}": getattr(backend, part, None) for part in ("matmul", "conv")}
    for where, setting in settings.items():
        precision = getattr(setting, "fp32_precision", "none")
        if precision not in ("none", "ieee"):
            return f"fp32_precision = {precision!r} of {where}"
    if torch.get_float32_matmul_precision() != "highest":
        return f"torch.set_float32_matmul_precision({torch.get_float32_matmul_precision()!r})"
    return ""


