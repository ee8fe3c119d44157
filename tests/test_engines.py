"""Engines of sweeps: what is lost is given again, what fails is not."""

import dataclasses
import pathlib
import subprocess
import sys
import time

import pytest

from roli_jax.experiment import command_line
from roli_jax.sweep import engines, runs

# Notes its start; then does what it is told in place of a run.
STARTED = (
  "import os, sys, time; open(sys.argv[1], 'a').write(f'{os.getpid()}\\n');"
)
FIRST = "first = len(open(sys.argv[1]).readlines()) == 1;"
GOOD = "print('good')"
BAD = "sys.exit(2)"
KILLED_ONCE = f"{FIRST} os.kill(os.getpid(), 9) if first else print('good')"
ALWAYS_KILLED = "os.kill(os.getpid(), 9)"
WAITS = "\nwhile not os.path.exists('go'): time.sleep(0.05)"


@pytest.fixture
def job(tmp_path):
  """`job(name, code)`: a cell that notes each start in a file of its name."""

  def make(name, code):
    command = (sys.executable, "-SE", "-c", STARTED + code, name)
    log = pathlib.Path("logs", f"{name}.txt")
    return engines.Job(name, command, log, tmp_path)

  (tmp_path / "logs").mkdir()
  return make


def starts(tmp_path, name):
  file = tmp_path / name
  return [int(pid) for pid in file.read_text().split()] if file.exists() else []


def test_the_flag_names_every_engine():
  assert tuple(engines.ENGINES) == command_line._ENGINES


def test_here_a_cell_that_is_killed_has_failed(job, tmp_path):
  jobs = [job("killed", KILLED_ONCE), job("bad", BAD), job("good", GOOD)]
  ended = engines.ENGINES["here"](jobs)
  found = [(one.name, succeeded) for one, succeeded in ended]
  assert found == [("killed", False), ("bad", False), ("good", True)]
  assert (tmp_path / "logs" / "good.txt").read_text() == "good\n"


def test_submitit_runs_again_what_was_lost_alone(job, tmp_path, monkeypatch):
  monkeypatch.setattr(engines, "TRIES", 2)
  jobs = [
    job("killed", KILLED_ONCE), job("bad", BAD), job("always", ALWAYS_KILLED),
  ]  # fmt: skip
  ended = engines.ENGINES["submitit"](jobs)
  found = {one.name: succeeded for one, succeeded in ended}
  assert found == {"killed": True, "bad": False, "always": False}
  counts = [len(starts(tmp_path, name)) for name in found]
  assert dict(zip(found, counts, strict=True)) == {
    "killed": 2, "bad": 1, "always": 2,
  }  # fmt: skip


def test_slurm_has_no_tpus(job):
  asks = dataclasses.replace(job("tpu", GOOD), num_tpus=4)
  with pytest.raises(ValueError, match="tpu asks for TPU chips"):
    next(engines.ENGINES["submitit"]([asks]))


def _is_there(pid):
  return pathlib.Path(f"/proc/{pid}").exists()


def _wait(condition):
  until = time.monotonic() + 60
  while not condition():
    assert time.monotonic() < until
    time.sleep(0.05)


@pytest.mark.slow
def test_a_ray_cluster_runs_again_what_a_killed_node_had(
  job, tmp_path, monkeypatch
):
  from ray import cluster_utils

  head = {"num_cpus": 1, "include_dashboard": False}
  cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
  try:
    lost = cluster.add_node(num_cpus=1)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    names = ("first", "second")
    jobs = [job("bad", BAD), job("killed", KILLED_ONCE)]
    jobs += [job(name, WAITS) for name in names]
    ended = engines.ENGINES["ray"](jobs)
    one, succeeded = next(ended)
    found = {one.name: succeeded}
    _wait(lambda: all(starts(tmp_path, name) for name in names))  # one a node
    cells = {name: starts(tmp_path, name)[0] for name in names}
    (raylet,) = [one.process.pid for one in lost.all_processes["raylet"]]
    (its,) = [k for k in names if _parent(_parent(cells[k])) == raylet]
    cluster.remove_node(lost, allow_graceful=False)
    _wait(lambda: not _is_there(cells[its]))
    (tmp_path / "go").touch()
    found |= {one.name: succeeded for one, succeeded in ended}
  finally:
    cluster.shutdown()
  assert not found.pop("bad")
  assert found == {"killed": True, "first": True, "second": True}
  counts = {one.name: len(starts(tmp_path, one.name)) for one in jobs}
  assert counts == {"bad": 1, "killed": 2, "first": 1, "second": 1, its: 2}


def _parent(pid):
  return int(pathlib.Path(f"/proc/{pid}/stat").read_text().split()[3])


def test_a_cell_ends_with_who_runs_it(job, tmp_path):
  code = "import subprocess, sys; subprocess.run(sys.argv[1:])"
  waits = engines._tied(job("waits", WAITS).command)
  parent = subprocess.Popen([sys.executable, "-c", code, *waits], cwd=tmp_path)
  _wait(lambda: starts(tmp_path, "waits"))
  (left,) = starts(tmp_path, "waits")
  parent.kill()
  parent.wait()
  _wait(lambda: not _is_there(left))


def test_a_cell_asks_for_what_its_config_says(tmp_path):
  def asked(**config):
    cell = runs.SweptRun("a", ("--config=X",), config)
    one = runs._job(cell, tmp_path)
    return one.num_cpus, one.num_gpus, one.num_tpus

  assert asked() == (1, 0, 0)
  assert asked(target="h100:8", data={"num_workers": 6}) == (7, 8, 0)
  assert asked(target="v5e:2x4", cpu_devices=2) == (2, 0, 8)
  with pytest.raises(ValueError, match="after the colon"):
    asked(target="h100:2x4")
