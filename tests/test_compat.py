"""Each switch of `compat`, on either side."""

import dataclasses
import itertools
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from configs import common, glyphs_roli
from configs import roli as roli_config
from roli_jax import (
  convert,
  data,
  keys,
  optim,
  peft,
  sharding,
  train,
  trees,
)
from roli_jax.experiment import compat, probe_reuse, stages
from roli_jax.experiment.build import (
  build_attack,
  build_method,
  build_model,
  build_schedule,
  optimizer_fields,
)
from roli_jax.experiment.program import build_program
from roli_jax.experiment.run import build_run, training_images
from roli_jax.experiment.start_and_resume import (
  initial_variables,
  start_variables,
)
from roli_jax.experiment.train_stage import best_variables
from roli_jax.optim import reference, schedules
from roli_jax.results import record
from tests.contracts.test_methods import filled, net, noisy
from tests.covering import covering


@pytest.fixture(scope="module", autouse=True)
def _one_device():
  one = Mesh(np.array(jax.devices()[:1]), ("data",))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, "mesh", lambda *_: one)
    yield


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  """A folder with a file of weights for each toy."""
  folder = tmp_path_factory.mktemp("weights")
  for name in ("glyph_vit_token", "glyph_swin"):
    bundle = convert.Bundle(net(name), *filled(net(name)))
    convert.save(bundle, folder / f"{name}.safetensors")
  return folder


@pytest.fixture(scope="module")
def setup(weights):
  """`setup(method, init=..., backbone=..., **switches)`: a tiny config."""

  def make(method, init="ranli", backbone="glyph_vit_token", **switches):
    config = glyphs_roli.get_config(f"backbone={backbone}")
    config.backbone.weights = str(weights)
    config.cells = ({"method": method, "init": init},)
    config.test, config.curve, config.data.train_size = False, (), 32
    config.num_val_images = 40
    for attack in (config.attack, config.val_attack, config.eval_attack):
      attack.num_steps = 1
    for section in (config.probe, config.adapt):
      section.update(
        num_steps=3, val_every=3, log_every=1, batch_size=16, lr=1e-2
      )
      section.loss.name = "clean"  # compiles faster
    config.compat.update(switches)
    return config.to_dict()

  return make


def parts_of(config):
  """The parts, and the last stage."""
  parts = build_run(config)
  return parts, stages.expand(config, 32)[-1]


def moved(config):
  """The trained leaves that three steps move, and those that they don't."""
  parts, stage = parts_of(config)
  params, stats = initial_variables(parts, stage)
  program = build_program(parts, stage)
  step = jax.jit(program.step)
  now = program.create(params, stats)
  rate = optim.at_rate(now.opt_state, stage.lr)
  now = dataclasses.replace(now, opt_state=rate)
  batches = data.train_batches(training_images(parts, stage), 16, seed=0)
  for batch in itertools.islice(batches, 3):
    now, _ = step(now, batch, keys.root(0))
  trained, _ = trees.split(params, program.method.trains(params))
  after = trees.paths(now.params)
  flags = {
    path: bool((np.asarray(leaf) != np.asarray(after[path])).any())
    for path, leaf in trees.paths(trained).items()
  }
  return (
    {path for path, flag in flags.items() if flag},
    {path for path, flag in flags.items() if not flag},
  )


@pytest.mark.slow
def test_of_all_zero_adapters_one_bias_moves(setup):
  dead, live = (
    moved(setup("adapter", adapter_init=init))
    for init in ("all_zero", "near_identity")
  )
  alive = {f"peft/block{i}/branch/up/bias" for i in range(2)}
  assert dead[0] == {"head/kernel", "head/bias", *alive}
  assert len(dead[1]) == 3 * 2
  assert not live[1]


@pytest.mark.slow
def test_lora_of_two_zeros_never_moves(setup):
  dead, live = (
    moved(setup("lora", lora_init=init)) for init in ("both_zero", "standard")
  )
  assert dead[0] == {"head/kernel", "head/bias"} and len(dead[1]) == 2 * 4
  assert not live[1]


def differ(config):
  """Whether the forward pass of training is another than evaluation's."""
  parts, stage = parts_of(config)
  params, stats = initial_variables(parts, stage)
  params = dataclasses.replace(params, peft=noisy(params.peft))
  model, method = build_model(parts, stage), build_method(parts, stage)
  images = jnp.asarray(parts.data["train"].pixels(slice(0, 8)))
  trained = jax.jit(
    lambda key: model(
      params, stats, images, train=method.train_mode, key=key
    )[0]
  )  # fmt: skip
  still = jax.jit(model.logits)(params, stats, images)
  return bool(np.abs(trained(keys.root(0)) - still).max() > 1e-4)


