"""What every backbone promises, on the toy of each family."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from roli_jax import convert, models, trees
from tests.covering import covering, mostly_slow

TOYS = [name for name in models.MODELS if name.startswith("glyph")]
# By batch.
NORMALISED = [
  "glyph_resnet",
  "glyph_wrn",
  "glyph_preact",
  "glyph_mobile",
  "glyph_regnet",
  "glyph_xcit",
  "glyph_coatnet",
]
# The formats that have names for each family.
FORMATS = [
  ("glyph_vit_token", "timm"),
  ("glyph_vit_token", "ares"),
  ("glyph_vit_token", "torchvision"),
  ("glyph_vit_token", "roli"),
  ("glyph_clip", "open_clip"),
  ("glyph_clip", "timm"),
  ("glyph_swin", "timm"),
  ("glyph_swin", "microsoft"),
  ("glyph_swin", "roli"),
  ("glyph_convnext", "timm"),
  ("glyph_convnext", "meta"),
  ("glyph_vit_stem", "timm"),
  ("glyph_convnext_stem", "timm"),
  ("glyph_xcit", "timm"),
  ("glyph_xcit", "meta"),
  ("glyph_resnet", "timm"),
  ("glyph_resnet", "torchvision"),
  ("glyph_wrn", "robustbench"),
  ("glyph_preact", "robustbench"),
  ("glyph_deit", "timm"),
  ("glyph_eva", "timm"),
  ("glyph_coatnet", "timm"),
  ("glyph_mobile", "timm"),
  ("glyph_regnet", "timm"),
]


def images(n=8):
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.uniform(size=(n, 8, 8, 1)), jnp.float32)


@functools.cache
def made(name):
  """A model whose arrays are far from their starts, and the arrays."""
  model = models.create(name, 3)
  shapes = model.shapes()
  rng = np.random.default_rng(1)

  def drawn(path, leaf):
    noise = rng.standard_normal(leaf.shape).astype(np.float32)
    if path.endswith(("scale", "gamma", "var")):
      return 1 + noise / 10
    return noise / np.float32(max(leaf.size // leaf.shape[-1], 9) ** 0.5)

  return model, *trees.map_named(drawn, shapes)


def close(got, expected, error=2e-5):
  """Each leaf to an error, relative to its largest value where that is > 1."""
  for path, leaf in trees.paths(expected).items():
    atol = error * max(1, np.abs(leaf).max())
    np.testing.assert_allclose(
      trees.paths(got)[path], leaf, 0, atol, err_msg=path
    )


@functools.partial(jax.jit, static_argnums=0)
def seen(model, params, stats):
  """Features, and the gradient of their squares by parameters and images."""

  def loss(params, x):
    features = model.features(params, stats, x)
    return (features**2).sum(), features

  grads, features = jax.grad(loss, (0, 1), has_aux=True)(params, images())
  return {"out": features, "grad": grads}


@functools.cache
def plainly_seen(name):
  return seen(*made(name))


# Each by itself on two families, both at once on all.
@pytest.mark.parametrize(
  "name, option",
  covering(
    [
      *itertools.product(("glyph_swin", "glyph_vit"), ("scan", "remat")),
      *((name, "both") for name in TOYS),
    ],
    among=("glyph_swin", "glyph_vit"),
  ),
)
def test_options_of_speed_change_no_number_and_no_name(name, option):
  model, params, stats = made(name)
  on = ("scan", "remat") if option == "both" else (option,)
  other = models.with_options(model, **dict.fromkeys(on, True))
  again, _ = other.shapes()
  trees.check_same(again, params, name)

  close(seen(other, params, stats), plainly_seen(name))


@pytest.mark.parametrize("name", mostly_slow(TOYS, "glyph_wrn"))
def test_eight_devices_see_what_one_sees(name):
  model, params, stats = made(name)
  see = jax.jit(model.logits)
  mesh = Mesh(np.array(jax.devices()), ("data",))
  spread = jax.device_put(images(), NamedSharding(mesh, PartitionSpec("data")))
  everywhere = jax.device_put(
    (params, stats), NamedSharding(mesh, PartitionSpec())
  )
  got = jax.block_until_ready(see(*everywhere, spread))
  close(got, see(params, stats, images()))


@pytest.mark.parametrize("name", mostly_slow(TOYS, "glyph_vit"))
def test_half_precision_errs_by_less_than_two_percent(name):
  """Of the features' size, at bfloat16's 8 bits; parameters stay float32."""
  model, params, stats = made(name)
  half = models.with_options(model, dtype="bfloat16")
  exact = jax.jit(model.features)(params, stats, images())
  got = jax.jit(half.features)(params, stats, images())
  assert got.dtype == jnp.float32
  error = np.sqrt(np.mean((got - exact) ** 2) / np.mean(exact**2))
  assert 0 < error < 0.02
  gradient = jax.grad(lambda p: half.logits(p, stats, images()).sum())
  grads = jax.eval_shape(gradient, params)
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(grads))


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(
  "name", mostly_slow(NORMALISED, "glyph_resnet", "glyph_wrn")
)
def test_statistics_move_where_they_are_told_to(name, scan):
  model, params, stats = made(name)
  moves = models.with_options(model, updates_stats=True, scan=scan)
  for told, train in ((model, True), (moves, False)):
    _, after = told(params, stats, images(), train=train)
    close(after, stats, error=0)
  logits, after = jax.jit(lambda: moves(params, stats, images(), train=True))()
  before = trees.paths(stats)
  assert trees.paths(after).keys() == before.keys()
  assert all((x != before[k]).any() for k, x in trees.paths(after).items())
  plain = models.with_options(moves, scan=False)
  expected = plain(params, stats, images(), train=True)
  close((logits, after), expected, 1e-4)


def test_a_batch_moves_statistics_by_a_tenth():
  """0.9 of the old and 0.1 of the batch's own: PyTorch's momentum of 0.1."""
  model, params, stats = made("glyph_resnet")
  stem = model.outputs(params, stats, images())["stem"]
  moves = models.with_options(model, updates_stats=True)
  _, after = moves(params, stats, images(), train=True)
  mean = 0.9 * stats["stem_norm"]["mean"] + 0.1 * stem.mean((0, 1, 2))
  np.testing.assert_allclose(after["stem_norm"]["mean"], mean, atol=1e-5)


@pytest.mark.parametrize("name", mostly_slow(TOYS, "glyph_vit", "glyph_wrn"))
def test_curvature_can_be_asked_for(name):
  model, *variables = made(name)
  params, stats = jax.device_put(variables)

  def loss(x):
    return (model.logits(params, stats, x) ** 2).sum()

  def along(x):
    return jax.jvp(jax.grad(loss), (x,), (jnp.ones_like(x),))[1]

  assert np.isfinite(jax.jit(along)(images(2))).all()


@pytest.mark.parametrize(
  "name",
  mostly_slow(TOYS, *{*TOYS} - {"glyph_vit_stem", "glyph_convnext_stem"}),
)
def test_outputs_are_named_by_their_modules(name):
  model, params, stats = made(name)
  model = models.with_options(model, scan=True)
  outputs = jax.jit(model.outputs)(params, stats, images(2))
  close(outputs[""], jax.jit(model.features)(params, stats, images(2)))
  assert any(path.endswith("block1") for path in outputs)


@pytest.mark.parametrize("name, format", FORMATS)
def test_a_state_dict_comes_back_and_forth(name, format, tmp_path):
  model, params, stats = made(name)
  if format == "open_clip":
    head = models.heads.projection(3)
    model = dataclasses.replace(model, head=head)
    params = dataclasses.replace(params, head={"kernel": np.ones((32, 3))})
  bundle = convert.Bundle(model, params, stats)
  for suffix in (".safetensors", ".pth"):
    path = tmp_path / f"x{suffix}"
    convert.save(bundle, path, format)
    told = (model.mean, model.std)
    again = convert.load(path, name, format, *told)
    assert again.model == model
    close((again.params, again.stats), (params, stats), error=0)
    assert not again.coverage.dropped and not again.coverage.resampled
