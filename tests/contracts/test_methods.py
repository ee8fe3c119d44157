"""What every method of fine-tuning promises, on a small net of each kind."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from roli_jax import (
  attacks,
  keys,
  losses,
  models,
  optim,
  peft,
  state,
  step,
  trees,
)
from roli_jax.models import heads, layers
from roli_jax.optim import schedules
from roli_jax.plan import cost
from roli_jax.threat import ThreatModel
from tests.covering import covering, mostly_slow

FAMILIES = (
  "vit", "glyph_swin", "glyph_convnext", "glyph_resnet", "wrn", "glyph_xcit",
)  # fmt: skip
WITH_TOKENS = ("vit", "glyph_swin")
PAIRS = [
  (family, name)
  for name in peft.METHODS
  for family in FAMILIES
  if name != "vpt" or family in WITH_TOKENS
]


def small(backbone):
  return models.Model(
    name="tiny",
    backbone=backbone,
    head=heads.linear(10),
    num_classes=10,
    image_size=8,
    mean=(0.5,),
    std=(0.5,),
  )


SMALL = {
  "vit": models.Vit(patch=4, width=8, depth=2, num_heads=2, hidden=16),
  "wrn": models.WideResNet(10, 1, squeeze=4),
}


@functools.cache
def net(family):
  if family in SMALL:
    return small(SMALL[family])
  return models.create(family, 10)


def filled(model):
  """Random arrays, but for what a method adds: that is as it begins."""
  params, stats = model.shapes()
  rng = np.random.default_rng(0)

  def fill(path, x):
    noise = rng.standard_normal(x.shape).astype(np.float32)
    if path.endswith(("scale", "gamma", "var")):
      return 1 + noise / 10
    return noise / np.float32(max(x.size // x.shape[-1], 16) ** 0.5)

  added = params.peft
  if added:
    added = jax.jit(lambda key: model.init(key)[0].peft)(keys.root(0))
  params, stats = trees.map_named(fill, (params, stats))
  return dataclasses.replace(params, peft=added), stats


@pytest.fixture(scope="module")
def model():
  return net("vit")


@pytest.fixture(
  params=mostly_slow(peft.METHODS, "full", "lora", "vpt", "autolora")
)
def method(request):
  return peft.METHODS[request.param]()


def batch(size=8):
  rng = np.random.default_rng(0)
  return {
    "image": rng.integers(0, 17, (size, 8, 8, 1), dtype=np.uint8),
    "label": np.arange(size, dtype=np.int32) % 10,
    "index": np.arange(size, dtype=np.uint32),
  }


def begin(model, method, objective=None, spec=None, lr=1e-2):
  model = method.apply_to(model)
  params, stats = filled(model)
  tx = optim.build(
    spec or {"name": "adamw", "weight_decay": 0.1, "clip_norm": 1.0},
    method.labels(params),
    schedules.warmup(10, 0.0, "constant"),
  )
  attack = attacks.Pgd(ThreatModel("linf", 0.1), num_steps=2)
  train_step = step.make_train_step(
    model,
    method,
    objective or losses.At(),
    attack,
    schedules.ramp(10),
    tx,
    white=16,
  )
  now = state.create(params, stats, method.trains(params), tx)
  now = dataclasses.replace(now, opt_state=optim.at_rate(now.opt_state, lr))
  return train_step, now


def test_exactly_the_labelled_leaves_move_by_one_program(model, method):
  train_step, now = begin(model, method)
  jitted = jax.jit(train_step)
  before = now.params
  for k in range(3):
    now, _ = jitted(now, batch(), keys.root(k))
  check_moved(method, before, now.params)
  assert jitted._cache_size() == 1


def check_moved(method, before, after):
  trains = trees.paths(method.trains(before))
  after = trees.paths(after)
  for name, old in trees.paths(before).items():
    moved = bool((old != after[name]).any())
    # A softmax doesn't see what is added to all its logits; noise may move it.
    assert moved == trains[name] or (
      trains[name] and name.endswith("attn/k/bias")
    ), name


@functools.cache
def two_steps(family, name):
  """The parameters before and after each of two steps, by gradients alone.

  Nothing decays, so that a leaf moves if its gradient is not zero.
  """
  method = peft.METHODS[name]()
  train_step, now = begin(
    net(family), method, losses.Clean(), {"name": "adamw"}
  )
  stepped = jax.jit(train_step)
  seen = [now.params]
  for _ in range(2):
    now, _ = stepped(now, batch(), keys.root(0))
    seen.append(now.params)
  return jax.device_get(seen)


def noisy(tree, seed=1):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(x.dtype), tree
  )


@pytest.mark.parametrize("family, name", covering(PAIRS))
def test_each_labelled_leaf_has_a_gradient_by_the_second_step(family, name):
  before, _, after = two_steps(family, name)
  check_moved(peft.METHODS[name](), before, after)


WAITS = {"lora": r"/a", "adapter": r"/down/(kernel|bias)"}


@pytest.mark.parametrize(
  "family, name",
  [case for case in covering(PAIRS) if case.values[1] in WAITS],
)
def test_what_feeds_a_zero_product_learns_from_the_second_step_on(family, name):
  waits = WAITS[name]
  before, after, _ = (trees.paths(x.peft) for x in two_steps(family, name))
  still = {path for path in before if (before[path] == after[path]).all()}
  assert still == {path for path in before if re.search(f"{waits}$", path)}
  assert len(still) < len(before)


@pytest.mark.parametrize(
  "family, name", covering(itertools.product(FAMILIES, WAITS))
)
def test_at_init_it_changes_nothing(family, name):
  plain = net(family)
  model = peft.METHODS[name]().apply_to(plain)
  params, stats = filled(model)
  without = dataclasses.replace(params, peft={})
  moved = dataclasses.replace(params, peft=noisy(params.peft))
  see = jax.jit(model.logits)
  got = see(params, stats, images())
  expected = jax.jit(plain.logits)(without, stats, images())
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
  assert np.abs(see(moved, stats, images()) - expected).max() > 1e-2


def images(n=8):
  return jnp.asarray(batch(n)["image"] / 16, jnp.float32)


@pytest.mark.parametrize(
  "family", [family for family in FAMILIES if family not in WITH_TOKENS]
)
def test_prompts_are_refused_where_there_are_no_tokens(family):
  with pytest.raises(ValueError, match="tokens into a ViT or a Swin"):
    peft.vpt().apply_to(net(family))


# Of ten classes: trained, and all; as counted in RoLI's reference.
COUNTS = {
  "swin_b": {
    "linear": (10_250, 86_753_474),
    "bias": (211_010, 86_753_474),
    "lora": (780_298, 87_523_522),
    "adapter": (1_768_682, 88_511_906),
    "vpt": (130_570, 86_873_794),
    "full": (86_753_474, 86_753_474),
  },
  "vit_b16": {
    "linear": (7_690, 85_806_346),
    "bias": (110_602, 85_806_346),
    "lora": (597_514, 85_806_346 + 589_824),
    "adapter": (1_787_530, 85_806_346 + 1_779_840),
    "vpt": (99_850, 85_806_346 + 92_160),
    "full": (85_806_346, 85_806_346),
  },
}


@pytest.mark.parametrize(
  "name, counted", [(name, of) for name in COUNTS for of in COUNTS[name]]
)
def test_as_many_numbers_train_as_in_the_reference(name, counted):
  method = peft.METHODS[counted]()
  params = cost.shapes(method.apply_to(models.create(name, 10)))
  trained, _ = trees.split(params, method.trains(params))
  assert (trees.size(trained), trees.size(params)) == COUNTS[name][counted]


def test_optimizer_state_counts_trained_leaves_only(model, method):
  _, now = begin(model, method)
  trained, _ = trees.split(now.params, method.trains(now.params))
  arrays = [x for x in jax.tree.leaves(now.opt_state) if x.ndim]
  assert sum(x.size for x in arrays) == 2 * trees.size(trained)


def test_no_gradient_exists_for_frozen_leaves(model, method):
  seen = []

  def spy(updates, opt_state, params):
    seen.append(updates)
    return updates, opt_state

  model = method.apply_to(model)
  params, stats = filled(model)
  trained, _ = trees.split(params, method.trains(params))
  tx = optax.GradientTransformation(lambda params: (), spy)
  attack = attacks.Pgd(ThreatModel("linf", 0.1), num_steps=1)
  train_step = step.make_train_step(
    model, method, losses.At(), attack, schedules.ramp(10), tx
  )
  now = state.create(params, stats, method.trains(params), tx)
  jax.eval_shape(train_step, now, batch(), keys.root(0))
  assert trees.paths(seen[0]).keys() == trees.paths(trained).keys()
  assert trees.size(seen[0]) == trees.size(trained)


@pytest.mark.parametrize("family, name", PAIRS)
def test_the_pretrained_tree_is_the_same_under_every_method(family, name):
  plain = net(family)
  entered = peft.METHODS[name]().apply_to(plain)
  (got, stats), (expected, plain_stats) = (
    model.shapes() for model in (entered, plain)
  )
  trees.check_same((got.backbone, stats), (expected.backbone, plain_stats), "")


def test_every_leaf_has_a_group(model, method):
  params, _ = jax.eval_shape(method.apply_to(model).init, keys.root(0))
  groups = set(trees.paths(method.labels(params)).values())
  assert "head" in groups and groups <= set(peft.GROUPS)


def test_another_rate_compiles_nothing(model):
  train_step, now = begin(model, peft.linear())
  jitted = jax.jit(train_step)
  jitted(now, batch(), keys.root(0))
  faster = dataclasses.replace(now, opt_state=optim.at_rate(now.opt_state, 1.0))
  jitted(faster, batch(), keys.root(0))
  assert jitted._cache_size() == 1


@pytest.mark.parametrize(
  "name", mostly_slow(losses.OBJECTIVES, "trades", "half_at")
)
def test_every_objective_trains(model, name):
  objective = losses.OBJECTIVES[name]()
  train_step, now = begin(model, peft.full(), objective, lr=3e-2)
  jitted = jax.jit(train_step)
  values = []
  # MART asks for a margin too, and weighs its second term by what is unsure.
  for _ in range(24 if name == "mart" else 12):
    now, counts = jitted(now, batch(16), keys.root(0))
    values.append(float(counts.loss / counts.seen))
  assert np.mean(values[-3:]) < 0.8 * np.mean(values[:3])
  assert int(counts.seen) == 16


def test_half_at_attacks_every_other_image(model):
  shapes = []

  @dataclasses.dataclass(frozen=True)
  class Shaped(attacks.Fgsm):
    def scaled(self, ratio):
      return self

    def __call__(self, logits_fn, images, labels, keys):
      shapes.append(images.shape)
      return jax.numpy.ones_like(images)

  params, stats = filled(model)
  tx = optim.build(
    {"name": "sgd"}, peft.linear().labels(params), schedules.ramp(1)
  )
  train_step = step.make_train_step(
    model, peft.linear(), losses.HalfAt(), Shaped(ThreatModel("linf", 0.1)),
    schedules.ramp(1), tx, white=16,
  )  # fmt: skip
  now = state.create(params, stats, peft.linear().trains(params), tx)
  _, counts = jax.jit(train_step)(now, batch(8), keys.root(0))
  assert shapes == [(4, 8, 8, 1)]
  mixed = batch(8)["image"].astype(np.float32) / 16
  mixed[::2] = 1
  logits = model.logits(params, stats, mixed)
  expected = losses.cross_entropy(logits, batch(8)["label"]).sum()
  np.testing.assert_allclose(counts.loss, expected, rtol=1e-5)


def test_the_radius_follows_its_schedule(model):
  seen = []

  @dataclasses.dataclass(frozen=True)
  class Spy(attacks.Fgsm):
    def scaled(self, ratio):
      seen.append(float(ratio))
      return self

  params, stats = filled(model)
  tx = optim.build(
    {"name": "sgd"}, peft.linear().labels(params), schedules.ramp(1)
  )
  train_step = step.make_train_step(
    model, peft.linear(), losses.At(), Spy(ThreatModel("linf", 0.1)),
    schedules.ramp(8, begin=0.25, end=0.75), tx, white=16,
  )  # fmt: skip
  now = state.create(params, stats, peft.linear().trains(params), tx)
  for _ in range(8):
    now, _ = train_step(now, batch(), keys.root(0))
  assert seen == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1]


@functools.cache
def prompted(family, deep):
  """A net with prompts whose arrays are far from their starts."""
  model = peft.vpt(tokens=3, deep=deep).apply_to(net(family))
  params, stats = filled(model)
  return model, noisy(params), stats


@functools.cache
def seeing(family, deep):
  """`(images, key) -> logits`; no key: in evaluation mode."""
  model, params, stats = prompted(family, deep)
  return jax.jit(lambda x, key: model(params, stats, x, key=key)[0])


each_net_with_prompts = pytest.mark.parametrize(
  "family, deep",
  [(name, deep) for name in WITH_TOKENS for deep in (False, True)],
)


def test_shallow_prompts_are_the_first_blocks_alone():
  own = {
    family: list(trees.paths(prompted(family, False)[1].peft))
    for family in WITH_TOKENS
  }
  assert own == {
    "vit": ["tokens0/prompt"], "glyph_swin": ["stage0/tokens0/prompt"]
  }  # fmt: skip


@each_net_with_prompts
def test_an_images_logits_hang_on_no_other_image(family, deep):
  see = seeing(family, deep)
  others = images().at[1:].set(images()[::-1][:-1])
  for key in (None, keys.root(0)):
    one, other = see(images(), key), see(others, key)
    np.testing.assert_allclose(one[0], other[0], atol=1e-6)
    assert np.abs(one[1] - other[1]).max() > 1e-3


@each_net_with_prompts
def test_prompts_drop_out_in_training_and_for_each_image(family, deep):
  see = seeing(family, deep)
  alike = jnp.repeat(images(1), 8, 0)
  still, moving = see(alike, None), see(alike, keys.root(0))
  np.testing.assert_allclose(still, still[:1].repeat(8, 0), atol=1e-6)
  assert len(np.unique(np.asarray(moving).round(4), axis=0)) > 4


@each_net_with_prompts
def test_every_block_sees_prompts(family, deep):
  model, params, stats = prompted(family, deep)
  outputs = jax.eval_shape(model.outputs, params, stats, images())
  # What a ViT's blocks read: its last one returns the class token alone.
  where = r".*block\d/norm1" if family == "vit" else r".*block\d"
  sizes = [x.shape[1] for k, x in outputs.items() if re.fullmatch(where, k)]
  of_map = {"vit": [5, 5], "glyph_swin": [64, 64, 16, 16]}
  assert sorted(sizes) == sorted(n + 3 for n in of_map[family])


@each_net_with_prompts
def test_a_loop_over_blocks_has_the_same_prompts(family, deep):
  model, params, stats = prompted(family, deep)
  looped = models.with_options(model, scan=True, remat=True)
  got = jax.jit(looped.logits)(params, stats, images())
  expected = seeing(family, deep)(images(), None)
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_what_a_block_makes_of_deep_prompts_is_thrown_away():
  """Only the last block's reach the feature, which is the mean with them."""
  model, params, stats = prompted("glyph_swin", True)
  outputs = jax.jit(model.outputs)(params, stats, images())
  last = outputs["stage1/block1"]
  np.testing.assert_allclose(
    outputs[""], outputs["norm"].mean(1), rtol=1e-5, atol=1e-6
  )
  assert outputs["norm"].shape == last.shape == (8, 16 + 3, 32)


