"""The story of a run: read this first.

A run is a table of cells, and a cell one or two stages. RoLI is a *probe* (the
head alone, adversarially) and then an *adaptation* from that head; RanLI is an
adaptation from a random one. A stage trains, is validated on the way, keeps
its best checkpoint, and is then tested. All that has happened is on disk: the
same command goes on where a killed one stopped, to the same numbers.
"""

import dataclasses
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging

from roli_jax import (
  convert,
  data,
  distributed,
  keys,
  models,
  optim,
  peft,
  progress,
  sharding,
  specs,
  state,
  step,
)
from roli_jax.experiment import ensembles_run, measure, probe_reuse, protocol
from roli_jax.experiment.build import Parts, Variables
from roli_jax.experiment.stages import Stage
from roli_jax.files import checkpoint, workdir
from roli_jax.results import record, report, tables
from roli_jax.statistics import Counts

LOG_FIELDS = (
    "cell", "stage", "lr", "steps", "step", "split", "attack", "metric",
    "value", "n",
)  # fmt: skip

LOG_SAID = frozenset({"value", "n"})


def run(config: Mapping[str, Any], path: pathlib.Path) -> list[dict[str, Any]]:
  """Trains, validates and tests every stage of the config's table.

  Args:
    config: any nested mapping with the fields of `configs/glyphs_roli.py`.
    path: the run's directory.

  Returns:
    All rows of the run.

  Raises:
    ValueError: a user's mistake, found before anything is computed or
      written; or a loss that is not finite.
  """
  parts = Parts(config)
  stages = parts.stages()
  parts.check(stages)
  protocol.check(parts, stages)
  ensembles_run.check(parts, stages)
  for warning in workdir.claim(path, config):
    logging.warning("%s", warning)
  results = record.Record(path / "results.jsonl")
  log = record.Record(path / "training.jsonl", LOG_FIELDS, LOG_SAID)
  distributed.wait("records")  # that are read before they are written
  protocol.write_facts(parts, stages, path)
  if parts.config["data"]["name"] in data.IN_FILES:
    tables.show(report.facts(path))
  with progress.bar("stages", len(stages)) as update:
    for stage in stages:
      if not protocol.is_done(parts, stage, results):
        if stage.name == "probe":
          probe_reuse.probe(parts, stage, path, log)
        meta = Trainer(parts, stage, path, log).train()
        if meta is None:
          return results.rows
        protocol.add_validation(parts, stage, results, meta)
        protocol.add_tests(
          parts,
          stage,
          results,
          step.make_predict(parts.model(stage)),
          best(parts, stage, path),
          protocol.tests(parts, stage),
        )
      if stage.start and parts.config.get("ensembles"):
        models = [best(parts, each, path) for each in (stage.start, stage)]
        ensembles_run.run(parts, stage, results, *models)
      update(1)
  for stage in stages:
    if stage.name == "pretrain":
      _keep_weights(parts, stage, path)
  if config["test"]:
    _keep_examples(parts, stages, path)
  workdir.finish(path, len(results.rows))
  return results.rows


def evaluate(
  config: Mapping[str, Any], path: pathlib.Path
) -> list[dict[str, Any]]:
  """Tests a checkpoint, and adds the rows that are missing.

  Args:
    config: of the run, or over it: `checkpoint` says which, `eval_attack` by
      what, `radii` how far (none: `threat.eps` alone), `num_images` how many.
    path: the run's directory.

  Returns:
    The rows of this checkpoint's stage on the test split.

  Raises:
    ValueError: no such checkpoint, or more than one; data of other classes.
  """
  parts = Parts(config, diagnoses=config["checks"])
  directory, asked = _chosen(parts, path)
  parts.check(())
  with checkpoint.manager(directory, reading=True) as checkpoints:
    best_step = checkpoints.best_step()
    if asked not in (None, best_step):
      raise ValueError(
        f"step {asked} is not the best of its stage, which rows are of;"
        f" the best is {directory}/{best_step:08d}"
      )
    meta = checkpoint.restore_meta(checkpoints, best_step)
    stage = Stage(**{**meta["stage"], "start": None, "tests": ()})
    method = specs.build(peft.METHODS, meta["method"], "method")
    model = method.enter(models.described(meta["model"]))
    classes = parts.data["test"].num_classes
    if model.num_classes != classes:
      raise ValueError(
        f"{directory} has a head of {model.num_classes} classes,"
        f" {config['data']['name']} has {classes}"
      )
    like = sharding.ruled(jax.eval_shape(model.init, keys.root(0)), parts.mesh)
    variables = checkpoint.restore(checkpoints, best_step, model=like)["model"]
  results = record.Record(path / "results.jsonl")
  chosen = protocol.asked(parts)
  predict = step.make_predict(model)
  protocol.add_tests(parts, stage, results, predict, variables, chosen)
  return record.where(
      results.rows, cell=stage.cell, stage=stage.name, lr=stage.lr,
      steps=stage.num_steps, split="test",
  )  # fmt: skip


