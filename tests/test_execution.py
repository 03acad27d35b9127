"""The certified program is the executed one: whatever could change `model(x)` without changing the layers is refused or has no effect."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import robustlip
from robustlip.certifiers import lipschitz_bound, weight_sensitivity_bound
from robustlip.certifiers.sequence import sequence_radii
from robustlip.certifiers.smoothing import certify_smoothed, predict_smoothed
from robustlip.errors import BadInput
from robustlip.execution import check_program, covered_kernels, execution_of
from robustlip.hashing import architecture_sha256
from robustlip.layers import Attention, Chain, MaxMin, Residual, Sum
from robustlip.threats import EmbeddingBall, InputBall, WeightBall


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


X = torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
Y = mlp()(X).argmax(1)


def proved(model: nn.Module, method: str = "global") -> np.ndarray:
    return robustlip.certify(model, X, Y, InputBall("l2"), method).radius


def test_what_is_plain_is_taken() -> None:
    check_program(mlp())
    with torch.device("cpu"):  # a default device rewrites nothing
        assert (proved(mlp()) > 0).any()


# ---- objects


def _own_forward(model: nn.Sequential) -> None:
    model[1].forward = lambda x: nn.Linear.forward(model[1], x) * 2  # type: ignore[method-assign]


def _own_call(model: nn.Sequential) -> None:
    model[1]._call_impl = lambda x: nn.Linear.forward(model[1], x) * 2  # type: ignore[method-assign]


def _compiled(model: nn.Sequential) -> None:
    model[1]._compiled_call_impl = lambda x: nn.Linear.forward(model[1], x) * 2  # type: ignore[assignment]


def _compile_method(model: nn.Sequential) -> None:
    model.compile(backend="eager")


def _hidden_weight(model: nn.Sequential) -> None:
    model[1].__dict__["weight"] = model[1].weight.detach() * 2


def _unregistered_weight(model: nn.Sequential) -> None:
    weight = model[1].weight.detach()
    del model[1].weight
    model[1].weight = weight


def _subclass(model: nn.Sequential) -> None:
    class Doubled(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            result = super().__torch_function__(func, types, args, kwargs or {})
            return result * 2 if func is F.linear else result

    model[1].weight = nn.Parameter(model[1].weight.detach().as_subclass(Doubled))


def _forward_hook(model: nn.Sequential) -> None:
    model[1].register_forward_hook(lambda module, inputs, output: output * 2)


def _state_hook(model: nn.Sequential) -> None:
    model[1].register_state_dict_post_hook(lambda module, state, prefix, local: None)


@pytest.mark.parametrize(
    "change",
    [_own_forward, _own_call, _compiled, _compile_method, _hidden_weight, _unregistered_weight, _subclass, _forward_hook, _state_hook],
    ids=lambda f: f.__name__,
)
def test_objects_that_run_something_else_are_refused(change) -> None:
    model = mlp()
    change(model)
    with pytest.raises(BadInput, match=r"^expected "):
        proved(model)
    with pytest.raises(BadInput, match=r"^expected "):
        lipschitz_bound(model)


def test_a_patch_inside_of_a_branch_or_of_attention_is_refused() -> None:
    inner = nn.Linear(16, 16)
    model = nn.Sequential(nn.Linear(8, 16), Residual(nn.Sequential(nn.ReLU(), inner)), nn.Linear(16, 4)).eval()
    proved(model)
    inner._call_impl = lambda x: nn.Linear.forward(inner, x) * 2  # type: ignore[method-assign]
    with pytest.raises(BadInput, match="_call_impl of its own"):
        proved(model)
    attention = Attention(8, 2)
    chain = Chain(nn.Sequential(attention), nn.Flatten(), nn.Linear(32, 4)).eval()
    attention.query._compiled_call_impl = lambda x: x  # type: ignore[assignment]
    with pytest.raises(BadInput, match="compiled"):
        robustlip.certify(chain, torch.randn(2, 4, 8), torch.zeros(2, dtype=torch.int64), InputBall("l2"), "global")


# ---- classes and functions


def _wrapped(function):
    @functools.wraps(function)
    def other(*args, **kwargs):
        return function(*args, **kwargs) * 2

    return other


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (nn.Linear, "forward"), (nn.Sequential, "forward"), (nn.Module, "__call__"), (nn.Module, "_call_impl"), (nn.Module, "state_dict"),
        (F, "linear"), (F, "relu"), (torch, "relu"), (Tensor, "flatten"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)  # fmt: skip
def test_patched_classes_and_functions_are_refused(monkeypatch, owner, name) -> None:
    model = mlp()
    monkeypatch.setattr(owner, name, _wrapped(getattr(owner, name)))
    with pytest.raises(BadInput, match="undo that patch"):
        check_program(model)


def test_a_method_of_torch_in_the_place_of_another_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(nn.ReLU, "forward", nn.Tanh.forward)
    with pytest.raises(BadInput, match="ReLU with a replaced forward"):
        proved(mlp())
    monkeypatch.undo()
    monkeypatch.setattr(F, "relu", F.silu)
    with pytest.raises(BadInput, match=r"a replaced torch\.nn\.functional\.relu"):
        proved(mlp())


def test_a_patched_layer_of_ours_is_refused(monkeypatch) -> None:
    model = nn.Sequential(nn.Linear(8, 16), MaxMin(), nn.Linear(16, 4)).eval()
    proved(model)
    monkeypatch.setattr(MaxMin, "forward", lambda self, x: x.flip(-1))
    with pytest.raises(BadInput, match="MaxMin with a replaced forward"):
        proved(model)


def test_a_property_that_hides_a_weight_is_refused(monkeypatch) -> None:
    model = mlp()
    monkeypatch.setattr(nn.Linear, "weight", property(lambda self: self._parameters["weight"] * 2), raising=False)
    with pytest.raises(BadInput, match="is not the one it registered"):
        proved(model)


def test_kernels_registered_by_python_are_refused() -> None:
    model, library = mlp(), torch.library.Library("aten", "IMPL")
    try:
        library.impl("relu", lambda x: x.clamp_min(0) * 2, "CPU")
        with pytest.raises(BadInput, match="aten::relu"):
            proved(model)
    finally:
        library._destroy()
    assert (proved(model) > 0).any()


# ---- modes


class _FunctionMode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is F.linear else result


class _DispatchMode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_modes_that_rewrite_operations_are_refused() -> None:
    model = mlp()
    for mode in (_FunctionMode(), _DispatchMode()):
        with mode, pytest.raises(BadInput, match=type(mode).__name__):
            proved(model)
    with pytest.raises(BadInput, match=r"torch\.func"):
        torch.vmap(lambda row: torch.as_tensor(proved(model)) + row.sum())(X)


@pytest.mark.parametrize("register", ["register_module_forward_hook", "register_module_forward_pre_hook"])
def test_hooks_for_all_modules_are_refused(register) -> None:
    handle = getattr(torch.nn.modules.module, register)(lambda *arguments: None)
    try:
        with pytest.raises(BadInput, match="hooks registered for all modules"):
            proved(mlp())
    finally:
        handle.remove()


@pytest.mark.parametrize("variable", ["ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"])
def test_variables_that_lower_products_are_refused(monkeypatch, variable) -> None:
    monkeypatch.setenv(variable, "BF16")
    with pytest.raises(BadInput, match=variable):
        proved(mlp())
    monkeypatch.setenv(variable, "STRICT")
    assert (proved(mlp()) > 0).any()


def test_every_precision_flag_is_seen() -> None:
    backend = torch.backends.mkldnn
    for where in (torch.backends, backend, backend.matmul, backend.conv):
        before = where.fp32_precision
        try:
            where.fp32_precision = "bf16"
            with pytest.raises(BadInput, match="fp32_precision"):
                proved(mlp())
        finally:
            where.fp32_precision = before
    assert (proved(mlp()) > 0).any()


# ---- weights that are none


def _lazy() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(4))


def _meta() -> nn.Module:
    return mlp().to("meta")


def _inference() -> nn.Module:
    with torch.inference_mode():
        return mlp()


def _quantized() -> nn.Module:
    model = mlp()
    model[1].weight = nn.Parameter(torch.quantize_per_tensor(model[1].weight.detach(), 0.1, 0, torch.qint8), requires_grad=False)
    return model


def _sparse() -> nn.Module:
    model = mlp()
    model[1].weight = nn.Parameter(model[1].weight.detach().to_sparse())
    return model


def _lazy_view() -> nn.Module:
    model = mlp()
    model[1].weight = nn.Parameter(torch.complex(torch.rand(16, 8), torch.rand(16, 8)).conj().imag)
    return model


@pytest.mark.parametrize("make", [_lazy, _meta, _inference, _quantized, _sparse, _lazy_view], ids=lambda f: f.__name__)
@pytest.mark.parametrize("method", ["global", "best"])
def test_weights_without_plain_values_are_one_sentence(make, method) -> None:
    with pytest.raises(BadInput, match=r"^expected .*got .*; "):
        robustlip.certify(make(), X, Y, InputBall("l2"), method)


def test_weights_on_two_devices_are_one_sentence() -> None:
    model = mlp()
    model[3] = nn.Linear(16, 4, device="meta")
    with pytest.raises(BadInput, match=r"^expected "):
        proved(model)


def test_other_devices_are_refused() -> None:
    with pytest.raises(BadInput, match="mps"):
        execution_of("mps")


# ---- surroundings that must not matter


def everything(model: nn.Module, x: Tensor, y: Tensor) -> list[np.ndarray]:
    ball = InputBall("l2")
    return [
        robustlip.certify(model, x, y, ball).radius,
        robustlip.certify(model, x, y, ball, "dual").radius,
        robustlip.certify(model, x, y, ball, "crown", dtype="real").radius,
        certify_smoothed(model, x[:2], y[:2], sigma=0.1, n0=8, n=64).smoothed_radius,
        predict_smoothed(model, x[:2], sigma=0.1, n=16),
        weight_sensitivity_bound(model, x, WeightBall("spectral", 0.01)),
        np.array(lipschitz_bound(model)["l2"]),
    ]


def test_inference_mode_changes_nothing() -> None:
    model = mlp()
    usual = everything(model, X, Y)
    with torch.inference_mode():
        inside = everything(model, X, Y)
        made_inside = everything(model, X.clone(), Y.clone())
    for a, b, c in zip(usual, inside, made_inside, strict=True):
        assert np.array_equal(a, b) and np.array_equal(a, c)


def test_inference_mode_around_a_transformer_changes_nothing() -> None:
    model, data = robustlip.load("digits-transformer-lipschitz"), robustlip.load_data("digits:test", limit=3)
    usual = robustlip.certify(model, data.x, data.y, EmbeddingBall(tokens=(-1,))).radius
    with torch.inference_mode():
        assert np.array_equal(robustlip.certify(model, data.x, data.y, EmbeddingBall(tokens=(-1,))).radius, usual)


def test_the_default_dtype_and_device_change_nothing() -> None:
    model = mlp()
    usual = everything(model, X, Y)
    try:
        torch.set_default_dtype(torch.float64)
        doubled = everything(model, X, Y)
        torch.set_default_dtype(torch.float16)
        halved = everything(model, X, Y)
    finally:
        torch.set_default_dtype(torch.float32)
    try:
        torch.set_default_device("meta")
        elsewhere = everything(model, X, Y)
    finally:
        torch.set_default_device(None)
    for a, b, c, d in zip(usual, doubled, halved, elsewhere, strict=True):
        assert np.array_equal(a, b) and np.array_equal(a, c) and np.array_equal(a, d)


# ---- layers in place


def in_place(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    for module in other.modules():
        if hasattr(module, "inplace"):
            module.inplace = True
    return other


def _activation_first(activation: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), activation, nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    for p in model.parameters():
        p.data.mul_(2)
    return model.eval()


def _residual() -> nn.Module:
    torch.manual_seed(3)
    branch = nn.Sequential(nn.SiLU(), nn.Linear(8, 8))
    return nn.Sequential(Residual(branch), nn.ReLU(), nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 4)).eval()


def _dropout() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Dropout(0.5), nn.SiLU(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


MODELS = {
    "silu": lambda: _activation_first(nn.SiLU()), "relu": lambda: _activation_first(nn.ReLU()), "residual": _residual, "dropout": _dropout,
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_layer_in_place_is_the_same_layer(name) -> None:
    plain, model = MODELS[name](), in_place(MODELS[name]())
    x = 2 * torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    y = plain(x).argmax(1)
    mine = x.clone()
    assert architecture_sha256(plain) == architecture_sha256(model)
    for a, b in zip(everything(plain, x, y), everything(model, mine, y), strict=True):
        assert np.array_equal(a, b)
    assert torch.equal(mine, x)
    assert [m.inplace for m in model.modules() if hasattr(m, "inplace")] == [True] * sum(hasattr(m, "inplace") for m in model.modules())
    with pytest.raises(BadInput):  # also when it ends early
        robustlip.certify(model, mine, y + 100, InputBall("l2"))
    assert all(m.inplace for m in model.modules() if hasattr(m, "inplace"))


def test_a_layer_in_place_whose_input_is_read_again_is_refused() -> None:
    """Where a branch writes over what another one reads, the layers out of place are another program."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), Sum(nn.SiLU(inplace=True), nn.Linear(8, 8)), nn.Linear(8, 4)).eval()
    with pytest.raises(BadInput, match="others read"):
        model(X)
    with pytest.raises(BadInput, match="others read"):
        proved(model)
    shared = nn.Sequential(nn.Linear(8, 8), Residual(nn.SiLU()), nn.Linear(8, 4)).eval()
    usual = proved(shared)
    assert np.array_equal(proved(in_place(shared)), usual)


