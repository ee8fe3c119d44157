"""`evaluations/` of a run: what its tests leave beside rows."""

import pathlib
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from roli_jax import distributed
from roli_jax.evaluate import Result, checks
from roli_jax.files import workdir


def keep(
  folder: pathlib.Path,
  about: Mapping[str, Any],
  result: Result,
  diagnosed: Iterable[checks.Check],
  with_images: bool,
) -> None:
  """Writes a result's summary and arrays; drops the progress made towards it.

  Args:
    folder: the test's own; with `progress` in it.
    about: further fields of the summary.
    result: the result.
    diagnosed: the checks of the diagnosis.
    with_images: whether the adversarial images are written too.
  """
  if not distributed.leads():
    return
  names = ["clean", "robust", "broken_by", "distance", "min_distance", "margin"]
  names += ["adv"] * with_images
  arrays = {name: getattr(result, name) for name in names}
  np.savez_compressed(folder / "result.npz", **arrays)
  summary = {**result.summary(), **about}
  summary["checks"] |= {check.name: check.plain() for check in diagnosed}
  workdir.write_json(folder / "summary.json", summary)
  shutil.rmtree(folder / "progress")


def keep_checks(
  folder: pathlib.Path, split: str, row: Mapping[str, Any], result: Result
) -> None:
  """Writes the checks of a test that leaves nothing else beside its rows."""
  if not distributed.leads():
    return
  fields = ("attack", "attack_steps", "restarts", "norm")
  name = "-".join([*(str(row[field]) for field in fields), f"{row['eps']:g}"])
  folder.mkdir(parents=True, exist_ok=True)
  checked = {check.name: check.plain() for check in result.checks}
  workdir.write_json(
    folder / f"checks-{split}-{name}.json", {"row": row, "checks": checked}
  )
