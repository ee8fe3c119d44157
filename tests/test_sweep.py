"""Grids of runs: names, commands, what is skipped, what fails."""

import json
import logging

import pytest

from configs import glyphs_roli
from roli_jax.files import workdir
from roli_jax.results import record
from roli_jax.sweep import runs
from tests import cli

GRID = (
  "--config=configs/glyphs_roli.py:method=full|lora,init=roli",
  "--config.adapt.lr=0.001|0.01",
  "--config.adapt.num_steps=3",
)


def resolve(words):
  """As the command line does, but for fields beside the arguments."""
  config = glyphs_roli.get_config(words[0].partition(":")[2]).to_dict()
  fields = dict(w.removeprefix("--config.").split("=") for w in words[1:])
  return {**config, "fields": fields}


def test_all_combinations_are_named_by_what_varies():
  found = runs.grid(GRID)
  assert [name for name, _ in found] == [
    "method=full-lr=0.001", "method=full-lr=0.01",
    "method=lora-lr=0.001", "method=lora-lr=0.01",
  ]  # fmt: skip
  assert found[2][1] == (
    "--config=configs/glyphs_roli.py:method=lora,init=roli",
    "--config.adapt.lr=0.001",
    "--config.adapt.num_steps=3",
  )


def test_each_cell_is_an_ordinary_command_in_a_directory_of_its_own(tmp_path):
  cells = runs.swept_runs(GRID, resolve)
  command = cells[1].command(tmp_path)
  assert command[:3] == ["python", "-m", "roli_jax.main"]
  assert command[-1] == f"--workdir={tmp_path}/method=full-lr=0.01"
  assert cells[1].config["fields"]["adapt.lr"] == "0.01"


def test_a_tables_cells_are_one_run_each():
  words = ("--config=configs/glyphs_roli.py:table=default",)
  cells = runs.swept_runs(words, resolve)
  assert [cell.words[-1] for cell in cells] == [
    f"--config.only={i}" for i in range(9)
  ]
  assert cells[6].name == "06-standard-linear-roli"
  assert {cell.config["only"] for cell in cells} == set(range(9))


@pytest.mark.parametrize(
  "words, message",
  [
    (("--config=configs/glyphs_roli.py:method=full",), "nothing to sweep"),
    ((GRID[0], "--config.seed=1|1"), "would be called"),
  ],
)
def test_what_is_no_grid_is_refused(words, message):
  with pytest.raises(ValueError, match=message):
    runs.swept_runs(words, resolve)


def test_a_run_is_finished_with_all_rows_of_its_own_config(tmp_path):
  config = {"seed": 0, "cells": ({"method": "full"},)}
  assert not workdir.is_finished(tmp_path, config)
  workdir.claim(tmp_path, config)
  results = record.Record(tmp_path / "results.jsonl")
  for seed in range(2):
    results.add({"seed": seed, "value": 0.5})
  assert not workdir.is_finished(tmp_path, config)
  workdir.finish(tmp_path, 2)
  assert workdir.is_finished(tmp_path, config)
  assert not workdir.is_finished(tmp_path, {**config, "seed": 1})
  lines = (tmp_path / "results.jsonl").read_text().splitlines(keepends=True)
  (tmp_path / "results.jsonl").write_text(lines[0])
  assert not workdir.is_finished(tmp_path, config)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
  """A sweep of two seeds of which one cell fails, and what it said."""
  path = tmp_path_factory.mktemp("sweep") / "runs"
  words = (
    "--mode=sweep", f"{cli.GLYPHS}:method=linear,init=roli", *cli.TINY,
    "--config.seed=0|1", "--config.data.train_size=7|20", f"--workdir={path}",
  )  # fmt: skip
  return path, words, cli.run(*words)


@pytest.mark.slow
def test_a_cell_that_fails_stops_no_other(swept):
  path, _, done = swept
  assert done.returncode == 2
  assert "2 of 4 cells failed: seed=0-train_size=7" in done.stderr
  log = path / "logs" / "seed=0-train_size=7.txt"
  assert "train_size" in log.read_text()
  for seed in (0, 1):
    assert (path / f"seed={seed}-train_size=20" / "finished.json").is_file()


@pytest.mark.slow
def test_rows_of_all_cells_are_merged(swept):
  path, _, _ = swept
  rows = record.read(path / "results.jsonl")
  assert {row["run"] for row in rows} == {
    "seed=0-train_size=20", "seed=1-train_size=20",
  }  # fmt: skip
  about = json.loads((path / "sweep.json").read_text())
  assert "--config.seed=1" in about["seed=1-train_size=20"]


@pytest.mark.slow
def test_what_is_complete_is_skipped_and_a_report_written(swept):
  path, words, _ = swept
  words = [w.replace("7|20", "20") for w in words]
  kept = path / "seed=0"
  (path / "seed=0-train_size=20").rename(kept)
  (path / "seed=1-train_size=20").rename(path / "seed=1")
  before = {f: f.stat().st_mtime_ns for f in kept.rglob("*") if f.is_file()}
  done = cli.run(*words)
  assert done.returncode == 0, done.stderr
  after = {f: f.stat().st_mtime_ns for f in kept.rglob("*") if f.is_file()}
  assert before == after
  assert not (path / "logs" / "seed=0.txt").exists()
  report = (path / "report.md").read_text()
  assert "linear probe (RoLI)" in report
  (path / "report.html").unlink()
  done = cli.run("--mode=report", f"--workdir={path}")
  assert done.returncode == 0, done.stderr
  shown = (path / "report.html").read_text()
  # Each run has kept images, of its own seed.
  assert "RoLI), seed 0" in shown and "RoLI), seed 1" in shown
  assert (path / "figures" / "runs.png").is_file()


def test_commands_are_printed_for_a_scheduler(tmp_path):
  done = cli.run(
    "--config.seed=0|1|2", "--mode=sweep", "--sweep_print",
    f"{cli.GLYPHS}:method=full", f"--workdir={tmp_path / 'a b'}",
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  assert len(lines) == 3 and all(line.startswith("python -m") for line in lines)
  assert f"'--workdir={tmp_path / 'a b'}/seed=2'" in lines[2]
  assert not (tmp_path / "a b").exists()


@pytest.mark.slow
def test_other_engines_leave_the_same(swept, tmp_path):
  path, words, _ = swept
  again = tmp_path / "runs"
  words = [w.replace("0|1", "0").replace(str(path), str(again)) for w in words]
  handler = logging.FileHandler(tmp_path / "log.txt")
  done = cli.run(*words, "--sweep_on=submitit")
  assert done.returncode == 2
  assert "1 of 2 cells failed: train_size=7" in done.stderr

  def kept(folder):
    names = ("run", "seconds")
    rows = record.read(folder / "results.jsonl")
    return [{k: v for k, v in row.items() if k not in names} for row in rows]

  assert kept(again) == [row for row in kept(path) if row["seed"] == 0]
  assert {f.name for f in (again / "logs").glob("*.txt")} == {
    "train_size=7.txt", "train_size=20.txt",
  }  # fmt: skip
  handler.stream.write("handlers of others stay open")
