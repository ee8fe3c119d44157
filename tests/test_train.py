"""Whole runs: what they leave behind, and what they do when given again."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from roli_jax import train, trees
from roli_jax.experiment import stages
from roli_jax.experiment.run import build_run
from roli_jax.experiment.start_and_resume import initial_variables
from roli_jax.experiment.train_stage import best_variables
from roli_jax.files import checkpoint, workdir
from roli_jax.results import record, report
from tests import cli

CELL = f"{cli.GLYPHS}:method=full,init=roli"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A finished run of one RoLI cell."""
  path = tmp_path_factory.mktemp("runs") / "a"
  done = cli.run(CELL, *cli.TINY, f"--workdir={path}")
  assert done.returncode == 0, done.stderr
  return path, done


@pytest.fixture
def run(finished, tmp_path):
  """A copy of it that a test may change."""
  path = tmp_path / "a"
  shutil.copytree(finished[0], path)
  return path


def config_of(path):
  return workdir.read_config(path)


def test_a_run_leaves_what_the_contract_says(finished):
  path, done = finished
  names = {p.relative_to(path).as_posix() for p in path.rglob("*.*")}
  assert {
    "config.json", "results.jsonl", "report.md", "report.html",
    "training.jsonl", "evaluations/clean-test-n50.npz",
    "figures/accuracy.png", "figures/curve.png", "figures/examples.png",
    "figures/training.png",
  } <= names  # fmt: skip
  assert {p.name for p in (path / "checkpoints").iterdir()} == {
    "robust-linear-roli-n200-seed0",
    "robust-full-roli-n200-seed0",
  }
  assert "full RoLI" in done.stdout and "PGD-2 linf 0.1" in done.stdout
  assert not done.stderr  # quiet where stderr is no terminal


def test_examples_are_images_of_the_test(finished):
  path = finished[0]
  examples = np.load(path / "figures/examples.npz")
  clean = np.load(path / "evaluations/clean-test-n50.npz")
  _, firsts = np.unique(clean["labels"], return_index=True)
  stage = path / "evaluations/robust-full-roli-n200-seed0/adapt"
  (file,) = stage.rglob("images-test-pgd-2-1-linf-0.1.npz")
  kept = np.load(file)
  np.testing.assert_array_equal(examples["labels"], clean["labels"][firsts])
  change = (examples["adv"] - examples["images"]) * 127 / kept["scale"]
  assert change.any()
  np.testing.assert_array_equal(np.rint(change), kept["change"][firsts])
  for ours, theirs in (("adv_said", "said"), ("clean_said", "clean_said")):
    np.testing.assert_array_equal(examples[ours], kept[theirs][firsts])


def test_rows_are_the_contracts(finished):
  rows = record.read(finished[0] / "results.jsonl")
  for row in rows:
    assert tuple(row) == record.FIELDS
    assert 0 <= row["value"] <= 1 and row["metric"] == "accuracy"
    assert row["n"] == {"val": 40, "test": 50}[row["split"]]
    assert row["backbone"] == "glyph_vit" and row["run"] == "a"
  said = [
    (r["stage"], r["method"], r["init"], r["split"], r["attack"], r["eps"])
    for r in rows
  ]
  assert len(said) == len(set(said)) == 2 * 4 + 1
  assert ("probe", "linear", "roli", "val", "none", None) in said
  assert ("adapt", "full", "roli", "test", "pgd", 0.2) in said
  assert {r["steps"] for r in rows} == {6}


def test_roli_starts_at_its_probe_and_is_never_worse_on_validation(finished):
  log = record.read(finished[0] / "training.jsonl")
  vals = record.where(log, split="val", attack="pgd")
  probe, adapt = (
    {r["step"]: r["value"] for r in record.where(vals, stage=stage)}
    for stage in ("probe", "adapt")
  )
  assert list(probe) == list(adapt) == [0, 2, 4, 6]
  assert adapt[0] == max(probe.values())
  rows = record.read(finished[0] / "results.jsonl")
  best = record.where(rows, stage="adapt", split="val", attack="pgd")
  assert best[0]["value"] == max(adapt.values()) >= max(probe.values())


