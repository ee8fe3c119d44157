"""--mode=evaluate: any attack on a checkpoint, killed and gone on with."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from roli_jax.results import record
from tests import cli

pytestmark = pytest.mark.slow  # each needs a run

SMALL = ("--config.num_images=24", "--config.checks=False")
CE = ("--config.attack=apgd_ce", "--config.eval_attack.num_steps=8")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  path = tmp_path_factory.mktemp("evaluated") / "run"
  words = (f"{cli.GLYPHS}:method=linear", *cli.TINY, f"--workdir={path}")
  assert cli.run(*words).returncode == 0
  return path


@pytest.fixture
def run(trained, tmp_path):
  """A copy of the trained run."""
  return shutil.copytree(trained, tmp_path / "run")


def evaluate(run, *words):
  return cli.run("--mode=evaluate", f"--workdir={run}", *SMALL, *words)


def added(run, attack):
  return record.where(record.read(run / "results.jsonl"), attack=attack)


def kept(run):
  (file,) = (run / "evaluations").rglob("summary.json")
  return json.loads(file.read_text()), file.parent


def test_an_attack_named_has_its_own_steps(run):
  """Not the 2 of the config's PGD; and its images are kept if asked for."""
  done = evaluate(run, *CE[:1], "--config.save_adv=True")
  assert done.returncode == 0, done.stderr
  (row,) = added(run, "apgd_ce")
  assert (row["attack_steps"], row["n"], row["norm"]) == (100, 24, "linf")
  summary, folder = kept(run)
  assert summary["robust"]["value"] == row["value"]
  arrays = np.load(folder / "result.npz")
  assert arrays["adv"].shape == (24, 8, 8, 1)
  assert arrays["robust"].mean() == row["value"]
  assert not (folder / "progress").exists()


def test_more_images_than_a_row_has_are_tested_and_fewer_are_not(run):
  counts = []
  for count in (24, 30, 24):
    assert evaluate(run, *CE, f"--config.num_images={count}").returncode == 0
    (row,) = added(run, "apgd_ce")
    counts.append((row["n"], row["value"], row["seconds"]))
  assert [n for n, *_ in counts] == [24, 30, 30]
  assert counts[1] == counts[2]
  assert kept(run)[0]["n"] == 30


def test_a_curve_has_a_row_at_each_radius(run):
  done = evaluate(
    run, "--config.attack=curve", "--config.eval_attack.num_steps=8",
    '--config.radii=("0.05","0.1","0.2")',
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  values = {row["eps"]: row["value"] for row in added(run, "curve")}
  assert list(values) == [0.05, 0.1, 0.2]
  assert values[0.05] >= values[0.1] >= values[0.2]
  assert cli.run("--mode=report", f"--workdir={run}").returncode == 0
  text = (run / "report.md").read_text()
  assert "CURVE-8" in text and "Evaluations" in text
  assert (run / "figures" / "evaluations.png").stat().st_size > 5000


def test_fast_is_called_non_standard_everywhere(run):
  done = evaluate(
    run, "--config.attack=autoattack_fast", "--config.threat.norm=l2",
    "--config.threat.eps=0.5", "--config.eval_attack.num_steps=6",
    "--config.eval_attack.num_queries=20",
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert "non-standard" in done.stdout
  (row,) = added(run, "autoattack_fast_custom")
  assert (row["norm"], row["eps"]) == ("l2", 0.5)
  cli.run("--mode=report", f"--workdir={run}")
  assert "non-standard" in (run / "report.md").read_text()


def test_killed_it_goes_on_to_the_same_flags(run, tmp_path):
  words = (
    "--mode=evaluate", *SMALL, "--config.attack=autoattack",
    "--config.eval_attack.num_steps=20", "--config.eval_attack.num_queries=900",
  )  # fmt: skip
  other = shutil.copytree(run, tmp_path / "other")
  whole = cli.run(*words, f"--workdir={other}")
  assert whole.returncode == 0, whole.stderr
  process = subprocess.Popen(
    cli.command(*words, f"--workdir={run}"), cwd=cli.ROOT,
    env=cli.environment(), stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL, start_new_session=True,
  )  # fmt: skip
  progress = run / "evaluations"
  while process.poll() is None and not list(progress.rglob("apgd_t-*.npz")):
    time.sleep(0.01)
  assert process.poll() is None
  os.killpg(process.pid, signal.SIGKILL)
  process.wait()
  assert not added(run, "autoattack_custom")
  done = cli.run(*words, f"--workdir={run}")
  assert done.returncode == 0, done.stderr
  (_, ours), (_, theirs) = kept(run), kept(other)
  a, b = (np.load(folder / "result.npz") for folder in (ours, theirs))
  assert a.files == b.files
  for name in a.files:
    np.testing.assert_array_equal(a[name], b[name], name)


# The command, with pieces of 64 images.
IN_PIECES = """
import sys
from roli_jax import main
from roli_jax.experiment import measure
measure._PIECE = 64 * 4 * 64
sys.exit(main.run(sys.argv[1:]))
"""


def test_two_processes_in_pieces_find_the_same(run, tmp_path):
  words = (
    "--mode=evaluate", "--config.checks=False", "--config.num_images=160", *CE,
  )  # fmt: skip
  other = shutil.copytree(run, tmp_path / "other")
  assert cli.run(*words, f"--workdir={other}").returncode == 0

  def start():
    address = f"--coordinator=127.0.0.1:{cli.free_port()}"
    command = [
      sys.executable, "-c", IN_PIECES, *words, f"--workdir={run}", address,
      "--num_processes=2",
    ]  # fmt: skip
    return [
      subprocess.Popen(
        [*command, f"--process={k}"], cwd=cli.ROOT, env=cli.environment(),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
      )
      for k in range(2)
    ]  # fmt: skip

  def entries():
    return list((run / "evaluations").rglob("piece-00001/apgd_ce-*.npz"))

  first = start()
  while not entries():
    assert first[0].poll() is None, first[0].communicate()[0]
    time.sleep(0.01)
  for process in first:
    process.kill()
  for process in first:
    process.communicate()
  assert entries() and not added(run, "apgd_ce")
  for process in start():
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
  (summary, ours), (_, theirs) = kept(run), kept(other)
  assert summary["n"] == 160 and len(added(run, "apgd_ce")) == 1
  a, b = (np.load(folder / "result.npz") for folder in (ours, theirs))
  for name in b.files:
    np.testing.assert_array_equal(a[name], b[name], name)


@pytest.mark.parametrize(
  "words, message",
  [
    (("--config.attack=autoatack",), "did you mean 'autoattack'"),
    ((*CE[:1], "--config.eval_attack.num_steps=0"), "num_steps"),
    ((*CE[:1], "--config.threat.eps=-1"), "eps"),
    ((*CE[:1], "--config.threat.norm=l3"), "l3"),
  ],
)
def test_what_can_not_be_meant_ends_in_a_line(trained, words, message):
  done = evaluate(trained, *words)
  assert done.returncode == 2 and message in done.stderr
  assert "Traceback" not in done.stderr
