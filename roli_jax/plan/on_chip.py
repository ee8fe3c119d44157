"""`--mode=plan --config.target=`: the run's programs, compiled for a chip.

Each program is compiled by the chip's own compiler, from shapes, without the
chip. What doesn't fit is compiled once more with the change of the config that
shapes say is the mildest to make it fit.
"""

import copy
import json
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from roli_jax import models, progress
from roli_jax.experiment.build import build_optimizer
from roli_jax.experiment.run import expand_stages
from roli_jax.files import workdir
from roli_jax.plan import chips, compiler, cost, programs, shapes
from roli_jax.results.tables import Table

Changes = dict[str, Any]  # dotted field of the config -> its value


def make(
  config: Mapping[str, Any], name: str, folder: pathlib.Path
) -> dict[str, Any]:
  """Compiles the run's programs, and returns plan.json's section `chip`.

  For each program: whether it compiles, its bytes, FLOPs, memory traffic and
  collectives on one device. For the run: whether it fits, the least hours, and
  a change of the config that makes it fit.

  Args:
    config: the run's.
    name: the target, `v5e:2x4` or `h100:8`.
    folder: a directory where the results of compilations are kept.

  Raises:
    ValueError: an unknown target, no compiler for it, or a config that can't
      run on so many devices.
  """
  target = chips.parse(name)
  run = shapes.planned(config)
  listed = programs.listed(run, expand_stages(run))
  made = []
  with progress.bar(f"compiling for {name}", len(listed)) as update:
    for number, one in enumerate(listed):
      update(0, f"{one.name} of {one.stage.name}")
      print(f"{name}: {one.name} of {one.stage.name} ...", file=sys.stderr)
      result = _compiled(config, number, one, target, folder)
      made.append({"name": one.name, "stage": one.stage.name, **result})
      update(1)
  overflowing = [i for i, x in enumerate(made) if not _fits(x, target)]
  suggestion = None
  if overflowing:
    first = overflowing[0]
    suggestion = _suggestion(
      config, first, listed[first], made[first], target, folder
    )
  return {
    "target": name,
    "kind": target.kind,
    "devices": target.num_devices,
    "memory_bytes": target.chip.memory,
    "programs": made,
    "hours": _hours(made, listed),
    "fits": not overflowing,
    "suggestion": suggestion,
  }


def _hours(
  made: Sequence[Mapping[str, Any]], listed: Sequence[programs.Planned]
) -> float | None:
  """A lower bound; None where a program isn't compiled."""
  if not all(result["compiled"] for result in made):
    return None
  seconds = (
    one.times * max(result["seconds_products"], result["seconds_traffic"])
    for result, one in zip(made, listed, strict=True)
  )
  return sum(seconds) / 3600


def _compiled(
  config: Mapping[str, Any],
  number: int,
  one: programs.Planned,
  target: chips.Target,
  folder: pathlib.Path,
) -> dict[str, Any]:
  folder.mkdir(parents=True, exist_ok=True)
  workdir.write_json(folder / "config.json", dict(config))
  order = {"program": number, "target": target.name, "turns": one.turns}
  return compiler.compile_apart(order, target, folder)


def _fits(result: Mapping[str, Any], target: chips.Target) -> bool:
  return result["compiled"] and result["peak_bytes"] <= target.chip.memory


def _suggestion(
  config: Mapping[str, Any],
  number: int,
  one: programs.Planned,
  result: Mapping[str, Any],
  target: chips.Target,
  folder: pathlib.Path,
) -> Changes | None:
  """Returns the mildest change that makes the program fit, or None.

  Each change is judged by an estimate from shapes. The compiler needs more
  than shapes tell, so the estimate is scaled by the ratio of the compiler's
  peak to it, before the change. The first change that then fits is compiled; if
  the compiler disagrees, None.
  """
  now = _estimate(config, one, target)
  factor = max((result["peak_bytes"] or 0) / now, 1.0)
  ranked = []
  for changes in _changes(config, one, target):
    changed = _changed(config, changes)
    wanted = factor * _estimate(changed, one, target)
    ranked.append((wanted, changes, changed))
  enough = [x for x in ranked if x[0] <= target.chip.memory]
  if not ranked:
    return None
  _, changes, changed = enough[0] if enough else min(ranked, key=lambda x: x[0])
  again = _compiled(changed, number, one, target, folder)
  return changes if _fits(again, target) else None


