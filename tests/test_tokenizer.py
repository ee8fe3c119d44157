"""CLIP's byte-pair encoding, by hand."""

import gzip
import importlib.machinery
import importlib.util

import numpy as np
import pytest

from roli_jax.clip import tokenizer
from roli_jax.clip.tokenizer import Tokenizer

# Ids 512 to 519, in this order; start and end are 520 and 521.
MERGES = "l o\nlo w\ne r</w>\nlo w</w>\nd o\ndo g</w>\na a\nÃ ©</w>\n"


@pytest.fixture(scope="module")
def words():
  return Tokenizer([tuple(line.split()) for line in MERGES.splitlines()])


def of(char, last=False):
  """The id of a byte that ASCII prints."""
  return ord(char) - ord("!") + 256 * last


def test_ids_are_bytes_then_last_bytes_then_merges_then_start_and_end(words):
  assert words.encode("a") == [of("a", last=True)] == [64 + 256]
  assert words.encode("aa") == [of("a"), of("a", last=True)]
  assert (words.start, words.end, words.vocab_size) == (520, 521, 522)
  # Latin-1's printed bytes are 94 of ASCII, 12 from A1, 82 from AE; then come
  # those from 00 to 20, 7F to A0, and AD.
  ids = [words._ids[words._bytes[b]] for b in (0x7E, 0xA1, 0xAE, 0xFF, 0, 0xAD)]
  assert ids == [93, 94, 106, 187, 188, 255]


WORKED = {
  "low": [515],  # not 513, which is no word's end
  "lower": [513, 514],
  "lo": [of("l"), of("o", last=True)],
  "dog": [517],
  "dogs": [516, of("g"), of("s", last=True)],
  "aaa": [518, of("a", last=True)],  # from the left
  "aaaa": [518, of("a"), of("a", last=True)],
  "é": [519],
  "a1b2": [of(c, last=True) for c in "a1b2"],  # letters and digits are apart
  "12": [of("1", last=True), of("2", last=True)],  # and each digit alone
  "a?!": [of("a", last=True), of("?"), of("!", last=True)],
  "_": [of("_", last=True)],
  "": [],
}


@pytest.mark.parametrize("text", WORKED)
def test_texts_are_encoded_as_by_hand(text, words):
  assert words.encode(text) == WORKED[text]


@pytest.mark.parametrize(
  "text, cuts",
  [
    ("don't", ["don", "'t"]),
    ("we'll've", ["we", "'ll", "'ve"]),
    ("'s's", ["'s", "'s"]),
    ("''s", ["''", "s"]),
    ("'so", ["'s", "o"]),
    ("x½²b", ["x", "½", "²", "b"]),  # numbers of Unicode too
    ("naïve", ["naïve"]),
    ("日本", ["日本"]),
    ("a—b", ["a", "—", "b"]),
    ("'é", ["'", "é"]),
  ],
)
def test_words_are_cut_as_clips_pattern_cuts_them(text, cuts, words):
  apart = [id for cut in cuts for id in words._word(cut)]
  assert words.encode(text) == apart


@pytest.mark.parametrize(
  "text", ["LOW dog", "  low\t\n dog ", "low\u00a0dog", "l&#111;w dog",
           "&amp;#108;ow dog"],
)  # fmt: skip
def test_texts_are_cleaned(text, words):
  assert words.encode(text) == [515, 517]


def test_rows_have_a_start_an_end_and_zeros(words):
  rows = words(["low dog", ""], 5)
  assert rows.dtype == np.int32
  assert rows.tolist() == [[520, 515, 517, 521, 0], [520, 521, 0, 0, 0]]
  assert words(["low"]).shape == (1, 77) and words([]).shape == (0, 77)


def test_a_text_too_long_is_refused_or_cut(words):
  assert words(["low dog"], 4).tolist() == [[520, 515, 517, 521]]
  with pytest.raises(ValueError, match=r"'low dog' has 2 tokens.* holds 1"):
    words(["low dog"], 3)
  assert words(["low dog"], 3, truncate=True).tolist() == [[520, 515, 521]]


def test_one_text_in_place_of_several_is_refused(words):
  with pytest.raises(ValueError, match="sequence of texts, got 'low'"):
    words("low")


def test_a_file_is_read_gzipped_or_not(words, tmp_path):
  plain, packed = tmp_path / "bpe.txt", tmp_path / "bpe.txt.gz"
  plain.write_text("a header\n" + MERGES + "\n\n", encoding="utf-8")
  packed.write_bytes(gzip.compress(plain.read_bytes()))
  for path in (plain, str(packed)):
    read = Tokenizer.from_file(path)
    assert read.vocab_size == words.vocab_size
    assert read.encode("lower dogs é") == words.encode("lower dogs é")


def test_of_a_longer_file_the_merges_of_clip_count(tmp_path):
  path = tmp_path / "bpe.txt"
  printed = [chr(c) for c in (*range(0x21, 0x7F), *range(0xAE, 0x144))]
  pairs = [f"{a} {b}" for a in printed for b in printed]
  path.write_text("\n".join(["header", *pairs]), encoding="utf-8")
  assert len(pairs) > 49_000
  assert Tokenizer.from_file(path).vocab_size == 49_408


def test_the_file_of_an_installed_package_is_found(tmp_path, monkeypatch):
  def find_spec(name):
    if name == "open_clip":
      return None
    spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    return spec

  monkeypatch.setattr(importlib.util, "find_spec", find_spec)
  with pytest.raises(ValueError, match="open_clip or clip; say where"):
    Tokenizer.from_file()
  packed = gzip.compress(b"header\nl o\n")
  (tmp_path / tokenizer.FILE).write_bytes(packed)
  assert Tokenizer.from_file().vocab_size == 515


@pytest.mark.parametrize(
  "content, message",
  [
    (b"header\nl o\nlo w x\n", r"merge 2 joins \('lo', 'w', 'x'\)"),
    (b"header\nlo w\n", "merge 1 joins"),
    (b"header\nl o\n\nlo w\n", r"merge 2 joins \(\)"),
    (b"\x1f\x8b\x08broken", "can't be read"),
    (b"\xff\xfe", "can't be read"),
  ],
)
def test_what_is_no_vocabulary_is_refused(content, message, tmp_path):
  path = tmp_path / "bpe.txt"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=message):
    Tokenizer.from_file(path)


def test_a_missing_vocabulary_is_named(tmp_path):
  with pytest.raises(ValueError, match=r"no vocabulary at .*x\.txt"):
    Tokenizer.from_file(tmp_path / "x.txt")