@pytest.mark.parametrize("active", [False, True])
def test_the_dropout_that_lora_declares_acts_if_told(setup, active):
  config = setup("lora", lora_dropout_active=active)
  assert config["peft"]["lora"]["dropout"] == 0.1
  assert differ(config) == active


@pytest.mark.parametrize(
  "method, evaluates",
  covering(
    itertools.product(("linear", "bias", "lora", "adapter"), (True, False))
  ),
)
def test_a_frozen_encoder_drops_paths_if_it_is_not_in_evaluation_mode(
  setup, method, evaluates
):
  init = "roli" if method == "linear" else "ranli"
  switches = {"frozen_encoder_eval": evaluates, "droppath_rate": 0.9}
  assert differ(setup(method, init, **switches)) != evaluates


@pytest.mark.slow
@pytest.mark.parametrize("evaluates", (True, False))
def test_prompts_drop_out_over_an_encoder_that_drops_no_paths(setup, evaluates):
  switches = {"frozen_encoder_eval": evaluates, "droppath_rate": 0.9}
  config = setup("vpt", backbone="glyph_swin", **switches)
  assert differ(config)
  config["peft"]["vpt"]["dropout"] = 0.0
  assert not differ(config)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_full_tuning_drops_paths_at_the_rate_given(setup, rate):
  config = setup("full", backbone="glyph_swin", droppath_rate=rate)
  assert differ(config) == (rate > 0)
  parts, stage = parts_of(config)
  assert build_model(parts, stage).backbone.drop_path == rate


@pytest.mark.parametrize("keep", ["sample", "batch", "last"])
def test_every_pgd_keeps_what_the_switch_says(setup, keep):
  parts = build_run(setup("full", pgd_best=keep))
  for kind in ("attack", "val_attack", "eval_attack"):
    assert build_attack(parts, kind).keep == keep


def test_the_default_of_pgd_best_leaves_what_the_config_says(setup):
  config = setup("full")
  config["attack"]["keep"] = "last"
  assert build_attack(build_run(config), "attack").keep == "last"


def test_attacks_other_than_pgd_are_as_they_are(setup):
  config = setup("full", pgd_best="batch")
  config["eval_attack"] = {"name": "fgsm"}
  assert build_attack(build_run(config), "eval_attack").name == "fgsm"


LABELS = {"head": {"kernel": "head", "bias": "head"}}
START = {"head": {"kernel": [[0.7, -1.3]], "bias": [0.4]}}
GRADS = (
  {"head": {"kernel": [[1e-4, -2.0]], "bias": [1e-5]}},
  {"head": {"kernel": [[-3e-5, 1.0]], "bias": [2e-4]}},
  {"head": {"kernel": [[2e-6, 0.5]], "bias": [-1e-3]}},
)


def arrays(tree, dtype):
  return jax.tree.map(
    lambda x: jnp.asarray(x, dtype), tree, is_leaf=lambda x: type(x) is list
  )


def run_optimizer(tx, dtype=np.float32, lr=0.1):
  """The parameters after each gradient."""
  now = arrays(START, dtype)
  opt_state = tx.init(now)
  if hasattr(opt_state, "hyperparams"):
    opt_state = optim.at_rate(opt_state, lr)
  seen = []
  for grads in GRADS:
    updates, opt_state = tx.update(arrays(grads, dtype), opt_state, now)
    now = optax.apply_updates(now, updates)
    seen.append(now)
  return seen


def by_hand(lr, weight_decay, eps=1e-6, b1=0.9, b2=0.999):
  """RoLI's AdamW as it is written there, in float64."""
  out = [{"head": {}} for _ in GRADS]
  for name, decay in (("kernel", weight_decay), ("bias", 0.0)):
    p = np.array(START["head"][name])
    m = v = np.zeros_like(p)
    for t, grads in enumerate(GRADS, 1):
      g = np.array(grads["head"][name])
      m = b1 * m + (1 - b1) * g
      v = b2 * v + (1 - b2) * g**2
      size = lr * math.sqrt(1 - b2**t) / (1 - b1**t)
      p = p - size * m / (np.sqrt(v) + eps)
      p = p - lr * decay * p
      out[t - 1]["head"][name] = p
  return out


def close(got, expected, rtol):
  for mine, theirs in zip(got, expected, strict=True):
    for path, leaf in trees.paths(mine).items():
      np.testing.assert_allclose(leaf, trees.paths(theirs)[path], rtol)


