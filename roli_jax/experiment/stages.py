"""From a config to the training stages of its table, each of them once."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from roli_jax.experiment import compat

INITS = ("ranli", "roli", "std")
ZEROSHOT = "zeroshot"  # a head_init: the file's own head, made of prompts

# What a cell of `config.cells` may say; the rest comes from the config.
_CELL_KEYS = (
    "weights", "method", "init", "head_init", "train_size", "seeds",
    "probe_steps_added", "rates", "curve", "tests", "loss",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Stage:
  """One run of training: a probe, an adaptation, or a pretraining.

  Attributes:
    name: `probe`, `adapt` or `pretrain`; the section of the config that it
      follows.
    weights: of the backbone at the start: the name of shipped weights, or a
      path; in pretraining, the name that the product goes by.
    method: which leaves train, a name in `peft.METHODS`.
    init: of the head. `ranli`: random. `roli`: from an adversarial linear
      probe. `std`: from a clean one. A probe's is what it is a probe for.
    head_init: the random head's distribution, or `zeroshot`: the head that
      `zeroshot.classifier` gave the weights.
    train_size: number of training images.
    seed: of the subset, the head, the order and the attacks' noise.
    num_steps: the number of steps of this stage, >= 1.
    epoch_steps: those that see every training image once.
    lr: peak learning rate.
    loss: the criterion, a name in `objectives.LOSSES`.
    start: the stage whose best parameters this one starts from; None starts
      from the weights and a random head.
    curve: whether accuracy is measured along the radii of the curve.
    tests: further ones: attack, norm, eps, number of images (0: all).
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
    """The name that its rows and checkpoints go by."""
    return _cell(self.__dict__)

  @property
  def selected_by(self) -> str:
    """The validation accuracy that selects the best checkpoint.

    Adversarial, as in the RoLI reference; clean where training is.
    """
    return "clean" if self.loss == "clean" else "robust"

  @property
  def is_random(self) -> bool:
    """Whether it begins at a head that nothing has taught."""
    return self.start is None and self.head_init != ZEROSHOT

  @property
  def directory(self) -> str:
    """Where its checkpoints lie, below the run's."""
    return f"{self.cell}/{self.name}/lr{self.lr:g}-steps{self.num_steps}"


def _cell(about: Mapping[str, Any]) -> str:
  head_init = about["head_init"]
  parts = (
    # A path's slashes would make directories of it.
    re.sub(r"[^\w.]+", "_", about["weights"]),
    about["method"],
    about["init"],
    *([head_init] if head_init != "kaiming_fan_out" else []),
    f"n{about['train_size']}",
    f"seed{about['seed']}",
  )
  return "-".join(parts)


def expand(config: Mapping[str, Any], num_train: int = 0) -> list[Stage]:
  """All stages of the config's cells, each after the one it starts from.

  Args:
    config: with `cells`, the stages' sections, and what cells don't say.
    num_train: what a `train_size` of 0 stands for, all training images.

  Raises:
    ValueError: a cell with unknown words, or a learning rate that nothing
      says.
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
  """The stages of a cell's seed number k."""
  if "pretrain" in config:
    about = _about(config, cell, seed, method="full", init="ranli")
    yield from _at_rates(config, "pretrain", about, cell)
    return
  method, init = cell["method"], cell["init"]
  if init not in INITS:
    raise ValueError(f"unknown init {init!r}; there are {', '.join(INITS)}")
  if method == "linear" and init == "ranli":
    init = "roli"  # one stage from a random head: the probe itself
  start = None
  if init != "ranli":
    loss = {"loss": "clean"} if init == "std" else {}
    about = _about(config, cell, seed, method="linear", init=init, **loss)
    if method == "linear":
      about["tests"] = _tests(cell.get("tests", ()), k)
      yield from _at_rates(config, "probe", about, cell)
      return
    (start,) = _at_rates(config, "probe", about, {})
    yield start
  about = _about(config, cell, seed, method=method, init=init, start=start)
  about["curve"] = k == 0 and cell.get("curve", False)
  about["tests"] = _tests(cell.get("tests", ()), k)
  yield from _at_rates(config, "adapt", about, cell)


def _tests(given, k: int) -> tuple[tuple[str, str, str, int], ...]:
  """Those of seed number k: a test is of the first seed, or of so many."""
  return tuple(
    (attack, norm, eps, count)
    for attack, norm, eps, count, *seeds in given
    if k < (seeds[0] if seeds else 1)
  )


def head_init(config: Mapping[str, Any]) -> str:
  """The random head's start; a compat switch that is set goes before."""
  switch = compat.switches(config)["head_init"]
  is_default = switch == compat.SWITCHES["head_init"][0]
  return config["head_init"] if is_default else switch


def _about(config, cell, seed, **fields):
  return {
    "weights": cell.get("weights", config["backbone"]["weights"]),
    "head_init": cell.get("head_init", head_init(config)),
    "train_size": cell.get("train_size", config["data"]["train_size"]),
    "seed": seed,
    **fields,
  }


def _at_rates(config, name, about, cell) -> Iterator[Stage]:
  """The stage at the cell's own rates, or at the one that the config chose."""
  section = config[name]
  epoch_steps, num_steps = _lengths(section, about["train_size"])
  if cell.get("probe_steps_added"):
    num_steps += _lengths(config["probe"], about["train_size"])[1]
  loss = cell.get("loss", section["loss"]["name"])
  rates = cell.get("rates") or (
    section["lr"] or _chosen(config["rates"], name, about, num_steps),
  )
  for lr in rates:
    if not lr > 0:
      raise ValueError(f"learning rates must be > 0, got {lr}")
    yield Stage(
      name=name,
      num_steps=num_steps,
      epoch_steps=epoch_steps,
      lr=lr,
      **{"loss": loss, **about},
    )


def _lengths(section, train_size) -> tuple[int, int]:
  """Steps of an epoch, the last batch a whole one, and of the stage."""
  if section["batch_size"] < 1:
    raise ValueError(f"batch_size must be >= 1, got {section['batch_size']}")
  if train_size < 1:
    raise ValueError(f"train_size must be >= 1, or 0 for all; got {train_size}")
  epoch = math.ceil(train_size / section["batch_size"])
  num_steps = section["num_steps"] or section.get("epochs", 0) * epoch
  if num_steps < 1:
    raise ValueError("a stage needs num_steps or epochs of at least 1")
  return epoch, num_steps


def _chosen(rates, name, about, num_steps) -> float:
  """The rate of the first pattern that matches `<cell>/<stage>/<steps>`."""
  said = f"{_cell(about)}/{name}/{num_steps}"
  for pattern, rate in rates:
    if re.fullmatch(pattern, said):
      return rate
  raise ValueError(
    f"no rate is chosen for {said!r}; set --config.{name}.lr, or add to"
    " config.rates"
  )
