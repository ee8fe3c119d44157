"""Folders of images: layouts, bad files, and files that are only odd."""

import io
import json
import os
import pathlib
import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from roli_jax import data
from roli_jax.data import decode, listing, verify
from tests import pictures

SMALL = {
  "train_transforms": ("resize:16", "random_crop:12", "flip"),
  "eval_transforms": ("resize:16", "center_crop:12"),
}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
  """Nothing is remembered from test to test."""
  where = tmp_path_factory.mktemp("cache")
  monkeypatch.setenv("XDG_CACHE_HOME", str(where))
  monkeypatch.setattr(verify, "_seen", set())
  return where / "roli_jax"


def folder(root, split="train", **fields):
  spec = {"name": "folder", "root": str(root), **SMALL, **fields}
  return data.build(spec, split)


def names(source, root):
  return [os.path.relpath(path, root) for path in source.images]


# Layouts.


def test_a_tree_with_splits_is_read(tmp_path):
  pictures.tree(tmp_path, train=3, val=1, test=2)
  splits = {split: folder(tmp_path, split) for split in data.SPLITS}
  assert [len(s) for s in splits.values()] == [6, 2, 4]
  train = splits["train"]
  assert (
    train.classes == ("a", "b") and train.labels.tolist() == [0] * 3 + [1] * 3
  )
  assert train.shape == (12, 12, 3) and train.white == 255
  indices = np.concatenate([s.indices for s in splits.values()])
  assert sorted(indices) == list(range(12))


def test_a_tree_without_splits_is_split_by_us(tmp_path):
  for name, count in (("a", 20), ("b", 10), ("c", 3), ("d", 1)):
    for i in range(count):
      pictures.write(tmp_path / name / f"{i}.png", i)
  splits = {split: folder(tmp_path, split) for split in data.SPLITS}
  counts = {
    split: [n for _, _, n in s.manifest()] for split, s in splits.items()
  }
  assert counts == {
    "train": [14, 7, 1, 1],
    "val": [2, 1, 1, 0],
    "test": [4, 2, 1, 0],
  }


def test_our_split_does_not_move():
  # Published numbers may rest on it.
  split = dict(listing._split([f"a/{i}.jpg" for i in range(10)]))
  assert [n for n, s in split.items() if s != "train"] == [
    "a/2.jpg", "a/6.jpg", "a/8.jpg",
  ]  # fmt: skip


@given(seed=st.integers(0, 1000))
def test_our_split_does_not_depend_on_the_order_of_files(seed):
  files = [f"a/{i}.jpg" for i in range(30)]
  mixed = random.Random(seed).sample(files, 30)
  assert dict(listing._split(files)) == dict(listing._split(mixed))


def test_json_splits_are_read(tmp_path):
  pictures.splits(
    tmp_path, "images",
    train={"x/1.jpg": 7, "y/1.jpg": 12, "y/2.jpg": 12},
    val={"x/2.jpg": 7}, test={"y/3.jpg": 12},
  )  # fmt: skip
  train, test = folder(tmp_path), folder(tmp_path, "test")
  # Numbers in the order of numbers, 7 before 12.
  assert train.classes == ("7", "12") and train.labels.tolist() == [0, 1, 1]
  assert test.labels.tolist() == [1] and test.indices.tolist() == [4]


def test_class_ids_of_text_are_ordered_as_text(tmp_path):
  pictures.splits(
    tmp_path, ".", train={"1.jpg": "012", "2.jpg": "007"},
    val={"3.jpg": "007"}, test={"4.jpg": "012"},
  )  # fmt: skip
  assert folder(tmp_path).classes == ("007", "012")
  assert folder(tmp_path).labels.tolist() == [1, 0]


@pytest.mark.parametrize(
  "name, images",
  [
    ("cub", "images"),
    ("stanforddogs", "Images"),
    ("caltech256", "256_ObjectCategories"),
  ],
)
def test_named_sets_lie_as_the_reference_has_them(name, images, tmp_path):
  pictures.splits(
    tmp_path, images, train={"x/1.jpg": 0, "y/1.jpg": 1},
    val={"x/2.jpg": 0}, test={"y/3.jpg": 1},
  )  # fmt: skip
  source = data.build({"name": name, "root": str(tmp_path)}, "train")
  assert source.shape == data.FACTS[name].shape and len(source) == 2
  expected = data.FACTS[name]
  (note,) = source.notes
  assert f"{expected.num_classes} classes and {expected.train}" in note


