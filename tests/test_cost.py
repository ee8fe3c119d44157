"""Costs from shapes, against closed forms, published figures and XLA's."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from roli_jax import attacks, models, peft, threat, trees
from roli_jax.bench import timing
from roli_jax.plan import chips, cost


def _floats(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def _small(depth=4, **options):
  """A ViT of 64 tokens and width 64."""
  backbone = models.Vit(
    patch=4, width=64, depth=depth, num_heads=4, hidden=256, **options
  )
  half = (0.5,) * 3
  head = models.heads.linear(10)
  return models.Model("small", backbone, head, 10, 32, half, half)


def _forward(model, batch=1):
  """FLOPs of the logits."""
  params, stats = model.shapes()
  side = model.image_size
  images = _floats(batch, side, side, model.channels)
  return cost.flops(model.logits, params, stats, images)


def _compiled(model, method, batch):
  """XLA's working memory in bytes, on one device: attack's and update's."""
  params, stats = model.shapes()
  halves = trees.split(params, method.trains(params))
  side = model.image_size
  images = _floats(batch, side, side, model.channels)

  def total(trained, frozen, stats, images):
    return model.logits(trees.merge(trained, frozen), stats, images).sum()

  one = SingleDeviceSharding(jax.devices()[0])
  return [
    jax.jit(jax.grad(total, by), in_shardings=one, out_shardings=one)
    .lower(*halves, stats, images)
    .compile()
    .memory_analysis()
    .temp_size_in_bytes
    for by in (3, 0)
  ]


def test_a_product_is_two_flops_for_each_multiply_add():
  a, b = _floats(5, 8, 16), _floats(5, 16, 4)
  assert cost.flops(jnp.matmul, a, b) == 2 * 5 * 8 * 16 * 4
  assert cost.flops(lambda a: jnp.tanh(a) + 1, a) == 0


