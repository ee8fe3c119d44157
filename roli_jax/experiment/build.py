"""From a run's config to attacks, models, losses and optimizers.

Each function reads one section of the config and returns one thing that a stage
needs. What a section says wrong is found here, before anything is computed.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import optax

from roli_jax import attacks, convert, models, objectives, optim, peft, specs
from roli_jax.experiment import compat
from roli_jax.experiment.run import (
  Run,
  backbone_sizes,
  load_whole,
  load_zeroshot,
)
from roli_jax.experiment.stages import ZEROSHOT, Stage
from roli_jax.optim import schedules
from roli_jax.types import PyTree


def build_attack(
  run: Run,
  section: str,
  eps: str | None = None,
  *,
  name: str = "",
  norm: str = "",
) -> attacks.Attack:
  """Returns the attack of a section of the config.

  Args:
    run: the run.
    section: `attack`, `val_attack` or `eval_attack`.
    eps: a radius in place of the threat model's, as text such as `8/255`.
    name: an attack in place of the section's, with its own defaults; "": the
      section's.
    norm: a norm in place of the threat model's, if `eps` is given; "": the
      threat model's.
  """
  threat = run.threat
  if eps is not None:
    threat = dataclasses.replace(
      threat, norm=norm or threat.norm, eps=specs.number(eps)
    )
  fields = {"name": name} if name else _attack_fields(run, run.config[section])
  return attacks.build(threat=threat, **fields)


def build_training_attack(
  run: Run, section: str, criterion: objectives.Criterion
) -> attacks.Attack:
  """Returns the attack inside the training of a stage.

  Args:
    run: the run.
    section: `pretrain`, `probe` or `adapt`; its `attack` goes before
      `config.attack`, field by field if both name the same attack.
    criterion: the training loss. The attack raises the loss that the criterion
      names, unless the section names one; training on clean images alone does
      not run the attack.

  Raises:
    ValueError: the attack can't train.
  """
  chosen = _without_unset(run.config[section].get("attack", {}))
  base = run.config["attack"]
  if chosen.get("name", base["name"]) != base["name"]:
    base = {}
  fields = _attack_fields(run, {**base, **chosen})
  attack = attacks.build(threat=run.threat, **fields)
  if not criterion.adversarial:
    return attack
  return attack.for_training("" if "loss" in chosen else criterion.surrogate)


def _without_unset(section: Mapping[str, Any]) -> dict[str, Any]:
  return {k: v for k, v in section.items() if v not in (None, "")}


def _attack_fields(run: Run, section: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the name and the fields that the section sets for its attack."""
  fields = specs.accepted_fields(attacks.ATTACKS, section, "attack")
  fields = {k: v for k, v in fields.items() if v is not None}
  keep = run.switches["pgd_best"]
  if fields["name"] == "pgd" and keep != compat.SWITCHES["pgd_best"][0]:
    fields["keep"] = keep
  return fields


def build_model(run: Run, stage: Stage) -> models.Model:
  """Returns the stage's model, which computes in full precision.

  Models of stages that differ only in `head_init` are equal, so that the stages
  share compiled programs; the zero-shot head is another model.
  """
  backbone = run.config["backbone"]
  if stage.name == "pretrain" and backbone["weights"]:
    model = load_whole(run, backbone["weights"]).model
  elif stage.name == "pretrain":
    side = backbone.get("image_size") or None
    told = backbone_sizes(backbone)
    if backbone.get("mean") or backbone.get("std"):
      raise ValueError(
        "backbone.mean and backbone.std are those of a file of weights; a new"
        " network has its model's"
      )
    model = models.create(backbone["name"], run.num_classes, side, **told)
  elif stage.head_init == ZEROSHOT:
    model = load_zeroshot(run, stage.weights).model
  else:
    model = run.load(stage.weights).model
    model = convert.with_classes(model, run.num_classes)
  options = model_options(run)
  method = build_method(run, stage)
  if method.train_mode and run.switches["droppath_rate"]:
    options["drop_path"] = run.switches["droppath_rate"]
  return method.apply_to(models.with_options(model, **options))


