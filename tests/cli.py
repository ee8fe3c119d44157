"""The command line as a user types it, on the tiniest of runs."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
GLYPHS = "--config=configs/glyphs_roli.py"

# A few steps of everything: seconds, and nothing learnt.
TINY = (
  "--config.attack.num_steps=1",
  "--config.val_attack.num_steps=2",
  "--config.eval_attack.num_steps=2",
  '--config.curve=("0.2",)',
  *(
    f"--config.{stage}.{field}"
    for stage in ("probe", "adapt")
    for field in ("num_steps=6", "val_every=2", "log_every=1", "batch_size=16")
  ),
)


def environment() -> dict[str, str]:
  """The tests', but for the devices: a run has those of its config."""
  return {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}


def command(*words: str) -> list[str]:
  return [sys.executable, "-m", "roli_jax.main", *words]


def run(*words: str, cwd=ROOT) -> subprocess.CompletedProcess:
  """The finished process, its output as text."""
  return subprocess.run(
    command(*words),
    cwd=cwd,
    env=environment(),
    capture_output=True,
    text=True,
    timeout=600,
  )
