"""Batches by step number, and a fixed evaluation set."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustlip.checks import check_fit
from robustlip.data.stream import Documents, TokenStream
from robustlip.data.tokenizers import make_tokenizer
from robustlip.errors import BadInput
from robustlip.hashing import tensors_sha256
from robustlip.layers import Chain
from robustlip.training.recipe import Recipe


def _step_generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


def _open(recipe: Recipe, data_dir: str | None) -> TokenStream:
    data = recipe.data
    assert data.tokenizer is not None  # checked by the recipe
    tokenizer = make_tokenizer(data.tokenizer, data.tokenizer_file)
    return TokenStream(
        lambda: Documents(data.name, data.subset, split=data.split, column=data.text_column, data_dir=data_dir), tokenizer, data.held_out
    )


class Source:
    """Batches by step number, and a fixed evaluation set as an iterator of batches.

    The batch of a step has the recipe's size and does not depend on the caller; processes that share a step each use some of its rows.
    text: token ids of characters; the model gets its vocabulary from here. stream: documents that are read while they are needed.
    """

    def __init__(self, recipe: Recipe, data_dir: str | None) -> None:
        from robustlip.data import load_data, load_tokens
        from robustlip.data.load import is_text

        self.recipe = recipe
        self.stream: TokenStream | None = None
        self.text = "gpt" in str(recipe.model.get("kind")) and not recipe.data.streaming
        self.context = recipe.data.context
        self.vocabulary: str | None = None
        self.note = ""
        self._hash: str | None = None
        if recipe.data.streaming:
            self.stream = _open(recipe, data_dir)
            self._reader = ThreadPoolExecutor(1)
            self._ahead: tuple[int, Future[np.ndarray]] | None = None
            self.test, self.note = torch.from_numpy(self.stream.held_out_tokens()).long(), self.stream.note
            if len(self.test) <= self.context:
                raise BadInput(f"expected held-out documents of more than {self.context} tokens, got {len(self.test)}; raise data.held_out")
        elif self.text:
            name, column = recipe.data.name, recipe.data.text_column
            options: Any = {"data_dir": data_dir, "subset": recipe.data.subset, "text_column": None if column == "text" and is_text(name) else column}
            self.train, self.vocabulary, self.note = load_tokens(f"{name}:train", **options)
            self.test, _, _ = load_tokens(f"{name}:test", vocabulary=self.vocabulary, **options)
        else:
            columns: Any = {"subset": recipe.data.subset, "image_column": recipe.data.image_column, "label_column": recipe.data.label_column}
            train, test = (load_data(f"{recipe.data.name}:{split}", data_dir=data_dir, **columns) for split in ("train", "test"))
            if train.names != test.names:
                raise BadInput(
                    f"expected the same class names in both splits of {recipe.data.name}, got {len(train.names or ())} and "
                    f"{len(test.names or ())} that differ; declare them as the hub does, or store labels as integers"
                )
            self.x, self.y, self.test_x, self.test_y, self.note = train.x, train.y, test.x, test.y, train.note

    def check(self, model: Chain) -> None:
        """Raises BadInput if the model does not accept this data."""
        if self.text and (shortest := min(len(self.train), len(self.test))) <= self.context + 1:
            raise BadInput(f"expected a text of more than {self.context + 1} characters in each split, got {shortest}; shorten data.context")
        x, y = (t[:1] for t in next(iter(self.evaluation(1))))
        largest = int(y.max()) if self.text or self.stream is not None else int(torch.cat([self.y, self.test_y]).max())
        logits = check_fit(model, x, "change its sizes or its kind, or data.name")
        if logits.shape[:-1] != y.shape or largest >= logits.shape[-1]:
            raise BadInput(
                f"expected logits of shape {(*y.shape, 'at least', largest + 1)}, got {tuple(logits.shape)}; "
                f"change the model's last width, or its kind"
            )

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        generator = _step_generator(self.recipe.seed, step)
        size = self.recipe.run.batch
        if self.stream is not None:
            # Consecutive windows: row r of step t begins at token (t·size + r)·context, which is the last token that the row before predicts.
            tokens = torch.from_numpy(self._tokens(step)).long()
            return tokens[:-1].view(size, self.context), tokens[1:].view(size, self.context)
        if self.text:
            start = torch.randint(len(self.train) - self.context - 1, (size,), generator=generator)
            window = self.train[start[:, None] + torch.arange(self.context + 1)]
            return window[:, :-1], window[:, 1:]
        pick = torch.randint(len(self.x), (size,), generator=generator)
        x = self.x[pick]
        if self.recipe.loss.input_noise:
            x = x + self.recipe.loss.input_noise * torch.randn(x.shape, generator=generator)
        return x, self.y[pick]

    def _tokens(self, step: int) -> np.ndarray:
        """The tokens of a step. Those of the next step are read and tokenised while this one trains, by a thread that owns the stream."""
        assert self.stream is not None
        count = self.recipe.run.batch * self.context

        def read(step: int) -> np.ndarray:
            assert self.stream is not None
            return self.stream.window(step * count, count + 1)

        if self._ahead is not None and self._ahead[0] == step:
            tokens = self._ahead[1].result()
        else:
            tokens = self._reader.submit(read, step).result()
        self._ahead = (step + 1, self._reader.submit(read, step + 1))
        return tokens

    def state(self, step: int) -> dict[str, Any] | None:
        """The position at which the data of `step`, the next one, begins, as plain numbers and strings; for data in memory, its hash."""
        if self.stream is None:
            return {"train_sha256": self._sha256()}
        if self._ahead is not None:
            self._ahead[1].result()  # until then the other thread uses the stream
        return self.stream.state_at(step * self.recipe.run.batch * self.context)

    def restore(self, state: dict[str, Any] | None) -> None:
        """Continue from a `state`; without one, earlier data is read again. Raises BadInput if the data has changed."""
        if self.stream is None:
            if (state or {}).get("train_sha256", "") not in ("", self._sha256()):
                raise BadInput(f"expected the training data of the saved run, got other data as {self.recipe.data.name}; restore it, or start again")
        elif state is not None:
            if self._ahead is not None:
                wait([self._ahead[1]])
            self._ahead = None
            self.stream.restore(state)

    def _sha256(self) -> str:
        """The hash of the whole training split; the data does not change, so it is computed once."""
        if self._hash is None:
            self._hash = tensors_sha256({"tokens": self.train} if self.text else {"x": self.x, "y": self.y})
        return self._hash

    def evaluation(self, limit: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of the test split: all images; text as consecutive windows, with a prediction at every position. limit: number of windows."""
        if self.text or self.stream is not None:
            count = (len(self.test) - 1) // self.context
            kept = range(count) if limit is None else range(0, count, max(1, count // limit))
            starts = torch.tensor([i * self.context for i in kept])
            for part in starts.split(16):
                window = self.test[part[:, None] + torch.arange(self.context + 1)]
                yield window[:, :-1], window[:, 1:]
        else:
            yield from zip(self.test_x.split(1000), self.test_y.split(1000), strict=True)