@pytest.mark.parametrize("name", ["cub", "stanforddogs", "caltech256"])
def test_a_named_set_that_is_not_there_says_what_must_lie_where(
  name, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match=f"data/{name}") as error:
    data.build(name, "train")
  said = str(error.value)
  assert "DongXzz/RoLI" in said and "data_splits" in said
  assert "train,val,test}.json" in said and len(said.splitlines()) <= 6


@pytest.mark.parametrize("root, said", [("", "needs"), ("absent", "absent")])
def test_a_folder_that_is_not_there_says_what_must_lie_where(root, said):
  with pytest.raises(ValueError, match=said) as error:
    folder(root)
  assert "CLASS/NAME.jpg" in str(error.value)
  assert len(str(error.value).splitlines()) <= 6


def test_the_manifest_counts_the_classes(tmp_path):
  pictures.tree(tmp_path, train=3, val=1, test=2)
  assert folder(tmp_path, "test").manifest() == [
    ("test", "a", 2), ("test", "b", 2),
  ]  # fmt: skip


def test_what_is_no_image_by_name_is_ignored_and_counted(tmp_path):
  pictures.tree(tmp_path, train=2, val=1, test=1)
  for name in ("Thumbs.db", ".DS_Store", "README.txt"):
    (tmp_path / "train" / "a" / name).write_bytes(b"x")
  (tmp_path / "train" / "a" / ".hidden.jpg").write_bytes(b"x")
  pictures.write(tmp_path / "train" / "stray.jpg")
  pictures.write(tmp_path / "train" / ".trash" / "0.jpg")
  source = folder(tmp_path)
  assert len(source) == 4 and source.skipped == 0
  assert "4 files without" in source.notes[0]
  assert "1 images outside" in source.notes[1]


def test_odd_names_are_names(tmp_path):
  pictures.tree(tmp_path, train=1, val=1, test=1)
  odd = [
    "\udcff.jpg",
    "ünï cödé.jpg",
    "two  spaces .JPG",
    "x.JPEG",
    "'quoted\".Png",
    "日本.png",
  ]
  for i, name in enumerate(odd):
    pictures.write(tmp_path / "train" / "a" / name, i)
  source = folder(tmp_path)
  assert len(source) == 8 and source.pixels().shape == (8, 12, 12, 3)


# What is bad.


def broken(tmp_path, content=b"no image"):
  pictures.tree(tmp_path, train=3, val=1, test=1)
  (tmp_path / "train" / "a" / "0.jpg").write_bytes(content)
  return tmp_path


def encoded(image, kind, **options):
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


BAD = {
  "empty": (b"", "empty"),
  "text": (b"hello", "no image"),
  "truncated": (encoded(pictures.smooth(1), "JPEG")[:-200], "truncated"),
  "png cut": (encoded(pictures.smooth(1), "PNG")[:-80], "truncated"),
  "thin": (encoded(Image.new("RGB", (2020, 20)), "PNG"), "sides at most"),
}


@pytest.mark.parametrize("content, reason", BAD.values(), ids=BAD)
def test_a_bad_file_is_found_before_training(content, reason, tmp_path):
  with pytest.raises(ValueError, match=rf"1 of 10.*\n.*0.jpg: .*{reason}"):
    folder(broken(tmp_path, content))


@pytest.mark.parametrize("split", data.SPLITS)
def test_bad_files_are_skipped_if_asked(split, tmp_path):
  source = folder(broken(tmp_path), split, policy="skip")
  full = {"train": 6, "val": 2, "test": 2}[split]
  bad = int(split == "train")
  assert (len(source), source.skipped) == (full - bad, bad)
  assert ("left out" in "".join(source.notes)) == bool(bad)


def test_a_skipped_file_moves_no_index(tmp_path):
  skipping = folder(broken(tmp_path), policy="skip")
  pictures.write(tmp_path / "train" / "a" / "0.jpg")
  whole = folder(tmp_path)
  assert skipping.indices.tolist() == whole.indices.tolist()[1:]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 0.99))
