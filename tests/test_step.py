"""A training step on one device and on many."""

import dataclasses

import jax
import numpy as np
import pytest

from roli_jax import keys, parts, sharding, state, table, trees


@pytest.fixture(scope="module")
def config():
  from configs import glyphs_roli

  return glyphs_roli.get_config("init=ranli").to_dict()


def two_steps(config):
  made = parts.Parts(config)
  (stage,) = table.expand(config)
  program = made.program(stage)
  params, stats = made.initial(stage)
  now = state.create(params, stats, program.method.trains(params), program.tx)
  now, key = sharding.replicate((now, keys.root(0)), made.mesh)
  source = made.train_data(stage)
  for k in range(2):
    rows = np.arange(64 * k, 64 * (k + 1))
    batch = {
      "image": source.images[rows],
      "label": source.labels[rows],
      "index": source.indices[rows],
    }
    now, counts = program.step(now, sharding.put(batch, made.mesh), key)
    jax.block_until_ready(now)
  assert program.step._cache_size() == 1
  return now, counts


def test_devices_agree_up_to_rounding(config, devices):
  devices(1)
  one, counts = two_steps(config)
  for k in (2, 8):
    devices(k)
    many, others = two_steps(config)
    assert int(others.seen) == 64 and int(others.correct) == int(counts.correct)
    for name, leaf in trees.paths(one.params).items():
      np.testing.assert_allclose(
        leaf, trees.paths(many.params)[name], atol=1e-5, err_msg=name
      )


def test_a_step_donates_its_state_and_leaves_the_weights(config):
  made = parts.Parts(config)
  (stage,) = table.expand(config)
  now, _ = two_steps(config)
  assert all(not x.is_deleted() for x in jax.tree.leaves(now))
  params, _ = made.initial(stage)
  assert np.isfinite(np.asarray(params.backbone["positions"])).all()
  changed = dataclasses.replace(stage, head_init="small")
  assert made.program(changed) is made.program(stage)


def test_a_batch_that_the_devices_do_not_divide_is_refused(config, devices):
  devices(3)
  (stage,) = table.expand(config)
  with pytest.raises(ValueError, match="multiple of the 3 devices"):
    parts.Parts(config).program(stage)
