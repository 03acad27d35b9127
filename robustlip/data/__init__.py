"""Data sets as tensors, with the notes that tables have to show about their source.

    from robustlip.data import load_data
    data = load_data("digits:test", limit=100)          # data.x (100, 1, 8, 8) in [0, 1], data.y (100,)

Read in this order: `dataset` (the result), `load` (what a name means), `images` and `text` (decoding), `folders` and `hub` (where data is searched).
"""

from robustlip.data.dataset import Dataset
from robustlip.data.load import load_data, load_text_or_page, load_tokens
from robustlip.data.text import CHARACTERS, decode, encode

__all__ = ["CHARACTERS", "Dataset", "decode", "encode", "load_data", "load_text_or_page", "load_tokens"]
