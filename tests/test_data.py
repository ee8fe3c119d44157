"""The embedded data, and batches of any data."""

import itertools
import multiprocessing
import os
import signal

import jax
import numpy as np
import pytest

from roli_jax import data
from roli_jax.data import glyphs
from tests import pictures
from tests.covering import mostly_slow


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


def test_size_zero_is_all(digits):
  assert digits["train"].subset(0, 0) is digits["train"]


@pytest.mark.parametrize("grouped", [False, True])
def test_a_few_images_are_of_all_classes(grouped):
  labels = np.arange(40, dtype=np.int32) % 10
  source = data.Source(
    images=np.zeros((40, 8, 8, 1), np.uint8),
    labels=np.sort(labels) if grouped else labels,
    indices=np.arange(40, dtype=np.uint32),
    num_classes=10,
  )
  rows = source.some(15)
  assert len(set(rows)) == 15 and set(source.labels[rows]) == set(range(10))
  assert grouped or list(rows) == list(range(15))
  for count in (0, 40, 41):
    assert list(source.some(count)) == list(range(40))


@pytest.mark.parametrize("size", [-1, 9, 995, 1001])
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


def batches(source, seed=0, start=0, count=8, batch_size=64, workers=0):
  stream = data.train_batches(source, batch_size, seed, start, workers)
  return list(itertools.islice(stream, count))


def test_batches_go_on_from_any_step(digits):
  source = digits["train"].subset(200, 0)
  whole = batches(source)
  rest = batches(source, start=5, count=3)
  equal(whole[5:], rest)


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


def by_element(source, batch_size, seed, start):
  """The pipeline as it first was, an element at a time: its order stands."""
  import grain

  elements = [
    {"image": source.images[i], "label": source.labels[i],
     "index": source.indices[i]} for i in range(len(source))
  ]  # fmt: skip
  dataset = grain.MapDataset.source(elements).shuffle(seed=seed).repeat(None)
  return iter(dataset.batch(batch_size)[start:].to_iter_dataset())


def equal(batches, others):
  for a, b in zip(batches, others, strict=True):
    for key in ("image", "label", "index"):
      assert a[key].dtype == b[key].dtype
      np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize("start, seed", [(0, 0), (37, 3)])
def test_the_order_of_digits_is_as_it_always_was(digits, start, seed):
  source = digits["train"].subset(200, 0)
  before = itertools.islice(by_element(source, 64, seed, start), 8)
  equal(batches(source, seed, start), before)


def split_in_two(monkeypatch, *args, **kwargs):
  """The batches that each of two processes gets."""
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  for process in range(2):
    monkeypatch.setattr(jax, "process_index", lambda p=process: p)
    yield batches(*args, **kwargs)


def interleaved(parts):
  """Global batches, from those of two processes."""
  for a, b in zip(*parts, strict=True):
    yield {k: np.stack([a[k], b[k]], 1).reshape(-1, *a[k].shape[1:]) for k in a}


def test_processes_share_a_batch(digits, monkeypatch):
  source = digits["train"].subset(200, 0)
  whole = batches(source)
  equal(whole, interleaved(split_in_two(monkeypatch, source)))


AUGMENTED = {
  "train_transforms": ("resize:16", "random_crop:12", "flip"),
  "eval_transforms": ("resize:16", "center_crop:12"),
}


@pytest.fixture(scope="module", params=["files", "memory"])
def augmented(request, tmp_path_factory):
  """Ten images in files, or digits, cropped and flipped by chance."""
  if request.param == "memory":
    return data.build({"name": "digits", **AUGMENTED}, "train").take(
      np.arange(10)
    )
  root = pictures.tree(tmp_path_factory.mktemp("tree"), train=5, val=1, test=1)
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("XDG_CACHE_HOME", str(root / ".cache"))
    return data.build({"name": "folder", "root": str(root), **AUGMENTED},
                      "train")  # fmt: skip


def test_the_same_step_is_the_same_augmented_batch(augmented):
  whole = batches(augmented, batch_size=4)
  equal(whole, batches(augmented, batch_size=4))
  equal(whole[5:], batches(augmented, batch_size=4, start=5, count=3))