def model_options(run: Run) -> dict[str, Any]:
  """Returns what the config tells `models.with_options`."""
  backbone = run.config["backbone"]
  names = (
    "act", "norm_eps", "attention", "pool", "scan", "remat", "updates_stats",
  )  # fmt: skip
  # "", 0 and False are every backbone's defaults: set, they would be refused by
  # backbones that lack the option.
  return {k: v for k in names if (v := backbone.get(k)) not in ("", False)}


def build_method(run: Run, stage: Stage) -> peft.Method:
  """Returns the stage's method of fine-tuning."""
  method = specs.build(peft.METHODS, method_fields(run, stage), "method")
  if not run.switches["frozen_encoder_eval"] and stage.method != "vpt":
    method = dataclasses.replace(method, train_mode=True)
  return method


def method_fields(run: Run, stage: Stage) -> dict[str, Any]:
  """Returns the method's name and fields, from `config.peft` and switches."""
  fields = dict(run.config.get("peft", {}).get(stage.method, {}))
  if stage.method == "lora":
    fields["init"] = run.switches["lora_init"]
    if not run.switches["lora_dropout_active"]:
      fields["dropout"] = 0.0
  elif stage.method == "adapter":
    fields["init"] = run.switches["adapter_init"]
  elif stage.method == "vpt":
    fields["order"] = run.switches["swin_prompt_order"]
  return {"name": stage.method, **fields}


def build_schedule(run: Run, stage: Stage) -> schedules.Schedule:
  """Returns the stage's learning rate by step, as a share of its peak."""
  by_epoch = run.switches["lr_granularity"] == "epoch"
  return schedules.warmup(
    stage.num_steps,
    **run.config[stage.name]["schedule"],
    every=stage.epoch_steps if by_epoch else 1,
    starts_at_zero=run.switches["warmup_starts_at_zero"],
  )


def build_radius(run: Run, stage: Stage) -> schedules.Schedule:
  """Returns the training attack's radius by step, as a share of its eps."""
  return schedules.ramp(stage.num_steps, **run.config[stage.name]["radius"])


def head_anchor(run: Run, stage: Stage) -> str:
  """Returns what an anchor does with the stage's head, one of `optim.HEADS`.

  Unless the config says so, a random head is not held where it starts.
  """
  section = run.config[stage.name]["optim"]
  if (section.get("anchor") or {"name": "none"})["name"] == "none":
    return optim.HEADS[0]  # so that all inits share a program
  return section["head"] or optim.HEADS[not stage.is_random]


def optimizer_fields(
  run: Run, section: str, head: str = optim.HEADS[0]
) -> dict[str, Any]:
  """Returns what `optim.build` takes, from the section and the switches.

  Args:
    run: the run.
    section: `pretrain`, `probe` or `adapt`.
    head: what an anchor does with the head, one of `optim.HEADS`; by default
      it leaves the head free.
  """
  fields = {**run.config[section]["optim"], "head": head}
  if not fields["weight_decay"] and run.switches["zero_decay_means_sgd"]:
    return {**fields, "name": "sgd", "momentum": 0.9}
  if fields["name"] == "adamw":
    if run.switches["adamw_decay"] == "fixed_0.01":
      fields["weight_decay"] = 0.01
    if run.switches["adamw_eps_style"] == "reference":
      fields |= {"eps_style": "reference", "eps": 1e-6}
  return fields


def build_optimizer(
  run: Run, stage: Stage, labels: PyTree
) -> optax.GradientTransformationExtraArgs:
  """Returns the stage's optimizer.

  Args:
    run: the run.
    stage: the stage.
    labels: the group of each leaf of the parameters, from `Method.labels`.
  """
  return optim.build(
    optimizer_fields(run, stage.name, head_anchor(run, stage)),
    labels,
    build_schedule(run, stage),
  )


def build_criterion(
  run: Run, section: str, loss: str, epoch_steps: int = 1
) -> objectives.Criterion:
  """Returns the training loss, with the options that the section gives it.

  Args:
    run: the run.
    section: `pretrain`, `probe` or `adapt`.
    loss: a name in `objectives.LOSSES`.
    epoch_steps: the number of steps of an epoch, >= 1; default 1.
  """
  options, penalty = (
    _without_unset(run.config[section].get(kind, {}))
    for kind in ("loss", "penalty")
  )
  return objectives.build(
    {**options, "name": loss},
    {"name": "none", **penalty},
    epoch_steps=epoch_steps,
  )