def _changes(
  config: Mapping[str, Any], one: programs.Planned, target: chips.Target
) -> Iterator[Changes]:
  """What saves memory, what costs least first."""
  low: Changes = {"backbone.dtype": "bfloat16"}
  lows = [{}] if config["backbone"].get("dtype") == "bfloat16" else [low, {}]
  size = config["eval_batch_size"]
  if one.attack is None:
    section = f"{one.stage.name}"
    batch = config[section]["batch_size"]
    turns = config[section].get("accumulate", 1)
    others: list[Changes] = [{}]
    others += [
      {f"{section}.accumulate": k * turns}
      for k in (2, 4, 8)
      if batch % (k * turns * target.num_devices) == 0
    ]
    if not config["backbone"].get("remat"):
      others.append({"backbone.remat": True})
    if target.num_devices > 1 and not config.get("mesh", {}).get("rules"):
      others.append({"mesh.rules": [[".*", "data"]]})
  else:
    others = [{}, *({"eval_batch_size": size // k} for k in (2, 4, 8))]
  for other in others:
    for dtype in lows:
      if dtype or other:
        yield {**dtype, **other}


def _changed(config: Mapping[str, Any], changes: Changes) -> dict[str, Any]:
  changed = copy.deepcopy(dict(config))
  for name, value in changes.items():
    *sections, field = name.split(".")
    section = changed
    for key in sections:
      section = section.setdefault(key, {})
    section[field] = value
  return changed


def _estimate(
  config: Mapping[str, Any], one: programs.Planned, target: chips.Target
) -> int:
  """Bytes on one device by shapes: weights, their training, activations."""
  run, stage = shapes.planned(config), one.stage
  model, method = shapes.model_and_method(run, stage)
  params = cost.shapes(model)
  if run.compute_dtype:
    model = models.with_options(model, dtype=run.compute_dtype)
  each = cost.of(model, method)
  images = config["eval_batch_size"]
  if one.attack is not None:
    return cost.num_bytes(params) + each.attack.fused * -(
      -images // target.num_devices
    )
  section = config[stage.name]
  turns = section.get("accumulate", 1)
  images = section["batch_size"] // turns
  trained, _ = method.split(params)
  tx = build_optimizer(run, stage, method.labels(params))
  state = cost.num_bytes((params, jax.eval_shape(tx.init, trained)))
  gradients = cost.num_bytes(trained)
  if run.rules:
    state, gradients = (x // target.num_devices for x in (state, gradients))
  kept = each.fused_activations * -(-images // target.num_devices)
  # Activations go as gradients come, but for the sum over parts of a batch.
  return state + (max(kept, gradients) if turns == 1 else kept + gradients)


def tables(chip: Mapping[str, Any]) -> list[Table]:
  """The programs on the chip, to look at, and the verdict."""
  heads = ("program", "stage", "compiled", "GiB", "TFLOP", "ms products",
           "GB moved", "ms traffic", "collectives in loop",
           "outside", "MB sent")  # fmt: skip
  lines = [_line(one) for one in chip["programs"]]
  memory = f"{chip['memory_bytes'] / 2**30:.4g} GiB"
  verdict = "fits" if chip["fits"] else "does not fit"
  note = f"{chip['target']}, {chip['devices']} devices of {memory}: {verdict}."
  if not chip["fits"]:
    changes = chip["suggestion"]
    note += (
      " It fits with "
      + " ".join(f"--config.{k}={_plain(v)}" for k, v in changes.items())
      + "." if changes else " No change tried makes it fit."
    )  # fmt: skip
  if chip["hours"] is not None:
    note += (
      f" At least {chip['hours']:.2g} hours: products at the chip's peak or"
      " traffic at its bandwidth, whichever takes longer; without searches."
    )
  note += " Figures are one device's, for one step or batch."
  return [Table(f"On {chip['target']}", heads, lines, note)]


def _line(one: Mapping[str, Any]) -> tuple[str, ...]:
  peak = f"{one['peak_bytes'] / 2**30:.3g}" if one["peak_bytes"] else ""
  if not one["compiled"]:
    return (one["name"], one["stage"], one["error"], peak, *[""] * 7)
  sent = one["collectives"]
  return (
    one["name"],
    one["stage"],
    "yes",
    peak,
    f"{one['flops'] / 1e12:.3g}",
    f"{one['seconds_products'] * 1e3:.3g}",
    f"{one['traffic_bytes'] / 1e9:.3g}",
    f"{one['seconds_traffic'] * 1e3:.3g}",
    str(sent["in_loop"]),
    str(sent["outside"]),
    f"{(sent['bytes_in_loop'] + sent['bytes_outside']) / 1e6:.3g}",
  )


def _plain(value: Any) -> str:
  return f"'{json.dumps(value)}'" if isinstance(value, list) else str(value)
