"""The compiled training step of a stage, and its model's forward passes."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from roli_jax import attacks, models, objectives, peft, sharding, step
from roli_jax import state as states
from roli_jax.experiment import build
from roli_jax.experiment.run import Run, training_images
from roli_jax.experiment.stages import Stage
from roli_jax.statistics import Counts


@dataclasses.dataclass(frozen=True)
class Program:
  """What stages of one kind share; compiled once for all of them.

  Attributes:
    method: chooses the leaves that train.
    criterion: the loss that training lowers.
    attack: finds the images to train on.
    tx: the optimizer; its state holds the learning rate.
    step: `(state, batch, key) -> (state, counts)`, jitted; donates its state.
    create: `(params, stats) -> state`, before the first step.
    abstract_state: shapes, dtypes and shardings of the state.
  """

  method: peft.Method
  criterion: objectives.Criterion
  attack: attacks.Attack
  tx: optax.GradientTransformationExtraArgs
  step: Callable[..., tuple[states.TrainState, Counts]]
  create: Callable[..., states.TrainState]
  abstract_state: states.TrainState


def check_run(run: Run, stages: Iterable[Stage]) -> None:
  """Raises the ValueError that training these stages would end in."""
  for section in ("attack", "val_attack", "eval_attack"):
    if not run.config[section]["name"].startswith("corruptions"):
      build.build_attack(run, section)
  for stage in stages:
    have, want = run.shape[-1], build.build_model(run, stage).channels
    if have != want:
      raise ValueError(
        f"{run.config['backbone']['name']} wants images of {want} channels,"
        f" {run.config['data']['name']} has {have}"
      )
    build_program(run, stage)
    training_images(run, stage)


def build_predict(run: Run, stage: Stage) -> Callable[..., Any]:
  """Returns `(variables, images) -> logits` of the stage's model."""
  return step.make_predict(for_devices(run, build.build_model(run, stage)))


def build_both(run: Run, stage: Stage) -> Callable[..., Any]:
  """Returns `(variables, images) -> (features, logits)` of that model."""
  return step.make_both(for_devices(run, build.build_model(run, stage)))


# TPUs whose on-chip memory holds a head's scores of 64 images, as docs/chips.md
# has it: v5e and v6e.
_ROOMY = ("TPU v5 lite", "TPU v6 lite")


def for_devices(run: Run, model: models.Model) -> models.Model:
  """Returns the model as the run's devices compute it.

  By the devices of the mesh, which a plan only describes, and unless the config
  chooses. Where they split the heads among them, each has few. A Swin's bias
  has a gradient, which devices that share a batch would sum head by head.
  """
  roomy = run.mesh.devices.flat[0].device_kind in _ROOMY
  chosen = run.config["backbone"].get("attention")
  plain = getattr(model.backbone, "attention", "") == "plain"
  shared = isinstance(model.backbone, models.Swin) and run.mesh.size > 1
  if roomy and plain and not (chosen or shared or run.mesh.shape["model"] > 1):
    return models.with_options(model, attention="looped")
  return model


def build_program(run: Run, stage: Stage) -> Program:
  """Returns the compiled step of the stage's kind, with what belongs to it.

  Stages that differ only in seed, rate or start share a program.

  Raises:
    ValueError: a section that can't be trained as it stands.
  """
  kind = (
    stage.name,
    stage.loss,
    stage.num_steps,
    stage.epoch_steps,
    build.build_method(run, stage),
    build.build_model(run, stage),
    build.head_anchor(run, stage),
  )
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


def _compile(run: Run, stage: Stage) -> Program:
  section = run.config[stage.name]
  method, model = build.build_method(run, stage), build.build_model(run, stage)
  criterion = build.build_criterion(
    run, stage.name, stage.loss, stage.epoch_steps
  )
  attack = build.build_training_attack(run, stage.name, criterion)
  _check_section(stage.name, section, criterion, run.mesh)
  if (stage.loss == "autolora") != (method.name == "autolora"):
    raise ValueError(
      f"the loss autolora and the method autolora go together, got"
      f" {stage.name}.loss.name={stage.loss} with method={method.name}"
    )
  params, stats = model.shapes()
  tx = build.build_optimizer(run, stage, method.labels(params))
  train_step = step.make_train_step(
    models.with_options(for_devices(run, model), dtype=run.compute_dtype),
    method,
    criterion,
    attack,
    build.build_radius(run, stage),
    tx,
    run.data["train"].white,
    step.WeightAttack(**section.get("awp", {})),
    stage.num_steps,
    section.get("accumulate", 1),
    section.get("ema", 0.0),
  )
  create = functools.partial(
    states.create,
    trains=method.trains(params),
    tx=tx,
    start=criterion.init_memory,
    averages=bool(section.get("ema")),
  )
  shapes = jax.eval_shape(create, params, stats)
  abstract_state = sharding.ruled(shapes, run.mesh, run.rules)
  everywhere = sharding.replicated(run.mesh)
  places = jax.tree.map(lambda x: x.sharding, abstract_state)
  jitted = jax.jit(
    train_step,
    in_shardings=(places, sharding.split(run.mesh), everywhere),
    out_shardings=(places, everywhere),
    donate_argnums=0,
  )
  return Program(method, criterion, attack, tx, jitted, create, abstract_state)


def _check_section(
  name: str,
  section: Mapping[str, Any],
  criterion: objectives.Criterion,
  mesh: Mesh,
) -> None:
  """Raises a ValueError for numbers of the section that can't be."""
  if section["val_every"] < 0 or section["log_every"] < 1:
    raise ValueError(
      f"{name}.val_every must be >= 0 and {name}.log_every >= 1, got"
      f" {section['val_every']} and {section['log_every']}"
    )
  if not 0 <= section.get("ema", 0) < 1:
    raise ValueError(f"{name}.ema must be in [0, 1), got {section['ema']}")
  size, turns = section["batch_size"], section.get("accumulate", 1)
  if turns < 1 or size % turns:
    raise ValueError(
      f"{name}.accumulate must divide {name}.batch_size={size}, got {turns}"
    )
  sharding.check_batch(size // turns, mesh)
  shares = mesh.shape["data"] * turns
  # half_at attacks every other image of a share.
  if criterion.adversarial == 0.5 and size % (2 * shares):
    raise ValueError(
      "half_at needs an even number of images on each device at a time, got"
      f" {name}.batch_size={size} for {shares} shares"
    )
