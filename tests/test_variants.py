"""Variants of ViTs, and mobile networks, compute what their originals do."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from roli_jax import convert, keys, models, trees
from roli_jax.convert import state_dict
from roli_jax.models import Coatnet, Entry, Vit, heads
from tests import golden
from tests.covering import mostly_slow

RAW = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
SMALL = functools.partial(
  Vit, patch=8, width=64, depth=2, num_heads=2, hidden=256
)
CLIP = functools.partial(SMALL, clip=True, eps=1e-5)
# timm's but for the last; all that its names don't show is told.
VITS = {
  "deit3": functools.partial(SMALL, scaled=True, cls_positions=False),
  "distilled": functools.partial(SMALL, distilled=True),
  "reg": functools.partial(SMALL, registers=4, scaled=True),
  "reg_bare": functools.partial(SMALL, registers=4, cls_positions=False),
  "reg_avg": functools.partial(
    SMALL, cls=False, registers=4, cls_positions=False, pool="mean",
    fc_norm=True,
  ),
  "avg": functools.partial(SMALL, pool="mean", fc_norm=True),
  "clip_timm": CLIP,
  "clip_bare": functools.partial(
    CLIP, num_heads=1, act=models.ACTS["quick_gelu"]
  ),
}  # fmt: skip
# EVA-02, which names and shapes tell from other ViTs.
EVA = functools.partial(
  SMALL, hidden=170, pool="mean", fc_norm=True, eva=True, act=jax.nn.silu
)
EVAS = {
  "eva02": functools.partial(EVA, gate_norm=True),
  "eva02_fused": EVA,
}
# CoAtNets, of images of 64 x 64.
COAT = functools.partial(Coatnet, (1, 2, 2, 1), (16, 32, 64, 64), (8, 16))
COATS = {
  "coatnet": COAT,
  "coatnet_first": functools.partial(
    COAT, pooled=True, squeeze_first=True, squeeze_act=jax.nn.relu,
    shortcut_bias=False,
  ),
}  # fmt: skip
SMALLS = {**VITS, **EVAS, **COATS}
# Of full size, on images of 64 x 64, with the layouts of their names.
NETS = {
  "mobilenetv3": ("mobilenetv3_l", "mobilenetv3"),
  "lite0": ("efficientnet_lite0", "efficientnet"),
  "hf_b0": ("efficientnet_b0", "transformers_efficientnet"),
  "regnetx": ("regnetx_004", "regnet"),
}
FACTS = json.loads((golden.FOLDER / "variants" / "facts.json").read_text())


@pytest.fixture(autouse=True)
def small(monkeypatch):
  """The small ones are models too."""
  entries = {
    name: Entry(make, image_size=64 if name in COATS else 32)
    for name, make in SMALLS.items()
  }
  monkeypatch.setattr(models, "MODELS", {**models.MODELS, **entries})


def state_of(name):
  """The state dict that the original was given, and our model of it."""
  if name in NETS:
    name, layout = NETS[name]
    model = models.create(name, 1000, 64)
  else:
    layout = {
      "clip_timm": "clip_vit",
      "clip_bare": "open_clip_visual",
      **{name: name for name in (*EVAS, *COATS)},
    }.get(name, "vit")
    model = models.create(name, 10)
  if name == "distilled":
    model = dataclasses.replace(model, head=heads.Pair(10))
  if name == "clip_bare":
    model = dataclasses.replace(model, head=heads.projection(24))
  shapes = model.shapes()
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
  bundle = convert.Bundle(model, *zeros, layout)
  state = convert.to_state_dict(bundle, state_dict.format_of(bundle))
  values = {
    key: golden.value(key, state[key].shape, state[key].dtype.name)
    for key in sorted(state)
  }
  return model, values


@pytest.mark.parametrize("name", [*SMALLS, *NETS])
def test_names_and_parameters_are_the_originals(name):
  model, state = state_of(name)
  params, _ = model.shapes()
  assert FACTS[name] == {
    "tensors": len(state),
    "parameters": trees.size(params),
    "digest": golden.digest(state),
  }


@functools.partial(jax.jit, static_argnums=0)
def seen(model, params, stats, x):
  """Logits, features and some of the slope of the squared logits."""

  def loss(x):
    logits = model.logits(params, stats, x)
    return (logits**2).sum(), logits

  slope, logits = jax.grad(loss, has_aux=True)(x)
  features = model.features(params, stats, x)
  return {"logits": logits, "features": features, "slope": slope}


def of_original(name, model, params, stats):
  """Compares with the original's numbers, those of them that there are."""
  images = np.random.default_rng(5).random(
    (2, model.image_size, model.image_size, 3), np.float32
  )
  with jax.enable_x64(True):
    wide = jax.tree.map(np.float64, (params, stats))
    found = seen(model, *wide, np.float64(images))
  found["slope"] = found["slope"][:, 3::8, 5::8]
  gold = golden.arrays(name, "variants")
  for what in found.keys() & {key.removesuffix("_f64") for key in gold}:
    few = found[what] if what == "slope" else found[what][:, :24]
    np.testing.assert_allclose(few, gold[f"{what}_f64"], 0, 1e-9, err_msg=what)


