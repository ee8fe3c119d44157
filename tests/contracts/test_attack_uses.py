"""Each attack, in each place where a config can name it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import glyphs_roli
from roli_jax import attacks, evaluate
from roli_jax.experiment import measure, stage_tests
from roli_jax.experiment.build import build_attack
from roli_jax.experiment.program import build_program, check_run
from roli_jax.experiment.run import build_run, expand_stages
from tests import cli
from tests.covering import mostly_slow

TRAINING = ("fgsm", "pgd", "apgd_ce", "apgd_dlr")
FEW = {"num_steps": 3, "num_queries": 8}
# Of each class of attacks one; `make test-all` has all.
ENOUGH = ("pgd", "apgd_t", "fab", "square", "curve")
SECTIONS = ("attack", "val_attack", "eval_attack")


def made(name, *sections):
  """The parts of a run whose sections name the attack, of a few steps."""
  config = glyphs_roli.get_config("method=full,init=ranli").to_dict()
  for section in sections:
    spec = dict.fromkeys(config[section])
    config[section] = {**spec, "name": name, **FEW}
  config["num_images"] = 12
  return build_run(config)


def predict(w, images):
  """A cheap stand-in for the model: what is asked is who may be named."""
  return (images.reshape(images.shape[0], -1) - 0.5) @ w


@pytest.fixture(scope="module")
def weights():
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.normal(size=(64, 10)), jnp.float32)


@pytest.mark.parametrize("name", attacks.ATTACKS)
def test_what_can_train_does_and_the_rest_is_refused(name):
  run = made(name, "attack")
  stages = expand_stages(run)
  if name not in TRAINING:
    with pytest.raises(ValueError, match="train"):
      check_run(run, stages)
    return
  check_run(run, stages)
  program = build_program(run, stages[0])
  batch = {
    "image": jax.ShapeDtypeStruct((64, 8, 8, 1), jnp.uint8),
    "label": jax.ShapeDtypeStruct((64,), jnp.int32),
    "index": jax.ShapeDtypeStruct((64,), jnp.int32),
  }
  _, counts = jax.eval_shape(
    program.step, program.abstract_state, batch, jax.random.key(0)
  )
  assert counts.loss.shape == ()


@pytest.mark.parametrize("name", attacks.ATTACKS)
def test_clean_training_asks_nothing_of_its_attack(name):
  run = made(name, "attack")
  run.config["adapt"]["loss"] = {"name": "clean"}
  stages = [dataclasses.replace(s, loss="clean") for s in expand_stages(run)]
  check_run(run, stages)


each_in_the_end = pytest.mark.parametrize(
  "name", mostly_slow(attacks.ATTACKS, *ENOUGH)
)


@each_in_the_end
def test_any_attack_validates_and_tests(name, weights):
  run = made(name, *SECTIONS[1:])
  (stage,) = expand_stages(run)
  asked = list(stage_tests.evaluation_tests(run))
  validation = measure.Test(build_attack(run, "val_attack"), 12)
  for split, test in (("val", validation), ("test", asked[0])):
    result = measure.run(run, predict, weights, 0, split, test)
    rows = stage_tests.rows(run, stage, split, test)
    assert len(rows) == len(test.values(result))
    assert {"gradients finite", "batch", "ball_and_box"} <= {
      check.name for check in result.checks
    }
    assert not [c for c in result.checks if c.verdict == "fail"]


@each_in_the_end
def test_any_attack_runs_in_the_library(name, weights):
  run = made(name, "eval_attack")
  images = run.data["test"].pixels()[:12]
  labels = np.asarray(predict(weights, images).argmax(1))
  attack = build_attack(run, "eval_attack")
  result = evaluate.run(predict, images, labels, attack, params=weights)
  assert result.clean.all() and result.summary()["n"] == 12


def test_the_command_line_refuses_before_it_claims(tmp_path):
  done = cli.run(
    f"{cli.GLYPHS}:method=full,init=ranli", *cli.TINY,
    "--config.attack=square", f"--workdir={tmp_path / 'run'}",
  )  # fmt: skip
  assert done.returncode == 2 and "square can't train" in done.stderr
  assert len(done.stderr.splitlines()) <= 6
  assert not (tmp_path / "run").exists()
