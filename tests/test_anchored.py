"""FTP, SPD, DiGraP and L2-SP: the authors' numbers, layouts, bad input.

The tables of FTP and SPD were made by the authors' optimizers in float64, that
of DiGraP by the author's pre-release one (torch 2.14), from a zero anchor.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from roli_jax import optim, trees
from roli_jax.optim import anchor


@pytest.fixture(params=["float64", "float32"])
def precision(request):
  """The dtype, and the tolerance of golden numbers in it."""
  with jax.enable_x64(request.param == "float64"):
    yield request.param, {"float64": 1e-12, "float32": 1e-5}[request.param]


def run(tx, gradients, shape, dtype):
  """The weights after each step from zero, and the states."""
  params = {"kernel": jnp.zeros(shape, dtype)}
  state, out = tx.init(params), []
  for g in gradients:
    grads = {"kernel": jnp.asarray(g, dtype).reshape(shape)}
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    out.append((np.asarray(params["kernel"]), state))
  return out


A, B = (3, 4), (-3, -4)

# Of each step: the radius, and the first weight.
FTP = {
  1.0: (
    (1e-8, -4.2857142e-09),
    (0.00744137820621, -0.00318916204),
    (0.00698955580999, 0.00299552388),
    (0.01004426603627, 0.00430468538),
  ),
  0.0: (
    (1e-8, -4.2857142e-09),
    (0.00744137820621, -0.00318916204),
    (0.01319357739, None),
    (0.0206349456, None),
  ),
}


@pytest.mark.parametrize("k", FTP)
def test_ftp_has_the_authors_radii_and_weights(k, precision):
  dtype, tolerance = precision
  steps = run(optim.ftp(optax.sgd(0.1), k=k), [A, A, B, B], (2, 1), dtype)
  for (weights, state), (radius, first) in zip(steps, FTP[k], strict=True):
    # Half of the last digit that the table has, at least.
    digits = 5e-15 if radius in (r for r, _ in FTP[1.0]) else 5e-12
    np.testing.assert_allclose(
      state.radius["kernel"], radius, rtol=tolerance, atol=digits
    )
    if first is not None:
      np.testing.assert_allclose(weights[0], first, rtol=tolerance, atol=5e-12)


def test_ftp_by_hand_in_the_second_step():
  with jax.enable_x64(True):
    steps = run(optim.ftp(optax.sgd(0.1)), [A, A], (2, 1), "float64")
    first = 2.5 / 0.7
    m, v = 0.1 * -first, 0.001 * first**2
    slope = (m / (1 - 0.9**2)) / (np.sqrt(v / (1 - 0.999**2)) + 1e-8)
    np.testing.assert_allclose(
      steps[1][1].radius["kernel"], 1e-8 - 0.01 * slope, rtol=1e-7
    )
    np.testing.assert_allclose(
      steps[1][0].ravel(), (-0.00318916204, -0.00425221606), rtol=1e-9
    )


def test_ftp_lets_a_step_through_that_stays_inside():
  with jax.enable_x64(True):
    (first, _), (second, state) = run(
      optim.ftp(optax.sgd(1e-4)), [A, A], (2, 1), "float64"
    )
    np.testing.assert_allclose(state.radius["kernel"], 7.0002e-4, rtol=1e-6)
    np.testing.assert_allclose(second, first - 1e-4 * np.array([[3], [4]]))


def test_ftp_measures_each_row_by_itself():
  with jax.enable_x64(True):
    both = np.array([A, (0, 1)]).T  # rows of PyTorch are columns of Flax
    (first, _), (second, state) = run(
      optim.ftp(optax.sgd(1e-3)), [both, both], (2, 2), "float64"
    )
    np.testing.assert_allclose(state.radius["kernel"], 0.0070000200, rtol=1e-8)
    np.testing.assert_allclose(second[:, 1], first[:, 1] - [0, 1e-3])


def test_ftp_without_a_ball_is_the_inner_optimizer():
  rng = np.random.default_rng(0)
  gradients = rng.normal(size=(5, 2, 3))
  plain = run(optax.adamw(0.1), gradients, (2, 3), "float32")
  free = optim.ftp(optax.adamw(0.1), gamma_init=float("inf"))
  held = run(free, gradients, (2, 3), "float32")
  for (a, _), (b, _) in zip(plain, held, strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
  "lam, second, expected",
  [
    (0.0, -0.1, -0.15926484959),
    (0.5, -0.1, -0.12963242430),
    (1.0, -0.1, -0.09999999900),
    (2.0, -0.1, -0.04073514841),
    (1.0, 0.1, -0.17408106224),  # descent leads on
    (1.0, -10.0, -0.03261927845),  # the step itself contracts
  ],
)
def test_spd_has_the_authors_numbers(lam, second, expected, precision):
  dtype, tolerance = precision
  tx = optim.spd(optax.adam(0.1), lam=lam)
  *_, (weights, _) = run(tx, [1.0, second], (1, 1), dtype)
  np.testing.assert_allclose(
    weights, [[expected]], rtol=tolerance, atol=max(tolerance, 5e-12)
  )


def test_spd_leaves_a_tensor_as_far_as_it_was():
  with jax.enable_x64(True):
    rng = np.random.default_rng(1)
    gradients = [rng.normal(size=(3, 2))]
    gradients.append(-0.1 * gradients[0])  # leads back, momentum leads on
    (first, _), (second, _) = run(
      optim.spd(optax.adam(0.1)), gradients, (3, 2), "float64"
    )
    np.testing.assert_allclose(
      np.linalg.norm(first), np.linalg.norm(second), rtol=1e-12
    )


def test_spd_can_have_a_strength_for_each_leaf_and_norms_of_rows():
  params = {"a": jnp.ones((2, 2)), "b": jnp.ones(3)}
  tx = optim.spd(optax.sgd(0.1), lam={"a": 0.0, "b": 1.0}, norm="mars")
  state = tx.init(params)
  now, _ = tx.update(params, state, params)
  assert jax.tree.structure(now) == jax.tree.structure(params)


DIGRAP = [
  ((1, 1), (1, 1), (-1, -1), (-1, -1), (1, 1), (1, 1)),
  ((1, 0), (1, 0.5), (-1, 0.5), (1, 0.5), (1, 0.5)),
]


@pytest.mark.parametrize("normalize", ["tensor", "row"])
def test_digrap_has_the_pre_release_numbers(normalize):
  """Of one row, where both cosines agree."""
  with jax.enable_x64(True):
    tx = optax.chain(optim.digrap(mu=0.5, normalize=normalize), optax.adam(0.1))
    steps = run(tx, DIGRAP[0], (2, 1), "float64")
    omegas = [float(state[0].omega["kernel"]) for _, state in steps]
    np.testing.assert_allclose(
      omegas,
      (0, 0, 0.31940679417, 0.29885566575, 0.44222429846, 0.41858073977),
      atol=2e-8,
    )
    np.testing.assert_allclose(
      [weights[0, 0] for weights, _ in steps],
      (-0.1, -0.2, -0.2261992597, -0.2157020223, -0.22182721, -0.24101082),
      atol=2e-8,
    )
    weights, state = run(tx, DIGRAP[1], (2, 1), "float64")[-1]
    np.testing.assert_allclose(
      state[0].omega["kernel"], 0.81393989244, atol=2e-8
    )
    np.testing.assert_allclose(
      weights.ravel(), (-0.2968486, -0.2895270), atol=1e-7
    )


@pytest.mark.parametrize(
  "omega, g, expected",
  [
    (1.0, (-1, 1), (0, 1)),
    (0.5, (-1, 1), (-0.5, 1)),
    (1.0, (1, 1), (1, 1)),  # no conflict
  ],
)
def test_digrap_takes_the_share_omega_of_what_leads_away(omega, g, expected):
  tx = optim.digrap({"w": jnp.zeros(2)}, mu=0.0)
  params = {"w": jnp.array([1.0, 0.0])}
  state = tx.init(params)
  # From the second step on omega is what it was.
  state = state._replace(count=1 + state.count, omega={"w": jnp.array(omega)})
  grads, _ = tx.update({"w": jnp.array(g, float)}, state, params)
  np.testing.assert_allclose(grads["w"], expected, atol=1e-6)


def test_l2sp_adds_the_way_back_to_the_gradient():
  tx = optim.l2sp(optax.sgd(1.0), {"w": jnp.array([1.0])}, lam=0.5)
  params = {"w": jnp.array([3.0])}
  updates, _ = tx.update({"w": jnp.array([0.25])}, tx.init(params), params)
  np.testing.assert_allclose(updates["w"], [-1.25])


@pytest.mark.parametrize(
  "path, shape, axes",
  [
    ("block0/mlp/fc1/kernel", (8, 16), (0,)),
    ("conv/kernel", (3, 3, 4, 8), (0, 1, 2)),
    ("embed/embedding", (100, 8), (1,)),
    ("attention/query/kernel", (8, 2, 4), (0,)),
    ("attention/query/bias", (2, 4), (0, 1)),
    ("attention/out/kernel", (2, 4, 8), (0, 1)),
    ("norm/scale", (8,), (0,)),
    ("cls", (1, 1, 8), (0, 1, 2)),
    ("positions", (1, 5, 8), (0, 1, 2)),
    ("block0/attn/q/a", (8, 2), (0,)),
    ("head/kernel", (1, 10), (0,)),
  ],
)
def test_rows_are_those_of_one_output(path, shape, axes):
  leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
  assert anchor.default_axes(path, leaf) == axes


def test_rows_can_be_given():
  params = {"kernel": jnp.ones((2, 3))}
  for axes in ({"kernel": (1,)}, lambda path, leaf: (1,)):
    tx = optim.ftp(optax.sgd(0.1), row_axes=axes)
    _, state = tx.update(params, tx.init(params), params)
    assert state.shrink["kernel"].shape == (2, 1)


TRANSFORMS = {
  "ftp": lambda anchor: optim.ftp(optax.sgd(0.1), anchor),
  "spd": lambda anchor: optim.spd(optax.sgd(0.1), anchor),
  "l2sp": lambda anchor: optim.l2sp(optax.sgd(0.1), anchor),
  "digrap": optim.digrap,
}


@pytest.fixture(params=TRANSFORMS)
def make(request):
  return TRANSFORMS[request.param]


def test_absent_leaves_need_no_anchor_of_their_own(make):
  params = {"a": jnp.ones(2), "b": jnp.ones(2), "c": None}
  whole = {"a": jnp.zeros(2), "b": jnp.zeros(2), "c": jnp.zeros(2)}
  tx = optax.masked(make(whole), {"a": True, "b": False, "c": None})
  state = tx.init(params)
  updates, _ = tx.update(params, state, params)
  np.testing.assert_array_equal(updates["b"], params["b"])
  anchors = [
    path for path in trees.paths(state) if path.split("/")[-2] == "anchor"
  ]
  assert len(anchors) == 1


@pytest.mark.parametrize(
  "wrong",
  [
    {"a": jnp.zeros(2)},
    {"a": jnp.zeros(2), "b": jnp.zeros(3)},
    {"a": jnp.zeros(2), "c": jnp.zeros(2)},
    [jnp.zeros(2)],
  ],
)
def test_an_anchor_of_another_structure_is_refused(make, wrong):
  params = {"a": jnp.ones(2), "b": jnp.ones(2)}
  with pytest.raises(ValueError, match="the anchor is not like"):
    make(wrong).init(params)


def test_an_update_without_parameters_is_refused(make):
  params = {"a": jnp.ones(2)}
  tx = make(None)
  with pytest.raises(ValueError, match=r"update\(grads, state, params\)"):
    tx.update(params, tx.init(params))


def test_the_anchor_is_a_copy(make):
  params = {"a": jnp.ones(2)}
  state = make(None).init(params)
  params["a"].delete()
  assert float(state.anchor["a"].sum()) == 2


@pytest.mark.parametrize(
  "build, message",
  [
    (lambda: optim.ftp(optax.sgd(0.1), k=-0.1), "k must be within"),
    (lambda: optim.ftp(optax.sgd(0.1), norm="max"), "mars"),
    (lambda: optim.spd(optax.sgd(0.1), lam=-1.0), "lam must be within"),
    (lambda: optim.spd(optax.sgd(0.1), lam={"a": -1.0}), "lam must be within"),
    (lambda: optim.l2sp(optax.sgd(0.1), lam=-1.0), "lam must be within"),
    (lambda: optim.digrap(omega_max=2.0), "omega_max"),
    (lambda: optim.digrap(project_when="always"), "conflict"),
  ],
)
def test_values_out_of_range_are_refused(build, message):
  with pytest.raises(ValueError, match=message):
    build()