class Dropped(nn.Module):
  """`layers.drop_path` in a module of its own."""

  rate: float

  def __call__(self, x):
    return layers.drop_path(self, x, self.rate)


def test_drop_path_drops_images_whole_and_keeps_the_mean():
  x = jnp.ones((4000, 3, 2))
  dropped = Dropped(0.75).apply({}, x, rngs={"dropout": keys.root(0)})
  assert set(np.unique(dropped)) == {0, 4}
  np.testing.assert_array_equal(dropped, dropped[:, :1, :1] * x)
  # Five standard errors of the mean of 4000 images.
  assert abs(float(dropped.mean()) - 1) < 5 * np.sqrt(3 / 4000)


# Of two blocks the first never drops a path. Depth of branches in the second.
DROPPING = {
  "vit": (models.Vit(4, 8, 2, 2, 16, drop_path=0.5), 2),
  "swin": (models.Swin(8, (2,), (2,), patch=2, drop_path=0.5), 2),
  "convnext": (models.ConvNext((8,), (2,), patch=2, drop_path=0.5), 1),
}


@pytest.mark.parametrize("family", mostly_slow(DROPPING, "vit"))
def test_the_last_block_drops_half_of_the_paths_however_it_is_computed(family):
  """Of equal images each keeps or drops each branch: 2 or 4 results."""
  backbone, branches = DROPPING[family]
  model = small(backbone)
  params, stats = filled(model)
  params = noisy(params)
  alike = jnp.repeat(images(1), 64, 0)
  still = models.with_options(model, drop_path=0.0)
  expected = jax.jit(still.logits)(params, stats, alike)
  found = []
  for scan, remat in ((False, False), (True, False), (False, True)):
    other = models.with_options(model, scan=scan, remat=remat)
    see = jax.jit(lambda key, m=other: m(params, stats, alike, key=key)[0])
    np.testing.assert_allclose(see(None), expected, rtol=1e-4, atol=1e-5)
    rows = np.asarray(see(keys.root(1)))
    _, first = np.unique(rows[:, 0].round(3), return_index=True)
    found.append(np.sort(rows[first, 0]))
  assert [len(values) for values in found] == [2**branches] * 3
  np.testing.assert_allclose(found[1:], [found[0]] * 2, rtol=1e-3)
