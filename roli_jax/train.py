"""The story of a run: read this first.

A run is a table of cells, and a cell one or two stages; `experiment.stages`
defines the three words. RoLI is a *probe* (the head alone, adversarially) and
then an *adaptation* from that head; RanLI is an adaptation from a random one. A
stage trains, is validated on the way, keeps its best checkpoint, and is then
tested. All that has happened is on disk: the same command goes on where a
killed one stopped, to the same numbers.
"""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

from absl import logging

from roli_jax import progress
from roli_jax.experiment import (
  ensembles_run,
  facts,
  probe_reuse,
  products,
  rows,
  stage_tests,
)
from roli_jax.experiment.best_checkpoint import restore
from roli_jax.experiment.run import build_run, expand_stages
from roli_jax.experiment.train_stage import best_variables, train_stage
from roli_jax.files import workdir
from roli_jax.results import record


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
  rows.check(config)
  run = build_run(config)
  stages = expand_stages(run)
  stage_tests.check(run, stages)
  ensembles_run.check(run, stages)
  for warning in workdir.claim(path, config):
    logging.warning("%s", warning)
  # A stage and the one that it starts from; more would fill the memory.
  best = functools.lru_cache(maxsize=2)(
    functools.partial(best_variables, run, path=path)
  )

  with (
    rows.opened(config, path, "results", "training") as (results, log),
    progress.bar("stages", len(stages)) as update,
  ):
    facts.write(run, stages, path)
    for stage in stages:
      if not stage_tests.is_done(run, stage, results):
        if stage.name == "probe":
          probe_reuse.adopt(run, stage, path, log)
        meta = train_stage(run, stage, path, log, best)
        if meta is None:
          return results.rows
        stage_tests.add_validation(run, stage, results, meta)
        stage_tests.test_stage(run, stage, results, best(stage))
      if stage.start and run.config.get("ensembles"):
        ensembles_run.run(run, stage, results, best(stage.start), best(stage))
      update(1)
    products.keep(run, stages, path, best)
  workdir.finish(path, len(results.rows))
  return results.rows


def evaluate(
  config: Mapping[str, Any], path: pathlib.Path
) -> list[dict[str, Any]]:
  """Tests a checkpoint, and adds the rows that are missing.

  Args:
    config: the run's config, or one over it. `checkpoint` names what is
      tested, `eval_attack` the attack, `radii` its radii ((): `threat.eps`
      alone), `num_images` the number of images (0: all).
    path: the run's directory.

  Returns:
    The rows of this checkpoint's stage on the test split.

  Raises:
    ValueError: no such checkpoint, or more than one; data of other classes.
  """
  rows.check(config)
  run = build_run(config, diagnoses=config["checks"])
  stage_tests.check(run, ())
  stage, predict, variables = restore(run, path)
  chosen = stage_tests.evaluation_tests(run)
  with rows.opened(config, path, "results") as (results,):
    stage_tests.add_tests(run, stage, results, predict, variables, chosen)
  return record.where(results.rows, **stage.row, split="test")
