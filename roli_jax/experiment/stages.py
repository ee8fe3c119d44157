"""From a config to the training stages of its table, each of them once.

Three words, here and elsewhere:

* A *run* is what one config makes in one workdir: `experiment.run.Run`, or all
  that lies in the workdir.
* A *cell* is one entry of `config.cells`, the run's table: weights, a method,
  an init, at one seed or several. Rows and checkpoints name a cell with its
  number of images and one of its seeds, as `Stage.cell` does:
  `robust-full-roli-n200-seed0`.
* A *stage* is one training inside a cell, of one seed, at one learning rate:
  `probe`, `adapt` or `pretrain`, the section of the config that it follows. A
  cell has one stage, or a probe and the adaptation that starts from it, for
  each seed and rate. Cells may share a probe: it is trained once.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from roli_jax.experiment import compat
from roli_jax.results import record

INITS = ("ranli", "roli", "std")
ZEROSHOT = "zeroshot"  # a head_init: the file's own head, made of prompts

# The fields that a cell may have; what it leaves out comes from the config.
_CELL_KEYS = (
    "weights", "method", "init", "head_init", "train_size", "seeds",
    "probe_steps_added", "rates", "curve", "tests", "loss",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Stage:
  """One training: a probe, an adaptation, or a pretraining.

  Attributes:
    name: `probe`, `adapt` or `pretrain`; the section of the config that the
      stage follows.
    weights: the backbone's at the start: the name of shipped weights, or a
      path; in pretraining, the name of the weights that are made.
    method: which leaves train, a name in `peft.METHODS`.
    init: where the adaptation's head comes from. `ranli`: random. `roli`: an
      adversarial linear probe. `std`: a clean one. A probe has the init that it
      is trained for.
    head_init: the random head's distribution, or `zeroshot`: the head that
      `zeroshot.classifier` gave the weights.
    train_size: number of training images, >= 1.
    seed: decides the subset, the head, the order and the attacks' noise.
    num_steps: the number of steps of this stage, >= 1.
    epoch_steps: the number of steps that see every training image once, >= 1.
    lr: peak learning rate, > 0.
    loss: the criterion, a name in `objectives.LOSSES`.
    start: the stage whose best parameters this one starts from; None starts
      from the weights and a random head.
    curve: whether accuracy is measured along the radii of `config.curve`.
    tests: further tests: attack, norm, eps, number of images (0: all).
  """

  name: str
  weights: str
  method: str
  init: str
  head_init: str
  train_size: int
  seed: int
  num_steps: int
  epoch_steps: int
  lr: float
  loss: str
  start: "Stage | None" = None
  curve: bool = False
  tests: tuple[tuple[str, str, str, int], ...] = ()

  @property
  def cell(self) -> str:
    """The name of its cell and seed, in rows and in paths of checkpoints."""
    return _cell_name(self.__dict__)

  @property
  def row(self) -> dict[str, Any]:
    """The fields by which rows name the stage."""
    return {
      "cell": self.cell,
      "stage": self.name,
      "lr": self.lr,
      "steps": self.num_steps,
    }

  @property
  def selected_by(self) -> str:
    """The validation accuracy that selects the best checkpoint.

    Adversarial, as in the RoLI reference; clean where training is.
    """
    return "clean" if self.loss == "clean" else "robust"

  @property
  def is_random(self) -> bool:
    """Whether it starts from a head that is drawn at random."""
    return self.start is None and self.head_init != ZEROSHOT

  @property
  def directory(self) -> str:
    """Where its checkpoints lie, below those of the run."""
    return record.directory(self.row)


def in_paths(weights: str) -> str:
  """Returns the name of weights as paths have it, without slashes."""
  return re.sub(r"[^\w.]+", "_", weights)


def _cell_name(fields: Mapping[str, Any]) -> str:
  """Returns the name of the cell and seed of a stage with these fields."""
  head_init = fields["head_init"]
  parts = (
    in_paths(fields["weights"]),
    fields["method"],
    fields["init"],
    *([head_init] if head_init != "kaiming_fan_out" else []),
    f"n{fields['train_size']}",
    f"seed{fields['seed']}",
  )
  return "-".join(parts)


def expand(config: Mapping[str, Any], num_train: int = 0) -> list[Stage]:
  """Returns all stages of the cells, each after the one it starts from.

  Args:
    config: with `cells`, the stages' sections, and defaults for the cells.
    num_train: the number of training images, for a `train_size` of 0.

  Raises:
    ValueError: a cell with an unknown field or value, or without a learning
      rate.
  """
  stages: dict[Stage, None] = {}  # an ordered set
  data = config["data"]
  size = data["train_size"] or num_train
  config = {**config, "data": {**data, "train_size": size}}
  only = config.get("only")
  if only is not None and not 0 <= only < len(config["cells"]):
    raise ValueError(
      f"config.only must be below the {len(config['cells'])} cells, got {only}"
    )
  for i, cell in enumerate(config["cells"]):
    if only not in (None, i):
      continue
    unknown = sorted(cell.keys() - set(_CELL_KEYS))
    if unknown:
      raise ValueError(f"cells have no {unknown}; they have {_CELL_KEYS}")
    for k in range(cell.get("seeds", 1)):
      for stage in _stages(config, cell, config["seed"] + k, k):
        stages.setdefault(stage)
  return list(stages)


def _stages(
  config: Mapping[str, Any], cell: Mapping[str, Any], seed: int, k: int
) -> Iterator[Stage]:
  """Yields the stages of one seed of a cell.

  Args:
    config: as `expand` takes it.
    cell: the entry of the table.
    seed: the seed.
    k: which of the cell's seeds it is, from 0.
  """
  if "pretrain" in config:
    fields = _fields(config, cell, seed, method="full", init="ranli")
    yield from _at_rates(config, "pretrain", fields, cell)
    return
  method, init = cell["method"], cell["init"]
  if init not in INITS:
    raise ValueError(f"unknown init {init!r}; there are {', '.join(INITS)}")
  if method == "linear" and init == "ranli":
    init = "roli"  # one stage from a random head: the probe itself
  start = None
  if init != "ranli":
    loss = {"loss": "clean"} if init == "std" else {}
    fields = _fields(config, cell, seed, method="linear", init=init, **loss)
    if method == "linear":
      fields["tests"] = _tests(cell, k)
      yield from _at_rates(config, "probe", fields, cell)
      return
    (start,) = _at_rates(config, "probe", fields, {})
    yield start
  fields = _fields(config, cell, seed, method=method, init=init, start=start)
  fields["curve"] = k == 0 and cell.get("curve", False)
  fields["tests"] = _tests(cell, k)
  yield from _at_rates(config, "adapt", fields, cell)


def _tests(
  cell: Mapping[str, Any], k: int
) -> tuple[tuple[str, str, str, int], ...]:
  """Returns the tests of seed number k.

  A cell's test is of the first seed alone, or, with a fifth value, of so many.
  """
  return tuple(
    (attack, norm, eps, count)
    for attack, norm, eps, count, *seeds in cell.get("tests", ())
    if k < (seeds[0] if seeds else 1)
  )


def head_init(config: Mapping[str, Any]) -> str:
  """Returns the random head's start; a compat switch that is set prevails."""
  switch = compat.switches(config)["head_init"]
  is_default = switch == compat.SWITCHES["head_init"][0]
  return config["head_init"] if is_default else switch


