"""The command line as a user types it, on the tiniest of runs."""

import contextlib
import io
import logging
import os
import pathlib
import socket
import subprocess
import sys
import traceback

ROOT = pathlib.Path(__file__).resolve().parent.parent
GLYPHS = "--config=configs/glyphs_roli.py"

# A few steps of everything: seconds, and nothing learnt.
TINY = (
  "--config.attack.num_steps=1",
  "--config.val_attack.num_steps=2",
  "--config.eval_attack.num_steps=2",
  '--config.curve=("0.2",)',
  "--config.num_val_images=40",
  "--config.num_images=50",
  *(
    f"--config.{stage}.{field}"
    for stage in ("probe", "adapt")
    for field in ("num_steps=6", "val_every=2", "log_every=1", "batch_size=16")
  ),
)

# Likewise of a pretraining; its weights are averages.
PRETRAIN = (
  "--config=configs/pretrain.py:dataset=digits,backbone=glyph_vit_token",
  "--config.data.train_size=100",
  "--config.val_attack.num_steps=1",
  "--config.eval_attack.num_steps=1",
  "--config.num_val_images=20",
  "--config.num_images=30",
  *(
    f"--config.pretrain.{field}"
    for field in ("num_steps=6", "val_every=2", "log_every=1", "batch_size=16")
  ),
)


def run(*words: str, cwd=ROOT) -> subprocess.CompletedProcess:
  """What the command does, in this process: its status and its output."""
  from roli_jax import main

  out, err = io.StringIO(), io.StringIO()
  handler = logging.StreamHandler(err)
  handler.setLevel(logging.WARNING)
  logging.getLogger().addHandler(handler)
  streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
  try:
    with contextlib.chdir(cwd), streams[0], streams[1]:
      status = main.run(words)
  except Exception:
    status = 1
    err.write(traceback.format_exc())
  finally:
    logging.getLogger().removeHandler(handler)
  return subprocess.CompletedProcess(
    words, status, out.getvalue(), err.getvalue()
  )


def environment() -> dict[str, str]:
  """The tests', but for the devices: a run has those of its config."""
  flags = os.environ["XLA_FLAGS"].split()
  kept = [flag for flag in flags if "device_count" not in flag]
  return {**os.environ, "XLA_FLAGS": " ".join(kept)}


def command(*words: str) -> list[str]:
  """What starts a process of its own."""
  return [sys.executable, "-m", "roli_jax.main", *words]


def process(*words: str, cwd=ROOT) -> subprocess.CompletedProcess:
  """What the command does in a process of its own, as a user gives it."""
  return subprocess.run(
    command(*words),
    cwd=cwd,
    env=environment(),
    capture_output=True,
    text=True,
    timeout=600,
  )


def free_port() -> int:
  """A port for processes of one run to meet at."""
  with socket.socket() as some:
    some.bind(("127.0.0.1", 0))
    return some.getsockname()[1]
