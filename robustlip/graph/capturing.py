"""Converts any module to a Chain that computes the same outputs, or says why it cannot."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from robustlip.errors import BadInput, UnsupportedLayer, first_line
from robustlip.execution import check_capturable
from robustlip.graph.attention import with_attention
from robustlip.graph.final import finished, without_final
from robustlip.graph.lower import lowered
from robustlip.graph.operations import source_of
from robustlip.graph.program import FREEZE, Program, check_apart, needed, recorded
from robustlip.graph.simplify import simplified
from robustlip.graph.tokens import with_chosen_token, with_embedding
from robustlip.layers import (
    AddPositions,
    Attention,
    Chain,
    NextTokenChain,
    OneTokenChain,
    Patchify,
    PrependToken,
    Shift,
    TokenChain,
    TokenLabelChain,
    Tokens,
)
from robustlip.modes import evaluated, random_state_kept
from robustlip.target import logits_of

# Sizes of the random batches on which chain and module have to agree.
TRIED = (1, 3, 130)
# Factors of the random batches: a clamp at a large bound has an effect on large numbers only.
RANGES = (1e-3, 1.0, 30.0, 1e3, 1e6)


class LogitsOnly(nn.Module):
    """A module that returns only the logits of the module inside (`robustlip.target.logits_of`)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        logits = logits_of(self.module(x), x.shape[0])  # len(x) would be a constant for the tracer
        return logits.unsqueeze(1) if logits.dim() == 1 else logits


@random_state_kept()
def capture(module: nn.Module, example: Tensor) -> Chain:
    """The module as a Chain of layers and joins with rules, recorded by torch.export: the form that certifiers need.

    module: in eval mode, from one tensor (N, …) to logits (N, C). example: inputs of the kind that it takes, on its device; one sample is repeated.
    The Chain shares the module's parameters. Weights that the module computes from others (parametrizations: spectral_norm, orthogonal, weight_norm)
    have their present values. A softmax, a log_softmax or the sigmoid of one logit at the end is left out (`Chain.final`). `check_same` has compared
    the outputs of both, with that function applied, on the example and on random inputs: they are equal bit by bit.
    Raises UnsupportedLayer, with the place in the module, if the module cannot be captured: an operation without a layer, one that mixes samples or
    overwrites a value that is read again; a module that changes its buffers, is compiled, has hooks or is in train mode. Raises BadInput for a bad
    example. Source: docs/theory.md, section 13.
    """
    if not isinstance(module, nn.Module):
        raise BadInput(f"expected a model that is an nn.Module, got {type(module).__name__}; wrap it in a module with a forward")
    if not isinstance(example, Tensor) or example.dim() < 2 or not len(example):
        got = tuple(example.shape) if isinstance(example, Tensor) else type(example).__name__
        raise BadInput(f"expected an example of samples (N, …), a tensor, got {got}; give one batch of inputs")
    check_capturable(module)
    if any(part.training for part in module.modules()):
        raise UnsupportedLayer("expected a model in eval mode, got one in train mode, in which it computes another function; call model.eval()")
    tokens = not example.is_floating_point()
    if tokens and (example.dtype not in (torch.int64, torch.int32) or example.dim() != 2):
        raise BadInput(f"expected floating-point numbers or token ids (N, T), got {example.dtype} of shape {tuple(example.shape)}; encode the text")
    torchs = any(isinstance(part, nn.MultiheadAttention | nn.TransformerEncoderLayer) for part in module.modules())
    if torchs and torch.backends.mha.get_fastpath_enabled():
        raise UnsupportedLayer(
            "expected torch's attention without its fast path, which runs another program if gradients are disabled, got "
            "MultiheadAttention with it; call torch.backends.mha.set_fastpath_enabled(False)"
        )
    example = example.detach().clone()
    example = example if len(example) > 1 else torch.cat([example, example])
    module = LogitsOnly(module)
    with evaluated(module), torch.no_grad():
        program, without = with_chosen_token(recorded(module, example))
        program = with_attention(with_embedding(program))
        check_apart(program)
        program, final = without_final(simplified(program))
        program, position = _read_token(program)
        layers = lowered(program)
        if not layers:
            raise UnsupportedLayer("expected a model with at least one operation, got one that returns its input; give it a layer")
        chain = _kind(program, layers, getattr(module.module, "task", None), position).eval()
        chain.input_range = getattr(module.module, "input_range", None)
        chain.final = final
        chain.computes_weights = program.computes_weights
        chain.without = without
        if isinstance(chain, TokenChain):
            chain.check_inputs(example)
        check_same(chain, module, example)
    return chain


def _read_token(program: Program) -> tuple[Program, int | None]:
    """(the program up to the logits of all tokens, the token that it selects of them), if it ends so; otherwise (the program, None)."""
    node, source = program.output, source_of(program.output)
    if node.op != "select" or source is None or source.op != "linear" or len(source.shape) != 2 or node.arguments["dim"] % 3 != 1:
        return program, None
    if program.input.dtype is None or program.input.dtype.is_floating_point:
        return program, None
    position = int(node.arguments["index"]) % source.shape[0]
    last = position == source.shape[0] - 1
    return Program(program.input, source, needed(source), program.computes_weights), -1 if last else position


