"""A training step on one device, on many, and in two processes."""

import dataclasses
import math
import os
import re
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from roli_jax import sharding, trees
from roli_jax.experiment.program import build_program, check_run
from roli_jax.experiment.run import build_run, expand_stages, training_images
from roli_jax.experiment.start_and_resume import initial_variables
from roli_jax.results import record
from tests import cli, steps

pytestmark = pytest.mark.usefixtures("eight_devices")

FSDP = (".*", "data")
# What AdamW keeps, and nothing else.
ZERO = ("(mu|nu)/.*", "data")
# As Megatron splits a block: columns, then rows, of its two pairs of products.
MEGATRON = (
  ("attn/[qkv]/kernel", (None, "model")),
  ("attn/[qkv]/bias", "model"),
  ("attn/out/kernel", ("model",)),
  ("mlp/fc1/kernel", (None, "model")),
  ("mlp/fc1/bias", "model"),
  ("mlp/fc2/kernel", ("model",)),
)


@pytest.fixture(scope="module")
def one():
  """The state and the counts of two steps on one device."""
  with pytest.MonkeyPatch.context() as patch:
    alone = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    patch.setattr(sharding, "mesh", lambda *_: alone)
    return steps.two_steps(steps.config())


def check_same(one, many):
  theirs = trees.paths((many.params, many.average))
  for name, leaf in trees.paths((one.params, one.average)).items():
    np.testing.assert_allclose(leaf, theirs[name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
  ("rules", "model"),
  [
    pytest.param((), 1, marks=pytest.mark.slow),
    pytest.param((FSDP,), 1, marks=pytest.mark.slow),
    pytest.param((ZERO,), 1, marks=pytest.mark.slow),
    (MEGATRON, 2),
  ],
)
def test_devices_agree_up_to_rounding(one, rules, model):
  many, counts = steps.two_steps(steps.config(*rules, model=model))
  assert int(counts.seen) == 64 and int(counts.correct) == int(one[1].correct)
  check_same(one[0], many)


def test_a_batch_in_parts_is_the_batch_up_to_rounding():
  whole = steps.config()
  whole["backbone"] = {**whole["backbone"], "scan": True}  # compiles faster
  whole["adapt"] = {**whole["adapt"], "awp": {"gamma": 0.01, "begin": 0.0}}
  parted = {**whole, "adapt": {**whole["adapt"], "accumulate": 4}}
  one, counts = steps.two_steps(whole)
  many, others = steps.two_steps(parted)
  assert int(others.seen) == 64 and int(others.correct) == int(counts.correct)
  np.testing.assert_allclose(others.loss, counts.loss, rtol=1e-5)
  check_same(one, many)


@pytest.mark.parametrize("turns", [0, 3, 16])
def test_parts_that_can_not_be_are_refused(turns):
  config = steps.config()
  config["adapt"] = {**config["adapt"], "accumulate": turns}
  made = build_run(config)
  with pytest.raises(ValueError, match=r"accumulate.* must"):
    build_program(made, expand_stages(made)[0])


def test_a_number_that_an_optimizer_keeps_for_a_leaf_is_not_split():
  shapes = {"omega/fc1/kernel": (), "params/fc1/kernel": (8, 32)}
  shapes = {k: jax.ShapeDtypeStruct(v, "float32") for k, v in shapes.items()}
  over = sharding.mesh(2, devices=jax.devices()[:2])
  placed = sharding.ruled(shapes, over, (("fc1/kernel", (None, "model")),))
  assert [tuple(x.sharding.spec) for x in placed.values()] == [
    (), (None, "model"),
  ]  # fmt: skip


def test_rules_split_parameters_and_what_the_optimizer_keeps(one):
  now, _ = one
  made = build_run(steps.config(FSDP))
  (stage,) = expand_stages(made)
  for name, leaf in trees.paths(
    build_program(made, stage).abstract_state
  ).items():
    spread = [n for n in leaf.shape if n % 8 == 0]
    own = leaf.sharding.shard_shape(leaf.shape)
    assert np.prod(own) * (8 if spread else 1) == np.prod(leaf.shape), name
  assert len(trees.paths(now.params)) < len(trees.paths(now.opt_state))


@pytest.mark.parametrize(
  ("rule", "said"),
  [
    ((".*", "modal"), "names the axis 'modal'; there are data, model"),
    (("fc1/bias", ("data", None)), "can't be split over"),
    (("fc[", "data"), r"'fc\[' is no pattern"),
    ("data", "is a tuple of pairs"),
    (("head/kernel", (None, "data")), r"shape \(64, 10\), which can't"),
  ],
)
def test_a_rule_that_can_not_be_is_refused(rule, said):
  made = build_run(steps.config(rule))
  with pytest.raises(ValueError, match=said):
    check_run(made, expand_stages(made))


def test_a_mesh_that_can_not_be_is_refused():
  with pytest.raises(ValueError, match="must divide the 8 devices, got 3"):
    build_run(steps.config(model=3))


COLLECTIVES = re.compile(
  r"= (\S+|\(.*?\)) (all-reduce|all-gather|reduce-scatter|all-to-all"
  r"|collective-permute|collective-broadcast)(?:-start)?\("
)


def kinds(text):
  return [kind for _, kind in COLLECTIVES.findall(text)]


def sent(text):
  """How many numbers all collectives together send."""
  shapes = " ".join(shapes for shapes, _ in COLLECTIVES.findall(text))
  axes = re.findall(r"\w\[([\d,]*)\]", shapes)
  return sum(math.prod(map(int, filter(None, x.split(",")))) for x in axes)


def loops(program, *args):
  """The text of the compiled program inside its while loops, and outside."""
  text = program.lower(*args).compile().as_text()
  whole = re.compile(r"^%?([\w.-]+) \([^\n]*\{\n(.*?)^\}", re.M | re.S)
  bodies = dict(whole.findall(text))
  reached = re.findall(r"(?:body|condition)=%?([\w.-]+)", text)
  inside, seen = [], set()
  while reached:
    name = reached.pop()
    if name not in seen and name in bodies:
      seen.add(name)
      inside.append(bodies[name])
      reached += re.findall(r"%([\w.-]+)", bodies[name])
  rest = [body for name, body in bodies.items() if name not in seen]
  return "\n".join(inside), "\n".join(rest) + text[text.index("ENTRY") :]


def arguments(config):
  made = build_run(config)
  (stage,) = expand_stages(made)
  program, now, key = steps.begin(made, stage)
  batch = sharding.put(steps.batch(training_images(made, stage), 0), made.mesh)
  return program.step, now, batch, key


def test_the_attack_needs_no_other_device(one):
  inside, outside = loops(*arguments(steps.config()))
  assert "dot" in inside
  assert not kinds(inside)
  assert set(kinds(outside)) == {"all-reduce"}
  # The gradients, the loss, and the number of correct images.
  assert sent(outside) == trees.size(one[0].params) + 2


def test_under_fsdp_parameters_are_gathered_before_the_attack():
  inside, outside = loops(*arguments(steps.config(FSDP)))
  assert not kinds(inside)
  assert set(kinds(outside)) == {"all-gather", "all-reduce"}


def test_as_megatron_splits_blocks_the_attack_reduces_activations():
  inside, _ = loops(*arguments(steps.config(*MEGATRON, model=2)))
  assert set(kinds(inside)) == {"all-reduce"}


@pytest.mark.slow
def test_to_keep_the_best_of_a_batch_asks_all_devices():
  config = steps.config()
  config["compat"] = {**config["compat"], "pgd_best": "batch"}
  inside, _ = loops(*arguments(config))
  assert kinds(inside) == ["all-reduce"]


def test_a_step_donates_its_state_and_leaves_the_weights():
  made = build_run(steps.config())
  (stage,) = expand_stages(made)
  program, now, key = steps.begin(made, stage)
  batch = sharding.put(steps.batch(training_images(made, stage), 0), made.mesh)
  after, _ = program.step(now, batch, key)
  assert all(x.is_deleted() for x in jax.tree.leaves(now.params))
  assert all(not x.is_deleted() for x in jax.tree.leaves(after))
  params, _ = initial_variables(made, stage)
  assert np.isfinite(np.asarray(params.backbone["positions"])).all()
  changed = dataclasses.replace(stage, head_init="small")
  assert build_program(made, changed) is program


def test_a_batch_that_the_devices_do_not_divide_is_refused(devices):
  devices(3)
  made = build_run(steps.config())
  with pytest.raises(ValueError, match="multiple of the 3 devices"):
    build_program(made, expand_stages(made)[0])


# Two processes of four devices each.

FOUR = {
  **os.environ,
  "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=4"),
}


