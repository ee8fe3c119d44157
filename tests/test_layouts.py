"""Folders as they are published: splits, links, copies, wrong roots."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from roli_jax import data
from roli_jax.data import decode, listing, verify, walk
from roli_jax.experiment import facts
from roli_jax.experiment.run import build_run

SMALL = {"train_transforms": ("stretch:8",), "eval_transforms": ("stretch:8",)}


@pytest.fixture(autouse=True)
def _nothing_is_remembered(tmp_path_factory, monkeypatch):
  cache = tmp_path_factory.mktemp("cache")
  monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
  monkeypatch.setattr(verify, "_seen", set())


def put(path):
  """An image that no other path has."""
  path.parent.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(list(str(path).encode()))
  Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path)


def fill(root, *folders, classes=("cat", "dog"), count=3):
  """root/{folders}/{classes}/{i}.png."""
  for folder in folders:
    for label in classes:
      for i in range(count):
        put(root / folder / label / f"{i}.png")
  return root


def build(root, split="train", **fields):
  spec = {"name": "folder", "root": str(root), **SMALL, **fields}
  return data.build(spec, split)


def names(root, **fields):
  """The names of a folder's images, by split."""
  return {
    split: {
      os.path.relpath(path, root)
      for path in build(root, split, **fields).images
    }
    for split in data.SPLITS
  }


def told(root, **fields):
  """All that is said of a folder, each thing once."""
  notes = [n for s in data.SPLITS for n in build(root, s, **fields).notes]
  return "\n".join(dict.fromkeys(notes))


def refused(root, **fields):
  """Why a folder is."""
  with pytest.raises(ValueError) as error:
    build(root, **fields)
  assert len(str(error.value).splitlines()) <= 6
  return str(error.value)


# Names of splits.


@pytest.mark.parametrize("called", walk.SPLIT_NAMES)
@pytest.mark.parametrize("how", [str.lower, str.title, str.upper])
def test_a_directory_called_as_a_split_is_it_in_any_case(called, how, tmp_path):
  split = walk.SPLIT_NAMES[called]
  rest = set(data.SPLITS) - {split}
  fill(tmp_path, how(called), *rest)
  for other in data.SPLITS:
    folder = how(called) if other == split else other
    source = build(tmp_path, other)
    assert source.classes == ("cat", "dog") and len(source) == 6
    assert all(path.split("/")[-3] == folder for path in source.images)
    assert not source.notes


@pytest.mark.parametrize("called", walk.SPLIT_NAMES)
def test_a_json_called_as_a_split_is_it_in_any_case(called, tmp_path):
  split = walk.SPLIT_NAMES[called]
  for name in {*data.SPLITS} - {split} | {called.upper()}:
    labels = {f"{name}{label}.png": label for label in (0, 1)}
    (tmp_path / f"{name}.json").write_text(json.dumps(labels))
    for image in labels:
      put(tmp_path / image)
  assert f"{called.upper()}0.png" in names(tmp_path)[split]


def test_two_directories_of_one_split_are_refused(tmp_path):
  fill(tmp_path, "Train", "training", "test")
  for layout in ("", "splits"):
    said = refused(tmp_path, layout=layout)
    assert "both Train and training" in said
  assert len(build(tmp_path, layout="classes").classes) == 3


def test_two_files_of_one_split_are_refused(tmp_path):
  for name in ("train", "valid", "val", "test"):
    (tmp_path / f"{name}.json").write_text("{}")
  assert "both val.json and valid.json" in refused(tmp_path)


def test_inside_a_split_any_name_is_a_class(tmp_path):
  fill(tmp_path, "train", "val", "test", classes=("boat", "train", "Test"))
  assert build(tmp_path).classes == ("Test", "boat", "train")


def test_splits_beside_other_directories_are_for_the_user_to_tell(tmp_path):
  fill(tmp_path, "train", "test", "boat")
  said = refused(tmp_path)
  assert "layout=classes" in said and "layout=splits" in said
  assert "boat" in said
  classes = build(tmp_path, layout="classes").classes
  assert classes == ("boat", "test", "train")
  splits = build(tmp_path, layout="splits")
  assert splits.classes == ("cat", "dog")
  assert "beside the splits ignored: boat" in told(tmp_path, layout="splits")


def test_a_directory_without_images_is_no_class_beside_splits(tmp_path):
  fill(tmp_path, "train", "val", "test")
  for name in ("annotations/x.xml", "__MACOSX/train/cat/0.png", ".git/0.png"):
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_bytes(b"x")
  assert len(build(tmp_path)) == 6


