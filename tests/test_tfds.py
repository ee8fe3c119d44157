"""CIFAR as TFDS prepares it: the reference's split, and what goes wrong."""

import hashlib
import json

import numpy as np
import pytest

from roli_jax import data
from roli_jax.data import cifar
from tests import made_cifar

COUNTS = {"train": 60, "test": 20}


def image(number, part):
  """Of record `number`: its number is in every pixel."""
  base = 0 if part == "train" else 100
  return np.full((32, 32, 3), base + number, np.uint8)


def prepare(where, name, first=0):
  """A small look-alike; see `made_cifar.tfds`."""
  parts = {
    part: (
      np.stack([image(first + i, part) for i in range(count)]),
      np.arange(first, first + count) % 10,
    )
    for part, count in COUNTS.items()
  }
  made_cifar.tfds(where, name, parts, first)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  where = tmp_path_factory.mktemp("tfds")
  for name in ("cifar10", "cifar100"):
    prepare(where, name)
  return where


def test_the_split_is_the_references():
  # Ids as public documentation of TFDS prints them, and the validation set of
  # the RoLI reference.
  order = cifar.order(50_000, "train")
  assert order[:8] == [16399, 1680, 47917, 17307, 27051, 48736, 26263, 1456]
  val = order[45_000:]
  assert val[:5] == [13431, 9237, 17462, 32685, 9518]
  digest = hashlib.sha256(",".join(map(str, val)).encode()).hexdigest()
  assert digest == (
    "356681849204d9a398aa248a4e1a775bde763df4975e8cc6a6618d57f3c0566b"
  )


@pytest.mark.parametrize("name, classes", [("cifar10", 10), ("cifar100", 100)])
def test_cifar_is_read_from_array_records(name, classes, prepared):
  spec = {"name": name, "root": str(prepared)}
  splits = {split: data.build(spec, split) for split in data.SPLITS}
  assert [len(s) for s in splits.values()] == [54, 6, 20]
  order = cifar.order(60, "train")
  assert splits["train"].indices.tolist() == order[:54]
  assert splits["val"].indices.tolist() == order[54:]
  for source in splits.values():
    assert source.images.dtype == np.uint8 and source.shape == (32, 32, 3)
    assert source.num_classes == classes == len(source.classes)
    np.testing.assert_array_equal(source.labels, source.indices % 50_000 % 10)


def test_an_image_is_told_by_its_id(prepared):
  spec = {"name": "cifar10", "root": str(prepared)}
  train, test = data.build(spec, "train"), data.build(spec, "test")
  np.testing.assert_array_equal(train.images[:, 0, 0, 0], train.indices)
  numbers = test.indices - 50_000
  np.testing.assert_array_equal(test.images[:, 5, 6, 2], 100 + numbers)


def test_tfds_itself_has_that_order(prepared):
  import tensorflow_datasets as tfds

  builder = tfds.builder("cifar10", data_dir=str(prepared))
  for part, count in COUNTS.items():
    records = builder.as_data_source(part)
    ids = [int(records[i]["id"].decode().split("_")[1]) for i in range(count)]
    # Its key is the id's number here, as in the original.
    assert ids == cifar.order(count, part)


def test_the_environment_says_where_data_is(prepared, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
  assert len(data.build("cifar10", "val")) == 6


def test_reading_writes_nothing(prepared):
  def files():
    return {p: p.stat().st_mtime_ns for p in prepared.rglob("*")}

  before = files()
  data.build({"name": "cifar10", "root": str(prepared)}, "test")
  assert files() == before


def test_tfrecords_are_told_from_nothing(tmp_path, prepared):
  import shutil

  copy = tmp_path / "cifar10"
  shutil.copytree(prepared / "cifar10", copy)
  info = copy / "3.0.2" / "dataset_info.json"
  content = info.read_text().replace("array_record", "tfrecord")
  info.chmod(0o644)
  info.write_text(content)
  assert json.loads(content)["fileFormat"] == "tfrecord"
  with pytest.raises(ValueError, match="but as tfrecord"):
    data.build({"name": "cifar10", "root": str(tmp_path)}, "train")


def test_records_of_something_else_are_refused(tmp_path):
  prepare(tmp_path, "cifar10", first=1)
  with pytest.raises(ValueError, match="train_0 to train_59"):
    data.build({"name": "cifar10", "root": str(tmp_path)}, "train")
