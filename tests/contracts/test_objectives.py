"""What every objective and surrogate promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from roli_jax import losses

LABELS = np.array([0, 1, 2, 1], np.int32)


def logits(seed, scale=1.0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(scale * rng.normal(size=(4, 3)), jnp.float32)


@pytest.fixture(params=losses.OBJECTIVES)
def objective(request):
  return losses.OBJECTIVES[request.param]()


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_values_and_gradients_are_finite(objective, scale):
  def total(clean, adv):
    return objective(clean=clean, adv=adv, labels=LABELS).sum()

  value, grads = jax.value_and_grad(total, (0, 1))(
    logits(0, scale), logits(1, scale)
  )
  assert np.isfinite(value) and all(np.isfinite(g).all() for g in grads)


def test_without_an_attack_it_is_cross_entropy(objective):
  if isinstance(objective, losses.Mart):
    return  # it asks for a margin: see its own test
  same = logits(0)
  value = objective(clean=same, adv=same, labels=LABELS)
  expected = losses.cross_entropy(same, LABELS)
  np.testing.assert_allclose(value, expected, atol=1e-6)


def test_each_image_has_a_loss_of_its_own(objective):
  clean, adv = logits(0), logits(1)
  whole = objective(clean=clean, adv=adv, labels=LABELS)
  first = objective(clean=clean[:2], adv=adv[:2], labels=LABELS[:2])
  np.testing.assert_allclose(whole[:2], first, rtol=1e-6)


def test_its_surrogate_is_one_that_attacks_know(objective):
  assert objective.surrogate in losses.SURROGATES
  assert objective.adversarial in (0.0, 0.5, 1.0)


def test_trades_on_two_classes_is_the_hand_computed_value():
  clean = jnp.log(jnp.array([[0.5, 0.5]]))
  adv = jnp.log(jnp.array([[0.25, 0.75]]))
  value = losses.Trades(beta=1.0)(
    clean=clean, adv=adv, labels=np.array([0], np.int32)
  )
  np.testing.assert_allclose(value, [0.8369882167], rtol=1e-6)


def test_mart_on_two_classes_is_the_hand_computed_value():
  clean = jnp.log(jnp.array([[0.5, 0.5], [0.9, 0.1]]))
  adv = jnp.log(jnp.array([[0.25, 0.75], [0.25, 0.75]]))
  values = losses.Mart(beta=2.0)(
    clean=clean, adv=adv, labels=np.array([0, 0], np.int32)
  )
  bce = np.log(4) - np.log(1.0001 - 0.75)
  kl = [
    0.1438410362,
    0.9 * np.log(0.9 / 0.25) + 0.1 * np.log(0.1 / 0.75),
  ]
  expected = [bce + 2 * 0.5 * kl[0], bce + 2 * 0.1 * kl[1]]
  np.testing.assert_allclose(values, expected, rtol=1e-5)


@pytest.mark.parametrize("make", [losses.Trades, losses.Mart])
def test_a_negative_weight_is_refused(make):
  with pytest.raises(ValueError, match="beta"):
    make(beta=-1.0)


def test_margin_is_positive_exactly_where_misclassified():
  values = logits(3)
  wrong = ~np.asarray(losses.correct(values, LABELS))
  np.testing.assert_array_equal(losses.margin(values, LABELS) > 0, wrong)


def test_a_tie_goes_to_the_lower_class_and_nan_is_never_correct():
  values = jnp.array([[1.0, 1.0], [1.0, 1.0], [jnp.nan, 0.0], [jnp.inf, 0.0]])
  labels = np.array([0, 1, 0, 0], np.int32)
  assert losses.correct(values, labels).tolist() == [True, False, False, False]


def test_kl_is_zero_only_where_the_two_agree():
  a, b = logits(0), logits(1)
  np.testing.assert_allclose(losses.kl(a, a), 0, atol=1e-7)
  assert (losses.kl(a, b) > 0).all()


@pytest.mark.parametrize("name", ["ce", "margin"])
def test_what_attacks_climb_grows_with_their_loss(name):
  surrogate = losses.SURROGATES[name]
  values = np.asarray(surrogate.climb(logits(5), LABELS))
  loss = np.asarray(surrogate.loss(jnp.asarray(values)))
  np.testing.assert_array_equal(np.argsort(values), np.argsort(loss))


def test_log_odds_climb_cross_entropy():
  values = losses.log_odds(logits(5), LABELS)
  np.testing.assert_allclose(
    jax.nn.softplus(values), losses.cross_entropy(logits(5), LABELS), rtol=1e-5
  )

  def direction(loss):
    grads = jax.grad(lambda x: loss(x, LABELS).sum())(logits(5))
    return grads / jnp.linalg.norm(grads, axis=1, keepdims=True)

  np.testing.assert_allclose(
    direction(losses.log_odds), direction(losses.cross_entropy), atol=1e-5
  )


def test_log_odds_have_a_gradient_where_cross_entropy_has_none():
  huge, labels = jnp.array([[300.0, 0.0, 1.0]]), np.zeros(1, np.int32)

  def steepness(loss):
    return float(jnp.abs(jax.grad(lambda x: loss(x, labels).sum())(huge)).max())

  assert steepness(losses.cross_entropy) == 0 < steepness(losses.log_odds)