def _chosen(parts, path):
  """The directory of the stage that config.checkpoint means, and the step."""
  config = parts.config
  root = path.absolute() / "checkpoints"
  if config["checkpoint"]:
    asked = root / config["checkpoint"]
    step = checkpoint.step_of(asked)
    found = checkpoint.find(asked if step is None else asked.parent)
    if step is not None and not asked.is_dir():
      found = []
  else:
    asked, step = root, None
    stages = parts.stages()
    starts = {stage.start for stage in stages}
    last = [
      checkpoint.directory(path, stage)
      for stage in stages
      if stage not in starts
    ]
    found = last if len(last) == 1 else checkpoint.find(root)
  if not found or not found[0].is_dir():
    raise ValueError(f"there is no checkpoint at {asked}")
  if len(found) > 1:
    names = [str(directory.relative_to(root)) for directory in found]
    raise ValueError(
      f"{len(found)} checkpoints are at {asked};"
      f" give one as --config.checkpoint: {', '.join(names)}"
    )
  return found[0], step


def best(parts: Parts, stage: Stage, path: pathlib.Path) -> Variables:
  """The values of a stage's best checkpoint, on every device."""
  like = parts.program(stage).like
  directory = checkpoint.directory(path, stage)
  with checkpoint.manager(directory, reading=True) as checkpoints:
    step = checkpoints.best_step()
    if step is None:
      raise ValueError(f"no checkpoint in {directory}")
    model = (like.params, like.stats)
    return checkpoint.restore(checkpoints, step, model=model)["model"]


def _keep_weights(parts, stage, path):
  """What was pretrained, as a bundle that other configs can name."""
  model = parts.model(stage)
  file = path / f"{model.name}_{stage.weights}.safetensors"
  bundle = convert.Bundle(model, *best(parts, stage, path))
  if distributed.leads() and not file.exists():
    convert.save(bundle, file)


def _keep_examples(parts, stages, path):
  """Examples of the last stage whose curve is drawn, or of the last one."""
  file = path / "figures" / "examples.npz"
  there = file.exists()
  distributed.wait("examples")  # before it is written
  if there:
    return
  stage = ([s for s in stages if s.curve] or stages)[-1]
  file.parent.mkdir(parents=True, exist_ok=True)
  examples = protocol.examples(parts, stage, best(parts, stage, path))
  if not distributed.leads():
    return
  partial = file.with_name("examples.partial.npz")
  np.savez(partial, **examples)
  partial.replace(file)