def test_a_truncated_image_is_bad_wherever_it_ends(share, tmp_path):
  for kind in ("JPEG", "PNG"):
    content = encoded(pictures.smooth(3, 200, 150), kind)
    file = tmp_path / "cut.jpg"
    file.write_bytes(content[: int(share * len(content))])
    assert verify.reason_against(file)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_bad(tmp_path, monkeypatch):
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
  file = pictures.write(tmp_path / "x.jpg")
  assert "at most 1000" in verify.reason_against(file)
  bomb = pictures.write(tmp_path / "y.jpg", width=60, height=60)
  assert "exceeds limit" in verify.reason_against(bomb)


def test_the_first_ten_are_listed_in_six_lines(tmp_path):
  pictures.tree(tmp_path, train=20, val=1, test=1)
  for i in range(10, 20):
    for name in ("a", "b"):
      (tmp_path / "train" / name / f"{i}.jpg").write_bytes(b"")
  with pytest.raises(ValueError, match="20 of 44") as error:
    folder(tmp_path)
  said = str(error.value)
  assert said.count(".jpg: empty") == 10 and len(said.splitlines()) <= 6
  assert "policy=skip" in said


def some_splits(root, **changes):
  files = {
    "train": {"1.jpg": 0, "2.jpg": 1},
    "val": {"3.jpg": 0},
    "test": {"4.jpg": 1},
  }
  return pictures.splits(root, ".", **{**files, **changes})


def test_a_file_that_a_split_names_must_exist(tmp_path):
  (some_splits(tmp_path) / "4.jpg").unlink()
  with pytest.raises(ValueError, match=r"4\.jpg: there is no such file"):
    folder(tmp_path)


def test_a_name_that_json_has_twice_is_bad(tmp_path):
  some_splits(tmp_path)
  text = '{"1.jpg": 0, "2.jpg": 1, "1.jpg": 1, "5.jpg": 0}'
  (tmp_path / "train.json").write_text(text)
  pictures.write(tmp_path / "5.jpg")
  with pytest.raises(ValueError, match=r"1\.jpg: named 2 times, in train"):
    folder(tmp_path)
  source = folder(tmp_path, policy="skip")
  assert names(source, tmp_path) == ["2.jpg", "5.jpg"]
  assert source.skipped == 2


def test_a_file_in_two_splits_is_bad(tmp_path):
  some_splits(tmp_path, test={"4.jpg": 1, "./1.jpg": 0})
  with pytest.raises(ValueError, match="named 2 times, in train and test"):
    folder(tmp_path)


@pytest.mark.parametrize(
  "text", ["{", "[1]", '{"1.jpg": 1.5}', '{"1.jpg": [1]}', '{"1.jpg": true}']
)
def test_json_that_is_no_split_is_refused(text, tmp_path):
  (some_splits(tmp_path) / "val.json").write_text(text)
  with pytest.raises(ValueError, match=r"val\.json"):
    folder(tmp_path)


def test_a_split_without_its_file_is_refused(tmp_path):
  (some_splits(tmp_path) / "val.json").unlink()
  with pytest.raises(ValueError, match=r"val\.json is missing"):
    folder(tmp_path)


def test_classes_are_all_numbers_or_all_text(tmp_path):
  some_splits(tmp_path, val={"3.jpg": "0"})
  with pytest.raises(ValueError, match="numbers here, text there"):
    folder(tmp_path)


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_a_class_without_training_images_is_an_error(policy, tmp_path):
  pictures.tree(tmp_path, train=1, val=1, test=1)
  pictures.write(tmp_path / "test" / "c" / "0.jpg")
  with pytest.raises(ValueError, match=r"1 of 3 classes.*: c"):
    folder(tmp_path, policy=policy)


def test_a_class_whose_training_images_are_bad_is_an_error(tmp_path):
  pictures.tree(tmp_path, train=1, val=1, test=1)
  (tmp_path / "train" / "a" / "0.jpg").write_bytes(b"")
  with pytest.raises(ValueError, match=r"1 of 2 classes.*: a"):
    folder(tmp_path, policy="skip")


