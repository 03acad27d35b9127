"""Tokenizers for training: bytes, which need no files, and GPT-2's vocabulary, by tiktoken."""

from __future__ import annotations

import base64
from codecs import BOM_UTF8
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from robustlip.errors import BadInput, DataUnavailable
from robustlip.files import read_limited

GPT2_RANKS = 50_256  # byte sequences in GPT-2's vocabulary; the next id ends a text
TOKENIZERS = {"bytes": 257, "gpt2": GPT2_RANKS + 1}  # number of ids
THREADS = 8
_RANKS_LIMIT = 2**23  # bytes of its file, which has less than a million


class Tokenizer(Protocol):
    """Documents to ids in [0, size). The last id, size − 1, ends every document and occurs nowhere else."""

    name: str
    size: int

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 arrays (tokens + 1,), one per document, each with the end token appended."""
        ...


class Bytes:
    """UTF-8 bytes, ids 0 to 255, and 256 at the end of a document: works for every text, without a file or a network."""

    name = "bytes"
    size = TOKENIZERS["bytes"]

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        end = np.array([self.size - 1], dtype=np.int32)
        return [np.concatenate([np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int32), end]) for text in texts]


class GPT2:
    """GPT-2's 50,256 byte sequences and the end token (Radford et al. 2019), by tiktoken. 'Special' strings in a text are ordinary text.

    file: the vocabulary of GPT-2 (r50k_base.tiktoken: each line a base64 sequence and its rank), or None: tiktoken downloads it once
    and keeps it in the folder named by TIKTOKEN_CACHE_DIR. Raises BadInput without tiktoken or for another file, DataUnavailable
    if the download fails.
    """

    name = "gpt2"
    size = TOKENIZERS["gpt2"]

    def __init__(self, file: str | Path | None = None) -> None:
        try:
            import tiktoken
            from tiktoken_ext.openai_public import r50k_pat_str
        except ImportError:
            raise BadInput(
                "expected tiktoken for the tokenizer 'gpt2', got no such package; install robustlip[text], or use tokenizer = \"bytes\""
            ) from None
        self.encoding: Any
        if file is not None:
            self.encoding = tiktoken.Encoding(
                "gpt2", pat_str=r50k_pat_str, mergeable_ranks=_ranks(Path(file)), special_tokens={"<|endoftext|>": GPT2_RANKS}
            )
            return
        try:
            self.encoding = tiktoken.get_encoding("gpt2")
        except Exception as error:  # tiktoken may raise errors of any HTTP client
            raise DataUnavailable(
                f"expected GPT-2's vocabulary in tiktoken's cache or on the network, got {type(error).__name__}; "
                f"name r50k_base.tiktoken as tokenizer_file, or set TIKTOKEN_CACHE_DIR to a folder that contains it"
            ) from None

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        rows = self.encoding.encode_ordinary_batch(list(texts), num_threads=THREADS)
        return [np.array([*row, GPT2_RANKS], dtype=np.int32) for row in rows]


def _ranks(file: Path) -> dict[bytes, int]:
    """The lines of a .tiktoken file. Raises BadInput unless they are 50,256 distinct sequences of ranks 0, 1, …, with all single bytes."""
    content = read_limited(file, "a vocabulary file", _RANKS_LIMIT, "name r50k_base.tiktoken").removeprefix(BOM_UTF8)
    try:
        lines = [line.split() for line in content.splitlines() if line]
        ranks = {base64.b64decode(sequence, validate=True): int(rank) for sequence, rank in lines}
    except ValueError:  # includes errors of base64
        raise BadInput(f"expected lines of a base64 sequence and a rank in {file.name}, got others; name r50k_base.tiktoken") from None
    whole = len(ranks) == GPT2_RANKS and sorted(ranks.values()) == list(range(GPT2_RANKS))
    if not whole or not all(bytes([i]) in ranks for i in range(256)):
        raise BadInput(f"expected the {GPT2_RANKS} sequences of GPT-2 in {file.name}, got {len(ranks)}; name r50k_base.tiktoken")
    return ranks


def make_tokenizer(name: str, file: str | Path | None = None) -> Tokenizer:
    """'bytes' or 'gpt2' (file: see GPT2). Raises BadInput for another name, and for a file with the tokenizer 'bytes'."""
    if name == "gpt2":
        return GPT2(file)
    if name != "bytes":
        raise BadInput(f"expected a tokenizer among {', '.join(TOKENIZERS)}, got {name!r}; name one of them")
    if file is not None:
        raise BadInput(f"expected no vocabulary file for the tokenizer 'bytes', got {str(file)!r}; leave it out")
    return Bytes()
