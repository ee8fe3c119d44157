"""Transforms: sizes, rounding, chance, and what is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from roli_jax import data
from roli_jax.data import transforms
from tests import pictures

EXAMPLES = list(transforms.TRANSFORMS.values())
GEOMETRIC = ("flip", "pad_crop:1", "random_crop:6", "cutout:3", "center_crop:6")


def rng(seed=0):
  return np.random.default_rng(seed)


def grid(width, height):
  """An image whose pixels say where they are."""
  y, x = np.mgrid[:height, :width]
  return np.stack([x, y, x + y], -1).astype(np.uint8)


def apply(chain, image, seed=0):
  if isinstance(image, np.ndarray):
    image = Image.fromarray(image)
  return transforms.apply(transforms.build(chain), rng(seed), image)


@pytest.mark.parametrize("text", EXAMPLES)
def test_a_transform_is_pure_in_its_generator(text):
  image = pictures.smooth(1)
  before = np.asarray(image).copy()
  a, b = apply((text,), image, 5), apply((text,), image, 5)
  np.testing.assert_array_equal(a, b)
  np.testing.assert_array_equal(np.asarray(image), before)
  assert a.dtype == np.uint8 and a.shape[-1] == 3


@pytest.mark.parametrize("text", EXAMPLES)
@given(width=st.integers(1, 60), height=st.integers(1, 60))
def test_a_transform_knows_the_size_of_what_it_makes(text, width, height):
  image = pictures.smooth(0, width, height)
  chain = transforms.build([text.replace("224", "9").replace("256", "7")])
  made = transforms.apply(chain, rng(1), image)
  assert made.shape[:2] == transforms.size(chain, (height, width))


@pytest.mark.parametrize(
  "before, after",
  [
    ((500, 400), (320, 256)),
    ((333, 517), (256, 397)),  # 397.45 cut, as torchvision cuts it
    ((256, 300), (256, 300)),
    ((1, 1), (256, 256)),
  ],
)
def test_resizing_rounds_as_torchvision(before, after):
  assert (
    apply(("resize:256",), pictures.smooth(0, *before)).shape[1::-1] == after
  )


@pytest.mark.parametrize("extent, left", [(10, 3), (9, 2), (11, 4), (13, 4)])
def test_the_centre_rounds_halves_to_even(extent, left):
  # int(round((extent - 4) / 2)), as in torchvision's CenterCrop.
  cut = apply(("center_crop:4",), grid(extent, extent))
  assert cut[0, 0].tolist() == [left, left, 2 * left]


def test_an_image_smaller_than_a_crop_is_framed_in_black():
  cut = apply(("center_crop:7",), grid(4, 4) + 1)
  assert cut.shape == (7, 7, 3)
  np.testing.assert_array_equal(cut[1:5, 1:5], grid(4, 4) + 1)
  assert cut.sum() == (grid(4, 4).astype(int) + 1).sum()


def test_random_crops_start_anywhere_alike():
  starts = [
    tuple(apply(("random_crop:4",), grid(7, 6), seed)[0, 0, :2])
    for seed in range(600)
  ]
  assert {x for x, _ in starts} == set(range(4))
  assert {y for _, y in starts} == set(range(3))
  counts = np.bincount([x for x, _ in starts])
  assert counts.min() > 100


def test_half_of_the_images_are_flipped():
  image = grid(5, 3)
  flipped = [(apply(("flip",), image, s) != image).any() for s in range(400)]
  assert 160 < sum(flipped) < 240
  seed = flipped.index(True)
  np.testing.assert_array_equal(apply(("flip",), image, seed), image[:, ::-1])


def test_padded_crops_move_an_image_by_as_much_as_the_padding():
  image = grid(8, 8) + 1
  moves = set()
  for seed in range(200):
    made = apply(("pad_crop:2",), image, seed)
    assert made.shape == image.shape
    x, y, _ = made[4, 4].astype(int) - image[4, 4]
    moves.add((x, y))
  assert moves == {(x, y) for x in range(-2, 3) for y in range(-2, 3)}


def test_cutout_blackens_one_square():
  made = apply(("cutout:4",), np.full((20, 20, 3), 9, np.uint8), 3)
  black = (made == 0).all(-1)
  assert set(np.unique(made)) == {0, 9}
  assert black.sum() in (16, 12, 8) and black.any(0).sum() <= 4


@given(seed=st.integers(0, 10**6))
def test_resized_crops_lie_within_the_image(seed):
  left, top, right, bottom = transforms._box(rng(seed), 300, 200)
  assert 0 <= left < right <= 300 and 0 <= top < bottom <= 200
  assert (right - left) * (bottom - top) >= 0.07 * 300 * 200
  assert 0.7 < (right - left) / (bottom - top) < 1.4


def test_where_no_shape_fits_the_middle_is_taken():
  # torchvision's RandomResizedCrop gives the same box.
  assert transforms._box(rng(), 2000, 10) == (993, 0, 1006, 10)


def test_colour_jitter_stays_within_its_strength():
  grey = np.full((4, 4, 3), 100, np.uint8)
  values = [apply(("color_jitter:0.2",), grey, s).mean() for s in range(100)]
  assert 79 <= min(values) < 85 and 115 < max(values) <= 121


@pytest.mark.parametrize("name", transforms.OPERATIONS)
def test_an_operation_without_magnitude_leaves_the_size(name):
  image = pictures.smooth(0)
  made = np.asarray(transforms.operate(name, image, 0.0, 1))
  assert made.shape == (30, 40, 3)
  if name not in ("AutoContrast", "Equalize"):
    # Of solarize at 0 only pixels of 255 turn.
    assert (made != np.asarray(image)).mean() < 0.02


@pytest.mark.parametrize("text", GEOMETRIC)
def test_geometry_works_on_grey_images(text):
  spec = {"name": "digits", "train_transforms": (text,)}
  if "crop:6" in text:
    spec["eval_transforms"] = ("center_crop:6",)
  source = data.build(spec, "test")
  image = source.train_image(0, rng())
  assert image.shape == source.shape and image.max() <= 16


@pytest.mark.parametrize("text", ["color_jitter:0.4", "rand_augment:2,9"])
def test_grey_images_have_no_colours_to_change(text):
  with pytest.raises(ValueError, match="wants colour images"):
    data.build({"name": "digits", "train_transforms": (text,)}, "train")


@pytest.mark.parametrize(
  "text, message",
  [
    ("flop", "did you mean 'flip'"),
    ("resize", "written like 'resize:256'"),
    ("resize:0", "must be positive"),
    ("resize:x", "got 'resize:x'"),
    ("random_crop:1,2", "written like 'random_crop:224'"),
    ("flip:0.5", "written like 'flip'"),
    ("color_jitter:2", "strength must be <= 1"),
    ("color_jitter:nan", "written like"),
    ("rand_augment:2,31", "magnitude must be <= 30"),
    ("rand_augment:2,-1", "none negative"),
  ],
)
def test_a_transform_that_can_not_be_is_refused(text, message):
  # Before anything is read: there is no such directory.
  spec = {"name": "folder", "root": "nowhere", "train_transforms": (text,)}
  with pytest.raises(ValueError, match=message):
    data.build(spec, "train")


def test_transforms_are_not_one_string():
  with pytest.raises(ValueError, match="tuple of strings"):
    transforms.build("flip")


def test_images_of_many_sizes_are_refused():
  spec = {"name": "folder", "root": "x", "eval_transforms": ("resize:256",)}
  with pytest.raises(ValueError, match=r"eval_transforms.*many sizes"):
    data.build(spec, "train")


def test_training_and_evaluation_see_one_size():
  spec = {"name": "digits", "train_transforms": ("random_crop:6",)}
  with pytest.raises(ValueError, match=r"\(6, 6\).*\(8, 8\)"):
    data.build(spec, "train")
