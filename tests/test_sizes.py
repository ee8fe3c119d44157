"""Backbones of any size: made, kept, planned, and read from files."""

import dataclasses

import jax
import numpy as np
import pytest

from roli_jax import convert, keys, models, trees
from roli_jax.experiment import command_line
from roli_jax.files import workdir
from roli_jax.plan import plan
from tests import cli

# Of each family a small one, and the formats that have names for it.
SMALL = {
  "vit": {
    "patch": 8, "width": 12, "depth": 3, "heads": 2, "channels": 1,
    "image_size": 24,
  },
  "swin": {
    "patch": 2, "width": 4, "depth": (1, 2, 1), "heads": (1, 2, 4),
    "image_size": 16,
  },
  "convnext": {
    "patch": 2, "width": (4, 6), "depth": (1, 2), "channels": 4,
    "image_size": 8,
  },
  "wrn": {"depth": 16, "width": 2},
  "dm_wrn": {"depth": 10, "width": 1},
}  # fmt: skip
FORMATS = [
  ("vit", "timm"),
  ("vit", "torchvision"),
  ("vit", "roli"),
  ("swin", "timm"),
  ("swin", "microsoft"),
  ("swin", "roli"),
  ("convnext", "timm"),
  ("convnext", "meta"),
  ("wrn", "robustbench"),
  ("dm_wrn", "robustbench"),
]


def made(name):
  """A small model of a family, or a named one, with random arrays."""
  model = models.create(name, 5, **SMALL.get(name, {}))
  rng = np.random.default_rng(0)
  shapes = model.shapes()
  params, stats = jax.tree.map(
    lambda x: rng.uniform(0.1, 1, x.shape).astype(x.dtype), shapes
  )
  return convert.Bundle(model, params, stats)


def same(bundle, other):
  mine, yours = (trees.paths((x.params, x.stats)) for x in (bundle, other))
  assert mine.keys() == yours.keys()
  for name, leaf in mine.items():
    np.testing.assert_array_equal(leaf, yours[name], name)


def size(name, num_classes, **sizes):
  model = models.create(name, num_classes, **sizes)
  return trees.size(model.shapes()[0])


