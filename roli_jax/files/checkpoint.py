"""Checkpoints of a stage, with orbax: all that going on needs, and the best.

A checkpoint holds three items: `model` (parameters and running statistics),
`rest` (optimizer state, step, random key) and `meta` (JSON: whose it is, the
resolved config, the position in the data, the results so far).
"""

import math
import os
import pathlib
import re
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from roli_jax.types import PyTree

_STEP = re.compile(r"\d{8}")


def _score(metrics: dict[str, Any]) -> tuple[float, int]:
  """Returns what orders checkpoints: the score, then the earlier step."""
  score = metrics["score"]
  return (score if math.isfinite(score) else -math.inf, -metrics["step"])


def manager(
  directory: pathlib.Path, reading: bool = False
) -> ocp.CheckpointManager:
  """Makes a manager that keeps a stage's latest and its best checkpoint.

  Saving is asynchronous and atomic: a process that is killed leaves the
  checkpoints before. Close it, or use it in `with`, to have all on disk.

  Args:
    directory: the stage's directory.
    reading: leaves unfinished checkpoints alone, which another process may be
      writing.
  """
  policies = [
    preservation_policy.LatestN(1),
    preservation_policy.BestN(get_metric_fn=_score, n=1),
  ]
  options = ocp.CheckpointManagerOptions(
    best_fn=_score,
    step_format_fixed_length=8,
    cleanup_tmp_directories=not reading,
    preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
  )
  return ocp.CheckpointManager(directory.absolute(), options=options)


def save(
  checkpoints: ocp.CheckpointManager,
  step: int,
  *,
  model: PyTree,
  rest: PyTree,
  meta: dict[str, Any],
  score: float,
) -> None:
  """Writes a checkpoint of this step; a step already there stays as it is.

  Args:
    checkpoints: the manager of the stage's checkpoints.
    step: the number of steps taken.
    model: a tree of arrays: parameters and running statistics.
    rest: a tree of arrays: optimizer state, step, random key.
    meta: plain JSON.
    score: validation accuracy in [0, 1]; the largest is the best.
  """
  args = ocp.args.Composite(
    model=ocp.args.StandardSave(_once(model)),
    rest=ocp.args.StandardSave(_once(rest)),
    meta=ocp.args.JsonSave(meta),
  )
  checkpoints.save(
    step, args=args, metrics={"score": float(score), "step": step}
  )


def _once(tree: PyTree) -> PyTree:
  """What each device of this process has whole, on one of them alone.

  Orbax cuts such an array into a slice for each device. Where one process
  writes all of them that costs more than it gains.
  """

  def once(x: Any) -> Any:
    is_whole = isinstance(x, jax.Array) and x.is_fully_replicated
    return x.addressable_data(0) if is_whole and x.is_fully_addressable else x

  return jax.tree.map(once, tree)


def restore(
  checkpoints: ocp.CheckpointManager, step: int, **templates: PyTree
) -> dict[str, Any]:
  """Restores `model`, `rest` or both, on the shardings of their templates.

  Args:
    checkpoints: the manager of the stage's checkpoints.
    step: the step of a checkpoint that is there.
    **templates: a tree of arrays like what was saved, for `model` and `rest`.

  Raises:
    ValueError: the checkpoint can't be read, or holds another tree.
  """
  items = {
    name: ocp.args.StandardRestore(
      jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
    )
    for name, tree in templates.items()
  }
  return _restore(checkpoints, step, "restored", **items)


def restore_meta(
  checkpoints: ocp.CheckpointManager, step: int
) -> dict[str, Any]:
  """Reads the checkpoint's `meta` alone.

  Raises:
    ValueError: it can't be read.
  """
  return _restore(checkpoints, step, "read", meta=ocp.args.JsonRestore())[
    "meta"
  ]


def _restore(
  checkpoints: ocp.CheckpointManager,
  step: int,
  verb: str,
  **items: ocp.args.CheckpointArgs,
) -> dict[str, Any]:
  try:
    return dict(checkpoints.restore(step, args=ocp.args.Composite(**items)))
  except (KeyError, OSError, TypeError, ValueError) as error:
    text = str(error).strip() or type(error).__name__
    raise ValueError(
      f"checkpoint {checkpoints.directory}/{step:08d} can't be {verb}:"
      f" {text.splitlines()[0][:200]}"
    ) from error


def directory(run: pathlib.Path, stage: Any) -> pathlib.Path:
  """Returns where a run keeps the checkpoints of a stage.

  Args:
    run: the run's directory.
    stage: an `experiment.stages.Stage`.
  """
  return run / "checkpoints" / stage.directory


def find(root: pathlib.Path) -> list[pathlib.Path]:
  """Finds the directories that hold checkpoints, at or below this; sorted."""
  # Not rglob: it raises where a run that is writing has renamed a directory.
  return sorted(
    pathlib.Path(stage)
    for stage, names, _ in os.walk(root)
    if any(_STEP.fullmatch(name) for name in names)
  )


def step_of(path: pathlib.Path) -> int | None:
  """Returns the step, if the path is that of a single checkpoint; else None."""
  return int(path.name) if _STEP.fullmatch(path.name) else None
