"""From a run's config to its attacks, models, optimizers and compiled steps.

Each function makes one thing that a stage needs, from a `Run` and the stage.
What can be known to be wrong is found here, before anything is computed.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import optax

from roli_jax import (
  attacks,
  convert,
  keys,
  models,
  objectives,
  optim,
  peft,
  sharding,
  specs,
  state,
  step,
)
from roli_jax.experiment import compat
from roli_jax.experiment.run import Run, training_images
from roli_jax.experiment.stages import ZEROSHOT, Stage
from roli_jax.optim import schedules
from roli_jax.statistics import Counts
from roli_jax.threat import ThreatModel
from roli_jax.types import PyTree, Variables


@dataclasses.dataclass(frozen=True)
class Program:
  """What stages of one kind have in common; compiled once for all of them.

  Attributes:
    method: chooses the leaves that train.
    criterion: the loss that training lowers.
    attack: finds the images to train on.
    tx: the optimizer; its state holds the learning rate.
    step: `(state, batch, key) -> (state, counts)`, jitted; donates its state.
    abstract_state: shapes, dtypes and shardings of the state.
  """

  method: peft.Method
  criterion: objectives.Criterion
  attack: attacks.Attack
  tx: optax.GradientTransformationExtraArgs
  step: Callable[..., tuple[state.TrainState, Counts]]
  abstract_state: state.TrainState


def check_run(run: Run, stages: Iterable[Stage]) -> None:
  """Raises the ValueError that training and testing these would end in."""
  for section in ("attack", "val_attack", "eval_attack"):
    if not run.config[section]["name"].startswith("corruptions"):
      build_attack(run, section)
  for stage in stages:
    have, want = run.shape[-1], build_model(run, stage).channels
    if have != want:
      raise ValueError(
        f"{run.config['backbone']['name']} wants images of {want} channels,"
        f" {run.config['data']['name']} has {have}"
      )
    build_program(run, stage)
    training_images(run, stage)


def build_attack(
  run: Run, section: str, eps: str | None = None, *, name: str = "",
  norm: str = "",
) -> attacks.Attack:  # fmt: skip
  """The attack of a section of the config.

  Args:
    run: the run.
    section: `attack`, `val_attack` or `eval_attack`.
    eps: a radius in place of the threat model's, as text such as `8/255`.
    name: an attack in place of the section's, with its own defaults.
    norm: a norm in place of the threat model's, if `eps` is given.
  """
  threat = run.threat
  if eps is not None:
    threat = ThreatModel(norm or threat.norm, eps=specs.number(eps))
  if name:
    return attacks.build(name, threat)
  return _attack(run, run.config[section], threat)


def build_training_attack(
  run: Run, section: str, criterion: objectives.Criterion
) -> attacks.Attack:
  """The attack inside the training of a stage.

  Args:
    run: the run.
    section: `pretrain`, `probe` or `adapt`; its `attack` goes before
      `config.attack`, field by field if both name the same attack.
    criterion: the training loss. The attack raises the loss that it asks for,
      unless the section names one; a loss of clean images alone asks for none.

  Raises:
    ValueError: the attack can't train.
  """
  given = run.config[section].get("attack", {})
  own = {k: v for k, v in given.items() if v not in (None, "")}
  base = run.config["attack"]
  if own.get("name", base["name"]) != base["name"]:
    base = {}
  attack = _attack(run, {**base, **own}, run.threat)
  if not criterion.adversarial:
    return attack
  return attack.for_training("" if "loss" in own else criterion.surrogate)


def _attack(run, section, threat):
  fields = specs.accepted_fields(attacks.ATTACKS, section, "attack")
  given = {k: v for k, v in fields.items() if v is not None}
  keep = run.switches["pgd_best"]
  if given["name"] == "pgd" and keep != compat.SWITCHES["pgd_best"][0]:
    given["keep"] = keep
  return attacks.build(given.pop("name"), threat, **given)


def build_model(run: Run, stage: Stage) -> models.Model:
  """The stage's model in full precision; equal for all head_init.

  Stages that differ in the random head's distribution so share programs.
  """
  backbone = run.config["backbone"]
  if stage.name == "pretrain":
    model = models.create(backbone["name"], run.num_classes)
  elif stage.head_init == ZEROSHOT:
    model = _load_zeroshot(run, stage.weights).model
  else:
    model = run.load(stage.weights).model
    model = convert.with_classes(model, run.num_classes)
  options = ("attention", "pool", "scan", "remat", "updates_stats")
  # The defaults are those of every backbone.
  chosen = {k: v for k in options if (v := backbone.get(k)) not in ("", False)}
  model = models.with_options(model, **chosen)
  method = build_method(run, stage)
  rate = run.switches["droppath_rate"]
  if method.train_mode and rate:
    model = models.with_options(model, drop_path=rate)
  return method.apply_to(model)


def build_predict(run: Run, stage: Stage) -> Callable[..., Any]:
  """`(variables, images) -> logits` of the stage's model."""
  return step.make_predict(build_model(run, stage))