@pytest.mark.parametrize(
  "fields, said",
  [
    ({"layout": "clases"}, "did you mean 'classes'"),
    ({"layout": "splits", "name": "pets"}, "data.name=folder"),
    ({"layout": "splits"}, "has no split"),
  ],
)
def test_a_layout_that_can_not_be_is_refused(fields, said, tmp_path):
  fill(tmp_path, ".")
  assert said in refused(tmp_path, **fields)


# Splits that lack.


@pytest.mark.parametrize("train, test", [("train", "test"), ("Train", "TEST")])
def test_without_validation_it_is_drawn_from_train(train, test, tmp_path):
  fill(tmp_path, train, test, count=20)
  by_split = names(tmp_path)
  assert {split: len(own) for split, own in by_split.items()} == {
    "train": 36, "val": 4, "test": 40,
  }  # fmt: skip
  assert {name.split("/")[0] for name in by_split["val"]} == {train}
  assert not by_split["val"] & by_split["train"]
  assert "no directory of validation" in told(tmp_path)
  # By names alone, whatever the directory is called.
  chosen = [f"cat/{i}.png" for i in range(20)]
  drawn = dict(listing._split(chosen, {"val": 0.1}))
  assert {n for n, split in drawn.items() if split == "val"} == {
    name.partition("/")[2] for name in by_split["val"] if "cat" in name
  }


def test_without_a_test_validation_is_it(tmp_path):
  fill(tmp_path, "train", "validation", count=10)
  by_split = names(tmp_path)
  folders = {s: {n.split("/")[0] for n in own} for s, own in by_split.items()}
  assert folders == {
    "train": {"train"}, "val": {"train"}, "test": {"validation"},
  }  # fmt: skip
  assert [len(by_split[s]) for s in data.SPLITS] == [18, 2, 20]
  assert "validation/ is the test" in told(tmp_path)


@pytest.mark.parametrize(
  "folders, said",
  [
    (("train",), "root={root}/train splits its classes"),
    (("Testing",), "no directory train/"),
    (("val", "test"), "val/ and test/, but no directory train/"),
  ],
)
def test_too_few_splits_are_refused(folders, said, tmp_path):
  fill(tmp_path, *folders)
  assert said.format(root=tmp_path) in refused(tmp_path)


def test_a_test_without_labels_is_named(tmp_path):
  fill(tmp_path, "train", "val")
  put(tmp_path / "test/0.png")
  said = refused(tmp_path)
  assert "no images for test" in said and "1 .png" in said
  assert "without labels" in said


def test_what_we_split_ourselves_is_told(tmp_path):
  fill(tmp_path, "train", "test")
  said = told(tmp_path / "train")
  assert "70:10:20" in said and "test beside train/ not used" in said


# Links and copies.


def test_a_directory_on_its_own_path_is_not_entered_again(tmp_path):
  fill(tmp_path, ".", count=5)
  (tmp_path / "cat/here").symlink_to(".")
  (tmp_path / "dog/above").symlink_to(tmp_path)
  (tmp_path / "dog/itself").symlink_to("itself")
  assert sum(map(len, names(tmp_path).values())) == 10
  assert "2 directories lead back" in told(tmp_path)
  assert "cat/here, dog/above" in told(tmp_path)


def test_a_way_back_through_another_directory_ends_too(tmp_path):
  fill(tmp_path / "root", ".")
  put(tmp_path / "other/9.png")
  (tmp_path / "other/back").symlink_to(tmp_path / "root/cat")
  (tmp_path / "root/cat/out").symlink_to(tmp_path / "other")
  found = walk.walk(tmp_path / "root")
  assert len(found.images) == 7 and found.loops == ("cat/out/back",)


def test_a_directory_that_can_not_be_read_is_named(tmp_path, monkeypatch):
  fill(tmp_path, ".")

  def scandir(folder):
    raise PermissionError(13, "Permission denied")

  monkeypatch.setattr(os, "scandir", scandir)
  assert "can't be read: Permission denied" in refused(tmp_path)


def test_one_file_in_two_splits_is_bad(tmp_path):
  fill(tmp_path, "train", "val", "test")
  link = tmp_path / "test/dog/link.png"
  link.symlink_to(tmp_path / "train/dog/1.png")
  said = refused(tmp_path)
  assert "2 of 19 files" in said
  assert "test/dog/link.png: the same file as train/dog/1.png" in said
  by_split = names(tmp_path, policy="skip")
  assert [len(own) for own in by_split.values()] == [5, 6, 6]
  assert build(tmp_path, "test", policy="skip").skipped == 1