def test_the_references_adamw_is_its_formula():
  decay = {"head": {"kernel": True, "bias": False}}
  with jax.enable_x64(True):
    tx = reference.adamw(
      lambda step: 0.1, lambda params: decay, 0.3, 0.9, 0.999, 1e-6
    )
    close(run_optimizer(tx, np.float64), by_hand(0.1, 0.3), 1e-12)


def built(config, num_steps=100, **spec):
  """The stage's optimizer, of the small tree, at a constant rate."""
  given = {
    **optimizer_fields(build_run(config), "adapt"),
    **spec,
    "clip_norm": 0.0,
  }
  shape = schedules.warmup(num_steps, 0.0, "constant")
  return optim.build(given, LABELS, shape)


@pytest.mark.parametrize("style", ["standard", "reference"])
def test_the_switch_chooses_the_adamw(setup, style):
  got = run_optimizer(built(setup("full", adamw_eps_style=style)))
  decay = {"head": {"kernel": True, "bias": False}}
  standard = run_optimizer(optax.adamw(0.1, weight_decay=0.01, mask=decay))
  expected = {"standard": standard, "reference": by_hand(0.1, 0.01)}
  close(got, expected[style], 2e-5)
  other = expected["reference" if style == "standard" else "standard"]
  with pytest.raises(AssertionError):
    close(got, other, 1e-3)


@pytest.mark.parametrize(
  "switch, expected", [("config", 0.3), ("fixed_0.01", 0.01)]
)
def test_the_decay_is_the_configs_or_the_references(setup, switch, expected):
  config = setup("full", adamw_decay=switch)
  config["adapt"]["optim"]["weight_decay"] = 0.3
  got = run_optimizer(built(config))
  decay = {"head": {"kernel": True, "bias": False}}
  plain = optax.adamw(0.1, weight_decay=expected, mask=decay)
  close(got, run_optimizer(plain), 1e-6)


def test_the_fixed_decay_is_of_adamw_alone(setup):
  config = setup("full", adamw_decay="fixed_0.01")
  config["adapt"]["optim"].update(name="sgd", weight_decay=0.3)
  assert optimizer_fields(build_run(config), "adapt")["weight_decay"] == 0.3


@pytest.mark.parametrize("sgd", [False, True])
@pytest.mark.parametrize("fixed", ["config", "fixed_0.01"])
def test_no_decay_means_sgd_if_told(setup, sgd, fixed):
  config = setup("full", zero_decay_means_sgd=sgd, adamw_decay=fixed)
  config["adapt"]["optim"].update(weight_decay=0.0, momentum=0.5)
  got = run_optimizer(built(config))
  decay = {"head": {"kernel": True, "bias": False}}
  adamw = optax.adamw(
    0.1, weight_decay=0.01 if fixed == "fixed_0.01" else 0.0, mask=decay
  )
  plain = optax.sgd(0.1, momentum=0.9) if sgd else adamw
  close(got, run_optimizer(plain), 1e-6)


def rates(config, num_steps=20, epoch_steps=1, epochs=20):
  """Of every step of ten epochs' warm-up and cosine."""
  config["adapt"]["schedule"] = {"warmup": 10 / epochs, "decay": "cosine"}
  parts, stage = parts_of(config)
  stage = dataclasses.replace(
    stage, num_steps=num_steps, epoch_steps=epoch_steps
  )
  schedule = build_schedule(parts, stage)
  return np.array([float(schedule(jnp.asarray(k))) for k in range(num_steps)])


def test_the_references_rates_are_constant_within_epochs(setup):
  switches = {"lr_granularity": "epoch", "warmup_starts_at_zero": True}
  got = rates(setup("full", **switches), num_steps=60, epoch_steps=3)
  e = np.arange(20)
  epochs = np.where(e < 10, e / 10, (1 + np.cos(np.pi * (e - 10) / 10)) / 2)
  np.testing.assert_allclose(got, np.repeat(epochs, 3), atol=1e-6)
  assert round(got[-1], 4) == 0.0245


def test_rates_change_with_each_step_by_default(setup):
  got = rates(setup("full"), num_steps=60, epoch_steps=3)
  assert got[0] > 0 and (np.diff(got) != 0).sum() >= 58


@pytest.mark.parametrize("epochs, last", [(40, 0.0027), (60, 0.0010)])
def test_longer_stages_end_lower(setup, epochs, last):
  switches = {"lr_granularity": "epoch", "warmup_starts_at_zero": True}
  got = rates(setup("full", **switches), 2 * epochs, 2, epochs)
  assert got[0] == got[1] == 0 and round(float(got[-1]), 4) == last
  assert got.argmax() == 2 * 10