@pytest.fixture
def start():
  """Starts a process of four devices; none outlives the test."""
  started = []

  def go(words):
    process = subprocess.Popen(
      words, env=FOUR, cwd=cli.ROOT, stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    started.append(process)
    return process

  yield go
  for process in started:
    process.kill()


@pytest.mark.slow
def test_two_processes_are_one(one, start, tmp_path, devices):
  file, address = tmp_path / "after.npz", f"127.0.0.1:{cli.free_port()}"
  words = [sys.executable, "-m", "tests.steps", str(file), address, "2"]
  both = [start([*words, str(k)]) for k in range(2)]
  for process in both:
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
  with np.load(file) as after:
    for name, leaf in trees.paths(one[0].params).items():
      np.testing.assert_allclose(leaf, after[name], atol=1e-5, err_msg=name)
    devices(1)
    images = steps.attacked(steps.config())
    assert len(images) == 64
    # A sign may flip where a gradient is zero but for rounding.
    other = np.mean([(images[i] != after[str(i)]).mean() for i in images])
    assert other < 1e-3


@pytest.mark.slow
def test_who_loses_a_process_ends_and_another_number_goes_on(start, tmp_path):
  run = tmp_path / "run"
  config = [f"{cli.GLYPHS}:method=full,init=ranli", *cli.TINY]
  config += ["--config.adapt.num_steps=40", f"--workdir={run}"]
  address = f"--coordinator=127.0.0.1:{cli.free_port()}"
  both = [
    start(cli.command(*config, address, "--num_processes=2", f"--process={k}"))
    for k in range(2)
  ]
  most = time.monotonic() + 300
  while not list(run.glob("checkpoints/*/adapt/*/0*")):
    assert both[0].poll() is None, both[0].communicate()[0]
    assert time.monotonic() < most
    time.sleep(0.1)
  both[1].kill()
  said, _ = both[0].communicate(timeout=120)
  assert both[0].returncode != 0 and "error" in said.lower()
  assert not (run / "results.jsonl").exists()
  before = record.read(run / "training.jsonl")
  done = cli.run(*config)
  assert done.returncode == 0, done.stderr
  after = record.read(run / "training.jsonl")
  assert after[: len(before)] == before
  assert max(row["step"] for row in after) == 40
  assert len(record.read(run / "results.jsonl")) == 5
