"""CLIP's tokenizer from the merges that lie beside this module, for checkpoints that bring none.

The merges are OpenAI's (MIT, `vocabulary/NOTICE.txt`); the vocabulary follows from them.
"""

from __future__ import annotations

import gzip
import json
import os
import tempfile
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

_START, _END = "<|startoftext|>", "<|endoftext|>"


def clip_tokenizer(pad_token: str = _END) -> Any:
    """CLIP's tokenizer, 49,408 tokens, 77 to a prompt. OpenCLIP's text encoders (SD 2, SDXL's second) pad with "!"."""
    from transformers import CLIPTokenizer

    merges = gzip.decompress(files(__package__).joinpath("vocabulary/merges.txt.gz").read_bytes()).decode()
    with tempfile.TemporaryDirectory() as folder:
        write_vocabulary(folder, merges.split("\n")[:-1])
        return CLIPTokenizer.from_pretrained(folder, pad_token=pad_token, model_max_length=77)


def write_vocabulary(folder: str | os.PathLike[str], merges: Sequence[str]) -> None:
    """Writes `vocab.json` and `merges.txt`, which every release of transformers reads, into `folder`.

    The vocabulary: each byte, each byte at the end of a word, one token for each merge, and start and end.
    """
    letters = _byte_letters()
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(m.split()) for m in merges), _START, _END]
    Path(folder, "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    Path(folder, "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")


def _byte_letters() -> list[str]:
    """A visible letter for each byte: Latin-1's own where it has one, else from U+0100 on; visible ones come first.

    This is the byte alphabet of GPT-2 (Radford et al. 2019), in whose order CLIP numbers its tokens.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(b) for b in visible] + [chr(0x100 + i) for i in range(256 - len(visible))]
