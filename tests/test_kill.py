"""A run that is killed goes on to the same bits."""

import os
import random
import signal
import subprocess
import time

import numpy as np
import pytest

from roli_jax import trees
from roli_jax.experiment import stages
from roli_jax.experiment.run import build_run
from roli_jax.experiment.train_stage import best_variables
from roli_jax.files import checkpoint, workdir
from roli_jax.results import record
from tests import cli

pytestmark = pytest.mark.slow

WORDS = (f"{cli.GLYPHS}:method=full,init=roli", *cli.TINY)


def results(path):
  rows = record.read(path / "results.jsonl")
  return [
    {k: v for k, v in row.items() if k not in ("seconds", "run")}
    for row in rows
  ]


def parameters(path):
  config = workdir.read_config(path)
  made = build_run(config)
  for stage in stages.expand(config):
    params, _ = best_variables(made, stage, path)
    yield from trees.paths(params).values()


def kill_after(seconds, path):
  """Starts the run, and kills it a while after its first checkpoint."""
  process = subprocess.Popen(
    cli.command(*WORDS, f"--workdir={path}"),
    cwd=cli.ROOT,
    env=cli.environment(),
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
    start_new_session=True,
  )
  while process.poll() is None and not checkpoint.find(path / "checkpoints"):
    time.sleep(0.01)
  time.sleep(seconds)
  alive = process.poll() is None
  if alive:
    os.killpg(process.pid, signal.SIGKILL)
  process.wait()
  return alive


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  path = tmp_path_factory.mktemp("whole") / "run"
  assert cli.process(*WORDS, f"--workdir={path}").returncode == 0
  return path


def test_killed_anywhere_it_ends_at_the_same_bits(uninterrupted, tmp_path):
  path = tmp_path / "run"
  moments = random.Random()  # other ones each time: any must do
  killed = [kill_after(moments.uniform(0, 5), path) for _ in range(4)]
  assert any(killed)
  done = cli.process(*WORDS, f"--workdir={path}")
  assert done.returncode == 0, done.stderr
  assert results(path) == results(uninterrupted)
  pairs = zip(parameters(path), parameters(uninterrupted), strict=True)
  for ours, theirs in pairs:
    np.testing.assert_array_equal(ours, theirs)


def test_the_log_of_training_is_whole_too(uninterrupted):
  log = record.read(uninterrupted / "training.jsonl")
  losses = record.where(log, split="train", metric="loss", stage="adapt")
  assert [row["step"] for row in losses] == [1, 2, 3, 4, 5, 6]