def test_a_split_without_images_is_an_error(tmp_path):
  pictures.tree(tmp_path, train=1, val=1, test=1)
  for name in ("a", "b"):
    (tmp_path / "val" / name / "0.jpg").unlink()
  with pytest.raises(ValueError, match="no images for val"):
    folder(tmp_path)


def test_a_file_that_vanishes_later_is_named(tmp_path):
  pictures.tree(tmp_path, train=2, val=1, test=1)
  source = folder(tmp_path)
  pathlib.Path(source.images[1]).unlink()
  with pytest.raises(ValueError, match=r"1\.jpg was a sound image.*no such"):
    list(zip(range(4), data.train_batches(source, 2, 0), strict=False))
  with pytest.raises(ValueError, match=r"1\.jpg was a sound image"):
    source.pixels()


@pytest.mark.parametrize(
  "field, said",
  [
    ({"policy": "skp"}, "did you mean 'skip'"),
    ({"num_workers": -1}, "num_workers must be >= 0"),
    ({"rot": "x"}, "did you mean 'root'"),
  ],
)
def test_a_field_that_can_not_be_is_refused(field, said):
  with pytest.raises(ValueError, match=said):
    folder("nowhere", **field)


# What was checked is remembered.


def decoded(monkeypatch, root):
  """How many of its files a build decodes."""
  count = []
  real = decode.decode
  monkeypatch.setattr(decode, "decode", lambda p: (count.append(p), real(p))[1])
  monkeypatch.setattr(verify, "_seen", set())
  folder(root)
  monkeypatch.setattr(decode, "decode", real)
  # Threads that an earlier test's loader left behind may still decode.
  return sum(root in pathlib.Path(p).parents for p in count)


def test_the_next_run_decodes_only_what_is_new(tmp_path, monkeypatch):
  pictures.tree(tmp_path, train=3, val=1, test=1)
  assert decoded(monkeypatch, tmp_path) == 10
  assert decoded(monkeypatch, tmp_path) == 0
  file = pictures.write(tmp_path / "train" / "a" / "0.jpg", 99)
  os.utime(file, ns=(1, 1))
  assert decoded(monkeypatch, tmp_path) == 1


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"version": 1}', b"\xff"])
def test_a_spoilt_memory_is_no_error(content, cache, tmp_path, monkeypatch):
  pictures.tree(tmp_path, train=1, val=1, test=1)
  folder(tmp_path)
  (file,) = cache.iterdir()
  file.write_bytes(content)
  assert decoded(monkeypatch, tmp_path) == 6


def test_a_memory_that_can_not_be_written_is_no_error(tmp_path, monkeypatch):
  pictures.tree(tmp_path / "data", train=1, val=1, test=1)
  (tmp_path / "file").write_bytes(b"")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
  assert len(folder(tmp_path / "data")) == 2


# Pixels.


def test_pixels_are_kept_for_the_next_time(tmp_path):
  pictures.tree(tmp_path, train=1, val=2, test=1)
  source = folder(tmp_path, "val")
  first = source.pixels()
  for path in source.images:
    os.unlink(path)
  np.testing.assert_array_equal(source.pixels(), first)
  np.testing.assert_array_equal(source.pixels(slice(1, 3)), first[1:3])
  assert first.dtype == np.float32 and first.shape == (4, 12, 12, 3)
  assert first.min() >= 0 and first.max() <= 1


def test_a_large_split_is_decoded_again(tmp_path, monkeypatch):
  from roli_jax.data import source as sources

  pictures.tree(tmp_path, train=1, val=2, test=1)
  source = folder(tmp_path, "val")
  monkeypatch.setattr(sources, "KEEP", 4 * 12 * 12 * 3 - 1)
  source.pixels()
  assert not source._kept


def test_part_of_the_pixels_is_part_of_all(tmp_path):
  pictures.tree(tmp_path, train=1, val=3, test=1)
  rows = np.array([4, 1])
  part = folder(tmp_path, "val").pixels(rows)
  np.testing.assert_array_equal(part, folder(tmp_path, "val").pixels()[rows])


