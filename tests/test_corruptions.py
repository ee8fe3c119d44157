"""Corruptions: what all keep to, what each does, and the error of a model."""

import colorsys

import numpy as np
import pytest

from roli_jax import corruptions
from roli_jax.corruptions import base, blur, digital, glyphs, noise, weather
from tests import pictures

NAMES = tuple(corruptions.CORRUPTIONS)
CALM = {  # no chance in them
  "defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate",
  "jpeg_compression", "gaussian_blur", "saturate", "glyph_blur",
  "glyph_contrast", "glyph_brightness", "glyph_pixelate",
}  # fmt: skip
TABLES = {
  f"{module.__name__}.{name}": table
  for module in (noise, blur, weather, digital)
  for name, table in vars(module).items()
  if isinstance(table, dict) and not name.startswith("_")
}
SIZES = [(8, 8), (32, 32), (61, 45), (9, 130)]


def photo(height=32, width=32, seed=0):
  """Like a photograph: pale colours, few of them clipped, fine detail."""
  x = np.asarray(pictures.smooth(seed, width, height)).astype(float)
  pale = 0.4 * x + 0.4 * x.mean(-1, keepdims=True) + 25
  detail = np.random.default_rng(seed).normal(0, 8, (height, width, 1))
  return np.clip(pale + detail, 0, 255).astype(np.uint8)


def grey(height=32, width=32, seed=0):
  return photo(height, width, seed)[..., :1].copy()


def rng(seed=0):
  return np.random.default_rng(seed)


def distance(a, b):
  return np.square(a.astype(float) - b).mean()


