"""One stage of training: its steps, validations and checkpoints."""

import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from roli_jax import data, progress, sharding
from roli_jax.experiment import stage_tests, start_and_resume
from roli_jax.experiment.program import build_program
from roli_jax.experiment.run import Run, training_images
from roli_jax.experiment.stages import Stage
from roli_jax.experiment.start_and_resume import Best, Meta
from roli_jax.files import checkpoint
from roli_jax.results import record
from roli_jax.statistics import Counts
from roli_jax.types import Variables


def train_stage(
  run: Run,
  stage: Stage,
  path: pathlib.Path,
  log: record.Record,
  best: Best,
) -> Meta | None:
  """Trains a stage from where it stopped, if it did, to its end.

  Args:
    run: the run.
    stage: the stage.
    path: the run's directory.
    log: gets the rows of training and validation.
    best: returns the variables of an earlier stage's best checkpoint.

  Returns:
    The meta data of the last checkpoint: the validations so far, the seconds.
    None if the loss was not finite and the config ends the run then.

  Raises:
    ValueError: the loss is not finite.
  """
  section = run.config[stage.name]
  program = build_program(run, stage)
  directory = checkpoint.directory(path, stage)
  with checkpoint.manager(directory) as checkpoints:
    now, key, meta = start_and_resume.restore_or_start(
      run, stage, checkpoints, best
    )
    done = int(now.step)
    batches = data.train_batches(
      training_images(run, stage),
      section["batch_size"],
      stage.seed,
      start=done,
      num_workers=run.config["data"].get("num_workers", 0),
    )
    about = start_and_resume.describe(run, stage)
    started = time.perf_counter() - meta["seconds"]
    attack = program.attack.name if program.criterion.adversarial else "none"
    counts: list[Counts] = []  # of the steps since the last row of the log
    name = f"{stage.name} {stage.init} seed {stage.seed}"
    with progress.bar(name, stage.num_steps, done) as update:
      while True:
        due = _is_due(run, stage, done, "val_every")
        if counts and (due or _is_due(run, stage, done, "log_every")):
          _log_training(stage, log, done, attack, counts)
          counts = []
        if due and done != meta["step"]:
          entry = _validate(run, stage, log, done, now.variables)
          meta = {
            "step": done,
            "history": [*meta["history"], entry],
            "seconds": time.perf_counter() - started,
          }
          start_and_resume.save(
            run, stage, checkpoints, now, key, {**about, **meta}
          )
        if done == stage.num_steps:
          return meta
        batch = next(batches)
        before = time.perf_counter()
        now, count = program.step(now, sharding.put(batch, run.mesh), key)
        # Waits for the step: simulated devices starve if steps queue up.
        count = jax.device_get(count)
        if not np.isfinite(count.loss):
          message = _not_finite(stage, done, batch, checkpoints, directory)
          if run.switches["nan_policy"] == "raise":
            raise ValueError(message)
          logging.warning("%s\nand so the run ends (nan_policy)", message)
          return None
        counts.append(count)
        done += 1
        update(1, _summary(count, time.perf_counter() - before))


def best_variables(run: Run, stage: Stage, path: pathlib.Path) -> Variables:
  """Restores the variables of a stage's best checkpoint, on every device.

  Raises:
    ValueError: the stage has no checkpoint yet.
  """
  abstract = build_program(run, stage).abstract_state
  directory = checkpoint.directory(path, stage)
  with checkpoint.manager(directory, reading=True) as checkpoints:
    step = checkpoints.best_step()
    if step is None:
      raise ValueError(f"no checkpoint in {directory}")
    model = (abstract.params, abstract.stats)
    return checkpoint.restore(checkpoints, step, model=model)["model"]


def _is_due(run: Run, stage: Stage, done: int, interval: str) -> bool:
  """Whether the section's `val_every` or `log_every` falls on this step."""
  steps = run.config[stage.name][interval] or stage.epoch_steps
  return done % steps == 0 or done == stage.num_steps


def _validate(
  run: Run, stage: Stage, log: record.Record, done: int, variables: Variables
) -> dict[str, Any]:
  """Logs the validation after this step; returns its entry of the history."""
  clean, robust = stage_tests.validate(run, stage, variables)
  about = {**stage.row, "step": done, "split": "val", "metric": "accuracy"}
  for measured in (clean, robust):
    log.add({**about, **measured})
  return {"step": done, "clean": clean["value"], "robust": robust["value"]}


def _log_training(
  stage: Stage, log: record.Record, done: int, attack: str, counts: list[Counts]
) -> None:
  """Logs mean loss and accuracy over the images of the counted steps."""
  total = jax.tree.map(lambda *x: sum(float(v) for v in x), *counts)
  row = {**stage.row, "step": done, "split": "train", "attack": attack}
  for metric, value in (("loss", total.loss), ("accuracy", total.correct)):
    value /= total.seen
    log.add({**row, "metric": metric, "value": value, "n": int(total.seen)})


def _not_finite(
  stage: Stage,
  done: int,
  batch: Mapping[str, np.ndarray],
  checkpoints: ocp.CheckpointManager,
  directory: pathlib.Path,
) -> str:
  """The message for a loss that is not finite."""
  checkpoints.wait_until_finished()
  last = checkpoints.latest_step()
  indices = np.asarray(batch["index"]).tolist()
  return (
    f"the loss is not finite at step {done} of {stage.cell}"
    f" {stage.name} (lr {stage.lr:g})\n"
    f"images: {indices}\n"
    f"last good checkpoint: {directory}/{last:08d}"
  )


def _summary(count: Counts, seconds: float) -> str:
  """What stands beside the progress bar."""
  loss, accuracy = count.loss / count.seen, count.correct / count.seen
  rate = count.seen / seconds
  return f"loss {loss:.2f} adv {accuracy:.2f} {rate:.0f} images/s"
