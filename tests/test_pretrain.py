"""Pretraining: the average of weights, its recipe, and going on from files."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from configs import glyphs_roli, pretrain
from roli_jax import (
  attacks,
  convert,
  keys,
  losses,
  objectives,
  sharding,
  state,
  trees,
)
from roli_jax.experiment import (
  build,
  command_line,
  stage_tests,
  start_and_resume,
)
from roli_jax.experiment.program import build_program, check_run
from roli_jax.experiment.run import build_run, expand_stages, training_images
from roli_jax.experiment.train_stage import best_variables
from roli_jax.files import checkpoint, workdir
from roli_jax.plan import shapes
from roli_jax.results import record
from roli_jax.types import Params
from tests import cli, steps

BUNDLE = "glyph_vit_token_robust.safetensors"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A finished pretraining, and the variables that it validated last."""
  path = tmp_path_factory.mktemp("pretrain") / "a"
  seen, validate = [], stage_tests.validate

  def spy(run, stage, variables):
    seen.append(jax.device_get(variables))
    return validate(run, stage, variables)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(stage_tests, "validate", spy)
    done = cli.run(*cli.PRETRAIN, f"--workdir={path}")
  assert done.returncode == 0, done.stderr
  return path, seen[-1]


def only_stage(config):
  made = build_run(config)
  return made, expand_stages(made)[-1]


def restored(made, stage, path):
  """The state and the metadata of the last checkpoint."""
  directory = checkpoint.directory(path, stage)
  with checkpoint.manager(directory, reading=True) as checkpoints:
    now, _, meta = start_and_resume.restore_or_start(
      made, stage, checkpoints, best=lambda stage: pytest.fail("starts anew")
    )
  return now, meta


def last(path):
  return restored(*only_stage(workdir.read_config(path)), path)


def check_equal(ours, theirs):
  mine, yours = trees.paths(ours), trees.paths(theirs)
  assert mine.keys() == yours.keys()
  for name, leaf in mine.items():
    np.testing.assert_array_equal(leaf, yours[name], name)


def test_a_stopped_pretraining_ends_at_the_same_bits(
  finished, tmp_path, monkeypatch
):
  path, save = tmp_path / "a", start_and_resume.save

  def save_and_stop(*args):
    save(*args)
    if args[-1]["step"] == 2:
      raise RuntimeError("stopped")

  with monkeypatch.context() as patch:
    patch.setattr(start_and_resume, "save", save_and_stop)
    assert "stopped" in cli.run(*cli.PRETRAIN, f"--workdir={path}").stderr
  made, stage = only_stage(workdir.read_config(path))
  assert int(restored(made, stage, path)[0].step) == 2
  # Others may start from what there is.
  best, _ = best_variables(made, stage, path)
  check_equal(convert.load(path).params, best)
  assert cli.run(*cli.PRETRAIN, f"--workdir={path}").returncode == 0
  (now, meta), (whole, expected) = last(path), last(finished[0])
  check_equal(now, whole)
  assert meta["history"] == expected["history"]
  bundles = [convert.load(run / BUNDLE) for run in (path, finished[0])]
  check_equal(*(bundle.params for bundle in bundles))


def test_the_average_is_validated_and_the_best_of_them_written(finished):
  path, validated = finished
  now, _ = last(path)
  check_equal((now.average, now.stats), validated)
  for name, leaf in trees.paths(now.params).items():
    assert (leaf != trees.paths(now.average)[name]).any(), name
  made, stage = only_stage(workdir.read_config(path))
  best, _ = best_variables(made, stage, path)
  bundle = convert.load(path / BUNDLE)
  check_equal(bundle.params, best)
  assert bundle.classes == made.data["train"].classes == tuple("0123456789")


def test_tests_are_of_as_many_images_as_the_config_says(finished):
  rows = record.read(finished[0] / "results.jsonl")
  assert {(r["split"], r["n"]) for r in rows} == {("val", 20), ("test", 30)}
  log = record.read(finished[0] / "training.jsonl")
  assert {r["n"] for r in record.where(log, split="val")} == {20}


def test_the_average_moves_as_the_formula_says():
  made, stage = only_stage(steps.config())  # 0.9, not reached in two steps
  program, now, key = steps.begin(made, stage)
  source = training_images(made, stage)
  expected = jax.device_get(now.params)
  for n in (1, 2):
    batch = sharding.put(steps.batch(source, n), made.mesh)
    now, _ = program.step(now, batch, key)
    kept = n / (9 + n)
    expected = jax.tree.map(
      lambda old, new, kept=kept: kept * old + (1 - kept) * np.asarray(new),
      expected,
      now.params,
    )
  for name, leaf in trees.paths(now.average).items():
    np.testing.assert_allclose(
      leaf, trees.paths(expected)[name], atol=1e-6, err_msg=name
    )


def test_a_late_average_keeps_the_decay_of_itself():
  def params(value):
    leaves = {"w": np.float32(value)}
    return Params(backbone={"frozen": None}, peft={}, head=leaves)

  now = state.TrainState(
    step=np.int32(1000), params=params(3), stats={}, opt_state={}, memory={},
    average=params(1),
  )  # fmt: skip
  after = state.averaged(now, now.params, 0.9)
  assert after.average.backbone == {"frozen": None}
  assert float(after.average.head["w"]) == pytest.approx(0.9 * 1 + 0.1 * 3)


