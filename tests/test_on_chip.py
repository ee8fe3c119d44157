"""A plan's programs, compiled for devices that a target describes.

The CPU stands in for a chip: what differs is tried by `make test-chips`.
"""

import json
import sys

import jax
import jaxtyping
import pytest

from roli_jax import trees
from roli_jax.experiment import command_line
from roli_jax.plan import chips, compiler, cost, on_chip, programs, shapes
from tests import cli

CONFIG = command_line.parse(
  [
    f"{cli.GLYPHS}:method=full,init=ranli",
    *cli.TINY,
    "--config.eval_attack.name=apgd_ce",
    "--config.eval_attack.num_steps=4",
    "--config.backbone.name=glyph_vit_token",
    "--config.eval_batch_size=16",
  ]
).config


class Here(chips.Target):
  """Devices of this machine, in place of a chip's."""

  def devices(self):
    return jax.devices("cpu")[: self.num_devices]


@pytest.fixture
def _unchecked():
  """What is lowered describes its arguments: placeholders in an attack."""
  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("_unchecked")
def test_a_steps_flops_are_those_that_shapes_count():
  here = Here("h100:2", "h100", (2,))
  described = compiler.describe(programs.lower(CONFIG, 0, here).compile(), here)
  run = shapes.planned(CONFIG)
  stage = programs.expand_stages(run)[0]
  model, method = shapes.model_and_method(run, stage)
  one = cost.of(model, method)
  # XLA leaves out what of the last block only the other tokens need.
  flops = 8 * cost.step_flops(one, passes=(2, 1))
  assert described["flops"] == pytest.approx(flops, rel=0.01)
  assert described["collectives"]["in_loop"] == 0
  assert described["collectives"]["outside"] > 0
  trained = 4 * trees.size(cost.shapes(model))
  assert described["collectives"]["bytes_outside"] >= trained


@pytest.mark.usefixtures("_unchecked")
def test_validation_and_a_search_are_programs_too():
  run = shapes.planned(CONFIG)
  listed = programs.listed(run, programs.expand_stages(run))
  names = [one.name for one in listed]
  assert names == ["step", "validate", "test:apgd_ce"]
  here = Here("h100:1", "h100", (1,))
  one = cost.of(*shapes.model_and_method(run, listed[0].stage))
  for number in (1, 2):
    planned = listed[number]
    lowered = programs.lower(CONFIG, number, here)
    described = compiler.describe(lowered.compile(), here, planned.turns)
    flops = 16 * cost.attack_flops(one, planned.attack.passes)
    assert described["flops"] == pytest.approx(flops, rel=0.01)


@pytest.mark.parametrize(
  "text, message",
  [
    ("b300:8", "h100"),
    ("h100:2x4", "a number of GPUs"),
    ("h100", "a number of GPUs"),
    ("v5e:0x4", "v5e:2x4"),
    ("v5p:", "v5p:2x2x1"),
  ],
)
def test_a_target_that_can_not_be_is_refused(text, message):
  with pytest.raises(ValueError, match=message):
    chips.parse(text)


@pytest.mark.parametrize("text", ["v5e:2x4", "h100:8"])
def test_a_missing_compiler_is_told_how_to_get(monkeypatch, tmp_path, text):
  monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
  done = cli.run(
    "--mode=plan", cli.GLYPHS, f"--config.target={text}",
    f"--workdir={tmp_path}",
  )  # fmt: skip
  assert done.returncode == 2
  assert "pip install" in done.stderr and jax.__version__ in done.stderr


def order(tmp_path, monkeypatch, script):
  """The answer to an order that this script takes in the compiler's place."""
  file = tmp_path / "compiler"
  file.write_text(f"#!{sys.executable}\n{script}")
  file.chmod(0o755)
  monkeypatch.setattr(compiler.sys, "executable", str(file))
  target = chips.Target("h100:1", "h100", (1,))
  return compiler.compile_apart({"program": 0}, target, tmp_path / "store")


ABORTS = """
import json, os, pathlib, sys
answer = {"digest": "d", "result": None}
pathlib.Path(sys.argv[4]).write_text(json.dumps(answer))
print("F1129 06:00:00.000000 1 tiling.cc:627] Check failed: 784 vs. 56",
      file=sys.stderr, flush=True)
os.abort()
"""


def test_a_compiler_that_aborts_leaves_its_first_line(tmp_path, monkeypatch):
  found = order(tmp_path, monkeypatch, ABORTS)
  assert not found["compiled"]
  assert found["error"] == "Check failed: 784 vs. 56"
  assert (tmp_path / "store" / "d.json").exists()


