"""Checkpoints of a stage."""

import pathlib
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from roli_jax import keys, sharding
from roli_jax.files import checkpoint
from roli_jax.types import Params

pytestmark = pytest.mark.usefixtures("eight_devices")


def tree(value):
  params = Params(backbone={"w": jnp.full((4, 2), value)}, peft={}, head={})
  return params, {}


def write(path, scores, start=0):
  with checkpoint.manager(path) as checkpoints:
    for step, score in enumerate(scores, start):
      checkpoint.save(
        checkpoints,
        step,
        model=tree(float(step)),
        rest=(jnp.asarray(step), keys.root(step)),
        meta={"history": list(range(step))},
        score=score,
      )


@pytest.mark.parametrize(
  "scores, best, kept",
  [
    ((0.1, 0.9, 0.4), 1, [1, 2]),
    ((0.5, 0.5, 0.5), 0, [0, 2]),  # of equal ones the earliest
    ((0.5, float("nan"), 0.2, 0.6), 3, [3]),
    ((float("nan"), float("nan")), 0, [0, 1]),
  ],
)
def test_the_latest_and_the_best_are_kept(tmp_path, scores, best, kept):
  write(tmp_path, scores)
  with checkpoint.manager(tmp_path, reading=True) as checkpoints:
    assert checkpoints.best_step() == best
    assert sorted(checkpoints.all_steps()) == kept


def test_steps_that_take_its_buffers_leave_what_is_saved(tmp_path):
  """Saving goes on while training does, whose step donates its state."""
  onwards = jax.jit(lambda x: x + 1, donate_argnums=0)
  state = onwards(sharding.replicate(jnp.zeros(100_000), sharding.mesh()))
  with checkpoint.manager(tmp_path) as checkpoints:
    checkpoint.save(
      checkpoints, 1, model={"w": state}, rest=(state,), meta={}, score=1.0
    )
    for _ in range(20):
      state = onwards(state)
    checkpoints.wait_until_finished()
    like = {"w": state}
    saved = checkpoint.restore(checkpoints, 1, model=like)["model"]["w"]
  assert (np.asarray(state) == 21).all() and (np.asarray(saved) == 1).all()


def test_all_items_come_back(tmp_path):
  write(tmp_path, (0.1, 0.2))
  like = sharding.ruled(jax.eval_shape(lambda: tree(0.0)), sharding.mesh())
  with checkpoint.manager(tmp_path, reading=True) as checkpoints:
    items = checkpoint.restore(
      checkpoints, 1, model=like, rest=(jnp.asarray(0), keys.root(0))
    )
    assert checkpoint.restore_meta(checkpoints, 1) == {"history": [0]}
  params, stats = items["model"]
  np.testing.assert_array_equal(params.backbone["w"], 1.0)
  assert len(params.backbone["w"].devices()) == 8 and stats == {}
  step, key = items["rest"]
  assert step == 1
  np.testing.assert_array_equal(
    jax.random.key_data(key), jax.random.key_data(keys.root(1))
  )


def test_another_tree_or_a_damaged_file_is_an_error(tmp_path):
  write(tmp_path, (0.1,))
  with checkpoint.manager(tmp_path, reading=True) as checkpoints:
    other = (Params(backbone={"v": jnp.ones(3)}, peft={}, head={}), {})
    with pytest.raises(ValueError, match="can't be restored"):
      checkpoint.restore(checkpoints, 0, model=other)
  for file in (tmp_path / "00000000" / "meta").iterdir():
    file.write_bytes(b"{")
  with (
    checkpoint.manager(tmp_path, reading=True) as checkpoints,
    pytest.raises(ValueError, match="can't be read"),
  ):
    checkpoint.restore_meta(checkpoints, 0)


def test_stages_are_found_below_a_directory(tmp_path):
  write(tmp_path / "a" / "probe", (0.1,))
  write(tmp_path / "b" / "adapt", (0.1,))
  found = checkpoint.find(tmp_path)
  assert found == [tmp_path / "a" / "probe", tmp_path / "b" / "adapt"]
  assert checkpoint.find(tmp_path / "none") == []
  assert checkpoint.step_of(pathlib.Path("x/00000020")) == 20
  assert checkpoint.step_of(pathlib.Path("x/probe")) is None


def test_stages_are_found_while_a_run_is_writing(tmp_path):
  done = threading.Event()

  def write_on():
    while not done.is_set():
      started = tmp_path / "a.tmp"
      (started / "item" / "more").mkdir(parents=True)
      shutil.rmtree(started.rename(tmp_path / "a"))

  writer = threading.Thread(target=write_on)
  writer.start()
  try:
    for _ in range(1000):
      assert checkpoint.find(tmp_path) == []
  finally:
    done.set()
    writer.join()
