"""The images that tests have kept, as a page takes them.

Pictures are PNG of many images side by side. Of an adversarial image it is the
change that is drawn, so that the page can amplify it; the page adds it to the
clean image.
"""

import base64
import dataclasses
import io
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from roli_jax.results.grouping import Attacked, Group
from roli_jax.results.page.answers import Answer
from roli_jax.results.record import Row

# A change is one of 31 grey values; 128 is none. They are few so that files
# are small.
_LEVELS, _STEP, _NONE = 15, 8, 128


@dataclasses.dataclass(frozen=True)
class Gallery:
  """What the page shows of images.

  Attributes:
    data: what its script reads; {} where there are no images.
    note: what the reader has to know.
  """

  data: dict[str, Any]
  note: str


@dataclasses.dataclass
class _View:
  """A model and an attack: what became of images, at every radius.

  Attributes:
    listed: the model's name in the answers; "" where it stands in none.
    model: its name, with the seed.
    attack: the attack's, without its radius.
    norm: that of its radii; "" where it is not known.
    clean: the images, as `evaluation_files.keep_images` keeps them.
    frames: by radius, what is kept of it.
  """

  listed: str
  model: str
  attack: str
  norm: str
  clean: Mapping[str, np.ndarray]
  frames: dict[float, dict[str, Any]]


def collect(
  runs: Mapping[str, pathlib.Path],
  best: Sequence[Answer],
  most_bytes: int,
) -> Gallery:
  """Reads the images that runs have kept, as many as may be shown.

  Args:
    runs: the runs' directories, by the name that rows have of them.
    best: the models, in the order in which they are shown.
    most_bytes: the greatest length of the data.
  """
  views = [
    view for run, path in runs.items() for view in _views(run, path, best)
  ]
  if not views:
    return Gallery(
      {},
      "This run has kept no images: it has no tests yet, or was made by a"
      " version that kept none.",
    )
  order = [*(answer.name for answer in best), ""]
  main = best[0].attack if best else None
  asked = (main.recipe, main.norm) if main else None
  views.sort(key=lambda v: (order.index(v.listed), (v.attack, v.norm) != asked))
  eps = main.eps if main else None
  total = max(len(view.clean["labels"]) for view in views)
  most, data = total, _data(views, total, eps)
  while (length := len(json.dumps(data))) > most_bytes and most > 1:
    most = max(1, min(most - 1, int(0.97 * most * most_bytes / length)))
    data = _data(views, most, eps)
  return Gallery(data, _note(views, most, total))


def _note(views: Sequence[_View], most: int, total: int) -> str:
  """Returns how many images there are, and what is not known of them."""
  said = [f"The first {most} test images of each run's first seed."]
  if most < total:
    said.append(f"{total} were kept; a page has room for as many.")
  if any("clean_sure" not in view.clean for view in views):
    said.append(
      "This run was made by a version that kept one image of each class, and"
      " not how sure the model is."
    )
  return " ".join(said)


def _views(run: str, path: pathlib.Path, best: Sequence[Answer]) -> list[_View]:
  """Returns what a run has kept, one view for each model and attack."""
  found: dict[Any, _View] = {}
  for file in sorted((path / "evaluations").rglob("images-*.npz")):
    with np.load(file) as stored:
      kept = dict(stored)
    about = json.loads(str(kept["about"]))
    with np.load(path / "evaluations" / str(kept["clean"])) as stored:
      clean = dict(stored)
    clean |= {key: kept[key] for key in ("clean_said", "clean_sure")}
    row, attack = about[-1], Attacked.of(about[-1])
    key = (file.parent, attack.recipe, attack.norm, str(kept["clean"]))
    names = (*_model(run, row, best), attack.recipe, attack.norm or "")
    view = found.setdefault(key, _View(*names, clean, {}))
    for i, of_radius in enumerate(about):
      view.frames[of_radius["eps"]] = {
        **kept,
        "fell": kept["fell"][i],
        "is_there": kept["is_there"][i],
      }
  return list(found.values()) or _of_older_version(run, path)


def _model(run: str, row: Row, best: Sequence[Answer]) -> tuple[str, str]:
  """Returns a model's name in the answers, if it has one, and with its seed."""
  group = Group.of(row)
  for answer in best:
    if run in answer.runs and answer.group == group:
      return answer.name, f"{answer.name}, seed {row['seed']}"
  name = ": ".join(filter(None, [run, group.name]))
  return "", f"{name}, seed {row['seed']}"