def test_a_split_that_is_a_link_to_another_is_bad(tmp_path):
  fill(tmp_path, "train", "test")
  (tmp_path / "val").symlink_to("test")
  assert "12 of 18 files" in refused(tmp_path)


def test_one_file_in_two_classes_is_bad(tmp_path):
  fill(tmp_path, "train", "val", "test")
  (tmp_path / "train/cat/link.png").symlink_to("../dog/1.png")
  assert "train/cat/link.png: the same file as" in refused(tmp_path)


def test_one_file_under_two_names_of_json_is_bad(tmp_path):
  splits = {"train": {"0.png": 0, "1.png": 1}, "val": {"2.png": 0},
            "test": {"3.png": 1, "link.png": 0}}  # fmt: skip
  for split, labels in splits.items():
    (tmp_path / f"{split}.json").write_text(json.dumps(labels))
  for i in range(4):
    put(tmp_path / f"{i}.png")
  (tmp_path / "link.png").symlink_to("0.png")
  assert "link.png: the same file as 0.png" in refused(tmp_path)


@pytest.fixture
def copied(tmp_path):
  """A test of 200 with copies: 1 in train, 1 in train and val, 1 across."""
  fill(tmp_path, "train", "val", count=4)
  fill(tmp_path, "test", count=100)
  for source, target in (
    ("test/cat/1.png", "train/cat/1.png"),
    ("test/dog/2.png", "train/dog/2.png"),
    ("test/dog/2.png", "val/dog/2.png"),
    ("test/dog/3.png", "train/cat/0.png"),
  ):
    shutil.copy(tmp_path / source, tmp_path / target)
  return tmp_path


def test_copies_in_two_splits_are_counted_and_told(copied):
  assert [len(own) for own in names(copied).values()] == [8, 8, 200]
  said = told(copied)
  assert "3 test images have the same bytes as images of train or val" in said
  assert "1 of them under another class" in said
  assert "test/cat/1.png = train/cat/1.png" in said
  assert "1 val images have the same bytes" in said


def test_skipped_copies_leave_training_and_never_the_test(copied):
  before, after = names(copied), names(copied, policy="skip")
  assert before["train"] - after["train"] == {
    "train/cat/0.png", "train/cat/1.png", "train/dog/2.png",
  }  # fmt: skip
  assert before["val"] - after["val"] == {"val/dog/2.png"}
  assert after["test"] == before["test"]
  train = build(copied, policy="skip")
  assert train.skipped == 3 and "3 copies of others left out" in train.notes[0]
  whole = build(copied)
  rows = np.searchsorted(whole.images, train.images)
  assert train.indices.tolist() == whole.indices[rows].tolist()


def test_over_a_hundredth_of_the_test_is_an_error(copied):
  shutil.copy(copied / "test/cat/9.png", copied / "train/cat/2.png")
  said = refused(copied)
  assert "3 of 200 test images" in said and "policy=skip" in said
  assert "test/cat/9.png = train/cat/2.png" in said
  assert len(build(copied, "test", policy="skip")) == 200


def test_validation_that_is_a_copy_of_the_test_is_refused(tmp_path):
  fill(tmp_path, "train", "test")
  shutil.copytree(tmp_path / "test", tmp_path / "val")
  assert "6 of 6 test images" in refused(tmp_path)
  said = refused(tmp_path, policy="skip")
  assert "no images for val, copies being left out" in said


def test_a_copy_is_found_by_its_bytes_not_its_name_or_size(tmp_path):
  fill(tmp_path, "train", "val", "test")
  same = tmp_path / "train/cat/1.png"
  for split in ("train", "test"):  # equal in size
    (tmp_path / split / "cat/1.bmp").write_bytes(b"")
    rng = np.random.default_rng(len(split))
    pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / split / "cat/1.bmp")
  assert not told(tmp_path)
  shutil.copy(same, tmp_path / "test/cat/other.png")
  assert "1 of 8 test images" in refused(tmp_path)


def test_what_a_copy_is_is_remembered(copied, monkeypatch):
  before = told(copied)
  monkeypatch.setattr(verify, "_seen", set())
  monkeypatch.setattr(decode, "decode", None)
  monkeypatch.setattr(verify, "_read", None)
  assert told(copied) == before


