"""Pretraining: the average of weights, pieces, and what a run leaves."""

import numpy as np
import pytest

from roli_jax import convert, state, trees
from roli_jax.experiment import command_line, start_and_resume
from roli_jax.experiment.program import build_program
from roli_jax.experiment.run import build_run, expand_stages
from roli_jax.files import checkpoint, workdir
from tests import cli

# A few steps of a toy on digits.
WORDS = (
  "--config=pretrain:dataset=digits,backbone=glyph_vit_token",
  "--config.data.train_size=100", "--config.pretrain.num_steps=4",
  "--config.pretrain.val_every=2", "--config.pretrain.batch_size=16",
  "--config.val_attack.num_steps=1", "--config.eval_attack.num_steps=1",
  "--config.num_val_images=20", "--config.num_images=30",
)  # fmt: skip
BUNDLE = "glyph_vit_token_robust.safetensors"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  path = tmp_path_factory.mktemp("pretrain") / "a"
  done = cli.run(*WORDS, f"--workdir={path}")
  assert done.returncode == 0, done.stderr
  return path


def last(path):
  """The program, the last checkpoint's state, and its metadata."""
  made = build_run(workdir.read_config(path))
  (stage,) = expand_stages(made)
  directory = checkpoint.directory(path, stage)
  with checkpoint.manager(directory, reading=True) as checkpoints:
    now, _, meta = start_and_resume.restore_or_start(
      made, stage, checkpoints, best=lambda stage: pytest.fail("starts anew")
    )
  return build_program(made, stage), now, meta


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

  with monkeypatch.context() as context:
    context.setattr(start_and_resume, "save", save_and_stop)
    assert "stopped" in cli.run(*WORDS, f"--workdir={path}").stderr
  assert int(last(path)[1].step) == 2
  assert cli.run(*WORDS, f"--workdir={path}").returncode == 0
  (_, now, meta), (_, whole, expected) = last(path), last(finished)
  check_equal(now, whole)
  assert meta["history"] == expected["history"]
  check_equal(*(convert.load(run / BUNDLE).params for run in (path, finished)))


def test_the_average_is_what_is_kept_and_raw_weights_train_on(finished):
  _, now, _ = last(finished)
  bundle = convert.load(finished / BUNDLE)
  averages = trees.paths(state.variables(now)[0])
  raw = trees.paths(now.params)
  for name in raw:
    apart = float(abs(averages[name] - raw[name]).max())
    assert 0 < apart < 1e-2, name
  history = last(finished)[2]["history"]
  if history[-1]["robust"] > max(entry["robust"] for entry in history[:-1]):
    check_equal(bundle.params, state.variables(now)[0])


def test_a_pretraining_goes_on_from_what_another_wrote(finished, tmp_path):
  path = tmp_path / "b"
  words = (*WORDS, f"--config.backbone.weights={finished / BUNDLE}")
  config = command_line.parse((*words, f"--workdir={path}")).config
  made = build_run(config)
  (stage,) = expand_stages(made)
  params, _ = start_and_resume.initial_variables(made, stage)
  check_equal(params, convert.load(finished / BUNDLE).params)
  other = build_run({**config, "data": {**config["data"], "name": "letters"}})
  with pytest.raises(ValueError, match="10 classes, letters has 37"):
    build_program(other, stage)
