"""Our results beside those of the Guide: its columns, its rows, its scores.

"A Guide to Robust Generalization" (Heuillet et al. 2025, arXiv 2508.14079) has
published 1,440 rows, `results_dataset.csv` of
github.com/MaxHeuillet/robust_training, none of which is kept here. A *line* is
a row of that file; a *row* is one of ours, of `results.jsonl`.
"""

import bisect
import csv
import math
import pathlib
import statistics
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from roli_jax.files import workdir
from roli_jax.results import record
from roli_jax.results.grouping import collect
from roli_jax.results.record import Row

Line = dict[str, Any]
K = TypeVar("K", bound=Hashable)

# Columns of accuracies, and the attack, norm and eps of their rows.
MEASURES = {
  "clean_acc": ("none", "", 0.0),
  "Linf_acc": ("autoattack", "linf", 4 / 255),
  "L2_acc": ("autoattack", "l2", 2.0),
  "L1_acc": ("autoattack", "l1", 75.0),
  "common_acc": ("guide", "severity", 3.0),
}

# Of the published file; the first column, a running number, has no name.
COLUMNS = (
  "", *MEASURES, "sum", "geom", "model_size", "backbone", "dataset",
  "loss_function", "pre_training_dataset", "pre_training_strategy",
  "volume_pre_training_data", "backbone_name", "model_type", "ft_strategy",
)  # fmt: skip

# Those that a backbone decides.
_OF_BACKBONE = (
  "model_size", "pre_training_dataset", "pre_training_strategy",
  "volume_pre_training_data", "backbone_name", "model_type",
)  # fmt: skip

# Those that `_config` gives a line, in its order.
_NAMES = ("backbone", "dataset", "loss_function", "ft_strategy")

# Those that identify a training, beside its data set.
_CONFIG = ("backbone", "loss_function", "ft_strategy", "source")

DATASETS = {
  "aircraft": "fgvc-aircraft-2013b",
  "caltech101": "caltech101",
  "cars": "stanford_cars",
  "flowers": "flowers-102",
  "pets": "oxford-iiit-pet",
  "uc_merced": "uc-merced-land-use-dataset",
}
LOSSES = {"at": "Classic AT", "trades": "TRADES"}
_INITS = {"ranli": "", "roli": "RoLI ", "std": "std "}
_METHODS = {"full": "FFT", "linear": "LP"}

_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")


def read(path: pathlib.Path) -> list[Row]:
  """Returns the test rows of a run's last stages, completed from its config.

  Args:
    path: the run's directory.

  Returns:
    Rows that have `loss`, a name as in configs, and `ft_strategy`, as in the
    Guide: `FFT (50 epochs)`, `LP (50 epochs)`; of ours `RoLI FFT (50 epochs)`
    or `RoLI lora (50 epochs)`, and steps where the config says steps.

  Raises:
    ValueError: there is no run.
  """
  config = workdir.read_config(path)
  last = {
    "probe" if cell["method"] == "linear" else "adapt"
    for cell in config["cells"]
  }
  tests = record.where(record.read(path / "results.jsonl"), split="test")
  return [
    {
      **row,
      "loss": config[row["stage"]]["loss"]["name"],
      "ft_strategy": _strategy(config[row["stage"]], row),
    }
    for row in tests
    if row["stage"] in last
  ]


def _strategy(section: Mapping[str, Any], row: Row) -> str:
  """Returns the `ft_strategy` of a row, from its stage's config."""
  epochs = not section["num_steps"]
  length = f"{section['epochs']} epochs" if epochs else f"{row['steps']} steps"
  method = _METHODS.get(row["method"], row["method"])
  # `linear probe (RoLI)` is the Guide's LP: its init is that of what follows.
  is_probe = (row["stage"], row["init"]) == ("probe", "roli")
  init = "" if is_probe else _INITS[row["init"]]
  return f"{init}{method} ({length})"


def table(rows: Iterable[Row]) -> list[Line]:
  """Returns rows as lines of the published file, the mean of their seeds.

  A seed counts if it has all five measurements. `sum` and `geom` are the sum
  and the product of the five. `backbone` is the last part of the weights'
  path, so that weights/convnext_base.fb_in22k are those of the Guide's
  backbone of that name; what a backbone decides is left empty, see `join`.

  Args:
    rows: as `read` returns them; those of other attacks or radii are passed
      over.

  Raises:
    ValueError: rows without `loss`; data or losses that the Guide hasn't; a
      training without all five measurements, or on images of several counts;
      one config trained in two ways, at two rates say.
  """
  tests = record.where(rows, split="test", metric="accuracy")
  measured = collect((row for row in tests if _measure(row)), _config)
  return [_line(i, *item) for i, item in enumerate(measured.items())]