def test_in_place_layers_of_a_sequence_model_are_the_same() -> None:
    model = robustlip.load("shakespeare-gpt-per-head")
    tokens = torch.arange(8)
    usual = sequence_radii(model, tokens)[0]
    with torch.inference_mode():
        assert torch.equal(sequence_radii(model, tokens)[0], usual)


# ---- kernels


def test_the_certificate_names_its_execution() -> None:
    certificate = robustlip.certify(mlp(), X, Y, InputBall("l2"), "global")
    assert certificate.execution == execution_of("cpu")
    assert robustlip.certify(mlp(), X, Y, InputBall("l2"), "global", dtype="real").execution == "exact arithmetic"


def test_covered_kernels_on_cuda_are_the_named_ones() -> None:
    before = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cudnn.enabled
    with covered_kernels("cuda"):
        assert torch.backends.cuda.math_sdp_enabled()
        assert not torch.backends.cuda.flash_sdp_enabled() and not torch.backends.cuda.mem_efficient_sdp_enabled()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert not torch.backends.cudnn.enabled
    assert before == (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cudnn.enabled)


@pytest.mark.parametrize("grad", [True, False])
def test_covered_keeps_the_gradient_mode(grad) -> None:
    with torch.set_grad_enabled(grad), covered_kernels("cpu"):
        assert torch.is_grad_enabled() == grad
    with torch.inference_mode(), covered_kernels("cpu"):
        assert not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