def test_copies_are_told_and_kept_in_a_published_set(tmp_path):
  root = tmp_path / "UCMerced_LandUse/Images"
  fill(root, ".", count=20)
  for i in range(1, 20):
    shutil.copy(root / "cat/0.png", root / f"cat/{i}.png")
  for path in root.rglob("*.png"):
    path.rename(path.with_suffix(".tif"))
  sizes = [
    len(build(tmp_path, s, name="uc_merced", policy="skip"))
    for s in data.SPLITS
  ]
  assert sizes == [27, 5, 8]
  assert "same bytes" in told(tmp_path, name="uc_merced")


# What is likely not meant.


def test_one_class_alone_is_refused(tmp_path):
  fill(tmp_path / "flat", ".", classes=("cat",))
  assert "one class, cat" in refused(tmp_path / "flat")
  fill(tmp_path / "deep", "pets")
  assert f"data.root={tmp_path}/deep/pets" in refused(tmp_path / "deep")
  fill(tmp_path / "split", "train/all", "test/all")
  said = refused(tmp_path / "split")
  assert "one class, all" in said and "cat, dog" in said


def test_one_class_of_json_is_refused(tmp_path):
  for split in data.SPLITS:
    put(tmp_path / f"{split}.png")
    labels = json.dumps({f"{split}.png": "cat"})
    (tmp_path / f"{split}.json").write_text(labels)
  assert "one class, cat" in refused(tmp_path)


@pytest.mark.parametrize("others", [(), ("samples/a",)])
def test_splits_one_level_below_the_root_are_pointed_at(others, tmp_path):
  fill(tmp_path, "set/train", "set/Test", *others)
  said = refused(tmp_path)
  assert f"data.root={tmp_path}/set" in said and "too high" in said


def test_a_class_may_hold_directories_called_as_splits(tmp_path):
  fill(tmp_path, "cat", "dog", classes=("train", "test"))
  assert build(tmp_path, layout="classes").classes == ("cat", "dog")


@pytest.mark.parametrize(
  "folders, said",
  [
    ((".", "pets"), "pets/cat, pets/dog"),
    (("seg_train", "seg_test"), "seg_test/cat"),
    (("train", "test", "train/train"), "train/cat"),
  ],
)
def test_classes_within_classes_are_told(folders, said, tmp_path):
  fill(tmp_path, *folders)
  found = told(tmp_path)
  assert "named like classes, or alike" in found and said in found


def test_classes_without_images_are_told_with_the_cause(tmp_path):
  fill(tmp_path, ".")
  (tmp_path / "bird").mkdir()
  (tmp_path / "fish").mkdir()
  (tmp_path / "fish/0.jp2").write_bytes(b"x")
  assert "2 directories without an image" in told(tmp_path)
  assert "bird: nothing, fish: 1 .jp2" in told(tmp_path)


def test_a_class_that_a_split_lacks_is_told(tmp_path):
  fill(tmp_path, "train", "val", "test")
  shutil.rmtree(tmp_path / "val/dog")
  said = build(tmp_path, "val").notes
  assert said == ("1 of 2 classes have no val image (dog)",)
  assert not build(tmp_path, "test").notes


@pytest.mark.parametrize("suffix", [".jp2", ".TGA", ".avif"])
def test_what_pil_could_read_is_named(suffix, tmp_path):
  fill(tmp_path, ".")
  for name in ("0.txt", f"1{suffix}", f"2{suffix}"):
    (tmp_path / "cat" / name).write_bytes(b"x")
  assert "3 files without an image's suffix" in told(tmp_path)
  assert f"PIL knows 2 {suffix.lower()}," in told(tmp_path)


def test_nothing_but_other_suffixes_is_an_error_that_names_them(tmp_path):
  (tmp_path / "cat").mkdir()
  (tmp_path / "cat/0.jp2").write_bytes(b"x")
  assert "but 1 .jp2" in refused(tmp_path)
  fill(tmp_path / "split", "train")
  (tmp_path / "split/test/cat").mkdir(parents=True)
  (tmp_path / "split/test/cat/0.jp2").write_bytes(b"x")
  assert "but 1 .jp2" in refused(tmp_path / "split")


def test_the_report_says_each_thing_once(tmp_path):
  fill(tmp_path / "data", "train", "test", count=4)
  (tmp_path / "data/train/cat/0.txt").write_bytes(b"x")
  config = {
    "backbone": {"name": "vit_ti16"},
    "data": {"name": "folder", "root": str(tmp_path / "data"), **SMALL},
    "threat": {"norm": "linf", "eps": "0.1"},
  }
  facts.write(build_run(config), [], tmp_path)
  notes = json.loads((tmp_path / "facts.json").read_text())["notes"]
  assert [note.split()[0] for note in notes] == ["1", "no"]