def _measure(row: Row) -> str:
  """Returns the column that a row's value belongs into, "" for none."""
  for name, (attack, norm, eps) in MEASURES.items():
    same = (row["attack"], row["norm"] or "") == (attack, norm)
    if same and math.isclose(float(row["eps"] or 0), eps, rel_tol=1e-5):
      return name
  return ""


def _config(row: Row) -> tuple[str, str, str, str]:
  """Returns backbone, data set, loss and strategy, in the Guide's words.

  Raises:
    ValueError: a field is missing, or the Guide has no such data or loss.
  """
  for field in ("loss", "ft_strategy"):
    if field not in row:
      raise ValueError(
        f"rows have no {field!r}; take those of guide.read(RUN), which adds it"
      )
  for field, known in (("data", DATASETS), ("loss", LOSSES)):
    if row[field] not in known:
      raise ValueError(
        f"the Guide has no {field} {row[field]!r}; it has {', '.join(known)}"
      )
  backbone = pathlib.PurePath(row["weights"]).name
  for suffix in _SUFFIXES:
    backbone = backbone.removesuffix(suffix)
  loss = LOSSES[row["loss"]]
  return backbone, DATASETS[row["data"]], loss, row["ft_strategy"]


def _line(
  number: int, config: tuple[str, str, str, str], measured: Sequence[Row]
) -> Line:
  """Returns the line of a config, the mean of the seeds that have all columns.

  Raises:
    ValueError: see `table`.
  """
  name = ", ".join(config)
  ways = {
    tuple(row[field] for field in ("lr", "steps", "head_init", "train_size"))
    for row in measured
  }
  if len(ways) > 1:
    raise ValueError(
      f"{name}: trained in {len(ways)} ways (rate, steps, head, images):"
      f" {sorted(ways, key=str)}; give the rows of one"
    )
  counts = sorted({row["n"] for row in measured})
  if len(counts) > 1:
    raise ValueError(f"{name}: measured on {counts} images; all must be one")
  seeds: dict[int, dict[str, float]] = {}
  for row in measured:
    measure, values = _measure(row), seeds.setdefault(row["seed"], {})
    if values.setdefault(measure, row["value"]) != row["value"]:
      raise ValueError(
        f"{name}: {measure} of seed {row['seed']} is both {values[measure]} and"
        f" {row['value']}; give the rows of one run"
      )
  whole = [values for values in seeds.values() if len(values) == len(MEASURES)]
  if not whole:
    most = max(seeds.values(), key=len)
    lacking = ", ".join(measure for measure in MEASURES if measure not in most)
    raise ValueError(f"{name}: no row for {lacking}; end its tests first")
  means = {
    measure: statistics.mean(values[measure] for values in whole)
    for measure in MEASURES
  }
  line = {
    "": number,
    **means,
    "sum": sum(means.values()),
    "geom": math.prod(means.values()),
    **dict(zip(_NAMES, config, strict=True)),
  }
  return {column: line.get(column, "") for column in COLUMNS}


def to_csv(rows: Iterable[Row], path: pathlib.Path) -> None:
  """Writes rows with the published file's columns.

  Args:
    rows: as `read` returns them.
    path: the file to write.

  Raises:
    ValueError: as `table`.
  """
  write_csv(table(rows), path)


def write_csv(lines: Sequence[Line], path: pathlib.Path) -> None:
  """Writes lines, with a column `source` where they are joined.

  Args:
    lines: as `table` or `join` returns them.
    path: the file to write.

  Raises:
    ValueError: a line without one of the columns.
  """
  for line in lines:
    _check(line, "a line")
  joined = ["source"] if any("source" in line for line in lines) else []
  with path.open("w", newline="", encoding="utf-8") as file:
    writer = csv.DictWriter(file, [*COLUMNS, *joined], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)


def read_csv(path: pathlib.Path) -> list[Line]:
  """Returns the lines of the published file, or one of `to_csv`.

  Raises:
    ValueError: there is no file; columns are missing; a number can't be read.
  """
  if not path.is_file():
    raise ValueError(
      f"there is no file {path}; the Guide's is results_dataset.csv of"
      " github.com/MaxHeuillet/robust_training"
    )
  with path.open(newline="", encoding="utf-8") as file:
    reader = csv.DictReader(file)
    _check(reader.fieldnames or (), str(path))
    return [_numbers(line, f"{path}:{reader.line_num}") for line in reader]


