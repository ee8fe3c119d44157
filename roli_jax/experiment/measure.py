"""One test of one model: an attack or a corruption on a split of the data."""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from jax.stages import Lowered

from roli_jax import attacks, corruptions, data, evaluate, sharding
from roli_jax.evaluate import batching, checks, classifier, tracing
from roli_jax.experiment.run import Run
from roli_jax.types import Variables

_PIECE = 2**30  # bytes of pixels that are held and attacked at once

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
) -> evaluate.Result:
  """Runs one test on one split of the run's data.

  Without `save`, a split whose pixels take much memory is attacked in pieces,
  and the result holds the adversarial images of the first piece alone.

  Args:
    run: the run.
    predict: `(variables, images) -> logits`.
    variables: what `predict` takes first.
    seed: decides the attack's noise, >= 0.
    split: `train`, `val` or `test`.
    test: the attack or corruption.
    save: a directory that keeps progress, from which a killed evaluation goes
      on; None keeps nothing.
  """
  source: data.Source = run.data[split]
  rows = source.some(test.num_images)
  batch = run.config["eval_batch_size"]
  function = on_devices(
    run, source, predict, variables, seed, run.compute_dtype
  )
  # 4 bytes a value, as pixels are float32.
  batches = _PIECE // (4 * math.prod(source.shape) * batch)
  at_once = max(batches, 1) * batch
  pieces = range(0, len(rows), at_once)
  each = [rows] if save else [rows[i : i + at_once] for i in pieces]
  results = [
    evaluate.run_on(
      function,
      test.pixels(source, few),
      source.labels[few],
      test.attack,
      indices=source.indices[few],
      save=save,
    )
    for few in each
  ]
  return _joined(results)


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
