"""One test of one model: an attack or a corruption on a split of the data."""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from jax.stages import Lowered

from roli_jax import (
  attacks,
  corruptions,
  data,
  distributed,
  evaluate,
  sharding,
)
from roli_jax.evaluate import batching, checks, classifier, tracing
from roli_jax.experiment.run import Run
from roli_jax.types import Variables

_PIECE = 2**28  # bytes of pixels that are read and attacked at once

CLEAN: dict[str, Any] = {"attack": "none"}


@dataclasses.dataclass(frozen=True)
class Test:
  """An attack on a split, and the rows that come of it.

  Attributes:
    attack: the attack.
    num_images: how many images of the split, see `Source.some`; 0: all.
    radii: eps at which accuracy is reported, increasing, for an attack that
      finds distances; (): the attack's own radius.
  """

  attack: attacks.Attack
  num_images: int = 0
  radii: tuple[float, ...] = ()

  def about(self) -> list[dict[str, Any]]:
    """Returns what identifies its rows: clean, and one for each radius."""
    attack = self.attack
    attacked = {
      "attack": attack.name,
      "attack_steps": attack.num_steps,
      "restarts": attack.num_restarts,
      "norm": attack.threat.norm,
    }
    radii = self.radii or (float(attack.threat.eps),)
    return [CLEAN, *({**attacked, "eps": eps} for eps in radii)]

  def pixels(self, source: data.Source, rows: np.ndarray) -> np.ndarray:
    """Returns the images at these positions, [n, h, w, c] in [0, 1]."""
    return source.pixels(rows)

  def values(self, result: evaluate.Result) -> list[float]:
    """Returns clean accuracy, and robust accuracy at each radius."""
    at = [result.robust_at(eps) for eps in self.radii] or [result.robust]
    return [float(flags.mean()) for flags in (result.clean, *at)]


@dataclasses.dataclass(frozen=True)
class Corruption:
  """A common corruption of a split; its row has the severity as `eps`.

  Attributes:
    name: one of `corruptions.CORRUPTIONS`; `guide`: each image has a type by
      its position.
    severity: 1 to 5.
    num_images: how many images of the split, see `Source.some`; 0: all.
  """

  name: str
  severity: int
  num_images: int = 0
  attack: ClassVar[None] = None

  def about(self) -> list[dict[str, Any]]:
    """Returns what identifies its row."""
    severity = float(self.severity)
    return [{"attack": self.name, "norm": "severity", "eps": severity}]

  def pixels(self, source: data.Source, rows: np.ndarray) -> np.ndarray:
    """Returns the corrupted images, [n, h, w, c] in [0, 1].

    The noise of each depends on its index in the data set alone.
    """
    # Corruptions are defined on 8 bits.
    clean = np.rint(255 * source.pixels(rows)).astype(np.uint8)
    corrupted = [
      corruptions.apply(self._type(row, source), image, self.severity, index)
      for row, image, index in zip(
        rows.tolist(), clean, source.indices[rows].tolist(), strict=True
      )
    ]
    return np.stack(corrupted) / np.float32(255)

  def _type(self, row: int, source: data.Source) -> str:
    if self.name == "guide":
      return corruptions.guide(row, len(source))
    return self.name

  def values(self, result: evaluate.Result) -> list[float]:
    """Returns the accuracy."""
    return [float(result.clean.mean())]