def test_a_compiler_that_was_killed_is_asked_again(tmp_path, monkeypatch):
  killed = ABORTS.replace("os.abort()", "os.kill(os.getpid(), 9)")
  assert not order(tmp_path, monkeypatch, killed)["compiled"]
  assert not (tmp_path / "store" / "d.json").exists()


def test_a_result_is_kept_by_all_that_it_hangs_on(monkeypatch):
  v5e, h100 = (
    chips.Target(f"{kind}:{n}", kind, (n,))
    for kind, n in (("v5e", 4), ("h100", 4))
  )
  orders = [("a", v5e, 1), ("b", v5e, 1), ("a", h100, 1), ("a", v5e, 7)]
  digests = [compiler.digest_of(*order) for order in orders]
  monkeypatch.setenv("XLA_FLAGS", "--xla_a_flag=1")
  digests.append(compiler.digest_of(*orders[0]))
  assert len(set(digests)) == 5


def test_devices_that_do_not_divide_the_batch_are_refused(
  tmp_path, monkeypatch
):
  script = """
import json, pathlib, sys
pathlib.Path(sys.argv[4]).write_text(json.dumps({"refused": "a multiple of 7"}))
"""
  with pytest.raises(ValueError, match="multiple of 7"):
    order(tmp_path, monkeypatch, script)


def test_memory_that_is_missing_is_read_from_the_compilers_words():
  said = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required"
    " for HLO temporaries (20.50G) exceeds available HBM (15.75G).\nmore"
  )
  found = compiler.failure(said)
  assert found["peak_bytes"] == int(20.5 * 2**30)
  assert "more" not in found["error"]


def swin(target, peaks, monkeypatch, tmp_path):
  """The chip section of a plan whose programs have these peaks, in GiB.

  The last one stands for all that are compiled after.
  """
  ordered = []

  def compile_apart(order, target, store):
    ordered.append(json.loads((store / "config.json").read_text()))
    gib = peaks[min(len(ordered), len(peaks)) - 1]
    nothing = compiler.failure("")
    counted = {"seconds_products": 0.5, "seconds_traffic": 1.5}
    return {
      **nothing, **counted, "compiled": True, "peak_bytes": int(gib * 2**30),
      "flops": 1, "traffic_bytes": 1,
      "collectives": dict.fromkeys(
        ("in_loop", "outside", "bytes_in_loop", "bytes_outside"), 0
      ),
    }  # fmt: skip

  monkeypatch.setattr(on_chip.compiler, "compile_apart", compile_apart)
  monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: True)
  config = command_line.parse(
    ["--config=cifar_roli:method=full,init=ranli"]
  ).config
  return on_chip.make(config, target, tmp_path), ordered


def test_a_run_that_fits_has_hours_and_no_suggestion(monkeypatch, tmp_path):
  chip, ordered = swin("v5e:2x4", [9], monkeypatch, tmp_path)
  assert chip["fits"] and chip["suggestion"] is None
  assert chip["devices"] == 8 and chip["kind"] == "v5e"
  assert [one["name"] for one in chip["programs"]] == [
    "step", "validate", "test:pgd",
  ]  # fmt: skip
  steps = 20 * -(-45_000 // 64)
  batches = 21 * -(-5_000 // 64) + -(-10_000 // 64)
  assert chip["hours"] == pytest.approx(1.5 * (steps + batches) / 3600)
  assert len(ordered) == 3
  (table,) = on_chip.tables(chip)
  assert "fits" in table.note and len(table.rows) == 3


def test_what_overflows_comes_with_what_makes_it_fit(monkeypatch, tmp_path):
  chip, ordered = swin("v5e:1x1", [20, 9], monkeypatch, tmp_path)
  assert not chip["fits"]
  assert chip["suggestion"] == {"backbone.dtype": "bfloat16"}
  assert ordered[-1]["backbone"]["dtype"] == "bfloat16"
  (table,) = on_chip.tables(chip)
  assert "does not fit" in table.note
  assert "--config.backbone.dtype=bfloat16" in table.note


def test_a_change_that_the_compiler_refuses_is_not_named(monkeypatch, tmp_path):
  chip, _ = swin("v5e:1x1", [500, 9, 9, 400], monkeypatch, tmp_path)
  assert not chip["fits"] and chip["suggestion"] is None


def test_every_target_says_its_devices():
  for name, (platform, count) in {
    "v4:2x2x1": ("tpu", 8), "v5e:16x16": ("tpu", 256), "h200:8": ("cuda", 8),
  }.items():  # fmt: skip
    kind, _, shape = name.partition(":")
    target = chips.Target(name, kind, tuple(map(int, shape.split("x"))))
    assert target.num_devices == count
    assert target.chip.platform == platform
    assert target.chip.memory > 15e9