def build_method(run: Run, stage: Stage) -> peft.Method:
  """The stage's method of fine-tuning."""
  method = specs.build(peft.METHODS, method_fields(run, stage), "method")
  if not run.switches["frozen_encoder_eval"] and stage.method != "vpt":
    method = dataclasses.replace(method, train_mode=True)
  return method


def method_fields(run: Run, stage: Stage) -> dict[str, Any]:
  """The method's name and fields, as `config.peft` and the switches say."""
  spec = dict(run.config.get("peft", {}).get(stage.method, {}))
  if stage.method == "lora":
    spec["init"] = run.switches["lora_init"]
    if not run.switches["lora_dropout_active"]:
      spec["dropout"] = 0.0
  elif stage.method == "adapter":
    spec["init"] = run.switches["adapter_init"]
  elif stage.method == "vpt":
    spec["order"] = run.switches["swin_prompt_order"]
  return {"name": stage.method, **spec}


def initial_variables(run: Run, stage: Stage) -> Variables:
  """The pretrained backbone under a random head, or all of it random."""
  model = build_model(run, stage)
  key = keys.root(stage.seed)
  if stage.head_init == ZEROSHOT:
    bundle = _load_zeroshot(run, stage.weights)
    added = _init_but_backbone(model, key).peft
    return dataclasses.replace(bundle.params, peft=added), bundle.stats
  model = convert.with_classes(
    model, model.num_classes, head_init=stage.head_init
  )
  if stage.name == "pretrain":
    return jax.jit(model.init)(key)
  bundle = run.load(stage.weights)
  drawn = _init_but_backbone(model, key)
  return dataclasses.replace(
    drawn, backbone=bundle.params.backbone
  ), bundle.stats


@functools.partial(jax.jit, static_argnums=0)
def _init_but_backbone(model, key):
  """Random head and added leaves, without drawing a backbone beside them."""
  params, _ = model.init(key)
  return dataclasses.replace(params, backbone={})


def _load_zeroshot(run, weights):
  """The weights with the head of prompts that they came with."""
  bundle = run.load(weights, keeps_head=True)
  if "projection" not in bundle.params.head:
    raise ValueError(
      f"head_init=zeroshot: {weights} has no zero-shot head; make one with"
      " zeroshot.classifier, and write it with convert.save"
    )
  if bundle.model.num_classes != run.num_classes:
    raise ValueError(
      f"the zero-shot head of {weights} has {bundle.model.num_classes}"
      f" classes, {run.config['data']['name']} has {run.num_classes}"
    )
  return bundle


def build_schedule(run: Run, stage: Stage) -> schedules.Schedule:
  """The stage's learning rate by step, as a share of its peak."""
  by_epoch = run.switches["lr_granularity"] == "epoch"
  return schedules.warmup(
    stage.num_steps,
    **run.config[stage.name]["schedule"],
    every=stage.epoch_steps if by_epoch else 1,
    starts_at_zero=run.switches["warmup_starts_at_zero"],
  )


def head_anchor(run: Run, stage: Stage) -> str:
  """What an anchor does with the stage's head, one of `optim.HEADS`.

  A random head is not held where it starts.
  """
  spec = run.config[stage.name]["optim"]
  if (spec.get("anchor") or {"name": "none"})["name"] == "none":
    return optim.HEADS[0]  # so that all inits share a program
  return spec["head"] or optim.HEADS[not stage.is_random]


def optimizer_fields(
  run: Run, section: str, head: str = optim.HEADS[0]
) -> dict[str, Any]:
  """What `optim.build` takes, as the section and the switches say.

  Args:
    run: the run.
    section: `pretrain`, `probe` or `adapt`.
    head: what an anchor does with the head, one of `optim.HEADS`.
  """
  spec = {**run.config[section]["optim"], "head": head}
  if not spec["weight_decay"] and run.switches["zero_decay_means_sgd"]:
    return {**spec, "name": "sgd", "momentum": 0.9}
  if spec["name"] == "adamw":
    if run.switches["adamw_decay"] == "fixed_0.01":
      spec["weight_decay"] = 0.01
    if run.switches["adamw_eps_style"] == "reference":
      spec |= {"eps_style": "reference", "eps": 1e-6}
  return spec


