"""What the words of a config stand for: attacks, data, models, programs.

Everything that a run's stages share is made here, once, and what can be known
to be wrong is found here, before anything is computed.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import optax

from roli_jax import (
  attacks,
  convert,
  data,
  keys,
  losses,
  models,
  optim,
  peft,
  sharding,
  specs,
  state,
  step,
)
from roli_jax.metrics import Counts
from roli_jax.optim import schedules
from roli_jax.table import Stage
from roli_jax.threat import ThreatModel
from roli_jax.types import Params, PyTree

Variables = tuple[Params, PyTree]  # parameters and running statistics


@dataclasses.dataclass(frozen=True)
class Program:
  """What stages of one kind have in common; compiled once for all of them.

  Attributes:
    method: which leaves train.
    objective: what is lowered.
    tx: the optimizer; its state holds the learning rate.
    step: `(state, batch, key) -> (state, counts)`, jitted; donates its state.
  """

  method: peft.Method
  objective: losses.Objective
  tx: optax.GradientTransformationExtraArgs
  step: Callable[..., tuple[state.TrainState, Counts]]


class Parts:
  """The parts of a run, each made when first asked for.

  Attributes:
    config: any nested mapping with the fields of `configs/glyphs_roli.py`.
    mesh: of all devices.
    threat: of training and, unless another radius is asked for, of tests.
    data: the three splits of the data set.
    diagnoses: whether an ensemble of attacks comes with a diagnosis.
  """

  def __init__(self, config: Mapping[str, Any], diagnoses: bool = False):
    self.config = config
    self.diagnoses = diagnoses
    self.mesh = sharding.mesh()
    self.threat = ThreatModel(
      config["threat"]["norm"], eps=specs.number(config["threat"]["eps"])
    )
    self.data = {
      split: data.build(config["data"]["name"], split) for split in data.SPLITS
    }
    self._bundle = functools.cache(self._load)
    self._init = functools.cache(lambda model: jax.jit(model.init))
    self._program = functools.cache(self._make_program)

  def check(self, stages: Iterable[Stage]) -> None:
    """Raises the ValueError that a run of these stages would end in."""
    for kind in ("attack", "val_attack", "eval_attack"):
      self.attack(kind)
    have = self.data["train"].images.shape[-1]
    for stage in stages:
      want = self.model(stage).channels
      if have != want:
        raise ValueError(
          f"{self.config['backbone']['name']} wants images of {want} channels,"
          f" {self.config['data']['name']} has {have}"
        )
      self.program(stage)
      self.train_data(stage)

  def attack(
    self,
    kind: str,
    eps: str | None = None,
    *,
    name: str = "",
    norm: str = "",
  ) -> attacks.Attack:
    """The attack of a section (`attack`, `val_attack`, `eval_attack`).

    Args:
      kind: the section's name.
      eps: another radius than the threat model's, as text.
      name: another attack than the section's, with its own defaults.
      norm: another norm than the threat model's.
    """
    threat = self.threat
    if eps is not None:
      threat = ThreatModel(norm or threat.norm, eps=specs.number(eps))
    if name:
      return attacks.build(name, threat)
    fields = specs.taken(attacks.ATTACKS, self.config[kind], "attack")
    given = {k: v for k, v in fields.items() if v is not None}
    return attacks.build(given.pop("name"), threat, **given)

  def train_data(self, stage: Stage) -> data.Source:
    """The stage's training images."""
    return self.data["train"].subset(stage.train_size, stage.seed)

  def model(self, stage: Stage) -> models.Model:
    """The stage's model; equal for all heads, so that they share programs.

    It computes in full precision; see `half`.
    """
    backbone = self.config["backbone"]
    classes = self.data["train"].num_classes
    if stage.name == "pretrain":
      model = models.create(backbone["name"], classes)
    else:
      model = convert.with_classes(self._bundle(stage.weights).model, classes)
    options = ("attention", "scan", "remat", "updates_stats")
    # The defaults are those of every backbone.
    chosen = {
      k: v for k in options if (v := backbone.get(k)) not in ("", False)
    }
    return models.with_options(model, **chosen)

  def initial(self, stage: Stage) -> Variables:
    """The pretrained backbone under a random head, or all of it random."""
    model = self.model(stage)
    model = convert.with_classes(
      model, model.num_classes, head_init=stage.head_init
    )
    params, stats = self._init(model)(keys.root(stage.seed))
    if stage.name != "pretrain":
      bundle = self._bundle(stage.weights)
      params = dataclasses.replace(params, backbone=bundle.params.backbone)
      stats = bundle.stats
    return params, stats

  def program(self, stage: Stage) -> Program:
    """The compiled step of the stage's kind, with what belongs to it."""
    return self._program(
      stage.name, stage.method, stage.loss, stage.num_steps, self.model(stage)
    )

  @property
  def half(self) -> str | None:
    """The precision of training and of attacks, if not the arrays' own."""
    known = {"float32": None, "bfloat16": "bfloat16"}
    dtype = self.config["backbone"].get("dtype", "float32")
    return specs.choose(known, dtype, "backbone.dtype")

  def like(self, stage: Stage) -> state.TrainState:
    """The shapes of the stage's state, on every device."""
    program = self.program(stage)

    def fresh(key):
      params, stats = self.model(stage).init(key)
      trains = program.method.trains(params)
      return state.create(params, stats, trains, program.tx)

    shapes = jax.eval_shape(fresh, keys.root(0))
    return sharding.shaped(shapes, self.mesh)

  def _load(self, weights):
    backbone = self.config["backbone"]
    file = convert.find(backbone["name"], weights, hint=backbone["origin"])
    return convert.load(
      file,
      model=backbone["name"],
      num_classes=self.data["train"].num_classes,
      image_size=backbone.get("image_size") or None,
    )

  def _make_program(self, name, method_name, loss, num_steps, model):
    section = self.config[name]
    method = specs.choose(peft.METHODS, method_name, "method")
    spec = {**section["loss"], "name": loss}
    spec = specs.taken(losses.OBJECTIVES, spec, "loss")
    objective = specs.build(losses.OBJECTIVES, spec, "loss")
    attack: Any = self.attack("attack")
    if objective.surrogate == "kl":
      attack = dataclasses.replace(attack, loss="kl")
    _check_section(name, section, objective, self.mesh)
    params, _ = jax.eval_shape(model.init, keys.root(0))
    tx = optim.build(
      section["optim"],
      method.labels(params),
      schedules.warmup(num_steps, **section["schedule"]),
    )
    train_step = step.make_train_step(
      models.with_options(model, dtype=self.half),
      method,
      objective,
      attack,
      schedules.ramp(num_steps, **section["radius"]),
      tx,
      self.data["train"].white,
    )
    everywhere = sharding.replicated(self.mesh)
    jitted = jax.jit(
      train_step,
      in_shardings=(everywhere, sharding.split(self.mesh), everywhere),
      out_shardings=everywhere,
      donate_argnums=0,
    )
    return Program(method, objective, tx, jitted)


def _check_section(name, section, objective, mesh):
  for field in ("num_steps", "val_every", "log_every"):
    if section[field] < 1:
      raise ValueError(f"{name}.{field} must be >= 1, got {section[field]}")
  sharding.check_batch(section["batch_size"], mesh)
  if objective.adversarial == 0.5 and section["batch_size"] % (2 * mesh.size):
    raise ValueError(
      "half_at needs an even number of images on each device, got"
      f" {name}.batch_size={section['batch_size']} for {mesh.size} devices"
    )