VIT_S16 = {"patch": 16, "width": 384, "depth": 12, "heads": 6}
SWIN_T = {"depth": (2, 2, 6, 2), "heads": (3, 6, 12, 24), "width": 96}
NAMED = {
  "vit_s16": ("vit", {**VIT_S16, "image_size": 224}),
  "swin_t": ("swin", {**SWIN_T, "patch": 4, "image_size": 224}),
  "convnext_t": (
    "convnext",
    {"patch": 4, "width": (96, 192, 384, 768), "depth": (3, 3, 9, 3)},
  ),
  "wrn_28_10": ("wrn", {"depth": 28, "width": 10}),
  "dm_wrn_28_10": ("dm_wrn", {"depth": 28, "width": 10}),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_named_size_is_a_setting_of_its_family(name):
  family, sizes = NAMED[name]
  own, named = models.create(family, 7, **sizes), models.create(name, 7)
  assert dataclasses.replace(own, name=name) == named
  assert models.sizes(own).items() <= sizes.items() and not models.sizes(named)


def test_parameters_are_as_many_as_the_sizes_say():
  """By hand: patches and positions, seven blocks, norm and head."""
  d, blocks = 128, 7
  block = 4 * (d * d + d) + (d * 4 * d + 4 * d) + (4 * d * d + d) + 4 * d
  about = {"width": d, "depth": blocks, "heads": 4, "patch": 4}
  rest = 65 * d + d + 2 * d + (10 * d + 10)  # positions, class token
  for channels in (1, 3, 5):
    patches = 16 * channels * d + d
    expected = patches + rest + blocks * block
    got = size("vit", 10, **about, channels=channels, image_size=32)
    assert got == expected


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels_are_centred_at_a_half(channels):
  model = models.create("wrn", 3, depth=10, width=1, channels=channels)
  assert model.mean == model.std == (0.5,) * channels
  images = np.full((2, 16, 16, channels), 0.5, np.float32)
  params, stats = model.shapes()
  logits = jax.eval_shape(model.logits, params, stats, images)
  assert logits.shape == (2, 3)


REFUSED = [
  ("vit_b16", {"width": 64}, "vit_b16 has its sizes, and takes no width;"),
  ("tiny32", {"channels": 1}, "takes no channels; those that do are vit, swin"),
  ("vit", {"patch": 4}, "vit takes patch, width, depth, heads; there is no"),
  ("vit", VIT_S16, "image_size"),
  ("vit", {**VIT_S16, "heads": 5}, "heads must divide the width 384, got 5"),
  ("vit", {**VIT_S16, "width": (4, 8)}, "width of vit is one whole number"),
  ("swin", {**SWIN_T, "patch": 0}, "patch of swin is one whole number >= 1"),
  ("swin", {**SWIN_T, "patch": 4, "heads": (3, 6)}, "one number for each"),
  ("swin", {**SWIN_T, "patch": 4, "heads": (3, 6, 12, 5)}, "width 768, got 5"),
  ("convnext", {"patch": 4, "width": 96, "depth": (1, 2)}, "is a tuple"),
  ("convnext", {"patch": 4, "width": (), "depth": ()}, "is a tuple"),
  ("wrn", {"depth": 29, "width": 1}, r"6 n \+ 4, as 28; got 29"),
  ("wrn", {"depth": 28, "width": 1, "heads": 2}, "and no heads"),
  ("wrn", {"depth": 28, "width": 1, "channels": 0}, "channels"),
]


@pytest.mark.parametrize("name, sizes, message", REFUSED)
def test_sizes_that_can_not_be_are_refused(name, sizes, message):
  with pytest.raises(ValueError, match=message):
    models.create(name, 10, **sizes)


def test_images_that_patches_do_not_tile_are_refused():
  model = models.create("vit", 10, image_size=30, **{**VIT_S16, "patch": 4})
  with pytest.raises(ValueError, match="4 do not tile images of 30 x 30"):
    model.shapes()


@pytest.mark.parametrize("name", SMALL)
def test_a_bundle_keeps_the_sizes(name, tmp_path):
  bundle, path = made(name), tmp_path / f"{name}.safetensors"
  convert.save(bundle, path)
  again = convert.load(path)
  assert again.model == bundle.model
  same(again, bundle)
  sizes = {k: v for k, v in SMALL[name].items() if k != "image_size"}
  assert convert.load(tmp_path, name, **sizes).model == bundle.model
  with pytest.raises(ValueError, match=f"{name} of depth="):
    convert.load(path, depth=4)


@pytest.mark.parametrize("name, format", FORMATS)
def test_a_file_of_another_framework_shows_its_sizes(name, format, tmp_path):
  bundle, path = made(name), tmp_path / "x.pth"
  convert.save(bundle, path, format)
  told = {"heads": 2} if name == "vit" else {}
  both = {"mean": bundle.model.mean, "std": bundle.model.std, **told}
  for model in (name, None):
    again = convert.load(path, model, **both)
    same(again, bundle)
    # Nothing tells the size of a convolutional network's images.
    side = models.FAMILIES[name].image_size
    by_custom = name == "swin"  # its windows
    assert ("image_size" in again.assumed) == (side is not None or by_custom)
    expected = dataclasses.replace(
      bundle.model, image_size=side or bundle.model.image_size
    )
    assert again.model == expected


def test_windows_that_are_larger_than_the_last_map_are_read(tmp_path):
  """Of maps of 8, 4 and 2; MIMIR's Swin-L has windows of 14, then of 7."""
  small = made("swin").model
  large = dataclasses.replace(small, backbone=small.backbone.clone(window=4))
  shapes = large.shapes()
  ones = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes)
  bundle, path = convert.Bundle(large, *ones), tmp_path / "x.safetensors"
  both = {"mean": large.mean, "std": large.std}
  for format in ("timm", None):
    convert.save(bundle, path, format)
    again = convert.load(path, **({} if format is None else both))
    same(again, bundle)
    assert again.model == large
  with pytest.raises(ValueError, match=r"windows of 4 do not tile .*\[10, 5\]"):
    wrong = small.backbone.clone(window=4, depths=(1, 1), num_heads=(1, 1))
    jax.eval_shape(wrong.init, keys.root(0), np.zeros((1, 20, 20, 3)))


