"""`--mode=plan`: what a run will do and cost, without data or weights."""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from roli_jax import data, models, optim, trees
from roli_jax.experiment.build import Parts
from roli_jax.experiment.stages import Stage, expand
from roli_jax.files import workdir
from roli_jax.plan import cost
from roli_jax.results.tables import Table


class Planned(Parts):
  """The parts of a run that has neither data nor weights yet."""

  @property
  def facts(self) -> data.Facts:
    """Of the data set; one that nothing is known of is looked at."""
    name = self.config["data"]["name"]
    if name in data.FACTS:
      return data.FACTS[name]
    train, val, test = (self.data[split] for split in data.SPLITS)
    return data.Facts(
      train.num_classes, len(train), len(val), len(test), train.shape
    )

  @property
  def num_classes(self) -> int:
    return self.facts.num_classes

  def pretrained(self, weights: str) -> models.Model:
    backbone = self.config["backbone"]
    size = backbone.get("image_size") or None
    return models.create(backbone["name"], self.num_classes, size)

  def method_spec(self, stage: Stage) -> dict[str, Any]:
    # Costs don't depend on how arrays start: what differs in that is one.
    spec = super().method_spec(stage)
    return {k: v for k, v in spec.items() if k not in ("init", "order")}


def make(config: Mapping[str, Any]) -> dict[str, Any]:
  """The plan, as plain JSON.

  Rates are those of the config's one cell; of a table every stage stands. Bytes
  are the last stage's: float32 arrays, and what a batch's gradients keep on one
  device. Hours are those of all stages with their validations and main tests,
  on one chip. `init` is the one asked for: the probe's rows say roli.

  Raises:
    ValueError: as a run of the config would.
  """
  parts = Planned(config)
  stages = expand(config, parts.facts.train)
  for stage in stages:
    if stage.train_size > parts.facts.train:
      raise ValueError(
        f"train_size={stage.train_size}, of {parts.facts.train} images"
      )
  told = [_told(parts, stage) for stage in stages]
  last = stages[-1]
  params = cost.shapes(parts.model(last))
  trained, _ = parts.method(last).split(params)
  one = cost.of(parts.model(last), parts.method(last))
  tx = optim.build(
    parts.optimizer(last.name, parts.head(last)),
    parts.method(last).labels(params),
    parts.schedule(last),
  )
  optimizer = jax.eval_shape(tx.init, trained)
  section = config[last.name]
  batch = section["batch_size"] // section.get("accumulate", 1)
  total = sum(_flops(parts, stage) for stage in stages)
  return {
    "dataset": config["data"]["name"],
    "backbone": config["backbone"]["name"],
    "method": last.method,
    "init": config["cells"][-1].get("init", last.init),
    "stages": told,
    "total_params": trees.size(params),
    "flops_per_image_forward": one.forward,
    "bytes": {
      "params": _bytes(params),
      "trainable": _bytes(trained),
      "optimizer": _bytes(optimizer),
      "activations": one.activations * batch,
    },
    "hours": {
      name: cost.hours(total, chip) for name, chip in cost.CHIPS.items()
    },
    "assumed": {
      "efficiency": cost.EFFICIENCY,
      "peak_flops": {name: chip.peak for name, chip in cost.CHIPS.items()},
      "flops": total,
      "batch_size": batch,
    },
  }


def run(config: Mapping[str, Any], path: pathlib.Path) -> dict[str, Any]:
  """Makes the plan and writes it to `plan.json` in this directory."""
  plan = make(config)
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
  ]


def _plain(value: Any) -> str:
  if isinstance(value, float):
    return f"{value:.6g}"
  return f"{value:,}" if isinstance(value, int) else str(value)


def _told(parts: Parts, stage: Stage) -> dict[str, Any]:
  """What a stage will do."""
  spec = parts.optimizer(stage.name)
  method = parts.method(stage)
  params = cost.shapes(parts.model(stage))
  trained, _ = method.split(params)
  first = (stage.num_steps - 1) // stage.epoch_steps * stage.epoch_steps
  with jax.enable_x64(True):  # 1 + cos x is all but 0 there
    share = float(parts.schedule(stage)(jnp.asarray(first)))
  tokens = parts.config.get("peft", {}).get("vpt", {}).get("tokens")
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


def _flops(parts: Planned, stage: Stage) -> int:
  """Of a stage: its steps, its validations and its test."""
  section, facts = parts.config[stage.name], parts.facts
  one = cost.of(parts.model(stage), parts.method(stage))
  criterion = parts.criterion(stage.name, stage.loss)
  a_step = cost.step_flops(
    one,
    parts.inner_attack(stage.name, criterion).passes,
    adversarial=criterion.adversarial,
    needs_clean=criterion.needs_clean,
    gradients=2 if section.get("awp", {}).get("gamma") else 1,
  )
  every = section["val_every"] or stage.epoch_steps
  validated = (math.ceil(stage.num_steps / every) + 1) * facts.val
  tested = facts.test if parts.config["test"] else 0
  return (
    stage.num_steps * section["batch_size"] * a_step
    + validated * cost.evaluation_flops(one, parts.attack("val_attack").passes)
    + tested * cost.evaluation_flops(one, parts.attack("eval_attack").passes)
  )


def _bytes(tree: Any) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
