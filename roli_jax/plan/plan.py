"""`--mode=plan`: what a run will do and cost, without data or weights."""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from roli_jax import trees
from roli_jax.experiment.build import (
  build_attack,
  build_criterion,
  build_optimizer,
  build_schedule,
  build_training_attack,
  optimizer_fields,
)
from roli_jax.experiment.run import Run, expand_stages
from roli_jax.experiment.stages import Stage
from roli_jax.files import workdir
from roli_jax.plan import chips, cost, on_chip, shapes
from roli_jax.results.tables import Table


def outline(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the plan without costs: stages, rates and parameters, as JSON.

  A config that is a table has the stages of all its cells in it. `init` is the
  last cell's, also where the stage before it, a probe, has another.

  Raises:
    ValueError: as a run of the config would.
  """
  run = shapes.planned(config)
  return _outline(run, expand_stages(run))


def make(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the plan: `outline` with the costs beside it.

  Bytes are the last stage's: float32 arrays, and what a batch's gradients keep
  on one device. Hours are those of all stages with their validations and main
  tests, on one chip.

  Raises:
    ValueError: as a run of the config would.
  """
  run = shapes.planned(config)
  stages = expand_stages(run)
  return _outline(run, stages) | _costs(run, stages)


def _outline(run, stages):
  have = len(run.data["train"])
  for stage in stages:
    if stage.train_size > have:
      raise ValueError(f"train_size={stage.train_size}, of {have} images")
  last, config = stages[-1], run.config
  model, _ = shapes.model_and_method(run, last)
  return {
    "dataset": config["data"]["name"],
    "backbone": config["backbone"]["name"],
    "method": last.method,
    "init": config["cells"][-1].get("init", last.init),
    "stages": [_describe(run, stage) for stage in stages],
    "total_params": trees.size(cost.shapes(model)),
  }


def _costs(run, stages):
  last = stages[-1]
  model, method = shapes.model_and_method(run, last)
  params = cost.shapes(model)
  trained, _ = method.split(params)
  one = cost.of(model, method)
  tx = build_optimizer(run, last, method.labels(params))
  section = run.config[last.name]
  batch = section["batch_size"] // section.get("accumulate", 1)
  optimizer = cost.num_bytes(jax.eval_shape(tx.init, trained))
  if section.get("ema"):  # the average of the trained leaves
    optimizer += cost.num_bytes(trained)
  total = sum(_flops(run, stage) for stage in stages)
  return {
    "flops_per_image_forward": one.forward,
    "bytes": {
      "params": cost.num_bytes(params),
      "trainable": cost.num_bytes(trained),
      "optimizer": optimizer,
      "activations": one.activations * batch,
    },
    "hours": {
      name: cost.hours(total, chip.peak) for name, chip in _hours_on().items()
    },
    "assumed": {
      "efficiency": cost.EFFICIENCY,
      "peak_flops": {name: chip.peak for name, chip in _hours_on().items()},
      "flops": total,
      "batch_size": batch,
    },
  }


def _hours_on() -> dict[str, chips.Chip]:
  """The chips that hours are given for, by their names in plan.json."""
  names = {"h100": "h100", "h200": "h200", "tpu_v5e": "v5e", "tpu_v5p": "v5p"}
  return {name: chips.CHIPS[kind] for name, kind in names.items()}


def run(config: Mapping[str, Any], path: pathlib.Path) -> dict[str, Any]:
  """Makes the plan and writes it to `plan.json` in this directory.

  With `config.target` its programs are compiled, and what came of it is kept
  in `compiled/` there.
  """
  plan = make(config)
  if name := config.get("target", ""):
    plan["chip"] = on_chip.make(config, name, path / "compiled")
  path.mkdir(parents=True, exist_ok=True)
  workdir.write_json(path / "plan.json", plan)
  return plan


def tables(plan: Mapping[str, Any]) -> list[Table]:
  """The plan, to look at."""
  fields = ("stage", "epochs", "steps", "peak_lr", "last_epoch_lr",
            "optimizer", "weight_decay", "trainable_params")  # fmt: skip
  lines = [
    tuple(_plain(stage[field]) for field in fields) for stage in plan["stages"]
  ]
  gib = {name: f"{n / 2**30:.3g} GiB" for name, n in plan["bytes"].items()}
  hours = {f"hours on {k}": f"{v:.2g}" for k, v in plan["hours"].items()}
  forward = f"{plan['flops_per_image_forward'] / 1e9:.4g} GFLOP"
  costs = {
    "parameters": f"{plan['total_params']:,}",
    "a forward pass of an image": forward,
    **gib,
    **hours,
  }
  about = plan["assumed"]
  note = (
    f"Activations: a batch of {about['batch_size']} on one device, as autodiff"
    " keeps them. Hours: FLOPs of all passes, validations and main test, at"
    f" {about['efficiency']:.0%} of one chip's peak in bfloat16; an assumption."
  )
  name = f"{plan['dataset']}: {plan['method']} {plan['init']}"
  return [
    Table(f"{name}, stages", fields, lines),
    Table(f"{plan['backbone']}, costs", ("", ""), list(costs.items()), note),
    *(on_chip.tables(plan["chip"]) if "chip" in plan else ()),
  ]


def _plain(value: Any) -> str:
  if isinstance(value, float):
    return f"{value:.6g}"
  return f"{value:,}" if isinstance(value, int) else str(value)


def _describe(run: Run, stage: Stage) -> dict[str, Any]:
  """What a stage will do."""
  spec = optimizer_fields(run, stage.name)
  model, method = shapes.model_and_method(run, stage)
  trained, _ = method.split(cost.shapes(model))
  first = (stage.num_steps - 1) // stage.epoch_steps * stage.epoch_steps
  schedule = build_schedule(run, stage)
  with jax.enable_x64(True):  # 1 + cos x is all but 0 there
    share = float(schedule(jnp.asarray(first)))
  tokens = run.config.get("peft", {}).get("vpt", {}).get("tokens")
  return {
    "stage": stage.name,
    "epochs": stage.num_steps / stage.epoch_steps,
    "steps": stage.num_steps,
    "peak_lr": stage.lr,
    "last_epoch_lr": stage.lr * share,
    "optimizer": spec["name"],
    "weight_decay": spec["weight_decay"],
    # Nothing is exempt from nothing.
    "no_decay": list(spec["no_decay"]) if spec["weight_decay"] else [],
    "prompt_tokens": tokens if stage.method == "vpt" else None,
    "trainable_params": trees.size(trained),
  }


def _flops(run: Run, stage: Stage) -> int:
  """The FLOPs of a stage: its steps, its validations and its test."""
  section = run.config[stage.name]
  one = cost.of(*shapes.model_and_method(run, stage))
  criterion = build_criterion(run, stage.name, stage.loss)
  a_step = cost.step_flops(
    one,
    build_training_attack(run, stage.name, criterion).passes,
    adversarial=criterion.adversarial,
    needs_clean=criterion.needs_clean,
    gradients=2 if section.get("awp", {}).get("gamma") else 1,
  )
  every = section["val_every"] or stage.epoch_steps
  times = math.ceil(stage.num_steps / every) + 1
  few, many = run.config["num_val_images"], run.config["num_images"]
  validated = times * shapes.num_images(run, "val", few)
  tested = shapes.num_images(run, "test", many) if run.config["test"] else 0
  validation, test = (
    cost.evaluation_flops(one, build_attack(run, section).passes)
    for section in ("val_attack", "eval_attack")
  )
  return (
    stage.num_steps * section["batch_size"] * a_step
    + validated * validation
    + tested * test
  )
