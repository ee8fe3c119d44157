"""What the stages of a run share: config, devices, data, weights.

The words run, cell and stage are defined in `stages`.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from roli_jax import convert, data, models, sharding, specs
from roli_jax.convert import registry
from roli_jax.experiment import compat
from roli_jax.experiment.stages import Stage, expand
from roli_jax.threat import ThreatModel


@dataclasses.dataclass(frozen=True)
class Run:
  """What the stages of a run share.

  Attributes:
    config: any nested mapping with the fields of `configs/glyphs_roli.py`.
    mesh: all devices, as `config.mesh` splits them.
    rules: where the leaves of a stage's state lie, for `sharding.ruled`.
    threat: the threat model of training and, unless a test names another
      radius, of tests.
    data: the `data.Source` of each split, read when it is first asked for; in a
      plan, the number of images and classes and the shape of each.
    switches: the value of each of `compat.SWITCHES`, by name.
    load: `(weights, keeps_head=False) -> Bundle`, which reads each file once.
    diagnoses: whether a test by an ensemble of attacks adds a diagnosis.
    programs: the compiled steps so far, by what they depend on.
  """

  config: Mapping[str, Any]
  mesh: Mesh
  rules: tuple[Any, ...]
  threat: ThreatModel
  data: Mapping[str, Any]
  switches: Mapping[str, Any]
  load: Callable[..., convert.Bundle]
  diagnoses: bool = False
  programs: dict[Any, Any] = dataclasses.field(
    default_factory=dict, repr=False, compare=False
  )

  @property
  def num_classes(self) -> int:
    """The number of classes of the data set."""
    return self.data["train"].num_classes

  @property
  def shape(self) -> tuple[int, int, int]:
    """(h, w, c) of an image as it is attacked."""
    return self.data["train"].shape

  @property
  def compute_dtype(self) -> str | None:
    """The precision of training and of attacks; None: the arrays' own."""
    known = {"float32": None, "bfloat16": "bfloat16"}
    dtype = self.config["backbone"].get("dtype", "float32")
    return specs.lookup(known, dtype, "backbone.dtype")


class _Splits(dict[str, data.Source]):
  """The splits of a data set, each read when first asked for."""

  def __init__(self, spec: Mapping[str, Any]):
    super().__init__()
    self._spec = spec

  def __missing__(self, split: str) -> data.Source:
    self[split] = data.build(self._spec, split)
    return self[split]


def build_run(config: Mapping[str, Any], diagnoses: bool = False) -> Run:
  """Returns the run of a config; reads neither data nor weights yet.

  Args:
    config: any nested mapping with the fields of `configs/glyphs_roli.py`.
    diagnoses: whether a test by an ensemble of attacks adds a diagnosis.

  Raises:
    ValueError: a threat model, mesh or compat switch that can't be.
  """
  # The configs of runs from before there were meshes have none.
  mesh = {"model": 1, "rules": (), **config.get("mesh", {})}
  splits = _Splits(config["data"])
  threat = config["threat"]
  return Run(
    config=config,
    mesh=sharding.mesh(mesh["model"]),
    rules=mesh["rules"],
    threat=ThreatModel(threat["norm"], eps=specs.number(threat["eps"])),
    data=splits,
    switches=compat.switches(config),
    load=functools.cache(functools.partial(_load, config["backbone"], splits)),
    diagnoses=diagnoses,
  )


def _load(
  backbone: Mapping[str, Any],
  splits: Mapping[str, data.Source],
  weights: str,
  keeps_head: bool = False,
) -> convert.Bundle:
  """Reads a file of weights; returns its bundle.

  Args:
    backbone: the section of the config.
    splits: the data set, for its number of classes.
    weights: the name of shipped or of published weights, or a path.
    keeps_head: whether the head is the file's, not a new one as wide as the
      data set.
  """
  source: Any = weights
  if not registry.is_name(weights):
    source = convert.find(backbone["name"], weights)
  return convert.load(
    source,
    model=backbone["name"] or None,
    mean=backbone.get("mean") or None,
    std=backbone.get("std") or None,
    num_classes=None if keeps_head else splits["train"].num_classes,
    image_size=backbone.get("image_size") or None,
    act=backbone.get("act") or None,
    norm_eps=backbone.get("norm_eps") or None,
    pool=backbone.get("pool") or None,
    key=backbone.get("key") or None,
    strict=backbone.get("strict", False),
    **backbone_sizes(backbone),
  )


def load_whole(run: Run, weights: str) -> convert.Bundle:
  """Loads weights with the head that they came with.

  Raises:
    ValueError: that head is of other classes than the data.
  """
  bundle = run.load(weights, keeps_head=True)
  if bundle.model.num_classes != run.num_classes:
    raise ValueError(
      f"the head of {weights} has {bundle.model.num_classes} classes,"
      f" {run.config['data']['name']} has {run.num_classes}"
    )
  return bundle


def load_zeroshot(run: Run, weights: str) -> convert.Bundle:
  """Loads weights with the head of prompts that they came with.

  Raises:
    ValueError: they have no such head, or one of other classes than the data.
  """
  bundle = run.load(weights, keeps_head=True)
  if "projection" not in bundle.params.head:
    raise ValueError(
      f"head_init=zeroshot: {weights} has no zero-shot head; make one with"
      " zeroshot.classifier, and write it with convert.save"
    )
  return load_whole(run, weights)


def expand_stages(run: Run) -> list[Stage]:
  """Returns the stages of the config's cells, in the order they train in.

  A train_size of 0 means all images.
  """
  given = run.config["data"]["train_size"]
  return expand(run.config, given or len(run.data["train"]))


def training_images(run: Run, stage: Stage) -> data.Source:
  """Returns the images that the stage trains on."""
  return run.data["train"].subset(stage.train_size, stage.seed)


def backbone_sizes(backbone: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the sizes that a config says, as `models.create` has them."""
  names = (*models.SIZES, "channels")
  return {k: v for k in names if (v := backbone.get(k)) is not None}


def fingerprint(run: Run, stage: Stage) -> str:
  """Returns a SHA-256, in hex, of a probe's weights and training images.

  For files of images their paths and labels stand in place of the pixels.
  """
  source = training_images(run, stage)
  backbone = run.load(stage.weights).params.backbone
  arrays = [*jax.tree.leaves(backbone), source.labels, source.indices]
  digest = hashlib.sha256()
  for array in [*arrays, source.images]:
    digest.update(np.ascontiguousarray(array).tobytes())
  return digest.hexdigest()