def test_a_checkpoint_says_all_that_going_on_needs(finished):
  path = finished[0]
  _, stage = stages.expand(config_of(path))
  with checkpoint.manager(
    path / "checkpoints" / stage.directory, reading=True
  ) as checkpoints:
    assert checkpoints.latest_step() == 6
    meta = checkpoint.restore_meta(checkpoints, 6)
  assert meta["stage"]["method"] == "full" and meta["images_seen"] == 96
  assert [entry["step"] for entry in meta["history"]] == [0, 2, 4, 6]
  assert meta["config"]["threat"]["eps"] == "0.1"


def test_a_probe_moves_the_head_alone(finished):
  path = finished[0]
  config = config_of(path)
  made = build_run(config)
  probe, _ = stages.expand(config)
  before, _ = initial_variables(made, probe)
  after, _ = best_variables(made, probe, path)
  for name, leaf in trees.paths(before.backbone).items():
    np.testing.assert_array_equal(leaf, trees.paths(after.backbone)[name])
  assert (before.head["kernel"] != jax.device_get(after.head["kernel"])).any()


def test_a_finished_run_is_left_as_it_is(run):
  before = {p: p.read_bytes() for p in run.rglob("*.json*")}
  done = cli.run(CELL, *cli.TINY, f"--workdir={run}")
  assert done.returncode == 0 and "full RoLI" in done.stdout
  assert {p: p.read_bytes() for p in run.rglob("*.json*")} == before


def test_another_config_is_refused_with_the_difference(run):
  done = cli.run(
    CELL, *cli.TINY, "--config.adapt.num_steps=4", f"--workdir={run}"
  )
  assert done.returncode == 2
  assert "adapt.num_steps: 6 -> 4" in done.stderr
  assert len(done.stderr.splitlines()) <= 6


def test_evaluate_adds_the_rows_that_are_missing(run):
  rows = len(record.read(run / "results.jsonl"))
  words = (
    "--mode=evaluate", f"--workdir={run}", "--config.attack=pgd",
    "--config.eval_attack.num_steps=3", "--config.eval_attack.num_restarts=2",
    '--config.radii=("0.05", "25/255")',
  )  # fmt: skip
  done = cli.run(*words)
  assert done.returncode == 0, done.stderr
  assert "PGD-3 x 2 linf 0.05" in done.stdout
  after = record.read(run / "results.jsonl")
  assert len(after) == rows + 2
  assert after[-1]["restarts"] == 2 and after[-1]["eps"] == 25 / 255
  assert after[-1]["stage"] == "adapt"
  assert cli.run(*words).returncode == 0
  assert len(record.read(run / "results.jsonl")) == rows + 2


def test_evaluate_takes_the_checkpoint_that_is_named(run):
  words = ("--mode=evaluate", f"--workdir={run}", "--config.attack=fgsm")
  probe = "--config.checkpoint=robust-linear-roli-n200-seed0"
  assert cli.run(*words, probe).returncode == 0
  row = record.read(run / "results.jsonl")[-1]
  assert (row["stage"], row["attack"], row["attack_steps"]) == (
    "probe", "fgsm", 1,
  )  # fmt: skip
  log = record.read(run / "training.jsonl")
  vals = record.where(log, stage="adapt", split="val", attack="pgd")
  best = max(vals, key=lambda row: row["value"])["step"]
  stage = run / "checkpoints" / "robust-full-roli-n200-seed0"
  for step in {best, 6}:
    named = next(stage.rglob(f"{step:08d}"))
    done = cli.run(*words, f"--config.checkpoint={named}")
    assert done.returncode == (0 if step == best else 2), done.stderr


