"""Models: their leaves, their sizes, and what they do with images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from roli_jax import keys, models, trees

BLOCK = {
  "attn/k/bias": (64,),
  "attn/k/kernel": (64, 64),
  "attn/out/bias": (64,),
  "attn/out/kernel": (64, 64),
  "attn/q/bias": (64,),
  "attn/q/kernel": (64, 64),
  "attn/v/bias": (64,),
  "attn/v/kernel": (64, 64),
  "mlp/fc1/bias": (256,),
  "mlp/fc1/kernel": (64, 256),
  "mlp/fc2/bias": (64,),
  "mlp/fc2/kernel": (256, 64),
  "norm1/bias": (64,),
  "norm1/scale": (64,),
  "norm2/bias": (64,),
  "norm2/scale": (64,),
}
REST = {
  "embed/bias": (64,),
  "embed/kernel": (2, 2, 1, 64),
  "norm/bias": (64,),
  "norm/scale": (64,),
  "positions": (1, 16, 64),
}


@pytest.fixture(scope="module")
def model():
  return models.create("glyph_vit", num_classes=10)


@pytest.fixture(scope="module")
def params(model):
  return model.init(keys.root(0))[0]


def images(n=4, side=8):
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.uniform(size=(n, side, side, 1)), jnp.float32)


def test_leaf_paths_are_api(params):
  expected = {
    f"block{i}/{name}": shape for i in range(4) for name, shape in BLOCK.items()
  } | REST
  got = {k: v.shape for k, v in trees.paths(params.backbone).items()}
  assert got == expected
  assert trees.size(params.backbone) == 201_408
  assert trees.paths(params.head).keys() == {"kernel", "bias"}


def test_the_forward_pass_is_the_papers(model, params):
  """ViT's equations in NumPy, float64."""
  leaves = {k: np.float64(v) for k, v in trees.paths(params).items()}

  def dense(x, name):
    kernel = leaves[f"{name}/kernel"]
    return x @ kernel + leaves[f"{name}/bias"]

  def norm(x, name):
    scaled = (x - x.mean(-1, keepdims=True)) / np.sqrt(
      x.var(-1, keepdims=True) + 1e-6
    )
    return scaled * leaves[f"{name}/scale"] + leaves[f"{name}/bias"]

  def gelu(x):
    from scipy import special

    return x * (1 + special.erf(x / np.sqrt(2))) / 2

  x = (np.float64(images()) - 0.35) / 0.39
  patches = x.reshape(4, 4, 2, 4, 2, 1).swapaxes(2, 3).reshape(4, 16, 4)
  kernel = leaves["backbone/embed/kernel"].reshape(4, 64)
  x = patches @ kernel + leaves["backbone/embed/bias"]
  x = x + leaves["backbone/positions"]
  for i in range(4):
    at = f"backbone/block{i}"
    y = norm(x, f"{at}/norm1")
    q, k, v = (
      dense(y, f"{at}/attn/{c}").reshape(4, 16, 4, 16).swapaxes(1, 2)
      for c in "qkv"
    )
    weights = np.exp(q @ k.swapaxes(2, 3) / 4)
    weights /= weights.sum(-1, keepdims=True)
    mixed = (weights @ v).swapaxes(1, 2).reshape(4, 16, 64)
    x = x + dense(mixed, f"{at}/attn/out")
    y = norm(x, f"{at}/norm2")
    x = x + dense(gelu(dense(y, f"{at}/mlp/fc1")), f"{at}/mlp/fc2")
  features = norm(x, "backbone/norm").mean(1)
  np.testing.assert_allclose(
    model.features(params, {}, images()), features, atol=2e-5
  )
  np.testing.assert_allclose(
    model.logits(params, {}, images()), dense(features, "head"), atol=1e-4
  )


def test_a_patch_embedding_is_a_convolution(params):
  kernel = params.backbone["embed"]["kernel"]
  expected = jax.lax.conv_general_dilated(
    images(), kernel, (2, 2), "VALID",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )  # fmt: skip
  embed = models.vit.layers.PatchEmbed(2, 64)
  got = embed.apply({"params": params.backbone["embed"]}, images())
  np.testing.assert_allclose(got.reshape(expected.shape), expected, atol=1e-5)


def test_a_seeds_head_is_the_same_on_any_backbone(model):
  narrow = models.Vit(patch=4, width=64, depth=1, num_heads=1, hidden=8)
  other = models.Model(**{**vars(model), "backbone": narrow})
  a, b = (m.init(keys.root(3))[0].head for m in (model, other))
  np.testing.assert_array_equal(a["kernel"], b["kernel"])


def test_head_inits_are_as_named():
  for init, std, bias in (
    ("kaiming_fan_out", np.sqrt(2 / 100), -np.log(99)),
    ("small", 0.02, 0.0),
  ):
    model = models.create("glyph_vit", num_classes=100, head_init=init)
    head = model.init(keys.root(0))[0].head
    assert np.std(head["kernel"]) == pytest.approx(std, rel=0.05)
    np.testing.assert_allclose(head["bias"], bias, rtol=1e-6)


def test_images_of_another_size_are_resized_inside(model, params):
  large = images(side=20)
  inside = jax.image.resize(large, (4, 8, 8, 1), "linear", antialias=False)
  np.testing.assert_allclose(
    model.logits(params, {}, large),
    model.logits(params, {}, inside),
    atol=1e-5,
  )
  grads = jax.grad(lambda x: model.logits(params, {}, x).sum())(large)
  assert grads.shape == large.shape


def test_equal_models_share_their_programs(model):
  from roli_jax import ensembles, step
  from roli_jax.evaluate import tracing

  again = models.create("glyph_vit", num_classes=10)
  assert again == model and hash(again) == hash(model)
  predicts = step.make_predict(model), step.make_predict(again)
  assert predicts[0] == predicts[1]
  variables = model.init(keys.root(0))
  for fns, params in (
    (predicts, variables),
    (
      [ensembles.output_space(fn, fn) for fn in predicts],
      (variables, variables, 0.5),
    ),
  ):
    one, two = (tracing.programs(fn, params, (8, 8, 8, 1)) for fn in fns)
    assert one is two


def test_a_description_makes_the_model_again(model):
  assert models.from_spec(models.to_spec(model)) == model


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: models.create("glyph_vti", 10), "did you mean 'glyph_vit'"),
    (lambda: models.create("glyph_vit", 1), "2 classes"),
    (lambda: models.create("glyph_vit", 10, head_init="big"), "small"),
    (
      lambda: models.create("glyph_vit", 10, image_size=9).init(keys.root(0)),
      "tile",
    ),
  ],
)
def test_models_that_can_not_be_are_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()