def test_names_are_the_papers_and_those_of_glyphs():
  assert len(corruptions.STANDARD) == 15 and len(corruptions.EXTRA) == 4
  assert corruptions.STANDARD[0] == "gaussian_noise"
  assert corruptions.STANDARD[-1] == "jpeg_compression"
  assert set(corruptions.EXTRA) == {
    "speckle_noise", "gaussian_blur", "spatter", "saturate"
  }  # fmt: skip
  assert all(name.startswith("glyph_") for name in corruptions.GLYPHS)
  assert (
    *corruptions.STANDARD, *corruptions.EXTRA, *corruptions.GLYPHS
  ) == NAMES  # fmt: skip
  assert set(corruptions.NON_STANDARD) < set(NAMES)
  assert all(corruptions.CORRUPTIONS[name].__name__ == name for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_of_any_size_keeps_it_and_is_left_alone(name):
  for size in SIZES:
    image = photo(*size)
    before = image.copy()
    image.flags.writeable = False
    for severity in corruptions.SEVERITIES:
      made = corruptions.apply(name, image, severity, index=3)
      assert made.shape == image.shape and made.dtype == np.uint8
      assert made.flags.writeable
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("name", NAMES)
def test_photographs_of_224_pixels_are_corrupted(name):
  image = photo(224, 224)
  made = corruptions.apply(name, image, 3, index=0)
  assert made.shape == image.shape and distance(made, image) > 1


@pytest.mark.parametrize("name", NAMES)
def test_what_chance_does_depends_on_who_the_image_is(name):
  image = photo()
  made = [corruptions.apply(name, image, 3, index) for index in range(4)]
  np.random.seed(9)
  again = [
    corruptions.apply(name, image, 3, index)
    for index in np.arange(4, dtype=np.uint32)[::-1]
  ]
  np.testing.assert_array_equal(made, again[::-1])
  seeded = corruptions.apply(name, image, 3, 0, seed=1)
  if name in CALM:
    assert all((other == made[0]).all() for other in (*made, seeded))
  else:
    assert all((other != made[0]).any() for other in (*made[1:], seeded))


def test_types_and_severities_have_chances_of_their_own():
  flat = np.full((32, 32, 3), 128, np.uint8)

  def signs(name, severity):
    return corruptions.apply(name, flat, severity, 0) > 128

  for other in (("glyph_noise", 1), ("gaussian_noise", 2)):
    alike = (signs("gaussian_noise", 1) == signs(*other)).mean()
    assert 0.45 < alike < 0.55


@pytest.mark.parametrize("side", [8, 32, 64])
@pytest.mark.parametrize(
  "name", [name for name in NAMES if name != "elastic_transform"]
)
def test_the_last_severity_moves_an_image_further_than_the_first(name, side):
  images = [photo(side, side, seed) for seed in range(6)]
  first, last = (
    np.mean([distance(corruptions.apply(name, image, severity, i), image)
             for i, image in enumerate(images)])
    for severity in (1, 5)
  )  # fmt: skip
  assert last > first
  assert first > 0 or (name, side) == ("zoom_blur", 8)


def test_elastic_severities_bend_more_and_move_less():
  # As published: the affine map shrinks while waves grow, so that of all types
  # this one's first severity may be the furthest from the image.
  for table in digital.ELASTIC_TRANSFORM.values():
    reaches = [reach for _, _, reach in table]
    slopes = [a / s**2 if s else 0 for a, s, _ in table]
    assert reaches[0] > reaches[-1] and np.argmax(slopes) == 4
  y, x = np.mgrid[:64, :64]
  ramp = (4 * x)[..., None].astype(np.uint8)
  centre = slice(20, 44)  # where no border comes in
  plane = np.stack([a[centre, centre].ravel() for a in (x, y, x**0)], -1)

  def bend(severity, index):
    made = corruptions.apply("elastic_transform", ramp, severity, index)
    levels = made[centre, centre].ravel().astype(float)
    return np.linalg.lstsq(plane, levels)[1][0] / levels.size

  assert (
    max(bend(1, i) for i in range(4)) < 1 < min(bend(5, i) for i in range(4))
  )


@pytest.mark.parametrize("name", NAMES)
def test_grey_images_stay_grey(name):
  image = grey()
  if name == "saturate":
    with pytest.raises(ValueError, match="saturate wants colour"):
      corruptions.apply(name, image, 3, 0)
    return
  made = corruptions.apply(name, image, 3, 0)
  assert made.shape == (32, 32, 1) and distance(made, image) > 0
  if name in ("frost", "spatter") or name.endswith("noise"):
    return  # colours, and noise of each channel
  # A grey picture stored in three channels is the same picture.
  colour = corruptions.apply(name, np.repeat(image, 3, -1), 3, 0)
  assert np.abs(colour.astype(int) - made).max() <= 1


@pytest.mark.parametrize("name", ["frost", "spatter"])
def test_grey_images_have_the_mean_of_a_colour(name):
  dark = np.zeros((32, 32, 1), np.uint8)
  for severity in (3, 5):
    made = corruptions.apply(name, dark, severity, 1)
    colour = corruptions.apply(name, np.repeat(dark, 3, -1), severity, 1)
    assert np.abs(colour.mean(-1) - made[..., 0]).mean() < 1 < made.max()


@pytest.mark.parametrize("side", [8, 32, 64, 224])
@pytest.mark.parametrize(
  "name",
  [
    "gaussian_blur", "glass_blur", "motion_blur", "zoom_blur", "contrast",
    "elastic_transform", "pixelate", "glyph_blur", "glyph_contrast",
    "glyph_pixelate",
  ],
)  # fmt: skip
def test_a_wall_has_no_detail_to_lose(name, side):
  wall = np.full((side, side, 3), 77, np.uint8)
  np.testing.assert_array_equal(corruptions.apply(name, wall, 5, 0), wall)


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"name": "gausian_noise"}, "did you mean 'gaussian_noise'"),
    ({"severity": 0}, "severity must be 1, 2, 3, 4 or 5, got 0"),
    ({"severity": 6}, "got 6"),
    ({"image": np.zeros((32, 32, 3))}, "uint8.*got float64"),
    ({"image": np.zeros((32, 32), np.uint8)}, r"got \(32, 32\)"),
    ({"image": np.zeros((32, 32, 4), np.uint8)}, r"got \(32, 32, 4\)"),
    ({"image": np.zeros((7, 32, 3), np.uint8)}, r"8 x 8 .* got \(7, 32, 3\)"),
    ({"index": -1}, "got -1 and 0"),
    ({"seed": -2}, "got 0 and -2"),
  ],
)
def test_what_does_not_fit_is_refused(fields, message):
  fits = {"name": "fog", "image": photo(), "severity": 1, "index": 0}
  with pytest.raises(ValueError, match=message):
    corruptions.apply(**{**fits, **fields})


@pytest.mark.parametrize("name", NAMES)
def test_each_refuses_a_severity_that_there_is_not(name):
  for severity in (0, 6):
    with pytest.raises(ValueError, match="severity must be"):
      corruptions.CORRUPTIONS[name](rng(), photo(), severity)


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_a_published_table_has_five_strengths_for_three_sizes(table):
  assert tuple(table) == (32, 64, 224)
  assert all(len(strengths) == 5 for strengths in table.values())


def test_there_is_a_table_for_each_published_corruption():
  names = {name.rpartition(".")[-1].lower() for name in TABLES}
  assert names == {*corruptions.STANDARD, *corruptions.EXTRA}


@pytest.mark.parametrize(
  "size, published",
  [((8, 8), 500), ((47, 300), 500), ((48, 48), 250), ((300, 127), 250),
   ((128, 128), 60), ((375, 500), 60)],
)  # fmt: skip
def test_strengths_go_by_the_shorter_side(size, published):
  image = np.zeros((*size, 3), np.uint8)
  assert base.level(noise.SHOT_NOISE, image, 1) == published


