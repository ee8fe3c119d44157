"""`--mode=evaluate` of weights as they are, without a run."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from roli_jax import data, models, step
from roli_jax.convert import registry
from roli_jax.experiment import build, facts, program, stage_tests
from roli_jax.experiment.run import Run, build_run
from roli_jax.experiment.stages import Stage, in_paths
from roli_jax.results import record, stated


@dataclasses.dataclass(frozen=True)
class _AsIs(Stage):
  """Weights that nobody has trained here, as if they were a stage."""

  @property
  def cell(self) -> str:
    return f"{in_paths(self.weights)}-{stated.AS_IS}-seed{self.seed}"

  @property
  def row(self) -> dict[str, Any]:
    return {"cell": self.cell, "stage": self.name}

  @property
  def directory(self) -> str:
    return self.cell


class _Results(record.Record):
  """A record that sets what a checkpoint is stated to do beside each row."""

  def __init__(self, path: pathlib.Path, checkpoint: registry.Checkpoint):
    super().__init__(path, stated.FIELDS, stated.VALUES)
    self._checkpoint = checkpoint

  def add(self, row: Mapping[str, Any]) -> None:
    super().add({**row, "stated": self._checkpoint.stated(row)})


def evaluate(config: Mapping[str, Any], path: pathlib.Path) -> list[record.Row]:
  """Tests weights as they are, and adds the rows that are missing.

  Args:
    config: any nested mapping with the fields of `configs/evaluate.py`.
    path: the directory of the rows, which may hold those of other weights.

  Returns:
    The rows of these weights.

  Raises:
    ValueError: no such weights, or of other classes than the data; no threat
      model.
  """
  weights = config["backbone"]["weights"]
  if not weights:
    raise ValueError("--config.backbone.weights= is missing; see --mode=zoo")
  checkpoint = registry.Checkpoint(weights, "")
  if registry.is_name(weights):
    checkpoint = registry.named(weights)
  run = build_run(_completed(config, checkpoint), config["checks"])
  chosen = list(stage_tests.evaluation_tests(run))
  bundle = run.load(weights, keeps_head=True)
  _check_data(run, bundle.model, weights)
  named = {**run.config["backbone"], "name": bundle.model.name}
  run = dataclasses.replace(run, config={**run.config, "backbone": named})
  model = models.with_options(bundle.model, **build.model_options(run))
  predict = step.make_predict(program.for_devices(run, model))
  stage = _AsIs(
    name=stated.AS_IS, weights=weights, method="", init="", head_init="",
    train_size=0, seed=config["seed"], num_steps=0, epoch_steps=0, lr=0.0,
    loss="",
  )  # fmt: skip
  path.mkdir(parents=True, exist_ok=True)
  facts.add_weights(weights, bundle, path)
  results = _Results(path / "results.jsonl", checkpoint)
  variables = (bundle.params, bundle.stats)
  stage_tests.add_tests(run, stage, results, predict, variables, chosen)
  return record.where(results.rows, **stage.row)


def _completed(
  config: Mapping[str, Any], checkpoint: registry.Checkpoint
) -> dict[str, Any]:
  """Returns the config with what it leaves to the name of the weights.

  Raises:
    ValueError: a threat model that neither says.
  """
  about_data = dict(config["data"])
  chosen = about_data["eval_transforms"] or checkpoint.preprocessing
  if chosen and about_data["name"] not in data.IN_MEMORY:
    # Nothing trains here, and the two have to be of one size.
    both = ("train_transforms", "eval_transforms")
    about_data |= dict.fromkeys(both, chosen)
  threat = _threat(config, checkpoint)
  return {**config, "threat": threat, "data": about_data}


def _threat(
  config: Mapping[str, Any], checkpoint: registry.Checkpoint
) -> dict[str, str]:
  """Returns norm and radius: the config's, or those of the weights' name."""
  if config["eval_attack"]["name"].startswith("corruptions"):
    return {"norm": "linf", "eps": "0"}  # which nothing uses
  for_corruptions = checkpoint.norm == "corruptions"
  named = {} if for_corruptions else {
    "norm": checkpoint.norm, "eps": checkpoint.eps,
  }  # fmt: skip
  threat = {
    k: v for k in ("norm", "eps") if (v := config["threat"][k] or named.get(k))
  }
  if len(threat) < 2:
    hint = "; they are for corruptions: --config.attack=corruptions:standard"
    raise ValueError(
      f"no threat model is known of {checkpoint.name}: say"
      " --config.threat.norm=linf --config.threat.eps=8/255"
      f"{hint if for_corruptions else ''}"
    )
  return threat


def _check_data(run: Run, model: models.Model, weights: str) -> None:
  """Raises a ValueError unless the images are those of the weights' classes."""
  source, name = run.data["test"], run.config["data"]["name"]
  for what, have, want in (
    ("classes", source.num_classes, model.num_classes),
    ("channels", source.shape[-1], model.channels),
  ):
    if have != want:
      raise ValueError(f"{weights} is of {want} {what}, {name} has {have}")