def _check(columns: Iterable[str], what: str) -> None:
  """Raises a ValueError unless all columns of the published file are there."""
  missing = [repr(name) for name in COLUMNS if name not in columns]
  if missing:
    raise ValueError(
      f"{what} has no column {', '.join(missing)}; it must have those of the"
      f" Guide's results_dataset.csv: {', '.join(COLUMNS[1:])}, after a running"
      " number without a name"
    )


def _numbers(line: Line, where: str) -> Line:
  """Returns a line that was read as text, with its numbers as floats."""
  parsed = dict(line)
  for name in (*MEASURES, "sum", "geom"):
    try:
      parsed[name] = float(line[name])
    except (TypeError, ValueError) as error:
      raise ValueError(
        f"{where}: {name} should be a number, got {line[name]!r}"
      ) from error
  return parsed


def join(ours: Sequence[Line], theirs: Sequence[Line]) -> list[Line]:
  """Returns their lines, then ours, with a column that tells them apart.

  Our lines take the size, family and pretraining of a backbone from their
  lines of the same backbone, if there are any.

  Returns:
    Lines with one more column, `source`: `guide` or `roli_jax`.

  Raises:
    ValueError: a line without one of the columns.
  """
  for line in (*ours, *theirs):
    _check(line, "a line")
  known = {
    line["backbone"]: {name: line[name] for name in _OF_BACKBONE}
    for line in theirs
  }
  joined = [{**line, "source": "guide"} for line in theirs]
  for line in ours:
    facts = known.get(line["backbone"], {})
    joined.append({**line, **facts, "source": "roli_jax"})
  return [{**line, "": number} for number, line in enumerate(joined)]


def scores(lines: Iterable[Line]) -> list[Line]:
  """Returns the Guide's three scores of each config, the best Borda first.

  A config is a backbone, a loss, a strategy and, where lines are joined, a
  source. `sum` and `geom` are totals over data sets of each one's sum and
  product of five accuracies; `borda` ranks the configs in each measurement of
  each data set, among those that are given, and adds the ranks: give the lines
  that are to be compared, of a strategy or of a size. `rank` is the place by
  `borda`, 1 the best, equal ones sharing the best of theirs.

  Raises:
    ValueError: a config twice on a data set, or not on all that others are on.
  """
  configs: dict[tuple[str, ...], dict[str, Line]] = {}
  for line in lines:
    config = tuple(line.get(field, "") for field in _CONFIG)
    by_data = configs.setdefault(config, {})
    if line["dataset"] in by_data:
      name = ", ".join(filter(None, config))
      raise ValueError(f"twice on {line['dataset']}: {name}")
    by_data[line["dataset"]] = line
  points = borda(
    [
      {
        (data, name): by_data[data][name]
        for data in by_data
        for name in MEASURES
      }
      for by_data in configs.values()
    ]
  )
  scored = [
    {
      **dict(zip(_CONFIG, config, strict=True)),
      "sum": sum(line["sum"] for line in by_data.values()),
      "geom": sum(line["geom"] for line in by_data.values()),
      "borda": ranks,
      "rank": 1 + sum(other > ranks for other in points),
    }
    for (config, by_data), ranks in zip(configs.items(), points, strict=True)
  ]
  return sorted(scored, key=lambda score: score["rank"])


def borda(configs: Sequence[Mapping[K, float]]) -> list[int]:
  """Returns each config's ranks, added over measurements: more is better.

  The lowest value has rank 1; equal values share the lowest of their ranks, as
  in the Guide.

  Examples:
    >>> borda([{"clean": 0.9, "linf": 0.1}, {"clean": 0.8, "linf": 0.1}])
    [3, 2]

  Raises:
    ValueError: configs that have not the same measurements.
  """
  names = {name for config in configs for name in config}
  for config in configs:
    lacking = sorted(str(name) for name in names - config.keys())
    if lacking:
      raise ValueError(
        f"ranks are of the same measurements, and a config has no"
        f" {', '.join(lacking[:5])}; give lines of data sets that all have"
      )
  columns = {name: sorted(c[name] for c in configs) for name in names}
  return [
    sum(1 + bisect.bisect_left(columns[n], v) for n, v in config.items())
    for config in configs
  ]
