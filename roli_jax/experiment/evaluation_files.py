"""`evaluations/` of a run: what its tests leave beside rows."""

import json
import pathlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from roli_jax import data, distributed
from roli_jax.evaluate import Result, checks
from roli_jax.evaluate.classifier import Classifier, Examples
from roli_jax.files import workdir
from roli_jax.types import Images

# Images of a test that a run keeps, for looking at: small ones, and others.
MOST_IMAGES = {"small": 500, "large": 60}
_SMALL = 32  # pixels a side


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
  name = f"checks-{split}-{_name(row)}.json"
  folder.mkdir(parents=True, exist_ok=True)
  checked = {check.name: check.plain() for check in result.checks}
  workdir.write_json(folder / name, {"row": row, "checks": checked})


def _name(row: Mapping[str, Any]) -> str:
  """Returns what an attack's files are called by."""
  fields = ("attack", "attack_steps", "restarts", "norm")
  return "-".join([*(str(row[field]) for field in fields), f"{row['eps']:g}"])


def keep_images(
  root: pathlib.Path,
  directory: str,
  about: Sequence[Mapping[str, Any]],
  radii: Sequence[float],
  source: data.Source,
  rows: np.ndarray,
  result: Result,
  function: Classifier,
) -> None:
  """Writes the first images of a test: clean, as attacked, and what was said.

  The pixels are those that the test has made and judged. Where an attack of
  one call did not break an image it is the point where it ended; where a search
  did not there is none. What the model says of them is asked once more, one
  pass an image: a result holds no logits.

  Args:
    root: the directory `evaluations` of the run.
    directory: the stage's, below it.
    about: the test's rows: clean, and one for each radius.
    radii: those radii, of an attack that finds distances; (): its own.
    source: the split.
    rows: the positions in the split that were tested.
    result: what the test found.
    function: the model.
  """
  # By the number tested, which decides the positions.
  clean = root / f"clean-{about[-1]['split']}-n{len(rows)}.npz"
  is_small = max(source.shape[:2]) <= _SMALL
  most = MOST_IMAGES["small" if is_small else "large"]
  rows = rows[: min(most, len(result.adv))]  # a result may have a few images
  m, images = len(rows), source.pixels(rows)
  adv, is_broken, is_attempt = attacked(result, images)
  clean_said, clean_sure = predicted(function, source, rows, images)
  said, sure = predicted(function, source, rows, adv)
  if not distributed.leads():
    return
  folder = root / directory
  folder.mkdir(parents=True, exist_ok=True)
  if not clean.exists():
    _save(
      clean,
      images=np.rint(255 * images).astype(np.uint8),
      labels=source.labels[rows],
      rows=rows,
      classes=np.array(source.classes, str),
    )
  stood = [result.robust_at(eps) for eps in radii] or [result.robust]
  fell = np.stack([result.clean[:m] & ~flags[:m] for flags in stood])
  scale = float(np.abs(adv - images).max()) or 1.0
  _save(
    folder / f"images-{about[-1]['split']}-{_name(about[-1])}.npz",
    about=json.dumps(about[1:]),
    clean=clean.name,
    change=np.rint(127 / scale * (adv - images)).astype(np.int8),
    scale=scale,
    said=said,
    sure=sure,
    clean_said=clean_said,
    clean_sure=clean_sure,
    was_right=result.clean[:m],
    fell=fell,
    # At each radius, whether the picture lies within it.
    is_there=(fell & is_broken) | is_attempt,
    broken_by=result.broken_by[:m],
  )


def attacked(
  result: Result, images: Images
) -> tuple[Images, np.ndarray, np.ndarray]:
  """Returns what an evaluation made of its first images.

  Args:
    result: the evaluation's.
    images: the first m clean ones.

  Returns:
    The attacked images, clean where there is none; who was broken by them, and
    of whom they are attempts that broke nothing, both bool [m].
  """
  m = len(images)
  is_broken = result.clean[:m] & ~result.robust[:m]
  tried = images if result.tried is None else result.tried[:m]
  is_attempt = result.robust[:m] & ~result.invalid[:m]
  is_attempt &= (tried != images).reshape(m, -1).any(1)
  adv = np.where(_like(is_attempt, images), tried, images)
  return (
    np.where(_like(is_broken, images), result.adv[:m], adv),
    is_broken,
    is_attempt,
  )


def _like(flags: np.ndarray, images: Images) -> np.ndarray:
  return flags.reshape(-1, *(1,) * (images.ndim - 1))


def predicted(
  function: Classifier, source: data.Source, rows: np.ndarray, images: Images
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the class that the model says, and its probability, each [n]."""
  examples = Examples(
    images.astype(np.float32),
    source.labels[rows].astype(np.int32),
    source.indices[rows].astype(np.int64),
  )
  _, _, logits = function.judge(examples)
  top = logits.max(1, keepdims=True)
  return logits.argmax(1), 1 / np.exp(logits - top).sum(1)


def _save(file: pathlib.Path, **arrays: Any) -> None:
  """Writes the arrays, the whole file or none of it."""
  partial = file.with_name(f"{file.stem}.partial.npz")
  np.savez_compressed(partial, **arrays)
  partial.replace(file)
