"""Subword tokenizers: text to token ids and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robustlip.errors import BadInput


class Subwords:
    """The tokenizer of a tokenizer.json, read by the package tokenizers. Models with subword tokens have it as vocabulary, in place of characters."""

    def __init__(self, content: bytes, classes: tuple[str, ...] | None = None) -> None:
        """classes: the model's names of classes 0, 1, …, if it has names."""
        self.classes = classes
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise BadInput("expected the package tokenizers to read a tokenizer.json, got none; pip install 'robustlip[hf]'") from error
        try:
            self.tokenizer = Tokenizer.from_str(content.decode("utf-8"))
            # The file may request truncation and padding; here these are set per text.
            self.tokenizer.no_truncation()
            self.tokenizer.no_padding()
        except Exception as error:  # the library raises Exception itself
            raise BadInput(f"expected a tokenizer.json, got {type(error).__name__}: {str(error)[:200]}; save the tokenizer again") from error

    def __len__(self) -> int:
        return int(self.tokenizer.get_vocab_size())

    def encode(self, text: str) -> Tensor:
        """Token ids int64 (T,) of a text, without tokens for its beginning and end."""
        return torch.tensor(self.tokenizer.encode(text, add_special_tokens=False).ids, dtype=torch.int64)

    def whole(self, text: str, most: int | None = None) -> Tensor:
        """Token ids int64 (T,) of a text with special tokens, as `tokenizer(text)` returns them, truncated to at most `most` tokens."""
        return torch.tensor(self._encoded(text, most).ids, dtype=torch.int64)

    def of_words(self, words: list[str], most: int | None = None) -> tuple[Tensor, list[int | None]]:
        """(token ids int64 (T,) of words, with the marks of a text; which word each token begins, None for marks and for the rest of a word)."""
        found = self._encoded(words, most)
        places = list(found.word_ids)
        return torch.tensor(found.ids, dtype=torch.int64), [word if i == 0 or word != places[i - 1] else None for i, word in enumerate(places)]

    def _encoded(self, text: str | list[str], most: int | None) -> Any:
        """What the tokenizer makes of a text or of words, with its marks."""
        options = {"is_pretokenized": True} if isinstance(text, list) else {}
        if most is None:
            return self.tokenizer.encode(text, **options)
        try:
            self.tokenizer.enable_truncation(most)
            found = self.tokenizer.encode(text, **options)
        except Exception as error:  # the library raises Exception itself
            raise BadInput(f"expected space for the special tokens within {most} tokens, got {str(error)[:200]}; raise --context") from error
        finally:
            self.tokenizer.no_truncation()
        if len(found.ids) > most:
            raise BadInput(f"expected space for the special tokens within {most} tokens, got {len(found.ids)}; raise --context")
        return found

    def decode(self, ids: Tensor) -> str:
        return str(self.tokenizer.decode(ids.tolist(), skip_special_tokens=False))