@pytest.mark.parametrize("zero", [False, True])
def test_a_first_epoch_at_zero_moves_moments_alone(setup, zero):
  config = setup(
    "full", warmup_starts_at_zero=zero, lr_granularity="epoch",
    adamw_eps_style="reference",
  )  # fmt: skip
  config["adapt"]["schedule"] = {"warmup": 0.5, "decay": "cosine"}
  parts, stage = parts_of(config)
  shape = build_schedule(
    parts, dataclasses.replace(stage, num_steps=60, epoch_steps=3)
  )
  tx = optim.build(optimizer_fields(parts, "adapt"), LABELS, shape)
  now = arrays(START, np.float32)
  opt_state = optim.at_rate(tx.init(now), 0.1)
  sizes = []
  for grads in GRADS:
    updates, opt_state = tx.update(arrays(grads, np.float32), opt_state, now)
    assert bool(optax.tree.norm(updates) == 0) == zero
    sizes.append(
      sum(float(abs(x).sum()) for x in jax.tree.leaves(opt_state) if x.ndim)
    )
  assert sizes[0] > 0 and len(set(sizes)) == 3
  updates, _ = tx.update(arrays(GRADS[0], np.float32), opt_state, now)
  assert optax.tree.norm(updates) > 0  # the second epoch


def images(n=4):
  return jnp.asarray(np.random.default_rng(0).random((n, 8, 8, 1)), jnp.float32)


def swin_with_prompts(order, deep):
  model = peft.vpt(tokens=3, deep=deep, order=order).apply_to(net("glyph_swin"))
  params, stats = filled(model)
  params = dataclasses.replace(params, peft=noisy(params.peft))
  return jax.jit(lambda x: model.features(params, stats, x))


@pytest.mark.parametrize("order", ["fixed", "as_is"])
def test_prompts_in_the_references_order_mix_images(order):
  see = swin_with_prompts(order, deep=False)
  changed = images().at[3].set(0)
  moved = np.abs(see(images()) - see(changed))[:3].max()
  assert (moved > 1e-4) if order == "as_is" else (moved < 1e-6)


