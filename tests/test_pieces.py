"""Splits that are attacked in pieces: the same, with less of them in memory."""

import numpy as np
import pytest

from configs import glyphs_roli
from roli_jax import data
from roli_jax.experiment import measure
from roli_jax.experiment.build import build_attack
from roli_jax.experiment.run import build_run
from roli_jax.files import journal

SIZE = 64  # images of a piece
FLAGS = (
  "clean", "robust", "broken_by", "distance", "min_distance", "margin",
  "invalid",
)  # fmt: skip


def predict(weights, images):
  return (images.reshape(len(images), -1) - 0.5) @ weights


@pytest.fixture(scope="module")
def run():
  config = glyphs_roli.get_config("method=linear").to_dict()
  attack = {"name": "apgd_t", "num_steps": 6, "num_targets": 2}
  config["eval_attack"] = {**config["eval_attack"], "step_size": None, **attack}
  return build_run({**config, "eval_batch_size": 32})


@pytest.fixture(scope="module")
def weights(run):
  """A linear classifier of the digits, by least squares."""
  train = run.data["train"]
  flat = train.pixels().reshape(len(train), -1) - 0.5
  return np.linalg.lstsq(flat, np.eye(10)[train.labels])[0].astype(np.float32)


@pytest.fixture(scope="module")
def test(run):
  return measure.Test(build_attack(run, "eval_attack", "0.05"), 2 * SIZE + 20)


@pytest.fixture(scope="module")
def whole(run, weights, test):
  return measure.run(run, predict, weights, 0, "test", test)


@pytest.fixture
def small(run, monkeypatch):
  """Pieces of 64 images; a list of how many were read at once."""
  monkeypatch.setattr(measure, "_PIECE", SIZE * 4 * 64)
  pixels, read = data.Source.pixels, []

  def noted(source, rows=slice(None)):
    found = pixels(source, rows)
    read.append(len(found))
    return found

  monkeypatch.setattr(data.Source, "pixels", noted)
  return read


def same(ours, theirs):
  for name in FLAGS:
    a, b = getattr(ours, name), getattr(theirs, name)
    np.testing.assert_array_equal(a, b, name)


def test_in_pieces_all_flags_are_the_same(run, weights, test, whole, small):
  found = measure.run(run, predict, weights, 0, "test", test)
  same(found, whole)
  assert whole.clean.any() and whole.robust.any()
  assert (whole.clean & ~whole.robust).any()
  np.testing.assert_array_equal(found.adv, whole.adv[:SIZE])
  assert small == [SIZE, SIZE, 20]


def test_killed_it_goes_on_and_attacks_no_finished_piece_again(
  run, weights, test, whole, small, tmp_path, monkeypatch
):
  add = journal.Journal.add

  def add_once(self, name, **arrays):
    add(self, name, **arrays)
    if self.path.name == "piece-00001" and name != "clean":
      raise KeyboardInterrupt

  def go(run):
    save = tmp_path / "progress"
    return measure.run(
      run, predict, weights, 0, "test", test, save, keep_adv=True
    )

  def entries():
    files = tmp_path.rglob("apgd*.npz")
    return {(file, file.stat().st_mtime_ns) for file in files}

  with monkeypatch.context() as patch:
    patch.setattr(journal.Journal, "add", add_once)
    with pytest.raises(KeyboardInterrupt):
      go(run)
  before = entries()
  # Pieces are no matter of the batch, which may have been too large.
  found = go(build_run({**run.config, "eval_batch_size": 8}))
  same(found, whole)
  # A program for another size of batch rounds otherwise.
  np.testing.assert_allclose(found.adv, whole.adv, atol=1e-6)
  assert before < entries()
  later = {file.parent.name for file, _ in entries() - before}
  assert later == {"piece-00001", "piece-00002"}