def _fields(
  config: Mapping[str, Any], cell: Mapping[str, Any], seed: int, **fields: Any
) -> dict[str, Any]:
  """Returns fields of a `Stage`: the cell's, or the config's where unset."""
  return {
    "weights": cell.get("weights", config["backbone"]["weights"]),
    "head_init": cell.get("head_init", head_init(config)),
    "train_size": cell.get("train_size", config["data"]["train_size"]),
    "seed": seed,
    **fields,
  }


def _at_rates(
  config: Mapping[str, Any],
  name: str,
  fields: Mapping[str, Any],
  cell: Mapping[str, Any],
) -> Iterator[Stage]:
  """Yields the stage at the cell's rates, or at the one that the config has.

  Args:
    config: as `expand` takes it.
    name: the stage's.
    fields: the stage's, but for its length, rate and default loss.
    cell: what may set rates, loss and length; {} sets none.
  """
  section = config[name]
  epoch_steps, num_steps = _lengths(section, fields["train_size"])
  if cell.get("probe_steps_added"):
    num_steps += _lengths(config["probe"], fields["train_size"])[1]
  loss = cell.get("loss", section["loss"]["name"])
  rates = cell.get("rates") or (
    section["lr"] or _chosen_rate(config, name, fields, num_steps),
  )
  for lr in rates:
    if not lr > 0:
      raise ValueError(f"learning rates must be > 0, got {lr}")
    yield Stage(
      name=name,
      num_steps=num_steps,
      epoch_steps=epoch_steps,
      lr=lr,
      **{"loss": loss, **fields},
    )


def _lengths(section: Mapping[str, Any], train_size: int) -> tuple[int, int]:
  """Returns the number of steps of an epoch and of the stage.

  The last batch of an epoch is a whole one.
  """
  if section["batch_size"] < 1:
    raise ValueError(f"batch_size must be >= 1, got {section['batch_size']}")
  if train_size < 1:
    raise ValueError(f"train_size must be >= 1, or 0 for all; got {train_size}")
  epoch = math.ceil(train_size / section["batch_size"])
  num_steps = section["num_steps"] or section.get("epochs", 0) * epoch
  if num_steps < 1:
    raise ValueError("a stage needs num_steps or epochs of at least 1")
  return epoch, num_steps


def _chosen_rate(
  config: Mapping[str, Any],
  name: str,
  fields: Mapping[str, Any],
  num_steps: int,
) -> float:
  """Returns the rate of the first pattern that matches the stage.

  Patterns are of `<cell>/<stage>/<steps>`.
  """
  path = f"{_cell_name(fields)}/{name}/{num_steps}"
  for pattern, rate in config["rates"]:
    if re.fullmatch(pattern, path):
      return rate
  raise ValueError(
    f"no rate is chosen for {path!r}; set --config.{name}.lr, or add to"
    " config.rates"
  )
