"""Measurements: that they are made, not what they are."""

import json
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from configs import bench as configured
from roli_jax import bench, models, peft
from roli_jax.bench import (
  against_torch,
  chip,
  eager,
  passes,
  suites,
  timing,
  workload,
)
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


def test_ratios_are_of_the_same_turn():
  assert timing.ratios([2.0, 8.0, 6.0], [1.0, 2.0, 6.0]) == (1.5, 2.0, 3.0)
  assert timing.ratios([1.5, 15.0], [1.0, 10.0]) == (1.5, 1.5, 1.5)
  assert timing.ratios([3.0], [2.0]) == (1.5, 1.5, 1.5)


def test_flops_of_a_product_are_counted():
  a, b = jnp.ones((8, 16)), jnp.ones((16, 4))
  assert timing.flops(jnp.matmul, a, b) == pytest.approx(
    2 * 8 * 16 * 4, rel=0.1
  )


def test_a_steps_count_is_of_its_passes():
  """About: 7 x (2 forwards) + 1 + the update, which a probe's is little of."""
  model = models.create("glyph_vit", 10)
  batch = workload.random_batch(model, 8)
  _, now = workload.build_step(model, peft.linear())
  linear = passes.count_flops(model, peft.linear(), now, batch)
  full = passes.count_flops(model, peft.full(), now, batch)
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
  shown = capsys.readouterr().out
  assert "linear PGD-7" in shown and "share_of_floor" in shown
  assert "times_adamw" not in shown  # no row of this suite has it


def test_the_shipped_config_runs_every_suite():
  assert set(configured.get_config().suites) == set(suites.SUITES)


def test_without_torch_a_row_says_so(tmp_path, capsys, monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)
  bench.run({**CONFIG, "suites": ("against_torch",)}, tmp_path)
  (row,) = (tmp_path / "bench.jsonl").read_text().splitlines()
  said = "skipped: torch is not installed"
  assert json.loads(row) == {"suite": "against_torch", "name": said}
  assert said in capsys.readouterr().out


@pytest.mark.parametrize(
  "where, sees_gpu, runs",
  [
    ("cpu", False, True),
    ("cpu", True, True),
    ("gpu", False, False),
    ("gpu", True, True),
    ("tpu", True, False),
  ],
)
def test_torch_runs_where_jax_does_or_not_at_all(
  where, sees_gpu, runs, monkeypatch
):
  cuda = types.SimpleNamespace(is_available=lambda: sees_gpu)
  torch = types.SimpleNamespace(cuda=cuda)
  monkeypatch.setitem(sys.modules, "torch", torch)
  monkeypatch.setattr(jax, "default_backend", lambda: where)
  assert (eager.lacking() == "") == runs


@pytest.fixture
def beside(monkeypatch):
  """`beside(counts)` gives the rows beside a torch that does nothing."""

  def rows(counts):
    monkeypatch.setattr(eager, "lacking", lambda: "")
    monkeypatch.setattr(eager, "set_num_threads", lambda count: None)
    monkeypatch.setattr(eager, "like", lambda model, params: None)
    monkeypatch.setattr(eager, "passes", lambda net, step: counts)
    monkeypatch.setattr(eager, "make_step", lambda *_: lambda: 0.0)
    for module in (timing, eager):
      monkeypatch.setattr(module, "product", lambda *_: lambda: 0.0)
    config = {
      **configured.get_config().to_dict(),
      "torch_models": ("glyph_vit_token",),
      "torch_batch": 2,
      "torch_pairs": 3,
      "runs": 1,
    }
    return list(against_torch.against_torch(config))

  return rows


@pytest.mark.slow
def test_our_step_stands_beside_torchs_in_both_forms(beside):
  rows = beside((9, 8))
  names = [row["name"] for row in rows]
  assert names[:2] == ["matmul 2048, JAX", "matmul 2048, torch"]
  assert names[2:] == [
    f"glyph_vit_token {method} PGD-7 batch 2, {which}"
    for method in ("full", "linear")
    for which in ("ours", "torch, as written", "torch, frozen in the attack")
  ]
  for row in rows[2:]:
    low, high = row["quartiles"]
    assert low <= row["times_ours"] <= high
    assert (row["times_ours"] == 1) == row["name"].endswith("ours")
    assert row["passes"] == 17 and row["pairs"] == 3 and row["threads"] > 0


def test_a_torch_of_other_passes_is_not_compared(beside):
  with pytest.raises(AssertionError, match="passes"):
    beside((8, 8))


@pytest.mark.parametrize("name", ["glyph_vit", "glyph_clip", "glyph_swin"])
def test_torch_has_vits_with_a_class_token_alone(name):
  with pytest.raises(ValueError, match="class token"):
    eager.vit(models.create(name, 10))


def test_an_unknown_suite_lists_the_known(tmp_path):
  with pytest.raises(ValueError, match="import"):
    bench.run({**CONFIG, "suites": ("setp",)}, tmp_path)


@pytest.mark.parametrize(
  "set_before, count",
  [
    pytest.param({}, 2, marks=pytest.mark.slow),
    ({"JAX_NUM_CPU_DEVICES": "3"}, 3),
  ],
)
def test_a_cpu_is_split_as_the_config_says_unless_told(
  set_before, count, tmp_path, monkeypatch
):
  for name, value in set_before.items():
    monkeypatch.setenv(name, value)
  done = cli.process(
    "--mode=bench", "--config=configs/bench.py", "--config.cpu_devices=2",
    "--config.suites=()", f"--workdir={tmp_path}",
  )  # fmt: skip
  assert f"on {count} x cpu" in done.stdout, done.stderr


REHEARSED = {
  **chip.CONFIG,
  "families": ("glyph_vit_token", "glyph_resnet"),
  "models": ("glyph_vit",),
  "methods": ("linear",),
  "batch_sizes": (8, 16),
  "runs": 1,
  "numbers": 8,
  "attack_images_224": 0,
}


@pytest.mark.slow
def test_the_first_minutes_on_a_chip_are_rehearsed(tmp_path, monkeypatch):
  known = chip.parts

  def parts(config):
    broken = {"torch": None, "trace": known(config)["trace"]}
    return {
      k: v for k, v in known(config).items() if k != "autoattack"
    } | broken

  monkeypatch.setattr(chip, "parts", parts)
  rows = chip.run(REHEARSED, tmp_path)
  suites = {row["suite"] for row in rows}
  assert {
    "environment", "numbers", "determinism", "families", "steps", "trace",
  } <= suites  # fmt: skip
  stopped = [row for row in rows if row["name"].startswith("stopped")]
  assert not stopped, stopped
  found = {row["name"]: row for row in rows}
  assert found["autoattack_robust, flags equal"]["share"] == 1
  assert found["features, largest error"]["error"] < 1e-6
  assert found["a step, twice"]["same"]
  assert all(row["finite"] for row in rows if row["suite"] == "families")
  assert json.loads((tmp_path / "bench-chip.json").read_text()) == rows


def test_a_part_that_fails_costs_itself_alone(tmp_path, monkeypatch):
  def parts(config):
    return {"determinism": None, "nothing": None, "late": None}

  monkeypatch.setattr(chip, "parts", parts)
  config = {**chip.CONFIG, "families": ("no_such_model",), "budget_s": 60}
  first, second, _ = chip.run(config, tmp_path)
  assert "stopped" in first["name"] and "no_such_model" in first["name"]
  assert "nothing" in second["name"]
  late = chip.run({**config, "budget_s": 0}, tmp_path)
  assert all("no time left" in row["name"] for row in late)
