"""One stage of training: its steps, validations and checkpoints."""

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging

from roli_jax import data, keys, models, optim, progress, sharding, state
from roli_jax.experiment import measure
from roli_jax.experiment.build import (
  Program,
  build_attack,
  build_model,
  build_predict,
  build_program,
  initial_variables,
  method_fields,
)
from roli_jax.experiment.run import Run, fingerprint, training_images
from roli_jax.experiment.stages import Stage
from roli_jax.files import checkpoint
from roli_jax.results import record
from roli_jax.statistics import Counts
from roli_jax.types import Array, Key, Variables

LOG_FIELDS = (
    "cell", "stage", "lr", "steps", "step", "split", "attack", "metric",
    "value", "n",
)  # fmt: skip

LOG_VALUES = frozenset({"value", "n"})

Meta = dict[str, Any]


def train_stage(
  run: Run,
  stage: Stage,
  path: pathlib.Path,
  log: record.Record,
  start: Callable[[], Variables],
) -> Meta | None:
  """Trains a stage from where it stopped, if it did, to its end.

  Args:
    run: the run.
    stage: the stage.
    path: the run's directory.
    log: gets the rows of training and validation.
    start: returns the variables that a fresh stage starts from.

  Returns:
    What the last checkpoint says: the validations so far, the seconds. None
    if the loss was not finite and the config says that this ends the run.

  Raises:
    ValueError: the loss is not finite.
  """
  section = run.config[stage.name]
  program = build_program(run, stage)
  directory = checkpoint.directory(path, stage)
  with checkpoint.manager(directory) as checkpoints:
    now, key, meta = _restore_or_start(run, stage, program, checkpoints, start)
    done = int(now.step)
    batches = data.train_batches(
      training_images(run, stage),
      section["batch_size"],
      stage.seed,
      start=done,
      num_workers=run.config["data"].get("num_workers", 0),
    )
    about = _about(run, stage, program)
    started = time.perf_counter() - meta["seconds"]
    counts: list[Counts] = []  # of the steps since the last row of the log
    name = f"{stage.name} {stage.init} seed {stage.seed}"
    with progress.bar(name, stage.num_steps, done) as update:
      while True:
        due = _is_due(run, stage, done, "val_every")
        if counts and (due or _is_due(run, stage, done, "log_every")):
          _log_training(stage, program, log, done, counts)
          counts = []
        if due and done != meta["step"]:
          meta = _validate(run, stage, log, now, meta, started)
          _save(checkpoints, now, key, {**about, **meta}, stage)
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
  """The values of a stage's best checkpoint, on every device.

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


def start_variables(
  run: Run, stage: Stage, best: Callable[[Stage], Variables]
) -> Variables:
  """What the stage starts from: weights, or a probe's best.

  Args:
    run: the run.
    stage: the stage.
    best: returns the variables of an earlier stage's best checkpoint. Leaves
      that this stage's method adds to them are drawn.
  """
  if not stage.start:
    return initial_variables(run, stage)
  params, stats = best(stage.start)
  if build_program(run, stage).abstract_state.params.peft:
    added = initial_variables(run, stage)[0].peft
    params = dataclasses.replace(params, peft=added)
  return params, stats


def _is_due(run, stage, done, every):
  steps = run.config[stage.name][every] or stage.epoch_steps
  return done % steps == 0 or done == stage.num_steps


def _restore_or_start(
  run: Run,
  stage: Stage,
  program: Program,
  checkpoints: Any,
  start: Callable[[], Variables],
) -> tuple[state.TrainState, Key[Array, ""], Meta]:
  """The state to go on from, its key, and what was known when it was saved."""
  key = keys.stream(keys.root(stage.seed), stage.name)
  last = checkpoints.latest_step()
  if last is not None:
    abstract = program.abstract_state
    items = checkpoint.restore(
      checkpoints,
      last,
      model=(abstract.params, abstract.stats),
      rest=(abstract.step, abstract.opt_state, key, abstract.memory),
    )
    params, stats = items["model"]
    done, opt_state, key, memory = items["rest"]
    now = state.TrainState(
      step=done,
      params=params,
      stats=stats,
      opt_state=opt_state,
      memory=memory,
    )
    return now, key, checkpoint.restore_meta(checkpoints, last)
  params, stats = start()
  trains = program.method.trains(params)
  now = state.create(
    params, stats, trains, program.tx, program.criterion.init_memory
  )
  now = dataclasses.replace(
    now, opt_state=optim.at_rate(now.opt_state, stage.lr)
  )
  now = sharding.place(now, program.abstract_state)
  key = sharding.replicate(key, run.mesh)
  return now, key, {"step": None, "history": [], "seconds": 0.0}


def _validate(run, stage, log, now, meta, started):
  """The meta of a checkpoint at this step: its validation joins the history."""
  attack = build_attack(run, "val_attack")
  result = measure.run(
    run,
    build_predict(run, stage),
    (now.params, now.stats),
    stage.seed,
    "val",
    measure.Test(attack),
  )
  entry = {
    "step": int(now.step),
    "clean": float(result.clean.mean()),
    "robust": float(result.robust.mean()),
  }
  n = len(result.clean)
  for name, kind in (("none", "clean"), (attack.name, "robust")):
    row = _row(stage, entry["step"], "val", name, "accuracy", entry[kind], n)
    log.add(row)
  return {
    "step": entry["step"],
    "history": [*meta["history"], entry],
    "seconds": time.perf_counter() - started,
  }


def _about(run, stage, program):
  """What each checkpoint of the stage says of its model and its origin."""
  return {
    "stage": dataclasses.asdict(stage),
    "config": run.config,
    "model": models.to_spec(build_model(run, stage)),
    "method": method_fields(run, stage),
    "made_of": fingerprint(run, stage) if stage.name == "probe" else "",
    "adds": bool(jax.tree.leaves(program.abstract_state.params.peft)),
  }


def _save(checkpoints, now, key, meta, stage):
  batch_size = meta["config"][stage.name]["batch_size"]
  checkpoint.save(
    checkpoints,
    meta["step"],
    model=(now.params, now.stats),
    rest=(now.step, now.opt_state, key, now.memory),
    meta={**meta, "images_seen": meta["step"] * batch_size},
    score=meta["history"][-1][stage.selected_by],
  )


def _log_training(stage, program, log, done, counts):
  total = jax.tree.map(lambda *x: sum(float(v) for v in x), *counts)
  attacked = program.criterion.adversarial > 0
  attack = program.attack.name if attacked else "none"
  n = int(total.seen)
  for metric, value in (("loss", total.loss), ("accuracy", total.correct)):
    value /= total.seen
    log.add(_row(stage, done, "train", attack, metric, value, n))


def _row(stage, done, split, attack, metric, value, n):
  return {
    "cell": stage.cell,
    "stage": stage.name,
    "lr": stage.lr,
    "steps": stage.num_steps,
    "step": done,
    "split": split,
    "attack": attack,
    "metric": metric,
    "value": value,
    "n": n,
  }


def _not_finite(stage, done, batch, checkpoints, directory):
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
  loss, accuracy = count.loss / count.seen, count.correct / count.seen
  rate = count.seen / seconds
  return f"loss {loss:.2f} adv {accuracy:.2f} {rate:.0f} images/s"
