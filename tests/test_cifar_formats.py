"""CIFAR in all of its forms: the same images, indices and split of each."""

import functools
import os
import pickle
import shutil
import tarfile

import numpy as np
import pytest

from roli_jax import data
from roli_jax.data import cifar, cifar_files
from tests import made_cifar

FORMS = {
  "python": made_cifar.python,
  "binary": made_cifar.binary,
  "python archive": functools.partial(
    made_cifar.archive, form=made_cifar.python
  ),
  "binary archive": functools.partial(
    made_cifar.archive, form=made_cifar.binary
  ),
  "parquet": made_cifar.parquet,
  "folders": made_cifar.folders,
  "tfds": made_cifar.tfds,
}
NAMES = ("cifar10", "cifar100")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """(form, name) -> the directory that it was written to, once."""

  @functools.cache
  def write(form, name):
    root = tmp_path_factory.mktemp("data")
    FORMS[form](root, name)
    return root

  return write


def check(root, name):
  """Asserts that what lies there is what was made up, by number."""
  made = made_cifar.made(name)
  order = cifar.order(60, "train")
  numbers = {
    "train": order[:54], "val": order[54:], "test": cifar.order(20, "test")
  }  # fmt: skip
  for split in data.SPLITS:
    source = data.build({"name": name, "root": str(root)}, split)
    images, labels = made["test" if split == "test" else "train"]
    np.testing.assert_array_equal(source.images, images[numbers[split]])
    np.testing.assert_array_equal(source.labels, labels[numbers[split]])
    offset = 50_000 if split == "test" else 0
    assert (source.indices - offset).tolist() == numbers[split]
    assert source.classes == cifar_files.CLASSES[name]
    assert source.num_classes == int(name[5:])
    (note,) = source.notes
    assert f"here are {len(source)}" in note


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", FORMS)
def test_all_forms_give_the_same(form, name, written):
  check(written(form, name), name)


@pytest.mark.parametrize("form, inner", [("python", 0), ("binary", 1)])
def test_the_root_may_be_the_unpacked_directory(form, inner, written):
  kind = cifar_files.KINDS["cifar10"]
  folder = (kind.folder, kind.binary_folder)[inner]
  check(written(form, "cifar10") / folder, "cifar10")


def test_without_a_root_it_is_where_prepare_puts_it(
  tmp_path, monkeypatch, written
):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("TFDS_DATA_DIR", str(written("tfds", "cifar10")))
  shutil.copytree(written("python archive", "cifar10"), "data/cifar10")
  check("", "cifar10")
  shutil.rmtree("data")
  check("", "cifar10")


def test_the_made_up_pickles_are_python_twos(written):
  (batch, *_) = made_cifar.batches("cifar10").values()
  folder = written("python", "cifar10") / "cifar-10-batches-py"
  with open(folder / "data_batch_1", "rb") as file:
    found = pickle.load(file, encoding="bytes")
  np.testing.assert_array_equal(found[b"data"], made_cifar.planes(batch[0]))
  assert found[b"labels"] == batch[1].tolist()


@pytest.mark.parametrize("protocol", [2, 4])
def test_pickles_that_were_written_again_are_read(protocol, tmp_path):
  made_cifar.python(tmp_path, "cifar10")
  for file in (tmp_path / "cifar-10-batches-py").iterdir():
    batch = pickle.loads(file.read_bytes(), encoding="bytes")
    file.write_bytes(pickle.dumps(batch, protocol))
  check(tmp_path, "cifar10")


def build(root, name="cifar10", split="train"):
  return data.build({"name": name, "root": str(root)}, split)


class Hostile:
  def __reduce__(self):
    return os.mkdir, ("executed",)


