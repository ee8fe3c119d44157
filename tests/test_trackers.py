"""TensorBoard and W&B get what a run writes, each row once, come what may."""

import json
import struct
import sys

import numpy as np
import pytest

from roli_jax.experiment import rows
from roli_jax.results import trackers
from tests import cli

STAGE = {"cell": "robust-full-roli-n200-seed0", "stage": "adapt", "lr": 0.01,
         "steps": 60}  # fmt: skip
FOLDER = "robust-full-roli-n200-seed0/adapt/lr0.01-steps60"
PGD = {"attack": "pgd", "attack_steps": 20, "norm": "linf", "eps": 0.1}


def loss(step, value=0.5):
  about = {"split": "train", "attack": "pgd", "metric": "loss"}
  return {**STAGE, **about, "step": step, "value": value, "n": 64}


def accuracy(value):
  about = {"split": "test", "metric": "accuracy"}
  return {**STAGE, **about, **PGD, "value": value, "n": 500}


def opened(path, track="tensorboard"):
  return rows.opened({"track": track}, path, "training", "results")


def events(path):
  """(tag, step, value) of all scalars and pictures in a folder's own files."""
  from tensorboardX.proto import event_pb2

  found = []
  for file in sorted(path.glob("events*")):
    content = file.read_bytes()
    while content:
      (length,) = struct.unpack("<Q", content[:8])
      event = event_pb2.Event.FromString(content[12 : 12 + length])
      content = content[16 + length :]
      for value in event.summary.value:
        kind = value.WhichOneof("value")
        found.append((value.tag, event.step, getattr(value, kind)))
  return found


def examples(path):
  (path / "figures").mkdir()
  images = np.full((2, 4, 4, 1), 0.5, np.float32)
  np.savez(
    path / "figures" / "examples.npz", cell="x", eps=np.float32(0.1),
    images=images, adv=images + np.float32(0.1), labels=[0, 1],
    clean_said=[0, 1], adv_said=[3, 1],
  )  # fmt: skip


def test_rows_come_as_they_are_added_and_a_run_that_goes_on_continues(tmp_path):
  folder = tmp_path / "tensorboard" / FOLDER
  with opened(tmp_path) as (log, _):
    log.add(loss(5, 0.25))
    assert events(folder) == [("train/pgd_loss", 5, 0.25)]  # before it ends
  with opened(tmp_path, "") as (log, _):
    log.add(loss(10))
    log.add(loss(15, None))  # was not finite
  with opened(tmp_path) as (log, results):
    log.add(loss(20))
    results.add(accuracy(0.75))
  said = sorted(events(folder), key=lambda event: event[1])
  assert said == [
    ("train/pgd_loss", 5, 0.25), ("train/pgd_loss", 10, 0.5),
    ("train/pgd_loss", 20, 0.5), ("test/PGD-20_linf_0.1", 60, 0.75),
  ]  # fmt: skip


def test_examples_come_once_with_what_the_model_said(tmp_path):
  examples(tmp_path)
  for _ in range(2):
    with opened(tmp_path):
      pass
  found = events(tmp_path / "tensorboard")
  assert [tag for tag, _, _ in found] == [
    "examples/is_0_said_0_then_3", "examples/is_1_said_1_then_1",
  ]  # fmt: skip
  assert (found[0][2].width, found[0][2].height) == (12, 4)


class Flaky:
  """Takes so many numbers, and then fails."""

  got: list = []  # noqa: RUF012
  takes = 1

  def __init__(self, path, config, sent):
    pass

  def scalar(self, stage, name, value, step):
    if len(self.got) == self.takes:
      raise ConnectionError("nobody there\nat all")
    self.got.append(step)

  def picture(self, name, image):
    raise AssertionError

  flush = close = lambda self: None


def test_a_tracker_that_fails_stops_nothing(tmp_path, monkeypatch, caplog):
  monkeypatch.setitem(trackers.TRACKERS, "wandb", ("json", Flaky))
  monkeypatch.setattr(Flaky, "got", [])
  with opened(tmp_path, "wandb,tensorboard") as (log, _):
    for step in (5, 10, 15):
      log.add(loss(step))
  assert Flaky.got == [5] and len(log.rows) == 3
  assert len(events(tmp_path / "tensorboard" / FOLDER)) == 3
  (said,) = [record.getMessage() for record in caplog.records]
  assert "wandb gets no more" in said and said.endswith("nobody there")
  monkeypatch.setattr(Flaky, "takes", 9)
  with opened(tmp_path, "wandb"):
    pass
  assert Flaky.got == [5, 10, 15]


def test_one_that_can_not_start_stops_nothing(tmp_path, monkeypatch, caplog):
  def start(*_):
    raise TimeoutError

  monkeypatch.setitem(trackers.TRACKERS, "wandb", ("json", start))
  with opened(tmp_path, "wandb") as (log, _):
    log.add(loss(5))
  assert "TimeoutError" in caplog.text
  assert not (tmp_path / "tracked.json").exists()


def test_a_run_that_fails_itself_is_not_hidden(tmp_path):
  with pytest.raises(ValueError, match="not finite"), opened(tmp_path):
    raise ValueError("the loss is not finite")


def test_names_and_packages_are_looked_for_before_anything(
  tmp_path, monkeypatch
):
  words = (cli.GLYPHS, f"--workdir={tmp_path / 'run'}")
  done = cli.run(*words, "--config.track=tensorbord")
  assert done.returncode == 2 and "did you mean 'tensorboard'" in done.stderr
  monkeypatch.setitem(sys.modules, "wandb", None)
  done = cli.run(*words, "--config.track=wandb")
  assert done.returncode == 2 and 'pip install "roli_jax[track]"' in done.stderr
  assert not (tmp_path / "run").exists()


@pytest.mark.slow  # imports and starts W&B
def test_wandb_offline_keeps_one_run_for_wandb_sync(tmp_path, monkeypatch):
  monkeypatch.setenv("WANDB_MODE", "offline")
  monkeypatch.setenv("WANDB_SILENT", "true")
  examples(tmp_path)
  for step in (5, 10):
    with opened(tmp_path, "wandb") as (log, _):
      log.add(loss(step))
  parts = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
  (name,) = {part.name for part in parts}  # of one run, in two parts
  sent = json.loads((tmp_path / "tracked.json").read_text())["wandb"]
  assert name == f"run-{sent['id']}.wandb" and len(parts) == 2
  for part in parts:
    assert f"{FOLDER}/train/pgd_loss".encode() in part.read_bytes()
  assert (sent["training.jsonl"], sent["step"]) == (2, 4)  # and two pictures
  pictures = list((tmp_path / "wandb").rglob("is_0_said_0_then_3*.png"))
  assert len(pictures) == 1