@pytest.mark.parametrize("method", ["full", "linear"])
def test_a_checkpoint_has_average_and_weights(method, tmp_path):
  config = glyphs_roli.get_config(f"method={method},init=ranli").to_dict()
  for name in ("probe", "adapt"):
    config[name]["ema"] = 0.9
  made, stage = only_stage(config)
  program, now, key = steps.begin(made, stage)
  trained, _ = program.method.split(now.params)
  check_equal(now.average, trained)
  now = dataclasses.replace(
    now, average=jax.tree.map(lambda x: x + 1, now.average)
  )
  meta = {"step": 1, "history": [{"robust": 0.5}], "seconds": 0.0}
  with checkpoint.manager(checkpoint.directory(tmp_path, stage)) as checkpoints:
    start_and_resume.save(made, stage, checkpoints, now, key, meta)
  check_equal(restored(made, stage, tmp_path)[0], now)
  tested, _ = best_variables(made, stage, tmp_path)
  moved = trees.paths(now.average)
  for name, leaf in trees.paths(now.params).items():
    expected = moved.get(name, leaf)
    np.testing.assert_array_equal(trees.paths(tested)[name], expected, name)


def test_a_pretraining_goes_on_from_what_another_wrote(finished):
  weights = finished[0] / BUNDLE
  words = (*cli.PRETRAIN, f"--config.backbone.weights={weights}")
  config = command_line.parse(words).config
  made, stage = only_stage(config)
  now = build_program(made, stage).create(
    *start_and_resume.initial_variables(made, stage)
  )
  check_equal(now.params, convert.load(weights).params)
  check_equal(now.average, now.params)
  of_others = shapes.Split(37, 100, (8, 8, 1))
  other = dataclasses.replace(build_run(config), data={"train": of_others})
  with pytest.raises(ValueError, match="has 10 classes, digits has 37"):
    check_run(other, [stage])


def test_one_step_is_fgsm_from_a_random_start_and_k_steps_are_shorter():
  config = pretrain.get_config("dataset=digits,backbone=glyph_vit_token")
  weights = np.random.default_rng(0).normal(size=(64, 10)).astype("float32")
  images = np.random.default_rng(1).uniform(size=(8, 8, 8, 1))
  labels = np.arange(8, dtype=np.int32)
  image_keys = keys.per_image(keys.root(0), np.arange(8, dtype=np.uint32))

  def found(attack):
    attacked = jax.jit(attack, static_argnums=0)
    return attacked(
      lambda x: x.reshape(len(x), -1) @ weights,
      images.astype("float32"),
      labels,
      image_keys,
    )

  attack = build.build_attack(build_run(config.to_dict()), "attack")
  fgsm_rs = attacks.Fgsm(attack.threat, random_start=True)
  np.testing.assert_array_equal(found(attack), found(fgsm_rs))
  assert attack.passes == (1, 1)
  config.attack.num_steps = 4
  attack = build.build_attack(build_run(config.to_dict()), "attack")
  assert attack.step_size == pytest.approx(0.5 * attack.threat.eps)
  config.attack.step_size = "eps/4"
  assert config.attack.num_steps == 4 and config.attack.step_size == "eps/4"


@pytest.mark.parametrize("name", ["at", "clean", "half_at"])
def test_smoothed_labels_are_those_of_optax(name):
  logits = np.random.default_rng(0).normal(size=(6, 5)).astype("float32")
  labels = np.arange(6, dtype=np.int32) % 5
  smoothed = optax.smooth_labels(jax.nn.one_hot(labels, 5), 0.2)
  objective = losses.OBJECTIVES[name](smoothing=0.2)
  np.testing.assert_allclose(
    objective(clean=None, adv=logits, labels=labels),
    optax.softmax_cross_entropy(logits, smoothed),
    rtol=1e-5,
  )


def test_a_loss_without_smoothed_labels_says_so():
  with pytest.raises(ValueError, match="loss 'trades' takes no 'smoothing'"):
    objectives.build({"name": "trades", "beta": 6.0, "smoothing": 0.1})


@pytest.mark.parametrize(
  ("word", "said"),
  [
    ("pretrain.ema=1.0", "ema must be in [0, 1), got 1.0"),
    ("pretrain.loss.smoothing=-0.1", "smoothing must be in [0, 1), got -0.1"),
  ],
)
def test_shares_that_can_not_be_are_refused(word, said, tmp_path):
  done = cli.run(*cli.PRETRAIN, f"--config.{word}", f"--workdir={tmp_path}")
  assert done.returncode == 2 and said in done.stderr
  assert len(done.stderr.splitlines()) <= 6 and not list(tmp_path.iterdir())


def test_images_in_files_are_cut_to_the_size_and_glyphs_left_alone():
  def transforms(text):
    section = pretrain.get_config(text).data
    return section.train_transforms, section.eval_transforms

  assert transforms("size=64,cutout=16") == (
    ("resize:64", "random_crop:64", "pad_crop:8", "flip", "cutout:16"),
    ("resize:64", "center_crop:64"),
  )
  assert transforms("dataset=cifar10") == (("pad_crop:4", "flip"), ())
  assert transforms("dataset=letters") == (None, None)
  with pytest.raises(ValueError, match="cutout is a side in pixels, got '-8'"):
    pretrain.get_config("cutout=-8")
