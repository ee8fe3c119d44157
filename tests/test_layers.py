"""Layers against their definitions, with all their gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from roli_jax import keys, models
from roli_jax.models import conv, layers


def normal(seed, *shape):
  return jax.random.normal(keys.root(seed), shape)


def definition(q, k, v, bias):
  """softmax(q k^T / sqrt(c) + bias) v, as it is written."""
  scores = jnp.einsum("...qhc,...khc->...hqk", q, k) / q.shape[-1] ** 0.5
  weights = jnp.exp(scores + bias)
  weights = weights / weights.sum(-1, keepdims=True)
  return jnp.einsum("...hqk,...khc->...qhc", weights, v)


@pytest.mark.parametrize("windows", [(), (3,)])
@pytest.mark.parametrize("bias", [(1, 1), (2, 5)])
@pytest.mark.parametrize("kind", ["plain", "looped"])
def test_attention_and_its_derivatives_are_the_definitions(kind, windows, bias):
  shape = (4, *windows, 5, 2, 6)
  bias = (1,) * (1 + len(windows)) + (bias[0], bias[1], bias[1])
  arrays = [normal(i, *shape) for i in range(3)] + [normal(3, *bias)]

  def loss(attend, *arrays):
    return jnp.sin(attend(*arrays)).sum()

  def second(attend, *arrays):
    grad = jax.grad(functools.partial(loss, attend))
    return jax.jvp(lambda q: grad(q, *arrays[1:]), arrays[:1], arrays[1:2])[1]

  with jax.enable_x64(True):
    wide = [np.asarray(x, np.float64) for x in arrays]
    ours, theirs = layers.ATTENTIONS[kind], definition
    np.testing.assert_allclose(ours(*wide), theirs(*wide), atol=1e-12)
    grads = [
      jax.grad(functools.partial(loss, of), (0, 1, 2, 3))(*wide)
      for of in (ours, theirs)
    ]
    for got, expected in zip(*grads, strict=True):
      np.testing.assert_allclose(got, expected, atol=1e-12)
    np.testing.assert_allclose(
      second(ours, *wide), second(theirs, *wide), atol=1e-12
    )


@pytest.mark.parametrize("kind", ["plain", "xla", "looped"])
def test_all_attentions_agree_in_half_precision(kind):
  exact = [normal(i, 2, 7, 2, 8) for i in range(3)]
  half = [x.astype(jnp.bfloat16) for x in exact]

  def loss(*arrays):
    return (layers.ATTENTIONS[kind](*arrays).astype(jnp.float32) ** 2).sum()

  got = jax.grad(loss, (0, 1, 2))(*half)
  expected = jax.grad(loss, (0, 1, 2))(*exact)
  for ours, theirs in zip(got, expected, strict=True):
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(
      ours.astype(np.float32), theirs, atol=0.05 * np.abs(theirs).max()
    )


@pytest.mark.parametrize("tokens", [16, 17])
def test_fused_attention_takes_odd_tokens_in_its_gradient(tokens, monkeypatch):
  """Traced as for a GPU with cuDNN, whose conditions are checked; not run."""
  from jax._src.cudnn import fused_attention_stablehlo as cudnn

  monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
  monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
  shapes = [jax.ShapeDtypeStruct((2, tokens, 2, 64), jnp.bfloat16)] * 3

  def loss(*arrays):
    return layers.fused_attention(*arrays).astype(jnp.float32).sum()

  grads = jax.eval_shape(jax.grad(loss, (0, 1, 2)), *shapes)
  assert [x.shape for x in grads] == [shapes[0].shape] * 3


@pytest.mark.parametrize("name", ["glyph_vit_token", "glyph_swin"])
def test_a_backbone_that_attends_by_head_is_the_same(name):
  plain = models.create(name, 2)
  looped = models.with_options(plain, attention="looped")
  variables = plain.init(keys.root(0))
  x = jnp.abs(normal(0, 3, 8, 8, 1))

  def gradient(model):
    loss = lambda x: jnp.sin(model.logits(*variables, x)).sum()  # noqa: E731
    return jax.jit(jax.grad(loss))(x)

  with jax.enable_x64(True):
    variables, x = jax.tree.map(
      lambda leaf: np.asarray(leaf, np.float64), (variables, x)
    )
    expected = gradient(plain)
    np.testing.assert_allclose(
      gradient(looped), expected, atol=1e-12 * np.abs(expected).max()
    )


def test_a_swin_takes_the_attentions_that_have_a_bias():
  with pytest.raises(ValueError, match="attention of glyph_swin"):
    models.create("glyph_swin", 2, attention="fused")


def test_fused_attention_says_that_it_wants_half_precision():
  model = models.create("glyph_vit_token", 2, attention="fused")
  with pytest.raises(ValueError, match="set the model's dtype to bfloat16"):
    model.shapes()


def test_gelu_and_its_derivatives_are_exact():
  x = np.linspace(-8, 8, 401)
  below = (1 + special.erf(x / np.sqrt(2))) / 2
  density = np.exp(-x * x / 2) / np.sqrt(2 * np.pi)
  with jax.enable_x64(True):
    derivative = jax.vmap(jax.grad(layers.gelu))
    second = jax.vmap(jax.grad(jax.grad(layers.gelu)))
    np.testing.assert_allclose(layers.gelu(x), x * below, atol=1e-14)
    np.testing.assert_allclose(derivative(x), below + x * density, atol=1e-14)
    np.testing.assert_allclose(second(x), (2 - x * x) * density, atol=1e-14)
  narrow = layers.gelu(jnp.asarray(x, jnp.float32))
  np.testing.assert_allclose(narrow, x * below, atol=1e-6)


@pytest.mark.parametrize(
  "size, channels, stride, same",
  [
    (3, 20, 1, False),
    (3, 20, 2, False),
    (3, 20, 2, True),
    (3, 3, 1, False),
    (7, 3, 2, False),
  ],
)
def test_convolutions_by_products_are_convolutions(
  size, channels, stride, same
):
  x = normal(0, 2, 9, 12, channels)
  kernel = normal(1, size, size, channels, 8)

  def expected(x, kernel):
    pads = "SAME" if same else [(size // 2, size // 2)] * 2
    return jax.lax.conv_general_dilated(
      x, kernel, (stride, stride), pads,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip

  for convolve in (conv._convolve, conv._convolve_by_products):
    ours = functools.partial(convolve, (stride, same))
    same_with_gradients(ours, expected, x, kernel)


def test_a_depthwise_convolution_is_one():
  x, kernel = normal(0, 2, 9, 12, 4), normal(1, 7, 7, 1, 4)

  def expected(x, kernel):
    return jax.lax.conv_general_dilated(
      x, kernel, (1, 1), [(3, 3)] * 2, feature_group_count=4,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip

  same_with_gradients(conv._depthwise_conv, expected, x, kernel)


def same_with_gradients(ours, theirs, *arrays):
  np.testing.assert_allclose(ours(*arrays), theirs(*arrays), atol=1e-4)
  got, expected = (
    jax.jit(
      jax.grad(lambda *arrays, of=of: jnp.sin(of(*arrays)).sum(), (0, 1))
    )(*arrays)
    for of in (ours, theirs)
  )
  for a, b in zip(got, expected, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-4)
