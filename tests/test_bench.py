"""Measurements: that they are made, not what they are."""

import json

import jax.numpy as jnp
import pytest

from roli_jax import bench, models, peft
from roli_jax.bench import suites, timing
from tests import cli

CONFIG = {
  "suites": ("step",),
  "model": "glyph_vit",
  "methods": ("linear",),
  "batch_sizes": (8,),
  "runs": 1,
}


def test_medians_take_turns():
  order = []
  calls = {name: lambda name=name: order.append(name) for name in "ab"}
  times = timing.medians(calls, 3)
  assert order == ["a", "b"] * 4 and times.keys() == {"a", "b"}


def test_flops_of_a_product_are_counted():
  a, b = jnp.ones((8, 16)), jnp.ones((16, 4))
  assert timing.flops(jnp.matmul, a, b) == pytest.approx(
    2 * 8 * 16 * 4, rel=0.1
  )


def test_a_steps_count_is_of_its_passes():
  """About: 7 x (2 forwards) + 1 + the update, which a probe's is little of."""
  model = models.create("glyph_vit", 10)
  batch = suites._batch(model, 8)
  _, now = suites._training(model, peft.linear())
  linear = suites._counted(model, peft.linear(), now, batch)
  full = suites._counted(model, peft.full(), now, batch)
  forward = 8 * 2 * 16 * 200_000  # images x 2 FLOPs x tokens x weights
  assert 15 * forward < linear < full < 22 * forward


def test_a_bench_writes_its_rows(tmp_path, capsys, devices):
  devices(1)
  bench.run(CONFIG, tmp_path / "bench")
  lines = (tmp_path / "bench" / "bench.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  assert [row["name"] for row in rows] == [
    "matmul 2048",
    "linear PGD-7 batch 8",
  ]
  assert 0 < rows[1]["share_of_floor"] < 1
  assert "linear PGD-7" in capsys.readouterr().out


def test_an_unknown_suite_lists_the_known(tmp_path):
  with pytest.raises(ValueError, match="import"):
    bench.run({**CONFIG, "suites": ("setp",)}, tmp_path)


@pytest.mark.parametrize(
  "set_before, count", [({}, 2), ({"JAX_NUM_CPU_DEVICES": "3"}, 3)]
)
def test_a_cpu_is_split_as_the_config_says_unless_told(
  set_before, count, tmp_path, monkeypatch
):
  for name, value in set_before.items():
    monkeypatch.setenv(name, value)
  done = cli.run(
    "--mode=bench", "--config=configs/bench.py", "--config.cpu_devices=2",
    "--config.suites=()", f"--workdir={tmp_path}",
  )  # fmt: skip
  assert f"on {count} x cpu" in done.stdout, done.stderr
