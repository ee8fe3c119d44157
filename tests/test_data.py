"""The embedded data, and batches of any data."""

import itertools

import numpy as np
import pytest

from roli_jax import data
from roli_jax.data import glyphs


@pytest.fixture(scope="module")
def digits():
  return {split: data.build("digits", split) for split in data.SPLITS}


def test_digits_are_split_once_and_for_all(digits):
  sizes = {split: len(source) for split, source in digits.items()}
  assert sizes == {"train": 1000, "val": 297, "test": 500}
  indices = np.concatenate([s.indices for s in digits.values()])
  assert sorted(indices) == list(range(1797))
  # The split must never move: published numbers rest on it.
  assert digits["test"].indices[:6].tolist() == [2, 6, 14, 18, 25, 27]


def test_digits_are_sklearns_pixels(digits):
  from sklearn import datasets

  test = digits["test"]
  whole = datasets.load_digits().images
  pixels = test.pixels()
  assert pixels.dtype == np.float32 and pixels.max() == 1
  np.testing.assert_allclose(
    pixels[..., 0], whole[test.indices] / 16, rtol=1e-7
  )


@pytest.mark.parametrize("split", data.SPLITS)
def test_classes_keep_their_shares(digits, split):
  counts = np.bincount(digits[split].labels)
  share = len(digits[split]) / 1797
  assert np.abs(counts - share * 180).max() < 0.15 * share * 180 + 1


@pytest.mark.parametrize("size", [50, 200, 1000])
def test_a_seed_draws_a_stratified_subset(digits, size):
  a, b = (digits["train"].subset(size, seed) for seed in (0, 1))
  assert len(a) == size
  again = digits["train"].subset(size, 0)
  np.testing.assert_array_equal(a.indices, again.indices)
  counts = np.bincount(a.labels)
  assert counts.min() >= size // 10 - 4
  if size < 1000:
    assert set(a.indices) != set(b.indices)


@pytest.mark.parametrize("size", [0, 9, 1001])
def test_subsets_that_can_not_be_are_refused(digits, size):
  with pytest.raises(ValueError, match="train_size"):
    digits["train"].subset(size, 0)


def test_fonts_have_the_letters_and_only_real_ones():
  names = [path.rsplit("/", 1)[-1] for path in glyphs.fonts()]
  assert len(names) >= 20 and "DejaVuSans.ttf" in names
  for symbols in ("cmex10.ttf", "cmsy10.ttf", "LastResortHE-Regular.ttf"):
    assert symbols not in names


def test_a_letter_is_a_function_of_its_index():
  val = data.build("letters", "val")
  assert len(val) == 1110 and val.num_classes == 37
  assert np.bincount(val.labels).tolist() == [30] * 37
  i = 17
  again = glyphs._letter(int(val.indices[i]), int(val.labels[i]))
  np.testing.assert_array_equal(val.images[i], again)


def test_letters_look_like_digits_to_a_histogram(digits):
  val = data.build("letters", "val")
  assert val.images.max() == 16 and val.images.min() == 0
  assert abs(val.pixels().mean() - digits["train"].pixels().mean()) < 0.1
  # No image is blank, or all ink.
  ink = val.pixels().mean((1, 2, 3))
  assert ink.min() > 0.02 and ink.max() < 0.95


def batches(source, seed=0, start=0, count=8, batch_size=64):
  stream = data.train_batches(source, batch_size, seed, start)
  return list(itertools.islice(stream, count))


def test_batches_go_on_from_any_step(digits):
  source = digits["train"].subset(200, 0)
  whole = batches(source)
  rest = batches(source, start=5, count=3)
  for a, b in zip(whole[5:], rest, strict=True):
    for key in ("image", "label", "index"):
      np.testing.assert_array_equal(a[key], b[key])


def test_every_epoch_is_a_permutation_of_its_own(digits):
  source = digits["train"].subset(200, 0)
  order = np.concatenate([b["index"] for b in batches(source, count=25)])
  epochs = order.reshape(8, 200)
  for epoch in epochs:
    assert sorted(epoch) == sorted(source.indices)
  assert (epochs[0] != epochs[1]).any()
  other = batches(source, seed=1, count=1)[0]["index"]
  assert (other != order[:64]).any()


def test_a_set_smaller_than_a_batch_fills_it(digits):
  (batch,) = batches(digits["train"].subset(50, 0), count=1)
  assert batch["image"].shape == (64, 8, 8, 1)
  assert batch["image"].dtype == np.uint8


def test_processes_share_a_batch(digits, monkeypatch):
  import jax

  source = digits["train"].subset(200, 0)
  whole = batches(source)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  parts = []
  for process in range(2):
    monkeypatch.setattr(jax, "process_index", lambda p=process: p)
    parts.append(batches(source))
  for batch, a, b in zip(whole, *parts, strict=True):
    both = np.concatenate([a["index"], b["index"]])
    assert len(a["index"]) == 32
    np.testing.assert_array_equal(np.sort(both), np.sort(batch["index"]))


def test_unknown_names_list_the_known():
  with pytest.raises(ValueError, match="did you mean 'digits'"):
    data.build("digit", "train")
  with pytest.raises(ValueError, match="val"):
    data.build("digits", "valid")


def test_cifar_is_read_through_tfds(monkeypatch):
  import tensorflow_datasets as tfds

  from roli_jax.data import tfds as ours

  monkeypatch.setattr(ours, "_TRAIN", 8)
  with tfds.testing.mock_data(num_examples=12):
    splits = {name: data.build("cifar10", name) for name in data.SPLITS}
  assert [len(splits[name]) for name in data.SPLITS] == [8, 4, 12]
  train = splits["train"]
  assert train.images.shape == (8, 32, 32, 3) and train.images.dtype == np.uint8
  assert train.num_classes == 10 and train.white == 255
  indices = np.concatenate([s.indices for s in splits.values()])
  assert len(set(indices)) == 24


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_that_is_not_there_says_how_to_prepare_it(
  name, monkeypatch, tmp_path
):
  import tensorflow_datasets as tfds

  builder = tfds.builder
  monkeypatch.setattr(
    tfds, "builder", lambda name: builder(name, data_dir=str(tmp_path))
  )
  with pytest.raises(ValueError, match="download_and_prepare"):
    data.build(name, "train")