def test_each_epoch_augments_anew(augmented):
  epochs = batches(augmented, batch_size=10, count=6)
  views = {
    batch["image"][batch["index"] == augmented.indices[0]].tobytes()
    for batch in epochs
  }
  assert len(views) >= 4


def test_another_seed_augments_otherwise(augmented):
  a, b = (
    batches(augmented, seed=seed, batch_size=10, count=1)[0] for seed in (0, 1)
  )
  rows = [np.argsort(batch["index"]) for batch in (a, b)]
  assert (a["image"][rows[0]] != b["image"][rows[1]]).any()


def test_processes_share_an_augmented_batch(augmented, monkeypatch):
  whole = batches(augmented, batch_size=4)
  parts = split_in_two(monkeypatch, augmented, batch_size=4)
  equal(whole, interleaved(parts))


@pytest.mark.parametrize("workers", mostly_slow((1, 2), 2))
def test_workers_change_nothing(augmented, workers):
  whole = batches(augmented, batch_size=4)
  late = batches(augmented, batch_size=4, start=3, count=5, workers=workers)
  equal(whole[3:], late)


def children():
  return {child.pid for child in multiprocessing.active_children()}


def test_workers_end_with_their_iterator(augmented):
  before = children()
  stream = data.train_batches(augmented, 4, 0, num_workers=1)
  next(stream)
  assert len(children() - before) == 1
  stream.close()
  assert children() == before


def test_a_worker_that_dies_is_an_error(augmented):
  before = children()
  stream = data.train_batches(augmented, 4, 0, num_workers=1)
  next(stream)
  (worker,) = children() - before
  os.kill(worker, signal.SIGKILL)
  with pytest.raises(RuntimeError, match="terminated unexpectedly"):
    list(itertools.islice(stream, 100))
  assert children() == before


def test_what_a_worker_can_not_read_is_named(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))
  pictures.tree(tmp_path, train=2, val=1, test=1)
  spec = {"name": "folder", "root": str(tmp_path), **AUGMENTED}
  source = data.build(spec, "train")
  os.unlink(source.images[0])
  with pytest.raises(ValueError, match=r"0\.jpg was a sound image"):
    batches(source, batch_size=4, workers=1)


def test_nothing_can_not_be_batched(digits):
  with pytest.raises(ValueError, match="no training images"):
    data.train_batches(digits["train"].take(np.arange(0)), 4, 0)


@pytest.mark.parametrize("name", ["digits", "letters"])
def test_the_facts_of_embedded_data_are_true(name):
  facts = data.FACTS[name]
  for split in ("val", "test"):
    source = data.build(name, split)
    assert len(source) == getattr(facts, split)
    assert source.num_classes == facts.num_classes
    assert source.shape == facts.shape
  sizes = glyphs.DIGIT_SIZES if name == "digits" else glyphs.LETTER_SIZES
  assert facts.train == sizes["train"]


def test_every_data_set_but_a_folder_is_known_before_it_is_read():
  assert {*data.FACTS, "folder"} == {*data.IN_MEMORY, *data.IN_FILES}


def test_the_manifest_of_digits_counts_them(digits):
  rows = digits["val"].manifest()
  assert [row[:2] for row in rows] == [("val", str(i)) for i in range(10)]
  assert sum(count for _, _, count in rows) == 297


def test_a_class_with_one_image_has_no_share(digits):
  rows = np.append(np.arange(50), np.flatnonzero(digits["test"].labels == 3))
  some = digits["test"].take(rows[digits["test"].labels[rows] != 3])
  with pytest.raises(ValueError, match="single image"):
    some.subset(20, 0)


def test_unknown_names_list_the_known():
  with pytest.raises(ValueError, match="did you mean 'digits'"):
    data.build("digit", "train")
  with pytest.raises(ValueError, match="val"):
    data.build("digits", "valid")
  with pytest.raises(ValueError, match="did you mean 'stanforddogs'"):
    data.build({"name": "stanforddog"}, "train")
