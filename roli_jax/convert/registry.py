"""Published checkpoints by name: what each is, and where its file comes from.

`checkpoints.csv` has one line for each. A field that is empty is not known, or
is the model's own. Facts are those of RobustBench's model zoo (78fcc9e) and
its `model_info`, of ARES (306e35f), of robust-models-transfer (cea2c37), of the
Guide (4c886c1) with timm (aa4b585), of RobustVLM (7de10ee) and of open_clip
(89fb801).
"""

import csv
import dataclasses
import functools
import importlib.resources
import math
import re
from collections.abc import Mapping
from typing import Any

from roli_jax import models, specs
from roli_jax.convert.name_maps import LAYOUTS

# What a name begins with, and a colon after it.
PREFIXES = ("robustbench", "ares", "madry", "timm", "hf", "openclip")
_HF = re.compile(r"hf:(?!.*\.\.)[\w.-]+/[\w.-]+(/[\w./-]+)?(@[\w./-]+)?")
# The format that the names in a prefix's files are of, where there is but one.
_FORMATS = {"timm": "timm", "openclip": "open_clip"}

Numbers = tuple[float, ...] | None


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A published file of weights; None and "" stand for what isn't known.

  Attributes:
    name: `PREFIX:...`, as users give it.
    origin: `hf:OWNER/REPO[/FILE][@REV]`, `gdrive:ID`, an address, or
      `page:ADDRESS` of one where a person has to choose; "": none.
    model: the architecture, a name in `models.MODELS` if there is one.
    act: its activation, as of `models.with_options`; None: the model's own.
    norm_eps: likewise.
    pool: likewise.
    key: the network in the file, as of `convert.load`.
    mean: per channel, in units of [0, 1]; 0 with a `std` of 1: raw pixels.
    std: per channel.
    image_size: the side that images are resized to inside the model.
    classes: the width of its head.
    preprocessing: what its authors do with test images, as `data` has it.
    data: the data set whose classes it tells.
    norm: of the threat model that it was made for, or `corruptions`.
    eps: its radius, as text.
    clean: the accuracy that is stated, in [0, 1].
    robust: likewise: under AutoAttack, or the mean over corruptions.
    license: its SPDX identifier.
    size: of the file, in bytes.
    digest: its MD5 or SHA-256 in hex, or the first eight digits of SHA-256.
    source: where it was published.
    out_of_scope: why it isn't read, whatever its architecture.
  """

  name: str
  origin: str
  model: str = ""
  act: str | None = None
  norm_eps: float | None = None
  pool: str | None = None
  key: str | None = None
  mean: Numbers = None
  std: Numbers = None
  image_size: int | None = None
  classes: int | None = None
  preprocessing: tuple[str, ...] = ()
  data: str = ""
  norm: str = ""
  eps: str = ""
  clean: float | None = None
  robust: float | None = None
  license: str = ""
  size: int | None = None
  digest: str = ""
  source: str = ""
  out_of_scope: str = ""

  @property
  def facts(self) -> dict[str, Any]:
    """What it tells `convert.load`, by the names of its arguments."""
    names = ("act", "norm_eps", "pool", "key", "mean", "std", "image_size")
    facts = {name: getattr(self, name) for name in names}
    return {"model": self.model or None, **facts}

  def stated(self, row: Mapping[str, Any]) -> float | None:
    """Returns what is stated of what a row of results has measured, if known.

    Args:
      row: its `data` and `attack`, and but for clean images `norm` and `eps`.
    """
    # ImageNet is a folder at most places.
    of_folder = (self.data, row["data"]) == ("imagenet", "folder")
    if self.data not in row["data"] and not of_folder:
      return None
    if row["attack"] == "none":
      return self.clean
    if (row["attack"], row["norm"]) != ("autoattack", self.norm):
      return None
    same = self.eps and math.isclose(
      row["eps"], specs.number(self.eps), rel_tol=1e-6
    )
    return self.robust if same else None

  def why_not(self) -> str:
    """Returns why it doesn't load, "" if it does; reads no file."""
    if self.out_of_scope or not self.model:
      return self.out_of_scope
    if self.model not in models.MODELS:
      return f"there is no model {self.model}"
    try:
      model = models.create(
        self.model,
        2,
        self.image_size,
        act=self.act,
        norm_eps=self.norm_eps,
        pool=self.pool,
      )
    except ValueError as error:
      return str(error)
    format = _FORMATS.get(self.name.partition(":")[0])
    if not any(
      layout.holds(model.backbone) and format in (None, *layout.formats)
      for layout in LAYOUTS
    ):
      return f"{format} has no names for a {self.model}"
    return ""


def is_name(text: Any) -> bool:
  """Returns whether it is a name of a checkpoint, and not a path."""
  return isinstance(text, str) and text.startswith(
    tuple(f"{prefix}:" for prefix in PREFIXES)
  )


def named(name: str) -> Checkpoint:
  """Returns the checkpoint of that name.

  Args:
    name: one of the table's; or any `hf:OWNER/REPO[/FILE][@REV]` or
      `timm:ID`, of which only the origin is known.

  Raises:
    ValueError: there is none; the message has the nearest.
  """
  found = table().get(name)
  if found:
    return found
  prefix, _, rest = name.partition(":")
  if prefix == "timm" and re.fullmatch(r"[\w.-]+", rest):
    return Checkpoint(name, f"hf:timm/{rest}")
  if prefix != "hf":
    return specs.lookup(table(), name, "checkpoint (--mode=zoo lists them)")
  if not _HF.fullmatch(name):
    raise ValueError(f"expected hf:OWNER/REPO[/FILE][@REV], got {name!r}")
  bare, _, revision = name.partition("@")
  if bare in table():
    same = table()[bare]
    origin = f"{same.origin}@{revision}"
    return dataclasses.replace(same, name=name, origin=origin)
  return Checkpoint(name, name)


@functools.cache
def table() -> Mapping[str, Checkpoint]:
  """Returns all checkpoints of `checkpoints.csv`, by name."""
  file = importlib.resources.files(__package__) / "checkpoints.csv"
  lines = csv.DictReader(file.read_text(encoding="utf-8").splitlines())
  return {line["name"]: _read(line) for line in lines}


_KINDS: dict[str, Any] = {
  "norm_eps": float,
  "mean": lambda text: tuple(map(float, text.split())),
  "std": lambda text: tuple(map(float, text.split())),
  "image_size": int,
  "classes": int,
  "preprocessing": lambda text: tuple(text.split()),
  "clean": lambda text: float(text) / 100,
  "robust": lambda text: float(text) / 100,
  "size": int,
}


def _read(line: Mapping[str, str]) -> Checkpoint:
  """Returns the checkpoint of a line; a single mean is of all channels."""
  fields = {
    name: _KINDS.get(name, str)(text) for name, text in line.items() if text
  }
  for name in {"mean", "std"} & fields.keys():
    fields[name] = (3 * fields[name])[:3]
  return Checkpoint(**{"origin": "", **fields})