def _kind(program: Program, layers: OrderedDict[str, nn.Module], task: str | None, position: int | None) -> Chain:
    """The layers as a Chain whose kind follows from its inputs and outputs: takes token ids, returns a row of logits per token, or neither.

    task: the task that the module declares. Scores per token are logits of the next token if it declares that, or if there is one per row of the
    embedding table and it declares nothing else; otherwise they are of labels of tokens. position: the token that the module reads at its end.
    """
    assert program.input.dtype is not None
    if not program.input.dtype.is_floating_point:
        if position is not None:
            return OneTokenChain(layers, position)
        if len(program.output.shape) != 2:
            return TokenChain(layers)
        words = int(next(iter(layers.values())).num_embeddings)  # type: ignore[arg-type]
        if task == "next-token" or (task != "token-classification" and program.output.shape[-1] == words):
            return NextTokenChain(layers)
        return TokenLabelChain(layers)
    chain = Chain(layers)
    chain.embedding_depth = _embedding_depth(list(chain))
    return chain


def _embedding_depth(layers: list[nn.Module]) -> int:
    """The number of leading layers that compute the tokens (N, T, D) of an image, with class tokens and positions; 0 without attention after them."""
    if not any(isinstance(part, Attention) for layer in layers for part in layer.modules()):
        return 0
    made = next((i for i, layer in enumerate(layers) if isinstance(layer, Tokens | Patchify)), None)
    if made is None:
        return 0
    following = (type(layer) in (PrependToken, Shift, nn.Linear, AddPositions) for layer in layers[made + 1 :])
    return made + 1 + next((i for i, more in enumerate(following) if not more), 0)


def check_same(chain: Chain, module: nn.Module, example: Tensor) -> None:
    """Raises UnsupportedLayer unless chain and module agree bit by bit on the example and on random batches of other sizes and ranges."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(chain, TokenChain):
        size = int(chain[0].num_embeddings)  # type: ignore[arg-type]
        batches = [example, *(_allowed(torch.randint(size, (n, *example.shape[1:]), generator=generator), size, chain).to(example) for n in TRIED)]
    else:
        batches = _random(example, generator)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    for batch in batches:
        check_outputs(chain, module, batch)
    with torch.enable_grad():  # a forward may depend on the grad mode
        check_outputs(chain, module, example.clone().requires_grad_(example.is_floating_point()))
    check_outputs(chain, module, example.transpose(0, -1).contiguous().transpose(0, -1))  # the same numbers with another memory layout
    changed = [name for name, tensor in module.state_dict().items() if name not in state or not torch.equal(tensor, state[name])]
    if changed:
        name = changed[0].removeprefix("module.")
        raise UnsupportedLayer(f"expected a model that does not change its own weights and buffers, got one that changes {name}; {FREEZE}")


def _allowed(ids: Tensor, size: int, chain: Chain) -> Tensor:
    """Token ids with another id in place of each that texts must not contain."""
    other = next(i for i in range(size) if i not in chain.without)
    for padding in chain.without:
        ids = ids.masked_fill(ids == padding, other)
    return ids


def _random(example: Tensor, generator: torch.Generator) -> list[Tensor]:
    """The example, and random batches of other sizes and ranges."""
    spread = float(example.double().std()) or 1.0
    batches = [example]
    for size in TRIED:
        noise = torch.randn(size, *example.shape[1:], generator=generator).to(example)
        rows = torch.arange(size, device=example.device) % len(example)
        batches += [noise] if size > 3 else [noise, example[rows] + spread * noise]
    return batches + [scale * spread * batches[3] for scale in RANGES]


def check_outputs(chain: Chain, module: nn.Module, x: Tensor) -> None:
    """Raises UnsupportedLayer unless chain and module agree bit by bit on these inputs."""
    batch = x if x.requires_grad else x.clone(memory_format=torch.preserve_format)
    try:
        theirs = logits_of(module(batch), len(x)).detach()
        theirs = theirs.unsqueeze(1) if theirs.dim() == 1 else theirs
    except (BadInput, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a user's module may raise anything
        raise UnsupportedLayer(
            f"expected a model that runs on {len(x)} samples, got {type(error).__name__}: {first_line(error)[:200]}; correct its forward"
        ) from error
    try:
        with torch.no_grad():
            ours = chain(x.detach().clone())
            ours = finished(chain.final, ours[:, chain.position] if type(chain) is OneTokenChain else ours)
    except (RuntimeError, IndexError) as error:
        raise UnsupportedLayer(
            f"expected layers that compute what the model does, got {type(error).__name__} from them: {first_line(error)[:200]}; attack the model"
        ) from error
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype or not torch.equal(ours.nan_to_num(), theirs.nan_to_num()):
        apart = float((ours.double() - theirs.double()).abs().max()) if ours.shape == theirs.shape else float("nan")
        raise UnsupportedLayer(
            f"expected layers that compute the model's outputs bit by bit, got outputs that differ by up to {apart:.3g} on {len(x)} samples; "
            f"its forward may depend on values, on the number of samples or on a mode, or use random numbers: attack it"
        )