@pytest.mark.parametrize("packed", [False, True])
def test_a_hostile_pickle_is_refused_unexecuted(packed, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  made_cifar.python(tmp_path, "cifar10")
  folder = tmp_path / "cifar-10-batches-py"
  (folder / "data_batch_3").write_bytes(pickle.dumps({b"data": Hostile()}))
  if packed:
    with tarfile.open("cifar-10-python.tar.gz", "w:gz") as out:
      out.add(folder, folder.name)
    shutil.rmtree(folder)
  with pytest.raises(ValueError, match=r"data_batch_3.*mkdir"):
    build(tmp_path)
  assert not (tmp_path / "executed").exists()


def _truncate(root):
  file = root / "cifar-10-batches-py/data_batch_2"
  file.write_bytes(file.read_bytes()[:-900])


def _remove(root):
  (root / "cifar-10-batches-py/data_batch_2").unlink()


def _relabel(root):
  file = root / "cifar-10-batches-py/data_batch_2"
  batch = pickle.loads(file.read_bytes(), encoding="bytes")
  batch[b"labels"][3] = 10
  file.write_bytes(pickle.dumps(batch, 2))


BROKEN = {
  "truncated": (made_cifar.python, _truncate, "data_batch_2 is truncated"),
  "missing": (made_cifar.python, _remove, "lacks data_batch_2"),
  "labels": (made_cifar.python, _relabel, "labels 0 to 9"),
  "archive": (
    FORMS["python archive"],
    lambda root: os.truncate(root / "cifar-10-python.tar.gz", 90_000),
    "--mode=prepare fetches it anew",
  ),
  "binary": (
    made_cifar.binary,
    lambda root: os.truncate(
      root / "cifar-10-batches-bin/data_batch_5.bin", 5000
    ),
    "truncated",
  ),
  "parquet": (
    made_cifar.parquet,
    lambda root: (root / "plain_text/train-00000-of-00001.parquet").write_bytes(
      b"PAR1"
    ),
    "no parquet of cifar10",
  ),
  "image": (
    made_cifar.folders,
    lambda root: next(root.glob("train/cat/*")).write_bytes(b"\x89PNG"),
    "can't be read as 32 x 32",
  ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_an_error_that_names_them(case, tmp_path):
  form, break_it, message = BROKEN[case]
  form(tmp_path, "cifar10")
  break_it(tmp_path)
  with pytest.raises(ValueError, match=message) as error:
    build(tmp_path)
    build(tmp_path, split="val")
  assert len(str(error.value).splitlines()) <= 6


def test_names_without_numbers_are_said(tmp_path):
  made_cifar.folders(tmp_path, "cifar10")
  for file in [*tmp_path.glob("*/*/*.png")]:
    file.rename(file.with_name(f"a{file.stem}b{file.stem}.png"))
  source = build(tmp_path)
  note, _ = source.notes
  assert "don't number the images" in note and len(source) == 54
  val = build(tmp_path, split="val")
  assert sorted([*source.indices, *val.indices]) == list(range(60))


def test_jpegs_are_never_called_cifar(tmp_path):
  from PIL import Image

  made_cifar.folders(tmp_path, "cifar10")
  for file in [*tmp_path.glob("*/*/*.png")]:
    Image.open(file).save(file.with_suffix(".jpg"))
    file.unlink()
  note, _ = build(tmp_path).notes
  assert "JPEGs" in note and "no number is one of cifar10" in note


def test_classes_may_be_numbers(tmp_path):
  made_cifar.folders(tmp_path, "cifar100")
  for folder in [*tmp_path.glob("*/*")]:
    label = cifar_files.CLASSES["cifar100"].index(folder.name)
    folder.rename(folder.with_name(f"{label}"))
  check(tmp_path, "cifar100")


@pytest.mark.parametrize("name", NAMES)
def test_cifar_that_is_not_there_says_the_command(name, tmp_path):
  with pytest.raises(data.Missing, match=f"{name} is not at") as error:
    build(tmp_path, name)
  said = str(error.value)
  assert "--mode=prepare" in said and f"--config.data.root={tmp_path}" in said
  assert "parquet" in said and "array_record" in said
  assert len(said.splitlines()) <= 6