def build_optimizer(
  run: Run, stage: Stage, labels: PyTree
) -> optax.GradientTransformationExtraArgs:
  """The stage's optimizer.

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
  """The training loss, with the options that the section gives it.

  Args:
    run: the run.
    section: `pretrain`, `probe` or `adapt`.
    loss: a name in `objectives.LOSSES`.
    epoch_steps: the number of steps of an epoch.
  """
  of_loss, of_penalty = (
    {
      k: v
      for k, v in run.config[section].get(kind, {}).items()
      if v not in (None, "")
    }
    for kind in ("loss", "penalty")
  )
  return objectives.build(
    {**of_loss, "name": loss},
    {"name": "none", **of_penalty},
    epoch_steps=epoch_steps,
  )


def build_program(run: Run, stage: Stage) -> Program:
  """The compiled step of the stage's kind, with what belongs to it.

  Stages that differ in seed, rate or start alone get the same program.

  Raises:
    ValueError: a section that can't be trained as it stands.
  """
  kind = (
    stage.name, stage.loss, stage.num_steps, stage.epoch_steps,
    build_method(run, stage), build_model(run, stage), head_anchor(run, stage),
  )  # fmt: skip
  if kind not in run.programs:
    run.programs[kind] = _compile(run, stage)
  program = run.programs[kind]
  if stage.is_random and objectives.needs_start(program.criterion):
    raise ValueError(
      f"{stage.name}.penalty compares with the model that the stage starts"
      f" from, and the head of {stage.cell} is random; start from a probe"
      " (init=roli)"
    )
  return program


def _compile(run, stage):
  section = run.config[stage.name]
  method, model = build_method(run, stage), build_model(run, stage)
  criterion = build_criterion(run, stage.name, stage.loss, stage.epoch_steps)
  attack = build_training_attack(run, stage.name, criterion)
  _check_section(stage.name, section, criterion, run.mesh)
  if (stage.loss == "autolora") != (method.name == "autolora"):
    raise ValueError(
      f"the loss autolora and the method autolora go together, got"
      f" {stage.name}.loss.name={stage.loss} with method={method.name}"
    )
  params, stats = jax.eval_shape(model.init, keys.root(0))
  tx = build_optimizer(run, stage, method.labels(params))
  train_step = step.make_train_step(
    models.with_options(model, dtype=run.compute_dtype),
    method,
    criterion,
    attack,
    schedules.ramp(stage.num_steps, **section["radius"]),
    tx,
    run.data["train"].white,
    step.WeightAttack(**section.get("awp", {})),
    stage.num_steps,
    section.get("accumulate", 1),
  )

  def fresh(params, stats):
    trains = method.trains(params)
    return state.create(params, stats, trains, tx, criterion.init_memory)

  shapes = jax.eval_shape(fresh, params, stats)
  abstract_state = sharding.ruled(shapes, run.mesh, run.rules)
  everywhere = sharding.replicated(run.mesh)
  places = jax.tree.map(lambda x: x.sharding, abstract_state)
  jitted = jax.jit(
    train_step,
    in_shardings=(places, sharding.split(run.mesh), everywhere),
    out_shardings=(places, everywhere),
    donate_argnums=0,
  )
  return Program(method, criterion, attack, tx, jitted, abstract_state)


def _check_section(name, section, criterion, mesh):
  if section["val_every"] < 0 or section["log_every"] < 1:
    raise ValueError(
      f"{name}.val_every must be >= 0 and {name}.log_every >= 1, got"
      f" {section['val_every']} and {section['log_every']}"
    )
  size, turns = section["batch_size"], section.get("accumulate", 1)
  if turns < 1 or size % turns:
    raise ValueError(
      f"{name}.accumulate must divide {name}.batch_size={size}, got {turns}"
    )
  sharding.check_batch(size // turns, mesh)
  parts = mesh.shape["data"] * turns
  if criterion.adversarial == 0.5 and size % (2 * parts):
    raise ValueError(
      "half_at needs an even number of images on each device at a time, got"
      f" {name}.batch_size={size} for {parts} shares"
    )