def test_a_vits_heads_must_be_told(tmp_path):
  state = convert.to_state_dict(made("vit"), "timm")
  shown = "heads of this vit .patch=8, channels=1, width=12, depth=3."
  for told in ({}, {"model": "vit"}):
    with pytest.raises(ValueError, match=f"no tensor shows {shown}"):
      convert.load(state, **told)
  with pytest.raises(ValueError, match="heads must divide the width 12, got 5"):
    convert.load(state, heads=5)
  four, two = (convert.load(state, heads=n, image_size=16) for n in (4, 2))
  images = np.random.default_rng(0).random((1, 16, 16, 1), np.float32)
  a, b = (x.model.logits(x.params, {}, images) for x in (four, two))
  assert np.abs(a - b).max() > 1e-4


def test_sizes_that_are_not_the_tensors_are_refused():
  state = convert.to_state_dict(made("wrn"), "robustbench")
  with pytest.raises(ValueError, match=r"missing: block1\.layer\.2"):
    convert.load(state, depth=22)
  state = convert.to_state_dict(made("glyph_resnet"), "timm")
  with pytest.raises(ValueError, match="it takes no depth"):
    convert.load(state, depth=18)


@pytest.mark.parametrize("name", ["vit", "dm_wrn"])
def test_half_a_file_reads_back_as_float32(name, tmp_path):
  bundle = made(name)
  whole, half = tmp_path / "whole.safetensors", tmp_path / "half.safetensors"
  convert.save(bundle, whole)
  convert.save(bundle, half, half=True)
  assert half.stat().st_size < 0.7 * whole.stat().st_size
  again = convert.load(half)
  assert again.model == bundle.model
  rounded = jax.tree.map(
    lambda x: x.astype(np.float16).astype(np.float32),
    (bundle.params, bundle.stats),
  )
  same(again, convert.Bundle(bundle.model, *rounded))
  leaves = jax.tree.leaves((again.params, again.stats))
  assert {leaf.dtype for leaf in leaves} == {np.dtype(np.float32)}


def test_what_half_precision_can_not_hold_is_refused(tmp_path):
  bundle, path = made("wrn"), tmp_path / "x.safetensors"
  bundle.params.head["bias"][0] = 1e6
  with pytest.raises(ValueError, match="in float16: head/bias"):
    convert.save(bundle, path, half=True)
  with pytest.raises(ValueError, match="our own format"):
    convert.save(bundle, path, "robustbench", half=True)
  assert not path.exists()


def test_weights_of_a_name_come_with_the_package(monkeypatch, tmp_path):
  """As `robust` and `standard` of tiny32 do, in half precision."""
  from roli_jax.convert import files

  (tmp_path / "weights").mkdir()
  names = tuple("abcde")
  bundle = dataclasses.replace(made("tiny32"), classes=names)
  file = tmp_path / "weights" / "tiny32_robust.safetensors"
  convert.save(bundle, file, half=True)
  assert file.stat().st_size < 3e6
  where = files.importlib.resources
  monkeypatch.setattr(where, "files", lambda package: tmp_path)
  assert convert.find("tiny32", "robust") == file
  assert convert.load(file, "tiny32").classes == names
  again = convert.load(file, "tiny32", num_classes=10)
  assert again.classes == ()
  assert again.model == models.create("tiny32", 10)
  assert again.params.backbone["positions"].dtype == np.float32


def test_tiny32_is_of_photographs():
  model = models.create("tiny32", 10)
  own = models.create(
    "vit", 10, 32, patch=8, width=128, depth=7, heads=4, pool="token"
  )
  assert model.backbone == own.backbone.clone(pool="mean", cls=False)
  assert (model.image_size, model.channels) == (32, 3)
  assert model.mean == models.create("swin_t", 10).mean