@pytest.mark.parametrize(
  "words, message",
  [
    (["--config.checkpoint=nothing"], "there is no checkpoint"),
    (["--config.checkpoint=."], "2 checkpoints"),
    (["--config.data.name=letters"], "head of 10 classes"),
    (["--config.eval_attack.steps=3"], "no field 'steps'"),
  ],
)
def test_evaluate_says_what_is_wrong(finished, words, message):
  done = cli.run("--mode=evaluate", f"--workdir={finished[0]}", *words)
  assert done.returncode == 2 and message in done.stderr
  assert len(done.stderr.splitlines()) <= 6


def test_report_needs_the_rows_alone(finished, tmp_path):
  shutil.copy(finished[0] / "results.jsonl", tmp_path)
  shutil.copy(finished[0] / "config.json", tmp_path)
  done = cli.run("--mode=report", f"--workdir={tmp_path}")
  assert done.returncode == 0, done.stderr
  assert (tmp_path / "figures" / "accuracy.png").is_file()
  text = (tmp_path / "report.md").read_text()
  assert "| robust | full RoLI | 0.003 | 1 |" in text
  assert len(report.tables(record.read(tmp_path / "results.jsonl"))) == 3


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_with_all_that_is_known(run):
  (run / "results.jsonl").unlink()
  shutil.rmtree(run / "checkpoints" / "robust-full-roli-n200-seed0")
  config = config_of(run)
  config["adapt"]["lr"] = 1e38
  (run / "config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match="not finite") as error:
    train.run(config, run)
  text = str(error.value)
  assert "images: [" in text and "last good checkpoint" in text
  assert pathlib.Path(text.splitlines()[-1].split(": ")[1]).is_dir()


@pytest.mark.slow  # draws 74,000 letters
def test_pretraining_writes_a_bundle(tmp_path):
  words = (
    "--config=configs/glyphs_pretrain.py", "--config.pretrain.num_steps=2",
    "--config.pretrain.batch_size=8", "--config.data.name=digits",
    "--config.data.train_size=100", "--config.val_attack.num_steps=1",
    "--config.eval_attack.num_steps=1", f"--workdir={tmp_path}",
  )  # fmt: skip
  done = cli.run(*words)
  assert done.returncode == 0, done.stderr
  from roli_jax import convert

  for name in ("robust", "standard"):
    bundle = convert.load(tmp_path / f"glyph_vit_{name}.safetensors")
    assert bundle.model.num_classes == 10
  used = cli.run(
    f"{cli.GLYPHS}:init=ranli", *cli.TINY,
    f"--config.backbone.weights={tmp_path}/glyph_vit_robust.safetensors",
    f"--workdir={tmp_path}/used",
  )  # fmt: skip
  assert used.returncode == 0, used.stderr


@pytest.mark.slow  # a run of its own
def test_validations_and_tests_are_of_as_many_images_as_said(tmp_path):
  path = tmp_path / "a"
  done = cli.run(
    f"{cli.GLYPHS}:method=linear", *cli.TINY, f"--workdir={path}",
    "--config.num_val_images=0", "--config.num_images=0",
    '--config.cells=({"method": "linear", "init": "roli", "tests":'
    ' (("fgsm", "linf", "0.1", 30), ("fgsm", "linf", "0.2", 0))},)',
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  rows = record.read(path / "results.jsonl")
  assert {row["n"] for row in record.where(rows, split="val")} == {297}
  said = {(r["attack"], r["eps"]): r["n"] for r in rows if r["split"] == "test"}
  # A test's own number goes before.
  assert said == {
    ("none", None): 500, ("pgd", 0.1): 500, ("fgsm", 0.1): 30,
    ("fgsm", 0.2): 500,
  }  # fmt: skip
  log = record.where(record.read(path / "training.jsonl"), split="val")
  assert {row["n"] for row in log} == {297}