@pytest.mark.parametrize(
  "size, stride, channels, groups, width",
  [(3, 1, 16, 1, 6), (3, 2, 16, 1, 6), (7, 2, 3, 1, 8), (7, 1, 8, 8, 8)],
)
def test_a_convolution_is_one_however_a_cpu_computes_it(
  size, stride, channels, groups, width
):
  """Forward, and twice that with the gradient by its input or its kernel."""
  layer = models.conv.Conv(width, size, stride, groups)
  x = _floats(2, 8, 8, channels)
  variables = jax.eval_shape(layer.init, jax.random.key(0), x)
  places = (8 // stride) ** 2
  once = 2 * 2 * places * size**2 * (channels // groups) * width
  assert cost.flops(layer.apply, variables, x) == once
  for by in (0, 1):
    pair = cost.gradient(layer.apply, (variables, x), by, images=1)
    assert pair[0] == once and pair[1].flops == 2 * once


def test_loops_count_times_their_length_and_branches_once():
  a = _floats(4, 4)
  once = 2 * 4**3

  def many(a):
    return jax.lax.fori_loop(0, 7, lambda _, x: x @ a, a)

  def either(a):
    return jax.lax.cond(a.sum() > 0, lambda: a @ a @ a, lambda: a)

  assert cost.flops(many, a) == 7 * once
  assert cost.flops(either, a) == 2 * once
  assert cost.flops(jax.checkpoint(jax.jit(lambda a: a @ a)), a) == once


def test_a_loop_of_unknown_length_is_refused():
  def until(a):
    return jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ x, a)

  with pytest.raises(ValueError, match="while_loop"):
    cost.flops(until, _floats(4, 4))


def test_what_is_not_asked_for_is_not_counted():
  def wasteful(a):
    jnp.matmul(a, a)
    return jax.jit(lambda a: (a @ a, a @ a @ a))(a)[0]

  assert cost.flops(wasteful, _floats(4, 4)) == 2 * 4**3


@pytest.mark.parametrize(
  "name, giga",
  [
    # But for what the last block would compute of the patches' tokens.
    ("vit_b16", 17.56 - 196 * (10 * 768**2 + 2 * 197 * 768) / 1e9),
    pytest.param("swin_b", 15.43, marks=pytest.mark.slow),
    pytest.param("convnext_b", 15.36, marks=pytest.mark.slow),
    ("resnet50", 4.09),
    pytest.param("wide_resnet50_2", 11.40, marks=pytest.mark.slow),
    ("wrn_28_10", 5.25),
  ],
)
def test_a_forward_pass_is_as_published(name, giga):
  """Multiply-adds, of torchvision's table and Zagoruyko and Komodakis."""
  model = models.create(name, 10 if name.startswith("wrn") else 1000)
  assert _forward(model) == pytest.approx(2e9 * giga, rel=0.005)


def test_a_scan_counts_as_its_blocks():
  assert _forward(_small(scan=True)) == _forward(_small())


def test_xla_counts_the_same_and_what_is_elementwise():
  model = models.create("vit_ti16", 10)
  params, stats = model.shapes()
  theirs = timing.flops(model.logits, params, stats, _floats(1, 224, 224, 3))
  assert 1.0 < theirs / _forward(model) < 1.05


def test_vit_s_costs_what_was_measured_before():
  """GF of a batch of 8: forward 68.5, by the pixels 73.7, by the weights 63.2.

  The weights' are without the gradient by the pixels through the patches.
  """
  model = models.create("vit_s16", 1000)
  one = cost.of(model, peft.full())
  patches = 2 * 8 * 196 * 16 * 16 * 3 * 384
  assert 8 * one.forward == pytest.approx(68.5e9, rel=0.002)
  assert 8 * one.attack.flops == pytest.approx(68.5e9 + 73.7e9, rel=0.002)
  assert 8 * one.update.flops + patches == pytest.approx(
    68.5e9 + 73.7e9 + 63.2e9, rel=0.002
  )


@pytest.mark.parametrize("name", sorted(peft.METHODS))
def test_an_update_is_one_to_three_forward_passes(name):
  method = peft.METHODS[name]()
  one = cost.of(method.apply_to(_small()), method)
  passes = {"linear": 1, "full": 3, "autolora": 3}.get(name, 2)
  assert one.update.flops / one.forward == pytest.approx(passes, rel=0.15)
  assert one.attack.flops / one.forward == pytest.approx(2, rel=0.15)


def test_the_gradient_by_the_pixels_is_two_passes_and_attention_again():
  """Both factors of q k^T and of p v have a gradient, frozen weights none."""
  tokens, width, depth = 64 + 1, 64, 4
  one = cost.of(_small(depth), peft.linear())
  # In the last block the class token alone asks.
  attention = 2 * 2 * ((depth - 1) * tokens + 1) * tokens * width
  assert one.attack.flops == 2 * one.forward + attention
  assert one.update.flops == one.forward + 2 * width * 10


@pytest.mark.parametrize("name", ["linear", "full"])
def test_the_head_counts_as_if_it_were_traced(name):
  method, model = peft.METHODS[name](), _small(depth=1)
  params, stats = model.shapes()
  halves = trees.split(params, method.trains(params))

  def logits(trained, frozen, stats, images):
    return model.logits(trees.merge(trained, frozen), stats, images)

  shapes = (*halves, stats, _floats(4, 32, 32, 3))
  forward, attack = cost.gradient(logits, shapes, 3, images=3)
  _, update = cost.gradient(logits, shapes, 0, images=3)
  one = cost.of(model, method)
  assert 4 * one.forward == forward
  assert 4 * one.attack.flops == attack.flops
  assert 4 * one.update.flops == update.flops
  assert 4 * one.attack.kept == attack.kept
  assert 4 * one.update.kept == update.kept
  assert 4 * one.update.fused == update.fused


@pytest.mark.slow
@pytest.mark.parametrize("remat", (False, True))
def test_activations_are_what_xla_keeps(remat):
  """Eight further blocks, of a loop, take what they keep, within 2%.

  And a copy of their weights and, in an update, of the weights' gradients: so
  a loop has them. A whole program also works in some memory: the factors.
  Unrolled, XLA for CPUs keeps 1.3 to 1.6 times as much, in several layouts, and
  undoes remat by finding what is computed twice.
  """
  method, batch = peft.full(), 64
  shallow, deep = (_small(d, scan=True, remat=remat) for d in (4, 12))
  ours, theirs = [], []
  for model in (shallow, deep):
    one = cost.of(model, method)
    ours.append([batch * one.attack.kept, batch * one.update.kept])
    theirs.append(_compiled(model, method, batch))
  copied = 4 * (_num_weights(deep) - _num_weights(shallow))
  for i in (0, 1):  # the attack, the update
    for mine, xla in zip(ours, theirs, strict=True):
      assert 0.9 < xla[i] / mine[i] < (1.7 if remat else 1.3)
    more = ours[1][i] - ours[0][i] + (1 + i) * copied
    assert theirs[1][i] - theirs[0][i] == pytest.approx(more, rel=0.02)


def _num_weights(model):
  params, _ = model.shapes()
  return trees.size(params)


def test_who_needs_activations():
  model = _small()
  full = cost.of(model, peft.full())
  remat = cost.of(_small(remat=True), peft.full())
  linear = cost.of(model, peft.linear())
  bias = cost.of(model, peft.bias())
  lora = peft.lora()
  lora = cost.of(lora.apply_to(model), lora)
  assert remat.activations < full.activations / 2
  assert linear.update.kept == 4 * 64  # the features
  assert linear.activations == linear.attack.kept
  assert linear.attack.kept / 2 < bias.update.kept < full.update.kept
  assert linear.attack.kept / 2 < lora.update.kept < full.update.kept


def test_an_array_is_kept_once_and_in_one_layout():
  def twice(w, x):
    y = jnp.sin(w.reshape(1, 1) * x)
    return (y @ y.T) @ y.T.reshape(4, 2).T

  shapes = (_floats(), _floats(2, 4))
  _, by_w = cost.gradient(twice, shapes, by=0, images=1)
  y, cosine, square = 4 * 8, 4 * 8, 4 * 4
  assert by_w.kept == y + cosine + square  # x is an argument


def test_elementwise_operations_are_computed_again_where_that_keeps_less():
  def kept(last):
    def fn(w, x):
      half = x.astype(jnp.bfloat16) @ jnp.ones((8, 8), jnp.bfloat16)
      return last(half.astype(jnp.float32) - 1, w)

    return cost.gradient(fn, (_floats(8, 8), _floats(8, 8)), 0, images=1)[1][1:]

  wide, half = 4 * 64, 2 * 64
  assert kept(jnp.multiply) == (wide, half)
  assert kept(jnp.matmul) == (wide, wide)  # a product reads it as it is
  assert kept(lambda y, w: jnp.exp(y) * w) == (wide, wide)


def test_half_the_bytes_in_bfloat16():
  model = _small()
  half = models.with_options(model, dtype="bfloat16")
  wide, narrow = (cost.of(m, peft.full()) for m in (model, half))
  assert narrow.forward == wide.forward
  assert 0.5 <= narrow.activations / wide.activations < 0.75


def test_fused_attention_is_planned_without_a_gpu():
  options = {"dtype": "bfloat16", "attention": "fused"}
  fused = cost.of(models.create("vit_ti16", 10, **options), peft.full())
  assert fused.forward == _forward(models.create("vit_ti16", 10))


def test_a_step_is_its_passes():
  one = cost.Cost(10, cost.Gradient(20, 0, 0), cost.Gradient(30, 0, 0))
  ball = threat.ThreatModel("linf", eps=8 / 255)
  pgd = attacks.build("pgd", ball, num_steps=7)
  assert cost.step_flops(one, pgd.passes) == 7 * 20 + 10 + 30
  assert cost.step_flops(one, (7, 7)) == 7 * 20 + 30
  half = cost.step_flops(one, (8, 7), adversarial=0.5)
  assert half == 150 // 2 + 30
  assert cost.step_flops(one, (0, 0), adversarial=0.0) == 30
  assert cost.step_flops(one, (8, 7), needs_clean=True) == 150 + 10 + 60
  assert cost.step_flops(one, (8, 7), gradients=2) == 150 + 60
  assert cost.evaluation_flops(one, (21, 20)) == 20 * 20 + 10 + 20


def test_hours():
  peak = chips.CHIPS["h200"].peak
  assert cost.hours(3600 * 989e12, peak, efficiency=1.0) == pytest.approx(1)
  assert cost.hours(1e18, peak) == cost.hours(1e18, peak, cost.EFFICIENCY)


def test_equal_models_are_traced_once(monkeypatch):
  method = peft.full()
  model = models.create("glyph_vit", 10)
  first = cost.of(model, method)
  monkeypatch.setattr(cost, "gradient", None)
  again = cost.of(models.create("glyph_vit", 10), peft.full())
  wider = cost.of(models.create("glyph_vit", 11), method)
  assert again == first and wider.forward == first.forward + 2 * 64
