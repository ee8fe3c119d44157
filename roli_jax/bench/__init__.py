"""Speed, measured: `--mode=bench --config=configs/bench.py`."""

import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from roli_jax import specs
from roli_jax.bench import suites, timing
from roli_jax.results import tables

# How each column of a row is printed, in their order.
_COLUMNS = {
  "seconds": "{:.4f}",
  "images_per_s": "{:.3g}",
  "gflops": "{:.1f}",
  "share_of_floor": "{:.0%}",
  "times_adamw": "{:.2f}",
  "times_ours": "{:.2f}",
  "quartiles": "{0[0]:.2f}-{0[1]:.2f}",
  "pairs": "{:d}",
  "threads": "{:d}",
  "mib": "{:.1f}",
  "state_mib": "{:.1f}",
  "passes_per_s": "{:.0f}",
  "passes": "{:d}",
  "programs": "{:d}",
  "robust": "{:d}",
}


def run(config: Mapping[str, Any], path: pathlib.Path) -> None:
  """Measures the config's suites; prints tables, and writes `bench.jsonl`.

  Args:
    config: `suites`, names in `suites.SUITES`, and what they read; see
      `configs/bench.py`.
    path: the folder of `bench.jsonl`, made if it is not there.

  Raises:
    ValueError: an unknown suite.
  """
  chosen = {
    name: specs.lookup(suites.SUITES, name, "suite")
    for name in config["suites"]
  }
  path.mkdir(parents=True, exist_ok=True)
  rows = {name: list(suite(config)) for name, suite in chosen.items()}
  with (path / "bench.jsonl").open("w") as file:
    for row in itertools.chain(*rows.values()):
      file.write(json.dumps(row) + "\n")
  device = jax.devices()[0]
  note = (
    f"Medians, on {jax.device_count()} x {device.device_kind}, jax"
    f" {jax.__version__}. The floor of a step is its counted FLOPs at the rate"
    " of the square matmul; of an attack, its passes made alone, in eights."
    " Programs: compiled in the first run, small ones included."
  )
  tables.show(itertools.starmap(_table, rows.items()))
  print(note)


def _table(suite: str, rows: Sequence[timing.Row]) -> tables.Table:
  """A suite's rows, in the columns that any of them fills."""
  columns = {
    column: form
    for column, form in _COLUMNS.items()
    if any(column in row for row in rows)
  }
  lines = [
    (
      row["name"],
      *(
        form.format(row[column]) if column in row else ""
        for column, form in columns.items()
      ),
    )
    for row in rows
  ]
  return tables.Table(f"Speed: {suite}", ("what", *columns), lines)