def test_acts_and_eps_are_kept_where_they_are_not_the_names():
  quick = models.create("vit_b16", 3, act="quick_gelu", norm_eps=1e-5)
  about = models.to_spec(quick)
  assert (about["act"], about["norm_eps"]) == ("quick_gelu", 1e-5)
  assert models.from_spec(about) == quick
  relu = models.create("dm_wrn", 3, depth=10, width=1, act="relu")
  assert models.from_spec(models.to_spec(relu)) == relu
  for name in models.MODELS:
    assert (
      not {"act", "norm_eps"} & models.to_spec(models.create(name, 3)).keys()
    )
  for options, message in (
    ({"act": "tanh"}, "there are gelu, quick_gelu, relu, silu"),
    ({"norm_eps": 0.0}, "norm_eps must be > 0"),
  ):
    with pytest.raises(ValueError, match=message):
      models.create("vit_b16", 3, **options)
  preact = models.create("preact_resnet18", 3, act="silu", norm_eps=1e-3)
  assert models.from_spec(models.to_spec(preact)) == preact
  with pytest.raises(ValueError, match="convnext_t has no option 'norm_eps'"):
    models.create("convnext_t", 3, norm_eps=1e-5)


@pytest.mark.parametrize("is_ours", [False, True])
def test_what_a_file_does_not_tell_is_said(is_ours, tmp_path):
  """A residual network's activation and eps, of the same tensors."""
  bundle, path = made("glyph_resnet"), tmp_path / "x.safetensors"
  convert.save(bundle, path, None if is_ours else "timm")
  both = {"mean": (0.5,), "std": (0.5,)}
  plain = convert.load(path, "glyph_resnet", **both)
  told = convert.load(path, "glyph_resnet", act="gelu", norm_eps=1e-3, **both)
  assert told.model == models.with_options(
    plain.model, act="gelu", norm_eps=1e-3
  )
  same(told, plain)
  images = np.random.default_rng(0).random((1, 8, 8, 1), np.float32)
  a, b = (
    jax.jit(x.model.logits)(x.params, x.stats, images) for x in (plain, told)
  )
  assert np.abs(a - b).max() > 1e-3
  convert.save(told, path)
  assert convert.load(path).model == told.model
  with pytest.raises(ValueError, match="did you mean 'relu'"):
    convert.load(path, act="rleu")


def words(**sizes):
  return [f"--config.backbone.{k}={v}" for k, v in sizes.items()]


VIT = words(name="vit", image_size=32, patch=4, width=24, depth=2, heads=3)
SWIN = words(
  name="swin", image_size=32, patch=2, width=8, depth="(1,2)", heads="(1,2)"
)


@pytest.mark.parametrize(
  "fields, count",
  [
    (VIT, size("vit", 10, image_size=32, patch=4, width=24, depth=2, heads=3)),
    (
      SWIN,
      size(
        "swin", 10, image_size=32, patch=2, width=8, depth=(1, 2), heads=(1, 2)
      ),
    ),
  ],
  ids=["vit", "swin"],
)
def test_a_config_says_the_sizes(fields, count, tmp_path):
  config = command_line.parse(["--config=cifar_roli", *fields]).config
  assert plan.outline(config)["total_params"] == count
  # A run's config comes back from its directory, to be overridden again.
  workdir.claim(tmp_path, config)
  again = command_line.parse(
    ["--mode=evaluate", f"--workdir={tmp_path}", "--config.num_images=7"]
  ).config
  assert again == {**config, "num_images": 7}


def test_convert_mode_is_told_the_heads(tmp_path):
  bundle, path = made("vit"), tmp_path / "x.pth"
  convert.save(bundle, path, "timm")
  words = (
    "--mode=convert", "--config=convert", f"--config.source={path}",
    f"--config.output={tmp_path / 'out'}",
  )  # fmt: skip
  refused = cli.run(*words)
  assert refused.returncode == 2 and "say heads=" in refused.stderr
  done = cli.run(*words, "--config.heads=2")
  assert done.returncode == 0, done.stderr
  again = convert.load(convert.find("vit", str(tmp_path / "out")))
  assert again.model == bundle.model
  same(again, bundle)