@pytest.mark.parametrize(
  "name",
  mostly_slow(
    SMALLS, "deit3", "distilled", "reg_avg", "clip_bare", *EVAS, *COATS
  ),
)
def test_variants_are_the_originals(name):
  model, state = state_of(name)
  act = "quick_gelu" if name == "clip_bare" else None
  bundle = convert.load(state, name, act=act, **RAW)
  # What the names show is shown, whatever the model of that name has.
  assert bundle.model.backbone == model.backbone
  assert models.from_spec(models.to_spec(bundle.model)) == bundle.model
  of_original(name, bundle.model, bundle.params, bundle.stats)
  back = convert.to_state_dict(bundle, state_dict.format_of(bundle))
  assert back.keys() == state.keys()
  for key, tensor in state.items():
    np.testing.assert_array_equal(back[key], tensor, err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_mobile_networks_are_the_originals(name):
  _, state = state_of(name)
  bundle = convert.load(state, image_size=64, **RAW)
  assert bundle.model.name == NETS[name][0]
  of_original(name, bundle.model, bundle.params, bundle.stats)
  back = convert.to_state_dict(bundle, state_dict.format_of(bundle))
  assert back.keys() == state.keys()


def test_a_new_head_of_a_distilled_vit_becomes_its_two():
  """As `linear` writes it: one on both class tokens."""
  model = models.create("distilled", 3)
  params, stats = model.init(keys.root(0))
  params = dataclasses.replace(
    params, head={**params.head, "bias": np.arange(3, dtype=np.float32)}
  )
  state = convert.to_state_dict(convert.Bundle(model, params, stats), "timm")
  again = convert.load(state, "distilled", None, model.mean, model.std)
  assert isinstance(again.model.head, heads.Pair)
  x = np.random.default_rng(0).random((2, 32, 32, 3), np.float32)
  found = again.model.logits(again.params, again.stats, x)
  expected = model.logits(params, stats, x)
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_what_a_distilled_vit_can_not_be():
  model = models.create("distilled", 10)
  with pytest.raises(ValueError, match="two class tokens: pool=token"):
    models.with_options(model, pool="mean")
  params, stats = model.shapes()
  bundle = convert.Bundle(model, params, stats)
  with pytest.raises(ValueError, match="torchvision has no names"):
    convert.to_state_dict(bundle, "torchvision")


def test_heads_of_other_widths_are_not_googles(tmp_path):
  model = models.create("avg", 5)
  model = dataclasses.replace(model, backbone=SMALL(width=64))
  bundle = convert.Bundle(model, *model.shapes())
  with pytest.raises(ValueError, match="64 channels a head; this avg has 32"):
    convert.to_state_dict(bundle, "google")


def test_googles_files_have_its_names_and_shapes(tmp_path):
  """Those that its vision_transformer writes; the heads are of 64 channels."""
  wide = functools.partial(SMALL, width=128)
  models.MODELS["google"] = Entry(wide, image_size=32)
  model = models.create("google", 5)
  rng = np.random.default_rng(0)
  params, _ = jax.tree.map(
    lambda x: rng.standard_normal(x.shape, np.float32),
    model.shapes(),
  )
  convert.save(convert.Bundle(model, params, {}), tmp_path / "x.npz", "google")
  block = "Transformer/encoderblock_1"
  with np.load(tmp_path / "x.npz", allow_pickle=False) as file:
    attention = f"{block}/MultiHeadDotProductAttention_1"
    assert file[f"{attention}/query/kernel"].shape == (128, 2, 64)
    assert file[f"{attention}/value/bias"].shape == (2, 64)
    assert file[f"{attention}/out/kernel"].shape == (2, 64, 128)
    assert file[f"{block}/MlpBlock_3/Dense_0/kernel"].shape == (128, 256)
    assert file["head/kernel"].shape == (128, 5)
    assert len(file.files) == 40
  again = convert.load(tmp_path / "x.npz", "google")
  assert (
    again.coverage.layout == "google_vit" and again.model.mean == (0.5,) * 3
  )
  for path, leaf in trees.paths(params).items():
    np.testing.assert_array_equal(trees.paths(again.params)[path], leaf)
