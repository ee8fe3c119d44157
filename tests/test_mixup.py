"""Geodesic Multi-Modal Mixup: by hand, at its edges, and as the paper has it.

What is by hand is from the formulas at one ratio: a batch of two pairs, each a
quarter of a circle apart.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from roli_jax import keys
from roli_jax.clip import mixup

A = np.float32([[1, 0], [0, 1]])
B = np.float32([[0, 1], [-1, 0]])


def embeddings(n=6, d=5):
  rng = np.random.default_rng(0)
  return unit(rng.normal(size=(2, n, d))).astype(np.float32)


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def arc(a, b, ratio):
  """The definition, in NumPy."""
  angle = np.arccos((a * b).sum(-1, keepdims=True))
  parts = np.sin(ratio * angle) * a + np.sin((1 - ratio) * angle) * b
  return parts / np.sin(angle)


def soft(logits, targets):
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  return -(targets * log_p).sum(-1).mean()


def test_half_way_is_half_way():
  h = np.sqrt(0.5)
  np.testing.assert_allclose(
    mixup.slerp(A, B, 0.5), [[h, h], [-h, h]], atol=1e-7
  )
  turned = mixup.slerp(A, B, 1 / 3)  # of 90 degrees, 60 from the images
  np.testing.assert_allclose((turned * A).sum(-1), 0.5, atol=1e-6)


def test_the_ends_are_image_and_text():
  img, txt = embeddings()
  np.testing.assert_allclose(mixup.slerp(img, txt, 1), img, atol=1e-6)
  np.testing.assert_allclose(mixup.slerp(img, txt, 0), txt, atol=1e-6)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 1.0])
def test_mixtures_have_length_1(ratio):
  img, txt = embeddings(50, 3)
  near = unit(img + 1e-4 * txt)
  for other in (txt, img, near, -near):
    mixed = mixup.slerp(img, other, ratio)
    np.testing.assert_allclose(np.linalg.norm(mixed, axis=-1), 1, atol=1e-5)


@jax.jit
def probe(a, b, direction, ratio):
  def along(a, b):
    return (mixup.slerp(a, b, ratio) * direction).sum()

  return jax.value_and_grad(along, (0, 1))(a, b)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("off", [0, 1e-7, 1e-4, 1e-3, 1e-2])
def test_gradients_are_finite_at_equal_and_opposite_rows(sign, off, ratio):
  img, txt = embeddings()
  other = unit(sign * img + off * txt)
  value, grads = probe(img, other, txt, ratio)
  assert np.isfinite(value)
  assert np.isfinite(grads).all()


def test_equal_rows_stay_and_of_opposite_ones_the_nearer_is_kept():
  img, _ = embeddings()
  np.testing.assert_allclose(mixup.slerp(img, img, 0.3), img, atol=1e-6)
  np.testing.assert_allclose(mixup.slerp(img, -img, 0.7), img, atol=1e-6)
  np.testing.assert_allclose(mixup.slerp(img, -img, 0.3), -img, atol=1e-6)
  assert not mixup.slerp(img, -img, 0.5).any()


# Ratio 1/2: rows 0, -0.7071 and 0.7071, 0 for images; the signs turned for
# texts. Ratio 1: the mixtures are the images.
BY_HAND = {0.5: 1.5087738341, 1.0: np.log(2) + 0.8132616875,
           0.0: 0.8132616875 + np.log(2)}  # fmt: skip


@pytest.mark.parametrize("ratio", BY_HAND)
def test_the_loss_is_as_by_hand(ratio):
  loss = mixup.m2_mix(A, B, ratio, tau=1.0)
  assert loss == pytest.approx(BY_HAND[ratio], abs=1e-6)
  mean = mixup.m2_mix(A, B, ratio, tau=1.0, reduction="mean")
  assert mean == pytest.approx(BY_HAND[ratio] / 2, abs=1e-6)


def test_the_loss_is_the_papers():
  img, txt = (np.float64(x) for x in embeddings())
  mixed = arc(img, txt, 0.3)
  own = np.eye(6)
  expected = sum(
    soft((own * (img @ txt.T) + (1 - own) * (x @ mixed.T)) / 0.07, own)
    for x in (img, txt)
  )
  got = mixup.m2_mix(*embeddings(), 0.3)
  assert got == pytest.approx(expected, rel=1e-5)


def test_gradients_reach_the_mixtures():
  """Against finite differences in float64."""
  with jax.enable_x64(True):
    img, txt = (np.float64(x) for x in embeddings())
    step = np.random.default_rng(1).normal(size=img.shape)

    @jax.jit
    def loss(t):
      return mixup.m2_mix(img + t * step, txt, 0.3)

    got = jax.jit(jax.grad(loss))(0.0)
    expected = float(loss(1e-5) - loss(-1e-5)) / 2e-5
  assert got == pytest.approx(expected, rel=1e-6)


def test_pairs_of_one_class_are_no_negatives():
  img, txt = embeddings()
  labels = np.array([0, 1, 2, 0, 1, 2])
  same = labels[:, None] == labels[None]
  mixed = arc(np.float64(img), np.float64(txt), 0.4)
  expected = 0.0
  for x in (img, txt):
    for i in range(6):
      others = [x[i] @ mixed[j] for j in range(6) if labels[j] != labels[i]]
      logits = np.array([img[i] @ txt[i], *others]) / 0.07
      expected += (np.log(np.exp(logits).sum()) - logits[0]) / 6
  got = mixup.m2_mix(img, txt, 0.4, same=same)
  assert got == pytest.approx(expected, rel=1e-5)
  assert got < mixup.m2_mix(img, txt, 0.4)
  unlike = np.zeros((6, 6), bool)
  assert mixup.m2_mix(img, txt, 0.4, same=unlike) == pytest.approx(
    float(mixup.m2_mix(img, txt, 0.4)), rel=1e-6
  )


def test_a_batch_of_one_class_costs_nothing_and_its_gradient_is_zero():
  img, txt = embeddings()
  same = np.ones((6, 6), bool)
  loss = functools.partial(mixup.m2_mix, txt=txt, ratio=0.4, same=same)
  value, grads = jax.jit(jax.value_and_grad(loss))(img)
  assert value == 0 and not grads.any()


def test_a_batch_draws_one_ratio_from_its_key():
  img, txt = embeddings()
  key = keys.root(3)
  ratio = mixup.draw_ratio(key, 0.5)
  assert ratio.shape == () and 0 <= ratio <= 1
  assert mixup.m2_mix_loss(img, txt, key) == mixup.m2_mix(img, txt, ratio)
  losses = {float(mixup.m2_mix_loss(img, txt, keys.root(i))) for i in range(4)}
  assert len(losses) == 4


@pytest.mark.parametrize("beta", [0.2, 0.5, 2.0])
def test_ratios_are_of_a_symmetric_beta(beta):
  draws = jax.vmap(lambda key: mixup.draw_ratio(key, beta))(
    jax.random.split(keys.root(0), 4000)
  )
  assert draws.mean() == pytest.approx(0.5, abs=0.02)
  assert draws.var() == pytest.approx(1 / (4 * (2 * beta + 1)), rel=0.05)


def test_the_weight_falls_as_one_over_the_epoch():
  assert [mixup.weight_schedule(e) for e in (0, 1, 3)] == [1, 0.5, 0.25]


def test_losses_compile():
  img, txt = embeddings()
  loss = jax.jit(lambda x, key: mixup.m2_mix_loss(x, txt, key))
  assert loss(img, keys.root(0)) == pytest.approx(
    float(mixup.m2_mix_loss(img, txt, keys.root(0))), rel=1e-5
  )
  assert jnp.isfinite(jax.grad(loss)(img, keys.root(0))).all()


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: mixup.m2_mix(A, B, 0.5, tau=0.0), "tau must be > 0"),
    (lambda: mixup.m2_mix(A, B, 0.5, reduction="max"), "unknown reduction"),
    (lambda: mixup.m2_mix_loss(A, B, keys.root(0), beta=0.0), "beta must be"),
  ],
)
def test_what_makes_no_loss_is_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()
