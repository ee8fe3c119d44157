"""Speed, measured: `--mode=bench --config=configs/bench.py`."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from roli_jax import specs, tabular
from roli_jax.bench import suites

_COLUMNS = {
  "seconds": "{:.4f}",
  "images_per_s": "{:.3g}",
  "gflops": "{:.1f}",
  "share_of_floor": "{:.0%}",
  "times_adamw": "{:.2f}",
  "mib": "{:.1f}",
  "state_mib": "{:.1f}",
  "passes_per_s": "{:.0f}",
  "passes": "{:d}",
  "programs": "{:d}",
  "robust": "{:d}",
}


def run(config: Mapping[str, Any], path: pathlib.Path) -> None:
  """Measures the config's suites, prints a table and writes `bench.jsonl`.

  Raises:
    ValueError: an unknown suite.
  """
  chosen = [
    specs.choose(suites.SUITES, name, "suite") for name in config["suites"]
  ]
  path.mkdir(parents=True, exist_ok=True)
  rows = [row for suite in chosen for row in suite(config)]
  with (path / "bench.jsonl").open("w") as file:
    file.writelines(json.dumps(row) + "\n" for row in rows)
  lines = [
    (
      row["suite"],
      row["name"],
      *(
        form.format(row[column]) if column in row else ""
        for column, form in _COLUMNS.items()
      ),
    )
    for row in rows
  ]
  device = jax.devices()[0]
  note = (
    f"Medians, on {jax.device_count()} x {device.device_kind}, jax"
    f" {jax.__version__}. The floor of a step is its counted FLOPs at the rate"
    " of the square matmul; of an attack, its passes made alone, in eights."
    " Programs: compiled in the first run, small ones included."
  )
  header = ("suite", "what", *_COLUMNS)
  tabular.show([tabular.Table("Speed", header, lines, note)])
