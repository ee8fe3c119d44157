"""A run of which the shapes are known, and neither images nor weights."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from roli_jax import convert, data, models, peft, sharding, specs
from roli_jax.experiment.build import build_model, method_fields
from roli_jax.experiment.run import Run, backbone_sizes, build_run
from roli_jax.experiment.stages import Stage


@dataclasses.dataclass(frozen=True)
class Split:
  """What a plan knows of a split in place of its images."""

  num_classes: int
  size: int
  shape: tuple[int, int, int]
  white: int = 255

  def __len__(self) -> int:
    return self.size


def planned(
  config: Mapping[str, Any], devices: Sequence[jax.Device] | None = None
) -> Run:
  """A run with shapes in place of data and weights.

  A data set of which nothing is known is looked at.

  Args:
    config: the run's.
    devices: those that it is planned for; None: one of this machine, which may
      have fewer than `config.mesh` wants.

  Raises:
    ValueError: as a run of the config would on such devices.
  """
  mesh = {"model": 1, "rules": (), **config.get("mesh", {})}
  run = build_run({**config, "mesh": {**mesh, "model": 1}})
  if devices is None:
    devices, mesh["model"] = jax.devices()[:1], 1
  over = sharding.mesh(mesh["model"], devices=devices)
  name, backbone = config["data"]["name"], config["backbone"]
  splits: Mapping[str, Any] = run.data
  if name in data.FACTS:
    facts = data.FACTS[name]
    sizes = {"train": facts.train, "val": facts.val, "test": facts.test}
    splits = {
      split: Split(facts.num_classes, size, facts.shape)
      for split, size in sizes.items()
    }

  @functools.cache
  def load(weights, keeps_head=False):
    told = backbone_sizes(backbone)
    # The head, or the sizes, are whatever the file has.
    if keeps_head or (backbone["name"] in models.FAMILIES and not told):
      return run.load(weights, keeps_head=keeps_head)
    model = models.create(
      backbone["name"],
      splits["train"].num_classes,
      backbone.get("image_size") or None,
      **told,
    )
    return convert.Bundle(model, *model.shapes())

  return dataclasses.replace(
    run, config=config, mesh=over, data=splits, load=load
  )


def num_images(run: Run, split: str, few: int) -> int:
  """How many images of a split are tested: `few`, or all if 0 or too many."""
  size = len(run.data[split])
  return min(few or size, size)


def model_and_method(
  run: Run, stage: Stage
) -> tuple[models.Model, peft.Method]:
  """The stage's model and method, equal for all that cost the same.

  How arrays start costs nothing, and methods that differ in nothing else are
  counted once.
  """
  fields = method_fields(run, stage)
  fields = {k: v for k, v in fields.items() if k not in ("init", "order")}
  method = specs.build(peft.METHODS, fields, "method")
  plain = build_model(run, dataclasses.replace(stage, method="linear"))
  return method.apply_to(plain), method