def _of_older_version(run: str, path: pathlib.Path) -> list[_View]:
  """Returns the examples of a run that has kept nothing else."""
  file = path / "figures" / "examples.npz"
  if not file.is_file():
    return []
  with np.load(file) as stored:
    kept = dict(stored)
  labels, change = kept["labels"], kept["adv"] - kept["images"]
  scale = float(np.abs(change).max()) or 1.0
  right = kept["clean_said"] == labels
  clean = {
    "images": np.rint(255 * kept["images"]).astype(np.uint8),
    "labels": labels,
    "rows": np.arange(len(labels)),
    "classes": np.array([], str),
    "clean_said": kept["clean_said"],
  }
  frame = {
    "change": np.rint(127 * change / scale),
    "scale": scale,
    "said": kept["adv_said"],
    "was_right": right,
    "fell": right & (kept["adv_said"] != labels),
    "is_there": np.ones(len(labels), bool),
    "broken_by": np.where(right, "", "clean"),
  }
  name = ": ".join(filter(None, [run, str(kept["cell"])]))
  frames = {float(kept["eps"]): frame}
  return [_View("", name, "the run's own attack", "", clean, frames)]


def _data(
  views: Sequence[_View], most: int, eps: float | None
) -> dict[str, Any]:
  """Returns what the script reads, of so many images of each view."""
  sheets: dict[str, int] = {}  # each is there once: radii and models share them

  def sheet(images: np.ndarray) -> int:
    return sheets.setdefault(_png(images), len(sheets))

  made = [
    {
      "model": view.model,
      "attack": view.attack,
      "norm": view.norm,
      "size": view.clean["images"].shape[1:],
      "columns": _columns(min(most, len(view.clean["images"]))),
      "classes": view.clean["classes"].tolist(),
      "labels": view.clean["labels"][:most].tolist(),
      "rows": view.clean["rows"][:most].tolist(),
      "sheet": sheet(view.clean["images"][:most]),
      "said": view.clean["clean_said"][:most].tolist(),
      "sure": _sure(view.clean.get("clean_sure"), most),
      "frames": [
        _frame(eps, frame, most, sheet)
        for eps, frame in sorted(view.frames.items())
      ],
    }
    for view in views
  ]
  return {
    "levels": _LEVELS * _STEP,
    "none": _NONE,
    "start": eps,
    "sheets": list(sheets),
    "views": made,
  }


def _frame(
  eps: float, kept: Mapping[str, Any], most: int, sheet: Any
) -> dict[str, Any]:
  """Returns a view's images at one radius, as the script reads them."""
  coded = np.rint(kept["change"][:most] * (_LEVELS / 127)) * _STEP + _NONE
  fell, was_right = kept["fell"][:most], kept["was_right"][:most]
  outcome = np.where(fell, "fell", np.where(was_right, "stood", "wrong"))
  return {
    "eps": eps,
    "sheet": sheet(coded.astype(np.uint8)),
    "scale": float(kept["scale"]),
    "said": kept["said"][:most].tolist(),
    "sure": _sure(kept.get("sure"), most),
    "outcome": outcome.tolist(),
    "by": np.where(fell, kept["broken_by"][:most], "").tolist(),
    "there": kept["is_there"][:most].astype(int).tolist(),
  }


def _sure(sure: np.ndarray | None, most: int) -> list[float] | None:
  return None if sure is None else np.round(sure[:most], 4).tolist()


def _columns(count: int) -> int:
  """Returns how many images a sheet has side by side."""
  return max(1, round(count**0.5))


def _png(images: np.ndarray) -> str:
  """Returns images [n, h, w, c] in uint8 as one PNG, rows filled with black."""
  from PIL import Image

  n, height, width, channels = images.shape
  columns = _columns(n)
  lines = -(-n // columns)
  filled = np.zeros((lines * columns, height, width, channels), np.uint8)
  filled[:n] = images
  whole = filled.reshape(lines, columns, height, width, channels)
  whole = whole.swapaxes(1, 2).reshape(
    lines * height, columns * width, channels
  )
  file = io.BytesIO()
  Image.fromarray(whole.squeeze(-1) if channels == 1 else whole).save(
    file, "PNG", optimize=True
  )
  return base64.b64encode(file.getvalue()).decode()
