"""A probe that a run beside this one has trained is not trained again."""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

from absl import logging

from roli_jax import distributed
from roli_jax.experiment.run import Run, fingerprint
from roli_jax.experiment.stages import Stage
from roli_jax.files import checkpoint, workdir
from roli_jax.results import record

# Fields of a config, and switches, that a linear probe doesn't depend on. Its
# seed and rate are the stage's.
_BESIDE_A_PROBE = (
  "cells", "only", "ensembles", "adapt", "rates", "seed", "peft",
  "eval_attack", "curve", "test", "checkpoint", "radii", "num_images",
  "save_adv", "checks",
)  # fmt: skip
_SWITCHES_BESIDE_A_PROBE = (
  "adapter_init",
  "lora_init",
  "lora_dropout_active",
  "swin_prompt_order",
)


def adopt(
  run: Run, stage: Stage, path: pathlib.Path, log: record.Record
) -> None:
  """Copies the probe from a run beside this one that has trained the same.

  With several processes the first looks and copies.

  Args:
    run: this run.
    stage: the probe.
    path: this run's directory.
    log: gets the rows of the probe's training.
  """
  directory = checkpoint.directory(path, stage)
  if distributed.leads() and not directory.exists():
    _copy(run, stage, path, directory, log)
  distributed.wait("adoption")


def _copy(
  run: Run,
  stage: Stage,
  path: pathlib.Path,
  directory: pathlib.Path,
  log: record.Record,
) -> None:
  """Copies the probe's checkpoints to the directory, from the first that fits.

  Args:
    run: this run.
    stage: the probe.
    path: this run's directory.
    directory: where this run would keep the probe's checkpoints.
    log: gets the rows of the probe's training.
  """
  for file in sorted(path.absolute().parent.glob("*/config.json")):
    other = file.parent
    try:
      if other.name == path.name or not _has_probe(run, stage, other, path):
        continue
      partial = path / "adopted.partial"
      shutil.rmtree(partial, ignore_errors=True)
      shutil.copytree(checkpoint.directory(other, stage), partial)
    except (KeyError, OSError, ValueError):
      continue  # whatever is wrong with that run, this one trains its own
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial.rename(directory)
    rows = record.read(other / "training.jsonl")
    for row in record.where(rows, **stage.row):
      log.add(row)
    logging.warning("the probe of %s is taken from %s", stage.cell, other)
    return


def _has_probe(
  run: Run, stage: Stage, other: pathlib.Path, path: pathlib.Path
) -> bool:
  """Whether another run has finished the probe that this one would train."""
  theirs = checkpoint.directory(other, stage)
  if not theirs.is_dir() or not workdir.same_code(other, path):
    return False
  with checkpoint.manager(theirs, reading=True) as checkpoints:
    if checkpoints.latest_step() != stage.num_steps:
      return False
    meta = checkpoint.restore_meta(checkpoints, stage.num_steps)
  mine = json.loads(json.dumps(dataclasses.asdict(stage)))
  for field in ("curve", "tests"):  # tested after training
    mine.pop(field)
    meta["stage"].pop(field)
  return (
    meta["stage"] == mine
    and meta["made_of"] == fingerprint(run, stage)
    and _of_a_probe(meta["config"]) == _of_a_probe(run.config)
  )


def _of_a_probe(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what a probe depends on in a config, as JSON has it."""
  plain = json.loads(json.dumps(config))
  plain["compat"] = {
    name: value
    for name, value in plain.get("compat", {}).items()
    if name not in _SWITCHES_BESIDE_A_PROBE
  }
  plain["data"].pop("num_workers", None)
  return {k: v for k, v in plain.items() if k not in _BESIDE_A_PROBE}
