"""A trained model of a run, for --mode=evaluate and --mode=publish."""

import pathlib
from collections.abc import Callable
from typing import Any

from roli_jax import models, peft, sharding, specs, step
from roli_jax.experiment.run import Run, expand_stages
from roli_jax.experiment.stages import Stage
from roli_jax.files import checkpoint
from roli_jax.types import Variables


def restore(
  run: Run, path: pathlib.Path
) -> tuple[Stage, Callable[..., Any], Variables]:
  """Restores the best checkpoint of a stage.

  Args:
    run: the run; `config.checkpoint` names the checkpoint, "" the only stage
      that no other starts from.
    path: the run's directory.

  Returns:
    The stage; `(variables, images) -> logits`; the variables.

  Raises:
    ValueError: there is no such checkpoint, or more than one; the data have
      another number of classes.
  """
  stage, directory, meta = find(run, path)
  method = specs.build(peft.METHODS, meta["method"], "method")
  model = method.apply_to(models.from_spec(meta["model"]))
  classes = run.data["test"].num_classes
  if model.num_classes != classes:
    raise ValueError(
      f"{directory.parent} has a head of {model.num_classes} classes,"
      f" {run.config['data']['name']} has {classes}"
    )
  shapes = model.shapes()
  placed = sharding.ruled(shapes, run.mesh)
  with checkpoint.manager(directory.parent, reading=True) as checkpoints:
    best_step = int(directory.name)
    items = checkpoint.restore(checkpoints, best_step, model=placed)
  return stage, step.make_predict(model), items["model"]


def find(
  run: Run, path: pathlib.Path
) -> tuple[Stage, pathlib.Path, dict[str, Any]]:
  """Finds the best checkpoint of the stage that `config.checkpoint` names.

  Args:
    run: the run.
    path: the run's directory.

  Returns:
    The stage; the checkpoint's directory; its metadata.

  Raises:
    ValueError: there is no such checkpoint, or more than one.
  """
  directory, asked = _choose(run, path)
  with checkpoint.manager(directory, reading=True) as checkpoints:
    best_step = checkpoints.best_step()
    if asked not in (None, best_step):
      raise ValueError(
        f"step {asked} is not the best of its stage, which rows are of;"
        f" the best is {directory}/{best_step:08d}"
      )
    meta = checkpoint.restore_meta(checkpoints, best_step)
  stage = Stage(**{**meta["stage"], "start": None, "tests": ()})
  return stage, directory / f"{best_step:08d}", meta


def _choose(run: Run, path: pathlib.Path) -> tuple[pathlib.Path, int | None]:
  """Returns the directory of the stage that config.checkpoint names.

  Also the step, if it names one.
  """
  root = path.absolute() / "checkpoints"
  asked = root / run.config["checkpoint"]
  at_step = checkpoint.step_of(asked)
  if run.config["checkpoint"]:
    found = checkpoint.find(asked if at_step is None else asked.parent)
    if at_step is not None and not asked.is_dir():
      found = []
  else:
    stages = expand_stages(run)
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
  return found[0], at_step
