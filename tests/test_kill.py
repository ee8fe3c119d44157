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

# A probe and an adaptation; a pretraining, whose weights are averages.
RUNS = {
  "roli": (f"{cli.GLYPHS}:method=full,init=roli", *cli.TINY),
  "pretrain": cli.PRETRAIN,
}


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


def kill_after(seconds, words, path):
  """Starts the run, and kills it a while after its first checkpoint."""
  process = subprocess.Popen(
    cli.command(*words, f"--workdir={path}"),
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


@pytest.fixture(scope="module", params=RUNS)
def uninterrupted(request, tmp_path_factory):
  """The words of a run, and what they leave."""
  path = tmp_path_factory.mktemp("whole") / "run"
  words = RUNS[request.param]
  assert cli.process(*words, f"--workdir={path}").returncode == 0
  return words, path


def test_killed_anywhere_it_ends_at_the_same_bits(uninterrupted, tmp_path):
  path, (words, whole) = tmp_path / "run", uninterrupted
  moments = random.Random()  # other ones each time: any must do
  killed = [kill_after(moments.uniform(0, 5), words, path) for _ in range(4)]
  assert any(killed)
  done = cli.process(*words, f"--workdir={path}")
  assert done.returncode == 0, done.stderr
  assert results(path) == results(whole)
  pairs = zip(parameters(path), parameters(whole), strict=True)
  for ours, theirs in pairs:
    np.testing.assert_array_equal(ours, theirs)


def test_the_log_of_training_is_whole_too(uninterrupted):
  log = record.read(uninterrupted[1] / "training.jsonl")
  losses = record.where(log, split="train", metric="loss")
  last = record.where(losses, stage=losses[-1]["stage"])
  assert [row["step"] for row in last] == [1, 2, 3, 4, 5, 6]
