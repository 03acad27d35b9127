"""The module of an ONNX file: a sequence of torch calls on rows of samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from robustlip.errors import BadInput, RobustlipError
from robustlip.onnx.builder import Builder, Ref, Step, TensorRef, Value, needed, parts_of, plain, refs, run
from robustlip.onnx.files import Graph, read_graph
from robustlip.onnx.operations import Reading


class Network(nn.Module):
    """Samples (N, …) of the file's input → its output (N, C), one row per sample: the file's graph applied to each sample separately.

    input_shape: of one sample, without the batch dimension. Samples may have another shape if it is unambiguous: one vector, or
    the same dimensions except those of size 1.
    A certificate covers this module as torch runs it, not other programs that run the same file.
    """

    def __init__(self, steps: Sequence[Step], output: Ref, parameters: dict[str, Tensor], buffers: dict[str, Tensor], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.steps, self.output, self.input_shape = tuple(steps), output.index, tuple(shape)
        for name, tensor in parameters.items():
            self.register_parameter(name, nn.Parameter(tensor))
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)
        last = [-1] * (len(steps) + 1)
        for i, step in enumerate(steps):
            for read in refs(step):
                last[read] = i
        last[self.output] = len(steps)
        self.last = tuple(last)

    def forward(self, x: Tensor) -> Tensor:
        shape = tuple(x.shape[1:])
        if shape != self.input_shape:
            known = [[n for n in s if n != 1] for s in (shape, self.input_shape)]
            if math.prod(shape) != math.prod(self.input_shape) or (known[0] != known[1] and min(map(len, known)) > 1):
                raise BadInput(f"expected samples of the shape {self.input_shape} in the ONNX file, got {shape}; reshape them")
            x = x.reshape(x.shape[0], *self.input_shape)
        made = run(self.steps, x, self._tensor, self.last)[self.output]
        assert made is not None
        return made

    def _tensor(self, name: str) -> Tensor:
        held = self._parameters.get(name)
        return held if held is not None else self._buffers[name]  # type: ignore[return-value]

    def extra_repr(self) -> str:
        lines = [f"%{i + 1} = {step}" for i, step in enumerate(self.steps)]
        return "\n".join([f"input %0 {self.input_shape}", *lines, f"output %{self.output}"])


def read_onnx(path: str | Path) -> Network:
    """The module of a .onnx or .onnx.gz file, in eval mode, with the weights of the file.

    Raises BadInput for a file that cannot be read, for an unsupported operation (with its node), and for a program that mixes samples.
    """
    path = Path(path)
    try:
        return network_of(read_graph(path), path.name)
    except RobustlipError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, ArithmeticError, AttributeError, AssertionError) as error:
        reason = (str(error).splitlines() or [""])[0][:120]
        raise BadInput(
            f"expected an ONNX network, got {path.name}, which is inconsistent ({type(error).__name__}: {reason}); export it again"
        ) from error


def network_of(graph: Graph, name: str = "the file") -> Network:
    """See `read_onnx`."""
    if any(n is None for n in graph.shape[1:]):
        raise BadInput(f"expected an input of known shape except for the number of samples, got {graph.shape} in {name}; export it with fixed sizes")
    if graph.shape[0] not in (None, 1) and len(graph.shape) > 1:
        raise BadInput(f"expected an input of one sample, or of any number of them, got {graph.shape} in {name}; export it with batch 1")
    named = graph.shape[0] is None
    shape = tuple(1 if n is None else n for n in graph.shape)
    reading = Reading(Builder(shape, graph.dtype, named), graph)
    found = reading.run(shape)
    if not isinstance(found, Value):
        raise BadInput(f"expected a network whose output depends on its input, got a constant in {name}; export it again")
    builder = reading.builder
    dims = [n for n in found.shape if n != 1]
    # Logits (1, C), or a vector with any dimensions of size 1.
    layout = plain(found.shape) if len(dims) > 1 else (math.prod(found.shape),)
    last = builder.as_rows(found, layout)
    if builder.dtypes[last.index] != graph.dtype:
        raise BadInput(f"expected an output in the input's dtype {graph.dtype}, got another in {name}; export it in one dtype")
    steps, output = needed(builder.steps, last)
    read = {part.name for step in steps for part in parts_of(step) if isinstance(part, TensorRef)}
    return Network(
        steps, output, {n: t for n, t in builder.parameters.items() if n in read}, {n: t for n, t in builder.buffers.items() if n in read},
        plain(shape),
    ).eval()  # fmt: skip

