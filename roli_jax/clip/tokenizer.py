"""CLIP's byte-pair encoding of text (Radford et al. 2021, section 2.4).

A text is cleaned and cut into words, a word into the bytes of its UTF-8, and
neighbours among those are joined as the vocabulary's merges say.
"""

import gzip
import html
import importlib.util
import itertools
import math
import pathlib
import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from roli_jax.types import Int

# CLIP takes the first of the file's merges, so that there are 49,408 tokens.
NUM_MERGES = 49_408 - 2 * 256 - 2
FILE = "bpe_simple_vocab_16e6.txt.gz"
PACKAGES = ("open_clip", "clip")  # the file comes with them

_LAST = "</w>"  # marks the symbol that ends a word


def _alphabet() -> list[tuple[int, str]]:
  """Pairs each byte with the character that stands for it, in the order of ids.

  Bytes that Latin-1 prints stand for themselves, and come first. Control
  characters and blanks are written as those from U+0100 on.
  """
  shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  rest = [byte for byte in range(256) if byte not in shown]
  return [
    *((byte, chr(byte)) for byte in shown),
    *((byte, chr(256 + i)) for i, byte in enumerate(rest)),
  ]


# Words of a text in which `_kind` has replaced every character beyond ASCII by
# an ASCII one of the same kind: a letter, a digit, or another mark.
_WORD = re.compile(r"'(?:re|ve|ll|[stmd])|[a-z]+|[0-9]|[^\sa-z0-9]+")


class Tokenizer:
  """Turns texts into rows of ids: a start, the words, an end, zeros.

  Ids are in this order: 256 bytes, the same at the end of a word, the merges,
  start, end. The end is the largest.

  Attributes:
    vocab_size: how many ids there are.
    start: the id that a text begins with.
    end: the id that it ends with.
  """

  def __init__(self, merges: Sequence[tuple[str, ...]]):
    """Makes a tokenizer of these merges.

    Args:
      merges: pairs of neighbours that become one symbol, those to be joined
        first in front.

    Raises:
      ValueError: a merge of what is neither a byte nor made by one before it.
    """
    alphabet = _alphabet()
    self._bytes = dict(alphabet)
    symbols = [char for _, char in alphabet]
    self._ids = {
      symbol: i
      for i, symbol in enumerate([*symbols, *(s + _LAST for s in symbols)])
    }
    self._ranks: dict[tuple[str, ...], int] = {}
    for rank, pair in enumerate(merges):
      if len(pair) != 2 or not all(part in self._ids for part in pair):
        raise ValueError(
          f"merge {rank + 1} joins {pair}, expected two symbols that are bytes"
          " or made by earlier merges; is this CLIP's vocabulary?"
        )
      self._ranks[pair] = rank
      self._ids["".join(pair)] = 2 * len(alphabet) + rank
    self.start = 2 * len(alphabet) + len(merges)
    self.end = self.start + 1
    self.vocab_size = self.end + 1

  @classmethod
  def from_file(cls, path: str | pathlib.Path = "") -> "Tokenizer":
    """Makes the tokenizer of a vocabulary file.

    Args:
      path: a copy of `bpe_simple_vocab_16e6.txt`, gzipped or not: a header,
        then a merge a line, of which the first 48,894 count. "": the copy in an
        installed package, open_clip or clip, which is not imported.

    Raises:
      ValueError: there is no such file, or it holds something else.
    """
    file = pathlib.Path(path).expanduser() if path else _installed()
    if not file.is_file():
      raise ValueError(f"there is no vocabulary at {file}; it is {FILE}")
    content = file.read_bytes()
    try:
      if content.startswith(b"\x1f\x8b"):  # as every gzipped file does
        content = gzip.decompress(content)
      lines = content.decode().rstrip("\n").split("\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
      raise ValueError(f"{file} can't be read: {error}") from error
    merges = [tuple(line.split()) for line in lines[1 : NUM_MERGES + 1]]
    try:
      return cls(merges)
    except ValueError as error:
      raise ValueError(f"{file}: {error}") from error

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, without start and end.

    The text is lower-cased, HTML's entities are resolved (twice, as some were
    escaped twice), and white space counts as one blank.

    CLIP also mends wrong encodings and straightens quotation marks with ftfy,
    which is not done here; it changes nothing of ASCII's printed characters.
    The names of start and end have no meaning in a text here. What is a letter
    is by Python's version of Unicode.
    """
    text = html.unescape(html.unescape(text))
    text = " ".join(text.split()).lower()
    plain = "".join(char if char.isascii() else _kind(char) for char in text)
    return [
      id
      for match in _WORD.finditer(plain)
      for id in self._word(text[slice(*match.span())])
    ]

  def __call__(
    self,
    texts: Sequence[str],
    context_length: int = 77,
    *,
    truncate: bool = False,
  ) -> Int[np.ndarray, "n context"]:
    """Returns the ids of texts, one text a row.

    Args:
      texts: any number of texts.
      context_length: tokens of a row, start and end included.
      truncate: whether a text too long is cut; its last id is the end still.

    Raises:
      ValueError: a text too long, or one text in place of several.
    """
    if isinstance(texts, str):
      raise ValueError(f"expected a sequence of texts, got {texts!r}: [text]")
    rows = np.zeros((len(texts), context_length), np.int32)
    for row, text in zip(rows, texts, strict=True):
      ids = self.encode(text)
      if len(ids) + 2 > context_length and not truncate:
        raise ValueError(
          f"{text!r} has {len(ids)} tokens, and a row of {context_length} holds"
          f" {context_length - 2}; shorten it, or take truncate=True"
        )
      ids = [self.start, *ids[: context_length - 2], self.end]
      row[: len(ids)] = ids
    return rows

  def _word(self, word: str) -> list[int]:
    parts = [self._bytes[byte] for byte in word.encode()]
    parts[-1] += _LAST
    while len(parts) > 1:
      ranks = [
        self._ranks.get(pair, math.inf) for pair in itertools.pairwise(parts)
      ]
      if min(ranks) == math.inf:
        break
      i = ranks.index(min(ranks))
      parts[i : i + 2] = ["".join(parts[i : i + 2])]
    return [self._ids[part] for part in parts]


def _kind(char: str) -> str:
  r"""An ASCII character of the same kind: \p{L}, \p{N}, or neither."""
  return {"L": "a", "N": "0"}.get(unicodedata.category(char)[0], "!")


def _installed() -> pathlib.Path:
  """Finds the vocabulary in the first package that has it."""
  for package in PACKAGES:
    spec = importlib.util.find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or ():
      if (pathlib.Path(folder) / FILE).is_file():
        return pathlib.Path(folder) / FILE
  raise ValueError(
    f"there is no {FILE} in an installed {' or '.join(PACKAGES)}; say where it"
    " is, or pip install open_clip_torch"
  )