class Trainer:
  """One stage, and where it is kept."""

  def __init__(
    self, parts: Parts, stage: Stage, path: pathlib.Path, log: record.Record
  ):
    self.parts = parts
    self.stage = stage
    self.path = path
    self.log = log
    self.section = parts.config[stage.name]
    self.program = parts.program(stage)
    self.directory = checkpoint.directory(path, stage)
    self.made_of = parts.made_of(stage) if stage.name == "probe" else ""

  def train(self) -> dict[str, Any] | None:
    """Trains from where the stage stopped, if it did, to its end.

    Returns:
      What the last checkpoint says: the validations so far, the seconds. None
      if the loss was not finite and the config says that this ends the run.
    """
    with checkpoint.manager(self.directory) as checkpoints:
      now, key, meta = self._begin(checkpoints)
      done = int(now.step)
      batches = data.train_batches(
        self.parts.train_data(self.stage),
        self.section["batch_size"],
        self.stage.seed,
        start=done,
        num_workers=self.parts.config["data"].get("num_workers", 0),
      )
      started = time.perf_counter() - meta["seconds"]
      counts: list[Counts] = []  # of the steps since the last row of the log
      name = f"{self.stage.name} {self.stage.init} seed {self.stage.seed}"
      with progress.bar(name, self.stage.num_steps, done) as update:
        while True:
          due = self._is_due(done, "val_every")
          if counts and (due or self._is_due(done, "log_every")):
            self._log_training(done, counts)
            counts = []
          if due and done != meta["step"]:
            meta = self._validate(now, meta, started)
            self._save(checkpoints, now, key, meta)
          if done == self.stage.num_steps:
            return meta
          batch = next(batches)
          before = time.perf_counter()
          now, count = self.program.step(
            now, sharding.put(batch, self.parts.mesh), key
          )
          # Waits for the step: simulated devices starve if steps queue up.
          count = jax.device_get(count)
          if not np.isfinite(count.loss):
            said = self._not_finite(done, batch, checkpoints)
            if self.parts.compat["nan_policy"] == "raise":
              raise ValueError(said)
            logging.warning("%s\nand so the run ends (nan_policy)", said)
            return None
          counts.append(count)
          done += 1
          update(1, _said(count, time.perf_counter() - before))

  def _is_due(self, done, every):
    steps = self.section[every] or self.stage.epoch_steps
    return done % steps == 0 or done == self.stage.num_steps

  def _begin(self, checkpoints):
    """The state to go on from, its key, and what was known at its saving."""
    key = keys.stream(keys.root(self.stage.seed), self.stage.name)
    last = checkpoints.latest_step()
    if last is not None:
      like = self.program.like
      items = checkpoint.restore(
        checkpoints,
        last,
        model=(like.params, like.stats),
        rest=(like.step, like.opt_state, key, like.memory),
      )
      params, stats = items["model"]
      step, opt_state, key, memory = items["rest"]
      now = state.TrainState(
        step=step,
        params=params,
        stats=stats,
        opt_state=opt_state,
        memory=memory,
      )
      return now, key, checkpoint.restore_meta(checkpoints, last)
    params, stats = self._start()
    trains = self.program.method.trains(params)
    start = self.program.criterion.start
    now = state.create(params, stats, trains, self.program.tx, start)
    now = dataclasses.replace(
      now, opt_state=optim.at_rate(now.opt_state, self.stage.lr)
    )
    now = sharding.place(now, self.program.like)
    key = sharding.replicate(key, self.parts.mesh)
    return now, key, {"step": None, "history": [], "seconds": 0.0}

  def _start(self) -> Variables:
    """What the stage starts from: the probe's best, under a new method."""
    if not self.stage.start:
      return self.parts.initial(self.stage)
    params, stats = best(self.parts, self.stage.start, self.path)
    if self.program.like.params.peft:
      added = self.parts.initial(self.stage)[0].peft
      params = dataclasses.replace(params, peft=added)
    return params, stats

  def _validate(self, now, meta, started):
    """What is known at this step: its validation joins the history."""
    attack = self.parts.attack("val_attack")
    result = measure.run(
      self.parts,
      step.make_predict(self.parts.model(self.stage)),
      (now.params, now.stats),
      self.stage.seed,
      "val",
      measure.Test(attack),
    )
    entry = {
      "step": int(now.step),
      "clean": float(result.clean.mean()),
      "robust": float(result.robust.mean()),
    }
    for name, kind in (("none", "clean"), (attack.name, "robust")):
      self._log(entry["step"], "val", name, "accuracy", entry[kind],
                len(result.clean))  # fmt: skip
    return {
      "step": entry["step"],
      "history": [*meta["history"], entry],
      "seconds": time.perf_counter() - started,
    }

  def _save(self, checkpoints, now, key, meta):
    model = self.parts.model(self.stage)
    about = {
      "stage": dataclasses.asdict(self.stage),
      "config": self.parts.config,
      "model": models.describe(model),
      "method": self.parts.method_spec(self.stage),
      "made_of": self.made_of,
      "adds": bool(jax.tree.leaves(now.params.peft)),
      "images_seen": meta["step"] * self.section["batch_size"],
    }
    checkpoint.save(
      checkpoints,
      meta["step"],
      model=(now.params, now.stats),
      rest=(now.step, now.opt_state, key, now.memory),
      meta={**meta, **about},
      score=meta["history"][-1][protocol.selected_by(self.stage)],
    )

  def _log_training(self, done, counts):
    total = jax.tree.map(lambda *x: sum(float(v) for v in x), *counts)
    attacked = self.program.criterion.adversarial > 0
    attack = self.program.attack.name if attacked else "none"
    for metric, value in (("loss", total.loss), ("accuracy", total.correct)):
      self._log(done, "train", attack, metric, value / total.seen,
                int(total.seen))  # fmt: skip

  def _log(self, step, split, attack, metric, value, n):
    self.log.add(
      {
        "cell": self.stage.cell,
        "stage": self.stage.name,
        "lr": self.stage.lr,
        "steps": self.stage.num_steps,
        "step": step,
        "split": split,
        "attack": attack,
        "metric": metric,
        "value": value,
        "n": n,
      }
    )

  def _not_finite(self, done, batch, checkpoints):
    checkpoints.wait_until_finished()
    last = checkpoints.latest_step()
    indices = np.asarray(batch["index"]).tolist()
    return (
      f"the loss is not finite at step {done} of {self.stage.cell}"
      f" {self.stage.name} (lr {self.stage.lr:g})\n"
      f"images: {indices}\n"
      f"last good checkpoint: {self.directory}/{last:08d}"
    )


def _said(count: Counts, seconds: float) -> str:
  loss, accuracy = count.loss / count.seen, count.correct / count.seen
  rate = count.seen / seconds
  return f"loss {loss:.2f} adv {accuracy:.2f} {rate:.0f} images/s"