def test_pixels_are_those_of_pil(tmp_path):
  pictures.tree(tmp_path, train=1, val=1, test=1)
  source = folder(tmp_path, "test")
  with Image.open(source.images[0]) as image:
    small = image.convert("RGB").resize((21, 16), Image.Resampling.BILINEAR)
  box = (4, 2, 16, 14)  # (21 - 12) / 2 = 4.5 rounds to even
  expected = np.asarray(small.crop(box), np.float32) / 255
  np.testing.assert_array_equal(source.pixels()[0], expected)


# What is odd, but an image.


def test_transparency_is_dropped_and_leaves_the_colour(tmp_path):
  image = Image.new("RGBA", (5, 4), (200, 100, 50, 0))
  image.save(tmp_path / "x.png")
  decoded = decode.decode(tmp_path / "x.png")
  assert decoded.mode == "RGB" and decoded.getpixel((0, 0)) == (200, 100, 50)


def test_a_palette_with_transparency_keeps_its_colours(tmp_path):
  image = Image.new("P", (5, 4), 1)
  image.putpalette([0, 0, 0, 10, 20, 30])
  image.save(tmp_path / "x.png", transparency=b"\x00\x80")
  assert decode.decode(tmp_path / "x.png").getpixel((2, 2)) == (10, 20, 30)


@pytest.mark.parametrize("mode, value", [("L", 77), ("LA", (77, 5)), ("1", 1)])
def test_grey_is_grey_in_colour(mode, value, tmp_path):
  Image.new(mode, (5, 4), value).save(tmp_path / "x.png")
  red, green, blue = decode.decode(tmp_path / "x.png").getpixel((1, 1))
  assert red == green == blue == (255 if mode == "1" else 77)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled(suffix, tmp_path):
  ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
  Image.fromarray(ramp).save(tmp_path / f"x.{suffix}")
  made = np.asarray(decode.decode(tmp_path / f"x.{suffix}"))
  np.testing.assert_array_equal(made[..., 0].ravel(), np.arange(256))


def test_cmyk_becomes_rgb(tmp_path):
  Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "x.jpg")
  red, green, blue = decode.decode(tmp_path / "x.jpg").getpixel((4, 4))
  assert red > 200 and green < 60 and blue < 60


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_upright(orientation, tmp_path):
  from PIL import ImageOps

  exif = Image.Exif()
  exif[0x0112] = orientation
  pictures.smooth(0, 20, 10).save(tmp_path / "x.png", exif=exif)
  with Image.open(tmp_path / "x.png") as image:
    upright = ImageOps.exif_transpose(image)
  made = decode.decode(tmp_path / "x.png")
  assert made.size == ((20, 10) if orientation < 5 else (10, 20))
  np.testing.assert_array_equal(np.asarray(made), np.asarray(upright))


def test_exif_that_can_not_be_read_turns_nothing(tmp_path):
  pictures.smooth(0).save(tmp_path / "x.jpg", exif=b"Exif\x00\x00rubbish")
  assert decode.decode(tmp_path / "x.jpg").size == (40, 30)


def test_of_an_animation_the_first_frame_is_taken(tmp_path):
  frames = [Image.new("RGB", (5, 4), c) for c in ((255, 0, 0), (0, 0, 255))]
  frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
  assert decode.decode(tmp_path / "x.gif").getpixel((2, 2)) == (255, 0, 0)


def test_an_image_of_one_pixel_is_an_image(tmp_path):
  pictures.tree(tmp_path, train=1, val=1, test=1)
  Image.new("RGB", (1, 1), (9, 9, 9)).save(tmp_path / "train" / "a" / "x.png")
  source = folder(tmp_path)
  assert (source.pixels(np.array([1])) == np.float32(9) / 255).all()


def test_indices_do_not_depend_on_the_split(tmp_path):
  some_splits(tmp_path)
  before = folder(tmp_path)
  order = json.loads((tmp_path / "train.json").read_text())
  (tmp_path / "train.json").write_text(
    json.dumps(dict(reversed(list(order.items()))))
  )
  after = folder(tmp_path)
  assert names(after, tmp_path) == names(before, tmp_path)
  np.testing.assert_array_equal(after.indices, before.indices)
