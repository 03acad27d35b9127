"""Batches by step number, and a fixed evaluation set."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from robustlip.training.recipe import Recipe


def _step_generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


class Source:
    """Batches by step number, and a fixed evaluation set as an iterator of batches."""

    def __init__(self, recipe: Recipe, data_dir: str | None) -> None:
        from robustlip.data import load_data, load_tokens

        self.recipe = recipe
        self.text = "gpt" in str(recipe.model.get("kind"))
        self.context = recipe.data.context
        self.vocabulary: str | None = None
        self.note = ""
        if self.text:
            self.train, self.vocabulary, self.note = load_tokens(f"{recipe.data.name}:train", data_dir=data_dir)
            self.test, _, _ = load_tokens(f"{recipe.data.name}:test", data_dir=data_dir, vocabulary=self.vocabulary)
        else:
            train, test = (load_data(f"{recipe.data.name}:{split}", data_dir=data_dir) for split in ("train", "test"))
            self.x, self.y, self.test_x, self.test_y, self.note = train.x, train.y, test.x, test.y, train.note

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        generator = _step_generator(self.recipe.seed, step)
        size = self.recipe.run.batch
        if self.text:
            start = torch.randint(len(self.train) - self.context - 1, (size,), generator=generator)
            window = self.train[start[:, None] + torch.arange(self.context + 1)]
            return window[:, :-1], window[:, 1:]
        pick = torch.randint(len(self.x), (size,), generator=generator)
        x = self.x[pick]
        if self.recipe.loss.input_noise:
            x = x + self.recipe.loss.input_noise * torch.randn(x.shape, generator=generator)
        return x, self.y[pick]

    def evaluation(self, limit: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of the test split: images all; text as consecutive windows, every position predicted. limit: windows."""
        if self.text:
            count = (len(self.test) - 1) // self.context
            kept = range(count) if limit is None else range(0, count, max(1, count // limit))
            starts = torch.tensor([i * self.context for i in kept])
            for part in starts.split(16):
                window = self.test[part[:, None] + torch.arange(self.context + 1)]
                yield window[:, :-1], window[:, 1:]
        else:
            yield from zip(self.test_x.split(1000), self.test_y.split(1000), strict=True)
