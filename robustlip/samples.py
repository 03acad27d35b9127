"""Converts samples from users to tensors, in the same way for every public function: tensors, arrays, pandas columns, lists, a DataLoader or Dataset.

Numbers keep their precision: a float64 array becomes a float64 tensor, and its rounding by a float32 model is taken into account where radii are
computed (from the given point). Integers become int64 token ids or labels. Ambiguous inputs are refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from robustlip.data.dataset import Dataset
from robustlip.data.lengths import NO_LABEL, NO_TOKEN, joined
from robustlip.errors import BadInput, first_line
from robustlip.modes import random_state_kept
from robustlip.threats import EmbeddingBall, InputBall, Threat, WeightBall, parse_threat


def as_request(x: Any, y: Any, threat: Any) -> tuple[Tensor, Tensor, Threat]:
    """Inputs (N, …), labels int64 (N,) and the threat of a call f(model, x, y, threat) or f(model, loader, threat). Raises BadInput."""
    if threat is None and isinstance(y, str | InputBall | EmbeddingBall | WeightBall):
        y, threat = None, y
    threat = as_threat(threat)
    x, y = as_samples(x, y)
    if y is None:
        raise BadInput("expected labels beside the inputs, got none; give y, or a DataLoader or Dataset of (x, y) in place of x")
    return x, y, threat


def as_threat(threat: Any) -> Threat:
    """A threat, or the threat with a given name ('l2', 'embedding-l2@-1'). Raises BadInput."""
    if isinstance(threat, str):
        return parse_threat(threat)
    if not isinstance(threat, InputBall | EmbeddingBall | WeightBall):
        raise BadInput(f"expected a threat, InputBall, EmbeddingBall or WeightBall or its name, got {type(threat).__name__}; e.g. InputBall('l2')")
    return threat


def as_samples(x: Any, y: Any = None) -> tuple[Tensor, Tensor | None]:
    """Inputs (N, …), floating-point or integer token ids, and labels int64 (N,), or None if no labels were given.

    x: a tensor, a numpy array, a pandas column or table, a list of numbers or of equal arrays; or, without y, a result of `robustlip.load_data`,
    or a DataLoader or torch Dataset of pairs (x, y), read in its order. y: class numbers in any of these forms, integers.
    Token ids of several lengths: a list of rows, or the output of a tokenizer of transformers (input_ids, attention_mask), padded on the right. After
    the end of a text the result has `robustlip.data.lengths.NO_TOKEN`; texts of the same length are run together, without padding.
    Arguments are not changed; a loader's generators and the global random state are restored.
    Raises BadInput for uint8, objects, text, other rows of different lengths, and labels that are bool, floating-point or one-hot.
    """
    if isinstance(x, DataLoader | TorchDataset | Dataset):
        if y is not None:
            raise BadInput(f"expected labels from the {type(x).__name__} only, got y too; leave y out")
        x, y = (x.x, x.y) if isinstance(x, Dataset) else _loaded(x)
        x = _inputs(x)
        return x, _labels(y, len(x), x)
    x = _inputs(x)
    return x, None if y is None else _labels(y, len(x), x)


def _inputs(x: Any) -> Tensor:
    x = _encoded(x) if isinstance(x, Mapping) else _texts(x)
    x = _tensor(x, "inputs", "give a numeric array (N, …), one row per sample")
    if x.dtype == torch.uint8:
        raise BadInput("expected inputs as floating-point numbers or int64 token ids, got uint8; scale images, e.g. x / 255, in the model's units")
    if x.dtype == torch.bool or x.is_complex():
        raise BadInput(f"expected inputs as real numbers or token ids, got {x.dtype}; convert them to float32")
    if x.dim() < 2 or len(x) == 0:
        raise BadInput(f"expected inputs as a tensor (N, …) of at least one sample, got shape {tuple(x.shape)}; add the batch dimension")
    return x if x.is_floating_point() else x.long()


def _texts(x: Any, behind: int = NO_TOKEN) -> Any:
    """Rows of token ids of several lengths as one tensor; anything else is returned unchanged."""
    if not isinstance(x, list | tuple) or not all(isinstance(row, list | tuple | np.ndarray | Tensor) and len(np.shape(row)) == 1 for row in x):
        return x
    if len({len(row) for row in x}) < 2:
        return x
    rows = [_tensor(row, "token ids", "give integers") for row in x if len(row)]
    if any(row.is_floating_point() or row.dtype == torch.bool for row in rows):
        return x
    found = joined([_tensor(row, "token ids", "give integers") if len(row) else torch.zeros(0) for row in x])
    count = torch.tensor([len(row) for row in x])
    return found.masked_fill(torch.arange(found.shape[1]) >= count[:, None], behind)


def _encoded(x: Mapping[str, Any]) -> Tensor:
    """Token ids from the output of a tokenizer of transformers, with NO_TOKEN in place of padding. Raises BadInput for unsupported entries."""
    given = {name: value for name, value in x.items() if name not in ("special_tokens_mask", "offset_mapping", "length")}
    if not {"input_ids"} <= given.keys() <= {"input_ids", "attention_mask", "token_type_ids"}:
        raise BadInput(f"expected input_ids, with attention_mask or without, got {', '.join(map(str, list(x)[:6]))}; give the token ids")
    remedy = "give integers of one shape (N, T), or rows of several lengths without padding"
    ids = _tensor(_texts(given["input_ids"]), "input_ids", remedy)
    kinds, mask = given.get("token_type_ids"), given.get("attention_mask")
    if kinds is not None and bool((_tensor(_texts(kinds), "token_type_ids", remedy) > 0).any()):
        raise BadInput("expected texts of one part, got token_type_ids of several; leave out the pairs; models are run without token_type_ids")
    if mask is None:
        return ids
    seen = _tensor(_texts(mask), "attention_mask", remedy)
    if seen.shape != ids.shape or ids.dim() != 2 or not bool((seen <= 1).all()):
        raise BadInput(f"expected an attention_mask of 0 and 1 of shape {tuple(ids.shape)}, got {tuple(seen.shape)}; give that of these ids")
    if bool((seen[:, 1:] > seen[:, :-1]).any()):
        raise BadInput(
            "expected padding after the end of a text, got padding before a text, which shifts the positions of its tokens; "
            "pad on the right (tokenizer.padding_side = 'right')"
        )
    return ids.masked_fill(seen != 1, NO_TOKEN)


def _labels(y: Any, count: int, of: Tensor | None = None) -> Tensor:
    what = f"labels as an integer tensor ({count},)"
    y = _tensor(_texts(y, NO_LABEL), what, "give one class number per sample")
    if of is not None and not of.is_floating_point() and y.shape == of.shape and y.dtype in (torch.int64, torch.int32):
        return y.long()  # a label for each token
    if y.shape != (count,) or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        onehot = y.dim() == 2 and len(y) == count and y.shape[1] > 1
        remedy = "give class numbers, e.g. y.argmax(1) of one-hot rows" if onehot else "give one class number per sample"
        raise BadInput(f"expected {what}, got {y.dtype} of shape {tuple(y.shape)}; {remedy}")
    return y.long()


def _tensor(values: Any, what: str, remedy: str) -> Tensor:
    """A strided tensor without a graph. Raises BadInput."""
    if isinstance(values, Tensor):
        if values.layout != torch.strided or values.is_quantized or values.is_meta or values.is_nested:
            raise BadInput(f"expected {what} in a plain tensor, got a sparse, nested, quantised or meta one; convert it with to_dense() or the like")
        return values.detach()
    if isinstance(values, np.ma.MaskedArray) and bool(np.ma.getmaskarray(values).any()):
        raise BadInput(f"expected {what} without gaps, got a masked array; fill or drop the masked values")
    if isinstance(values, str | bytes | dict | set) or values is None:
        raise BadInput(f"expected {what}, got {type(values).__name__}; {remedy}")
    if hasattr(values, "to_numpy"):  # a pandas column or table
        values = values.to_numpy()
        if values.dtype == object:
            values = list(values)
    if isinstance(values, list | tuple) and values and all(isinstance(row, Tensor) for row in values):
        return _stacked(cast("Sequence[Tensor]", values), what)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # old numpy versions only warn about rows of different lengths
            array = np.array(values, order="C")  # a copy: writable, with its own strides
            if array.dtype == object:
                array = np.array([np.asarray(row) for row in values], order="C")
    except Exception as error:  # the given object may raise anything
        raise BadInput(f"expected {what} with rows of one shape, got an error of numpy ({first_line(error)}); {remedy}") from None
    if array.dtype.kind not in "fiub" or array.dtype.itemsize > 8:
        raise BadInput(f"expected {what}, got an array of {array.dtype}; {remedy}")
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        if array.dtype.itemsize == 8 and array.size and int(array.max()) > np.iinfo(np.int64).max:
            raise BadInput(f"expected {what} that int64 can hold, got {int(array.max())}; {remedy}")
        array = array.astype(np.int64)
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


def _stacked(rows: Sequence[Tensor], what: str) -> Tensor:
    shapes, dtypes = {tuple(row.shape) for row in rows}, {row.dtype for row in rows}
    if len(shapes) != 1 or len(dtypes) != 1:
        raise BadInput(f"expected {what} with rows of one shape and dtype, got {sorted(map(str, shapes | dtypes))[:4]}; make them equal")
    return torch.stack([_tensor(row, what, "") for row in rows])


def _loaded(source: Any) -> tuple[Any, Any]:
    """All pairs (x, y) of a DataLoader or Dataset, in its order."""
    kind = type(source).__name__
    try:
        count = len(source)
    except TypeError:
        raise BadInput(f"expected a {kind} with a length, got one without; collect a limited number of samples into tensors first") from None
    batched = (isinstance(source, DataLoader) and source.batch_size is not None) or getattr(source, "batch_sampler", None) is not None
    generators = {id(g): g for g in _generators(source)}
    states = [(g, g.get_state()) for g in generators.values()]
    with random_state_kept():
        try:
            pairs = list(source) if isinstance(source, DataLoader) else [source[i] for i in range(count)]
        finally:
            for generator, state in states:
                generator.set_state(state)
    if not pairs:
        raise BadInput(f"expected at least one sample, got an empty {kind}; check the data")
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            got = f"{len(pair)} parts" if isinstance(pair, tuple | list) else type(pair).__name__
            raise BadInput(f"expected pairs (x, y) from the {kind}, got {got}; wrap it so that it returns inputs and label")
    rows, labels = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    if batched:
        return _joined(rows, "inputs"), _joined(labels, "labels")
    whole = [label.item() if isinstance(label, Tensor | np.generic) and label.ndim == 0 else label for label in labels]
    return _tensor(rows, "inputs", "give numeric rows of one shape"), _tensor(whole, "labels", "give one class number per sample")


def _joined(parts: list[Any], what: str) -> Tensor:
    tensors = [_tensor(part, what, "give tensors from the loader") for part in parts]
    if len({t.shape[1:] for t in tensors}) != 1 or len({t.dtype for t in tensors}) != 1:
        raise BadInput(f"expected {what} of one shape and dtype in all batches, got several; convert the samples")
    return torch.cat(tensors)


def _generators(source: Any) -> list[torch.Generator]:
    holders = [source, getattr(source, "sampler", None), getattr(getattr(source, "batch_sampler", None), "sampler", None)]
    found = [getattr(holder, "generator", None) for holder in holders]
    return [g for g in found if isinstance(g, torch.Generator)]
