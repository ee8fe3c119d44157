"""What the words of a config stand for: attacks, data, models, programs.

Everything that a run's stages share is made here, once, and what can be known
to be wrong is found here, before anything is computed.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
import optax

from roli_jax import (
  attacks,
  convert,
  data,
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
from roli_jax.experiment.stages import ZEROSHOT, Stage, expand
from roli_jax.optim import schedules
from roli_jax.statistics import Counts
from roli_jax.threat import ThreatModel
from roli_jax.types import Params, PyTree

Variables = tuple[Params, PyTree]  # parameters and running statistics


@dataclasses.dataclass(frozen=True)
class Program:
  """What stages of one kind have in common; compiled once for all of them.

  Attributes:
    method: which leaves train.
    criterion: what is lowered.
    attack: that finds the images to train on.
    tx: the optimizer; its state holds the learning rate.
    step: `(state, batch, key) -> (state, counts)`, jitted; donates its state.
    like: the state's shapes, where the config's rules put them.
  """

  method: peft.Method
  criterion: objectives.Criterion
  attack: attacks.Attack
  tx: optax.GradientTransformationExtraArgs
  step: Callable[..., tuple[state.TrainState, Counts]]
  like: state.TrainState


class Parts:
  """The parts of a run, each made when first asked for.

  Attributes:
    config: any nested mapping with the fields of `configs/glyphs_roli.py`.
    mesh: of all devices, as the config splits them.
    rules: where the leaves of a stage's state lie, for `sharding.ruled`.
    threat: of training and, unless another radius is asked for, of tests.
    data: the three splits of the data set, each read when first asked for.
    compat: the switches of `compat.SWITCHES`.
    diagnoses: whether an ensemble of attacks comes with a diagnosis.
  """

  def __init__(self, config: Mapping[str, Any], diagnoses: bool = False):
    self.config = config
    self.diagnoses = diagnoses
    # Runs of before there were meshes say nothing of them.
    spec = {"model": 1, "rules": (), **config.get("mesh", {})}
    self.mesh, self.rules = sharding.mesh(spec["model"]), spec["rules"]
    self.threat = ThreatModel(
      config["threat"]["norm"], eps=specs.number(config["threat"]["eps"])
    )
    self.data = _Splits(config["data"])
    self.compat = compat.switches(config)
    self._bundle = functools.cache(self._load)
    self._init = functools.cache(lambda model: jax.jit(model.init))
    # Compiled without what would draw a backbone that is then thrown away.
    self._init_rest = functools.cache(
      lambda model: jax.jit(lambda key: _but_backbone(model.init(key)[0]))
    )
    self._program = functools.cache(self._make_program)

  def check(self, stages: Iterable[Stage]) -> None:
    """Raises the ValueError that a run of these stages would end in."""
    for kind in ("attack", "val_attack", "eval_attack"):
      if not self.config[kind]["name"].startswith("corruptions"):
        self.attack(kind)
    have = self.shape[-1]
    for stage in stages:
      want = self.model(stage).channels
      if have != want:
        raise ValueError(
          f"{self.config['backbone']['name']} wants images of {want} channels,"
          f" {self.config['data']['name']} has {have}"
        )
      self.program(stage)
      self.train_data(stage)

  @property
  def num_classes(self) -> int:
    """Of the data set."""
    return self.data["train"].num_classes

  @property
  def shape(self) -> tuple[int, int, int]:
    """(h, w, c) of an image as it is attacked."""
    return self.data["train"].shape

  def stages(self) -> list[Stage]:
    """Those of the config's table; all images train where it says 0."""
    given = self.config["data"]["train_size"]
    return expand(self.config, given or len(self.data["train"]))

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
    return self._attack(self.config[kind], threat)

  def inner_attack(
    self, name: str, criterion: objectives.Criterion
  ) -> attacks.Attack:
    """The attack in the training of the section of that name.

    Args:
      name: of the section; what its `attack` says goes before `config.attack`.
      criterion: that is lowered; the loss it asks for is raised, if the attack
        can and the config names no other. A criterion of clean images alone
        asks for nothing.

    Raises:
      ValueError: the attack can't train.
    """
    said = self.config[name].get("attack", {})
    own = {k: v for k, v in said.items() if v not in (None, "")}
    base = self.config["attack"]
    if own.get("name", base["name"]) != base["name"]:
      base = {}
    attack = self._attack({**base, **own}, self.threat)
    if not criterion.adversarial:
      return attack
    if not isinstance(attack, attacks.TrainingAttack):
      raise ValueError(
        f"{attack.name} can't train: it looks for misclassified images, and"
        " training wants each image's point of highest loss; take pgd, fgsm,"
        " apgd_ce or apgd_dlr"
      )
    return attack.for_training("" if "loss" in own else criterion.surrogate)

  def _attack(self, section, threat):
    fields = specs.taken(attacks.ATTACKS, section, "attack")
    given = {k: v for k, v in fields.items() if v is not None}
    keep = self.compat["pgd_best"]
    if given["name"] == "pgd" and keep != compat.SWITCHES["pgd_best"][0]:
      given["keep"] = keep
    return attacks.build(given.pop("name"), threat, **given)

  def train_data(self, stage: Stage) -> data.Source:
    """The stage's training images."""
    return self.data["train"].subset(stage.train_size, stage.seed)

  def made_of(self, stage: Stage) -> str:
    """A digest of the weights and the training images of a probe.

    Of files of images their paths and labels stand for them.
    """
    source = self.train_data(stage)
    backbone = self._bundle(stage.weights).params.backbone
    arrays = [*jax.tree.leaves(backbone), source.labels, source.indices]
    digest = hashlib.sha256()
    for array in [*arrays, source.images]:
      digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()

  def model(self, stage: Stage) -> models.Model:
    """The stage's model; equal for all heads, so that they share programs.

    It computes in full precision; see `half`.
    """
    backbone = self.config["backbone"]
    classes = self.num_classes
    if stage.name == "pretrain":
      model = models.create(backbone["name"], classes)
    elif stage.head_init == ZEROSHOT:
      model = self._zeroshot(stage.weights).model
    else:
      model = convert.with_classes(self.pretrained(stage.weights), classes)
    options = ("attention", "pool", "scan", "remat", "updates_stats")
    # The defaults are those of every backbone.
    chosen = {
      k: v for k in options if (v := backbone.get(k)) not in ("", False)
    }
    model = models.with_options(model, **chosen)
    method = self.method(stage)
    if method.train_mode and self.compat["droppath_rate"]:
      rate = self.compat["droppath_rate"]
      model = models.with_options(model, drop_path=rate)
    return method.enter(model)

  def pretrained(self, weights: str) -> models.Model:
    """The model that weights are of."""
    return self._bundle(weights).model

  def method(self, stage: Stage) -> peft.Method:
    """The stage's method."""
    method = specs.build(peft.METHODS, self.method_spec(stage), "method")
    if not self.compat["frozen_encoder_eval"] and stage.method != "vpt":
      method = dataclasses.replace(method, train_mode=True)
    return method

  def method_spec(self, stage: Stage) -> dict[str, Any]:
    """What makes it, as `config.peft` and the switches say."""
    switches = self.compat
    spec = dict(self.config.get("peft", {}).get(stage.method, {}))
    if stage.method == "lora":
      spec["init"] = switches["lora_init"]
      if not switches["lora_dropout_active"]:
        spec["dropout"] = 0.0
    elif stage.method == "adapter":
      spec["init"] = switches["adapter_init"]
    elif stage.method == "vpt":
      spec["order"] = switches["swin_prompt_order"]
    return {"name": stage.method, **spec}

  def initial(self, stage: Stage) -> Variables:
    """The pretrained backbone under a random head, or all of it random."""
    model = self.model(stage)
    key = keys.root(stage.seed)
    if stage.head_init == ZEROSHOT:
      bundle = self._zeroshot(stage.weights)
      added = self._init_rest(model)(key).peft
      return dataclasses.replace(bundle.params, peft=added), bundle.stats
    model = convert.with_classes(
      model, model.num_classes, head_init=stage.head_init
    )
    if stage.name == "pretrain":
      return self._init(model)(key)
    bundle = self._bundle(stage.weights)
    rest = self._init_rest(model)(key)
    backbone = bundle.params.backbone
    return dataclasses.replace(rest, backbone=backbone), bundle.stats

  def program(self, stage: Stage) -> Program:
    """The compiled step of the stage's kind, with what belongs to it."""
    program = self._program(
      stage.name, self.method(stage), stage.loss, stage.num_steps,
      stage.epoch_steps, self.model(stage), self.head(stage),
    )  # fmt: skip
    if stage.is_random and objectives.needs_start(program.criterion):
      raise ValueError(
        f"{stage.name}.penalty compares with the model that the stage starts"
        f" from, and the head of {stage.cell} is random; start from a probe"
        " (init=roli)"
      )
    return program

  def head(self, stage: Stage) -> str:
    """What an anchor does with the stage's head: a random one isn't held."""
    spec = self.config[stage.name]["optim"]
    if (spec.get("anchor") or {"name": "none"})["name"] == "none":
      return optim.HEADS[0]  # so that all inits share a program
    return spec["head"] or optim.HEADS[not stage.is_random]

  @property
  def half(self) -> str | None:
    """The precision of training and of attacks, if not the arrays' own."""
    known = {"float32": None, "bfloat16": "bfloat16"}
    dtype = self.config["backbone"].get("dtype", "float32")
    return specs.choose(known, dtype, "backbone.dtype")

  def _zeroshot(self, weights):
    """The weights with the head of prompts that they came with."""
    bundle = self._bundle(weights, keeps_head=True)
    if "projection" not in bundle.params.head:
      raise ValueError(
        f"head_init=zeroshot: {weights} has no zero-shot head; make one with"
        " zeroshot.classifier, and write it with convert.save"
      )
    if bundle.model.num_classes != self.num_classes:
      raise ValueError(
        f"the zero-shot head of {weights} has {bundle.model.num_classes}"
        f" classes, {self.config['data']['name']} has {self.num_classes}"
      )
    return bundle

  def _load(self, weights, keeps_head=False):
    backbone = self.config["backbone"]
    file = convert.find(backbone["name"], weights, hint=backbone["origin"])
    return convert.load(
      file,
      model=backbone["name"],
      num_classes=None if keeps_head else self.num_classes,
      image_size=backbone.get("image_size") or None,
      pool=backbone.get("pool") or None,
      key=backbone.get("key") or None,
    )

  def schedule(self, stage: Stage) -> schedules.Schedule:
    """The learning rate by step, as a share of its peak."""
    return self._schedule(stage.name, stage.num_steps, stage.epoch_steps)

  def _schedule(self, name, num_steps, epoch_steps):
    by_epoch = self.compat["lr_granularity"] == "epoch"
    return schedules.warmup(
      num_steps,
      **self.config[name]["schedule"],
      every=epoch_steps if by_epoch else 1,
      starts_at_zero=self.compat["warmup_starts_at_zero"],
    )

  def optimizer(self, name: str, head: str = optim.HEADS[0]) -> dict[str, Any]:
    """What `optim.build` takes, of the section of that name.

    Args:
      name: of the section.
      head: what an anchor does with it, one of `optim.HEADS`.
    """
    spec = {**self.config[name]["optim"], "head": head}
    if not spec["weight_decay"] and self.compat["zero_decay_means_sgd"]:
      return {**spec, "name": "sgd", "momentum": 0.9}
    if spec["name"] == "adamw":
      if self.compat["adamw_decay"] == "fixed_0.01":
        spec["weight_decay"] = 0.01
      if self.compat["adamw_eps_style"] == "reference":
        spec |= {"eps_style": "reference", "eps": 1e-6}
    return spec

  def criterion(
    self, name: str, loss: str, epoch_steps: int = 1
  ) -> objectives.Criterion:
    """The loss of that name, with the options of the section of that name."""
    section = self.config[name]
    of_loss, of_penalty = (
      {k: v for k, v in section.get(kind, {}).items() if v not in (None, "")}
      for kind in ("loss", "penalty")
    )
    return objectives.build(
      {**of_loss, "name": loss},
      {"name": "none", **of_penalty},
      epoch_steps=epoch_steps,
    )

  def _make_program(
    self, name, method, loss, num_steps, epoch_steps, model, head
  ):
    section = self.config[name]
    criterion = self.criterion(name, loss, epoch_steps)
    attack = self.inner_attack(name, criterion)
    _check_section(name, section, criterion, self.mesh)
    if (loss == "autolora") != (method.name == "autolora"):
      raise ValueError(
        f"the loss autolora and the method autolora go together, got"
        f" {name}.loss.name={loss} with method={method.name}"
      )
    params, stats = jax.eval_shape(model.init, keys.root(0))
    tx = optim.build(
      self.optimizer(name, head),
      method.labels(params),
      self._schedule(name, num_steps, epoch_steps),
    )
    train_step = step.make_train_step(
      models.with_options(model, dtype=self.half),
      method,
      criterion,
      attack,
      schedules.ramp(num_steps, **section["radius"]),
      tx,
      self.data["train"].white,
      step.WeightAttack(**section.get("awp", {})),
      num_steps,
      section.get("accumulate", 1),
    )

    def fresh(params, stats):
      trains = method.trains(params)
      return state.create(params, stats, trains, tx, criterion.start)

    like = sharding.ruled(
      jax.eval_shape(fresh, params, stats),
      self.mesh,
      self.rules,
    )
    everywhere = sharding.replicated(self.mesh)
    places = jax.tree.map(lambda x: x.sharding, like)
    jitted = jax.jit(
      train_step,
      in_shardings=(places, sharding.split(self.mesh), everywhere),
      out_shardings=(places, everywhere),
      donate_argnums=0,
    )
    return Program(method, criterion, attack, tx, jitted, like)


def _but_backbone(params):
  return dataclasses.replace(params, backbone={})


class _Splits(dict[str, data.Source]):
  """The splits of a data set, each read when first asked for."""

  def __init__(self, spec: Mapping[str, Any]):
    super().__init__()
    self._spec = spec

  def __missing__(self, split: str) -> data.Source:
    self[split] = data.build(self._spec, split)
    return self[split]


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