@pytest.mark.parametrize("severity", [1, 3, 5])
@pytest.mark.parametrize("side", [32, 64, 224])
def test_noise_has_the_published_size(severity, side):
  # In the middle of the range, where little is clipped; fractions are cut.
  flat = np.full((side, side, 3), 128, np.uint8)
  x = 128 / 255

  def made(name):
    return corruptions.apply(name, flat, severity, 5) / 255

  def of(table):
    return table[side][severity - 1]

  clean = np.clip(x + of(noise.GAUSSIAN_NOISE) * rng().normal(size=10**5), 0, 1)
  assert made("gaussian_noise").std() == pytest.approx(clean.std(), rel=0.05)
  speck = np.clip(x + x * of(noise.SPECKLE_NOISE) * rng().normal(size=10**5),
                  0, 1)  # fmt: skip
  assert made("speckle_noise").std() == pytest.approx(speck.std(), rel=0.05)
  photons = of(noise.SHOT_NOISE)
  shot = np.clip(rng().poisson(x * photons, 10**5) / photons, 0, 1)
  assert made("shot_noise").std() == pytest.approx(shot.std(), rel=0.05)
  impulses = made("impulse_noise")
  lost = impulses != x
  share, n = of(noise.IMPULSE_NOISE), lost.size
  assert abs(lost.mean() - share) < 4 * (share * (1 - share) / n) ** 0.5
  assert set(np.unique(impulses[lost])) == {0, 1}
  assert abs(impulses[lost].mean() - 0.5) < 4 * 0.5 / lost.sum() ** 0.5


@pytest.mark.parametrize("severity", corruptions.SEVERITIES)
def test_brightness_and_saturation_are_those_of_hsv(severity):
  image = rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
  image[0, :9] = 60  # grey: their hue is 0
  image[1, :9] = 0
  more = weather.BRIGHTNESS[32][severity - 1]
  factor, offset = digital.SATURATE[32][severity - 1]
  bright, vivid = [], []
  for pixel in image.reshape(-1, 3) / 255:
    h, s, v = colorsys.rgb_to_hsv(*pixel)
    bright.append(colorsys.hsv_to_rgb(h, s, min(1, v + more)))
    vivid.append(colorsys.hsv_to_rgb(h, np.clip(factor * s + offset, 0, 1), v))
  for name, wanted in (("brightness", bright), ("saturate", vivid)):
    made = corruptions.apply(name, image, severity, 0).reshape(-1, 3)
    assert np.abs(made - 255 * np.array(wanted)).max() <= 1


def test_contrast_is_drawn_to_each_channels_mean():
  image = np.zeros((8, 8, 3), np.uint8)
  image[:4] = (200, 100, 0)
  made = corruptions.apply("contrast", image, 2, 0)  # halved
  assert made[0, 0].tolist() == [150, 75, 0]
  assert made[7, 0].tolist() == [50, 25, 0]


def test_pixels_of_a_pixelated_image_are_the_means_of_boxes():
  made = corruptions.apply("pixelate", photo(64, 64), 5, 0)  # to half
  blocks = made.reshape(32, 2, 32, 2, 3)
  assert (blocks == blocks[:, :1, :, :1]).all()
  means = photo(64, 64).reshape(32, 2, 32, 2, 3).mean((1, 3))
  assert np.abs(blocks[:, 0, :, 0] - means).max() <= 1


def test_a_defocused_point_is_a_disk():
  image = np.zeros((224, 224, 1), np.uint8)
  image[100:103, 100:103] = 255
  made = corruptions.apply("defocus_blur", image, 3, 0)  # radius 6
  y, x, _ = np.nonzero(made)
  assert np.hypot(y - 101, x - 101).max() < 6 + 2 * 2**0.5
  assert {y.min(), x.min()} == {101 - 7} and {y.max(), x.max()} == {101 + 7}


def test_a_trail_is_half_a_normal_density_along_a_line():
  image = np.zeros((40, 40))
  image[20, 20] = 1
  weights = np.exp(-(np.arange(13) ** 2) / 18)
  made = blur.trail(image, 6, 3.0, 0.0)  # of what is to the right
  np.testing.assert_allclose(made[20, 20:7:-1], weights / weights.sum())
  np.testing.assert_allclose(made.sum(), 1)
  below = blur.trail(image, 6, 3.0, 90.0)
  np.testing.assert_allclose(below, made.T, atol=1e-12)
  slanted = blur.trail(image, 6, 3.0, 45.0)
  assert (np.nonzero(slanted)[0] == np.nonzero(slanted)[1]).all()


def test_glass_moves_pixels_and_makes_none():
  image = np.arange(32 * 32, dtype=np.uint16).view(np.uint8).reshape(32, 32, 2)
  image = np.concatenate([image, image[..., :1]], -1)
  made = corruptions.apply("glass_blur", image, 1, 0)  # a blur of 0.05 pixels
  who = made[..., 0] + 256 * made[..., 1].astype(int)
  assert (who != np.arange(1024).reshape(32, 32)).mean() > 0.5
  np.testing.assert_array_equal(made[:2], image[:2])  # out of reach
  assert np.unique(who).size < 1024  # given to both, not exchanged