def run(
  run: Run,
  predict: Callable[..., Any],
  variables: Any,
  seed: int,
  split: str,
  test: Test | Corruption,
  save: pathlib.Path | None = None,
  keep_adv: bool = False,
  checked: bool = True,
) -> evaluate.Result:
  """Runs one test on one split of the run's data.

  A split whose pixels take much memory is attacked in pieces, of which one is
  held at a time. No image's result depends on them.

  Args:
    run: the run.
    predict: `(variables, images) -> logits`.
    variables: what `predict` takes first.
    seed: decides the attack's noise, >= 0.
    split: `train`, `val` or `test`.
    test: the attack or corruption.
    save: a directory that keeps progress, of each piece by itself, from which
      a killed evaluation goes on; None keeps nothing.
    keep_adv: whether the result has all adversarial images, from a file in
      `save`; otherwise it has those of the first piece.
    checked: see `evaluate.run_on`.
  """
  source: data.Source = run.data[split]
  rows = source.some(test.num_images)
  function = on_devices(
    run, source, predict, variables, seed, run.compute_dtype
  )
  pieces = _pieces(rows, source.shape)
  if save and (save / "about.json").exists():
    pieces = [rows]  # an older version's progress is of all of them at once
  every_adv = None
  if save and keep_adv and len(pieces) > 1 and distributed.leads():
    every_adv = _on_disk(save / "adv.npy", (len(rows), *source.shape))
  results = []
  for number, few in enumerate(pieces):
    result = evaluate.run_on(
      function,
      # A long attack reads its images once: what is decoded isn't kept.
      source.take(few).pixels() if save else test.pixels(source, few),
      source.labels[few],
      test.attack,
      indices=source.indices[few],
      save=save / f"piece-{number:05d}" if save and len(pieces) > 1 else save,
      checked=checked,
    )
    if every_adv is not None:
      start = number * len(pieces[0])
      every_adv[start : start + len(few)] = result.adv
    results.append(_without_images(result) if number else result)
  joined = _joined(results)
  if every_adv is not None:
    return dataclasses.replace(joined, adv=every_adv)
  return joined


def _pieces(rows: np.ndarray, shape: tuple[int, ...]) -> list[np.ndarray]:
  """Splits rows into those that are attacked at once.

  Not by the size of a batch, which may be another when a killed evaluation
  goes on.
  """
  count = _PIECE // (4 * math.prod(shape))  # pixels are float32
  at_once = max(count - count % checks.MOST, checks.MOST)
  return [rows[i : i + at_once] for i in range(0, len(rows), at_once)]


def _on_disk(file: pathlib.Path, shape: tuple[int, ...]) -> np.memmap:
  """Returns float32 zeros that lie in a file."""
  file.parent.mkdir(parents=True, exist_ok=True)
  return np.lib.format.open_memmap(file, "w+", np.dtype(np.float32), shape)


def _without_images(result: evaluate.Result) -> evaluate.Result:
  none = np.zeros((0, *result.adv.shape[1:]), np.float32)
  return dataclasses.replace(result, adv=none, tried=None)


def on_devices(
  run: Run,
  source: data.Source,
  predict: Callable[..., Any],
  variables: Any,
  seed: int,
  dtype: str | None = None,
) -> classifier.Classifier:
  """Returns a model of the run as a classifier for evaluation.

  Args:
    run: the run.
    source: the images that it will see.
    predict: `(variables, images) -> logits`.
    variables: what it takes first.
    seed: decides the attacks' noise, >= 0.
    dtype: the precision of attacks, `bfloat16`; None: the arrays' own.
  """
  return classifier.make(
    predict,
    variables,
    source.shape,
    run.config["eval_batch_size"],
    dtype=dtype,
    seed=seed,
  )


def lower(
  run: Run,
  predict: Callable[..., Any],
  variables: Variables,
  attack: attacks.Attack,
) -> Lowered:
  """The program of a test's attack on the run's devices, not compiled.

  Args:
    run: the run.
    predict: `(variables, images) -> logits`.
    variables: the shapes of what it takes first.
    attack: no ensemble.
  """
  small = (classifier.SMALLEST, *run.shape)
  everywhere = sharding.replicated(run.mesh)
  function = classifier.Classifier(
    tracing.programs(predict, variables, small),
    jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
      variables,
    ),
    run.mesh,
    run.config["eval_batch_size"],
    dtype=run.compute_dtype,
  )
  if isinstance(attack, attacks.Search):
    return batching.lower(function, attack, run.shape)
  return function.lower(attack, run.shape)


def _joined(results: Sequence[evaluate.Result]) -> evaluate.Result:
  """Returns the result of all pieces; `adv` and `tried` are the first one's."""
  if len(results) == 1:
    return results[0]
  arrays: dict[str, Any] = {
    name: np.concatenate([getattr(result, name) for result in results])
    for name, value in vars(results[0]).items()
    if isinstance(value, np.ndarray) and name not in ("adv", "tried")
  }
  work: dict[str, batching.Work] = {}
  for result in results:
    for name, one in result.work.items():
      work[name] = work.get(name, batching.Work()) + one
  return dataclasses.replace(
    results[0],
    work=work,
    notes=list(dict.fromkeys(n for result in results for n in result.notes)),
    checks=checks.worst(result.checks for result in results),
    seconds=sum(result.seconds for result in results),
    **arrays,
  )
