"""The programs of a run: its steps, validations and tests, to be compiled."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from roli_jax import attacks, keys, sharding
from roli_jax.experiment import measure, stage_tests
from roli_jax.experiment.build import build_attack, build_model
from roli_jax.experiment.program import build_predict, build_program
from roli_jax.experiment.run import Run, expand_stages
from roli_jax.experiment.stages import Stage
from roli_jax.plan import chips, shapes


@dataclasses.dataclass(frozen=True)
class Planned:
  """A program that a run compiles.

  Attributes:
    name: `step`, `validate`, or `test:` and the attack's name.
    stage: the first stage that runs it.
    attack: of a validation or test; None of a step.
    times: how often the run executes it. 0 of a search, since that depends on
      which images fall.
  """

  name: str
  stage: Stage
  attack: attacks.Attack | None
  times: int

  @property
  def turns(self) -> int:
    """How often the attack's loop runs; in an evaluation that is data."""
    if self.attack is None:
      return 1
    if isinstance(self.attack, attacks.Search):
      return self.attack.length
    return int(self.attack.num_steps)


def listed(run: Run, stages: Sequence[Stage]) -> list[Planned]:
  """The programs of these stages, equal ones once."""
  found: dict[Any, Planned] = {}
  for stage in stages:
    for one in _of_stage(run, stage):
      if one.attack is None:
        kind: Any = id(build_program(run, stage))
      else:
        # Radii and step sizes are data: others are the same program.
        static = jax.tree.structure(one.attack)
        kind = (one.name, build_model(run, stage), static, one.turns)
      if kind in found:
        times = found[kind].times + one.times
        one = dataclasses.replace(found[kind], times=times)
      found[kind] = one
  return list(found.values())


def lower(
  config: Mapping[str, Any], number: int, target: chips.Target
) -> jax.stages.Lowered:
  """A program of the config's run, traced for the target's devices.

  Args:
    config: the run's.
    number: which of `listed`.
    target: the devices, described.
  """
  run = shapes.planned(config, target.devices())
  chosen = listed(run, expand_stages(run))[number]
  if chosen.attack is None:
    return _lower_step(run, chosen.stage)
  model = build_model(run, chosen.stage)
  variables = model.shapes()
  return measure.lower(
    run, build_predict(run, chosen.stage), variables, chosen.attack
  )


def _of_stage(run: Run, stage: Stage) -> Iterator[Planned]:
  yield Planned("step", stage, None, stage.num_steps)
  every = run.config[stage.name]["val_every"] or stage.epoch_steps
  validated = math.ceil(stage.num_steps / every) + 1
  attack = build_attack(run, "val_attack")
  batches = _batches(run, "val", run.config["num_val_images"])
  yield Planned("validate", stage, attack, validated * batches)
  for test in stage_tests.tests(run, stage):
    if test.attack is None:
      continue
    for part in test.attack.parts:
      batches = _batches(run, "test", test.num_images)
      times = 0 if part.is_search else batches
      yield Planned(f"test:{part.name}", stage, part, times)


def _batches(run: Run, split: str, few: int) -> int:
  images = shapes.num_images(run, split, few)
  return math.ceil(images / run.config["eval_batch_size"])


def _lower_step(run: Run, stage: Stage) -> jax.stages.Lowered:
  program = build_program(run, stage)
  size, rows = run.config[stage.name]["batch_size"], sharding.split(run.mesh)
  batch = {
    "image": jax.ShapeDtypeStruct((size, *run.shape), jnp.uint8, sharding=rows),
    "label": jax.ShapeDtypeStruct((size,), jnp.int32, sharding=rows),
    "index": jax.ShapeDtypeStruct((size,), jnp.uint32, sharding=rows),
  }
  root = keys.root(0)
  key = jax.ShapeDtypeStruct(
    root.shape, root.dtype, sharding=sharding.replicated(run.mesh)
  )
  jitted: Any = program.step
  return jitted.lower(program.abstract_state, batch, key)