def test_an_enlargement_keeps_the_middle():
  image = np.zeros((33, 41))
  image[16, 20] = 1
  large = blur.enlarge(image, 2.0)
  assert large.shape == image.shape
  assert np.unravel_index(large.argmax(), large.shape) == (16, 20)
  assert large.sum() > 3


@pytest.mark.parametrize("size", [(8, 8), (33, 20), (100, 224)], ids=str)
def test_plasma_fills_its_range_more_smoothly_the_larger_the_decay(size):
  rough, smooth = (
    np.mean([np.abs(np.diff(weather.plasma(rng(i), *size, decay))).mean()
             for i in range(5)])
    for decay in (1.2, 3.0)
  )  # fmt: skip
  field = weather.plasma(rng(), *size, 2.0)
  assert field.shape == size and field.min() >= 0 and field.max() <= 1
  assert np.ptp(field) > 0.4 and smooth < rough


def test_fog_keeps_the_brightest_there_was():
  image = photo() // 2
  made = corruptions.apply("fog", image, 5, 0)
  assert made.max() <= image.max() and made.std() < image.std()
  black = np.zeros_like(image)
  assert not corruptions.apply("fog", black, 5, 0).any()


def test_water_shines_and_mud_covers():
  image = np.full((64, 64, 3), 120, np.uint8)
  water = corruptions.apply("spatter", image, 3, 0).astype(int)
  assert (water >= image).all() and (water > image).any()
  mud = corruptions.apply("spatter", image, 5, 0)
  covered = (mud != image).any(-1)
  assert 0.01 < covered.mean() < 0.5
  assert (mud[covered] < 60).mean() > 0.5


def test_an_image_without_a_drop_is_left_dry():
  image = photo(8, 8)
  made = [corruptions.apply("spatter", image, 1, i) for i in range(60)]
  wet = [(m != image).any() for m in made]
  assert any(wet) and not all(wet)


@pytest.mark.parametrize("name", corruptions.GLYPHS)
def test_each_severity_is_harder_on_glyphs_than_the_last(name):
  images = rng(3).choice([0, 0, 120, 255], (30, 8, 8, 1)).astype(np.uint8)
  moves = [
    np.mean([distance(corruptions.apply(name, image, severity, i), image)
             for i, image in enumerate(images)])
    for severity in corruptions.SEVERITIES
  ]  # fmt: skip
  assert moves[0] > 0 and all(np.diff(moves) > 0)


def test_glyphs_have_strengths_of_their_own():
  assert all(
    len(strengths) == 5
    for strengths in (glyphs.NOISE, glyphs.BLUR, glyphs.CONTRAST,
                      glyphs.BRIGHTNESS, glyphs.PIXELATE)
  )  # fmt: skip
  image = np.zeros((8, 8, 1), np.uint8)
  image[::2] = 200
  assert set(np.unique(corruptions.apply("glyph_pixelate", image, 5, 0))) == {
    100
  }
  assert corruptions.apply("glyph_brightness", image, 5, 0).min() == 153
  assert np.ptp(corruptions.apply("glyph_contrast", image, 5, 0)) == 20
  flat = np.full((100, 100, 1), 128, np.uint8)
  noisy = corruptions.apply("glyph_noise", flat, 2, 0)
  assert noisy.std() == pytest.approx(0.08 * 255, rel=0.05)


def test_the_guide_goes_through_its_types_in_turn_or_in_blocks():
  assert len(corruptions.GUIDE) == 11
  assert set(corruptions.GUIDE) == set(corruptions.STANDARD) - {
    "gaussian_noise", "glass_blur", "frost", "fog"
  }  # fmt: skip
  names = [corruptions.guide(i) for i in range(23)]
  assert names == [*corruptions.GUIDE, *corruptions.GUIDE, "shot_noise"]
  # The authors': (i // (count // 11)) % 11, of 1,000 images blocks of 90.
  blocks = [corruptions.guide(np.uint32(i), 1000) for i in range(1000)]
  assert blocks[:90] == ["shot_noise"] * 90 and blocks[90] == "impulse_noise"
  assert blocks[989] == "jpeg_compression"
  assert blocks[990:] == ["shot_noise"] * 10
  assert [corruptions.guide(i, 5) for i in range(5)] == names[:5]


@pytest.mark.parametrize("index, count", [(-1, None), (10, 10), (-1, 10)])
def test_the_guide_knows_no_image_outside_the_test_set(index, count):
  with pytest.raises(ValueError, match=f"got {index}"):
    corruptions.guide(index, count)