def test_deep_prompts_do_not_show_the_order():
  fixed, as_is = (
    swin_with_prompts(order, deep=True)(images())
    for order in ("fixed", "as_is")
  )
  np.testing.assert_allclose(as_is, fixed, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("order", ["fixed", "as_is"])
def test_the_switch_says_the_order(setup, order):
  config = setup("vpt", backbone="glyph_swin", swin_prompt_order=order)
  parts, stage = parts_of(config)
  assert build_model(parts, stage).backbone.hooks.mixed == (order == "as_is")


@pytest.mark.parametrize(
  "switch, field, cell, expected",
  [
    ("kaiming_fan_out", "kaiming_fan_out", {}, "kaiming_fan_out"),
    ("kaiming_fan_out", "small", {}, "small"),
    ("small", "kaiming_fan_out", {}, "small"),
    ("small", "small", {"head_init": "kaiming_fan_out"}, "kaiming_fan_out"),
  ],
)
def test_a_cells_head_goes_before_the_switch_before_the_config(
  setup, switch, field, cell, expected
):
  config = setup("full", head_init=switch)
  config["head_init"] = field
  config["cells"] = ({**config["cells"][0], **cell},)
  parts, stage = parts_of(config)
  assert stage.head_init == expected
  kernel = initial_variables(parts, stage)[0].head["kernel"]
  std = {"kaiming_fan_out": np.sqrt(0.2), "small": 0.02}[expected]
  assert np.std(kernel) == pytest.approx(std, rel=0.15)


@pytest.mark.parametrize("policy", ["raise", "return"])
def test_a_loss_that_is_not_finite_raises_or_ends_the_run(
  setup, policy, tmp_path, caplog
):
  config = setup("full", nan_policy=policy)
  config["adapt"].update(lr=1e38, num_steps=6)
  path = tmp_path / "run"
  if policy == "raise":
    with pytest.raises(ValueError, match="not finite"):
      train.run(config, path)
  else:
    with caplog.at_level(logging.WARNING):
      assert train.run(config, path) == []
    assert "not finite" in caplog.text and "the run ends" in caplog.text
  assert not record.read(path / "results.jsonl")
  steps = (path / "checkpoints").glob("*/adapt/*/0*")
  assert [step.name for step in steps] == ["00000000"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["adapter", "vpt"])
def test_a_run_goes_through_with_all_that_the_reference_does(
  setup, method, tmp_path
):
  theirs = {name: both[1] for name, both in common.COMPAT.items()}
  config = setup(method, backbone="glyph_swin", **theirs)
  rows = train.run(config, tmp_path / "run")
  assert {row["split"] for row in rows} == {"val"} and len(rows) == 2
  log = record.read(tmp_path / "run" / "training.jsonl")
  assert np.isfinite([row["value"] for row in log]).all()


@pytest.fixture(scope="module")
def probed(setup, tmp_path_factory):
  """A run that is a probe."""
  path = tmp_path_factory.mktemp("runs") / "probe"
  config = setup("linear", "roli")
  train.run(config, path)
  return path, config


@pytest.mark.parametrize(
  "method, init",
  [
    ("lora", "standard"),
    pytest.param("lora", "both_zero", marks=pytest.mark.slow),
    ("adapter", "near_identity"),
    pytest.param("adapter", "all_zero", marks=pytest.mark.slow),
  ],
)
def test_the_second_stage_starts_at_the_firsts_function(
  setup, probed, method, init
):
  path, before = probed
  parts, stage = parts_of(setup(method, "roli", **{f"{method}_init": init}))
  start = start_variables(
    parts, stage, lambda probe: best_variables(parts, probe, path)
  )
  old, probe = parts_of(before)
  assert stage.start == probe
  end = best_variables(old, probe, path)
  x = parts.data["val"].pixels(slice(0, 16))
  got = jax.jit(build_model(parts, stage).logits)(*start, x)
  np.testing.assert_array_equal(
    got, jax.jit(build_model(old, probe).logits)(*end, x)
  )
  assert build_program(parts, stage).abstract_state.params.peft


def test_what_no_probe_hangs_on_leaves_it_to_other_runs(setup, probed):
  config = setup("lora", "roli", lora_init="both_zero")
  assert probe_reuse._of_a_probe(config) == probe_reuse._of_a_probe(probed[1])
  other = setup("lora", "roli", lr_granularity="epoch")
  assert probe_reuse._of_a_probe(other) != probe_reuse._of_a_probe(probed[1])


@pytest.mark.parametrize(
  "given, message",
  [
    ({"lora_int": "standard"}, "'lora_int'.*lora_init"),
    ({"lora_init": "zero"}, "lora_init is one of standard, both_zero; got 'z"),
    ({"nan_policy": True}, "nan_policy is one of raise, return"),
    ({"droppath_rate": 1.0}, r"share in \[0, 1\), got 1.0"),
    ({"droppath_rate": -0.1}, r"share in \[0, 1\), got -0.1"),
  ],
)
def test_what_is_no_switch_is_refused_with_those_there_are(given, message):
  with pytest.raises(ValueError, match=message):
    compat.switches({"compat": given})


def test_a_config_without_switches_has_the_defaults():
  expected = {name: values[0] for name, values in compat.SWITCHES.items()}
  assert compat.switches({}) == expected
  assert compat.switches({"compat": {"pgd_best": "last"}}) == {
    **expected, "pgd_best": "last",
  }  # fmt: skip


def test_the_configs_know_every_switch_and_its_default():
  assert list(common.COMPAT) == list(compat.SWITCHES)
  for name, (default, theirs) in common.COMPAT.items():
    assert default == compat.SWITCHES[name][0]
    assert theirs in compat.SWITCHES[name]


@pytest.mark.parametrize(
  "arg, expected",
  [
    ("method=lora,init=roli,compat=true", "both_zero"),
    ("method=lora,init=std,compat=true", "both_zero"),
    ("method=lora,init=ranli,compat=true", "standard"),
    ("method=full,init=roli,compat=true", "standard"),
    ("method=lora,init=roli,compat=true,backbone=vit_b16", "standard"),
    ("method=lora,init=roli", "standard"),
  ],
)
def test_loras_two_zeros_are_those_of_the_references_files(arg, expected):
  config = roli_config.get_config(arg)
  assert config.compat.lora_init == expected


def test_compat_is_all_that_the_reference_does_at_once():
  def made(text):
    return compat.switches(roli_config.get_config(text).to_dict())

  theirs = {name: both[1] for name, both in common.COMPAT.items()}
  got = made("method=lora,init=roli,compat=true")
  assert got == {**theirs, "droppath_rate": 0.5}
  ours = {name: both[0] for name, both in common.COMPAT.items()}
  assert made("method=lora,init=roli") == {**ours, "droppath_rate": 0.5}
  assert made("backbone=convnext_b")["droppath_rate"] == 0.0


def test_compat_is_true_or_false():
  with pytest.raises(ValueError, match="'yes'; there are false, true"):
    glyphs_roli.get_config("compat=yes")
