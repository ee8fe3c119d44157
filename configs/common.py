"""What the configs share. A config is data: it imports other configs alone."""

from ml_collections import ConfigDict, config_dict

# How many devices a CPU is split into for a small model. On two cores
# two run its training steps 1.1 to 1.5 times as fast as one (--mode=bench).
CPU_DEVICES = 2


def parse_arg(text: str, **defaults: str) -> ConfigDict:
  """Reads the `key=value,...` after a config's colon, over defaults.

  Args:
    text: the part after the colon, "" if there is none.
    **defaults: each key's default.

  Raises:
    ValueError: a key that the config does not take.
  """
  given = ConfigDict(defaults)
  for pair in filter(None, text.split(",")):
    key, equals, value = pair.partition("=")
    if not equals or key not in defaults:
      raise ValueError(
        f"expected key=value, with a key of {', '.join(defaults)}; got {pair!r}"
      )
    given[key] = value
  return given


def data(name: str, train_size: int, **changes) -> dict:
  """A data set and how its images come to the model; see docs/data.md.

  Args:
    name: the data set's name.
    train_size: the number of images to train on; 0: all there are.
    **changes: fields below that differ.
  """
  return {
    "name": name,
    "train_size": train_size,
    "root": "",  # where it lies; "": data/NAME, of CIFAR TFDS's directory too
    "policy": "error",  # of bad files; skip: they are left out and counted
    "layout": "",  # of a folder: classes or splits; "": by directories' names
    "download": False,  # whether data that isn't there is fetched at the start
    "num_workers": 0,  # processes that decode; 0: threads of this one
    # Names with arguments, as resize:256. None: the data set's own.
    "train_transforms": config_dict.placeholder(tuple),
    "eval_transforms": config_dict.placeholder(tuple),
    **changes,
  }


def mesh() -> dict:
  """How devices share the work; docs/scaling.md.

  Each of `rules` is a pattern of paths and the axis, `data` or `model`, that
  splits the leaves there: (".*", "data") for all (FSDP). Leaves without a rule
  are copied to each device.
  """
  return {"model": 1, "rules": ()}  # devices along the axis model


def recipes() -> dict:
  """Other methods of adversarial fine-tuning, as changes to `adapt` by name.

  At the authors' numbers, where they are known; docs/rivals.md has sources.
  """
  undecayed = {"weight_decay": 0.0}

  def near(**anchor) -> dict:
    return {"optim": {**undecayed, "anchor": anchor}}

  return {
    "adamw": {},
    "l2sp": near(name="l2sp", lam=0.01),
    "ftp": near(name="ftp", k=1.0),
    "spd": near(name="spd", lam=1.0),
    "digrap": near(name="digrap", mu=0.01),
    "trades": {"loss": {"name": "trades", "beta": 6.0}},
    "mart": {"loss": {"name": "mart", "beta": 5.0}},
    "awp": {"awp": {"gamma": 0.01}},
    "epsilon": {"radius": {"begin": 12 / 50, "end": 37 / 50}},
  }


def follow(config: ConfigDict, name: str, chosen: dict | None = None) -> None:
  """Changes the section `adapt` to a recipe's.

  Args:
    config: has a section `adapt`.
    name: a key of `recipes`.
    chosen: changes that replace the authors' numbers, by the recipe's name.
  """
  known = choose(recipes(), name, "recipe")
  for changes in (known, (chosen or {}).get(name, {})):
    config.adapt.update(ConfigDict(changes))


def methods() -> dict:
  """The options of each method of fine-tuning, as in RoLI's reference."""
  return {
    "lora": {"rank": 16, "alpha": 16.0, "dropout": 0.1},
    "adapter": {"reduction": 8},
    # deep: whether every block has prompts, or only the first.
    "vpt": {"tokens": 10, "deep": True, "dropout": 0.1},
  }


# What roli_jax does, and what RoLI's reference code does; in words in
# roli_jax/experiment/compat.py.
COMPAT = {
  "adapter_init": ("near_identity", "all_zero"),
  "lora_init": ("standard", "both_zero"),
  "lora_dropout_active": (False, False),
  "frozen_encoder_eval": (True, True),
  "pgd_best": ("sample", "batch"),
  "adamw_eps_style": ("standard", "reference"),
  "adamw_decay": ("config", "fixed_0.01"),
  "zero_decay_means_sgd": (False, True),
  "lr_granularity": ("step", "epoch"),
  "warmup_starts_at_zero": (False, True),
  "swin_prompt_order": ("fixed", "as_is"),
  "droppath_rate": (0.0, 0.0),
  "head_init": ("kaiming_fan_out", "kaiming_fan_out"),
  "nan_policy": ("raise", "return"),
}


def compat(text: str, backbone: str, method: str, init: str) -> dict:
  """The compat switches: roli_jax's values, or the reference's.

  The reference's LoRA, which never moves, is copied only where it is so there:
  in a Swin that starts from a probe.

  Args:
    text: `true`, for the reference's values, or `false`.
    backbone: the model's name.
    method: the method of fine-tuning, a name in `peft.METHODS`.
    init: the head's, a name in `experiment.stages.INITS`.

  Raises:
    ValueError: the text is neither `true` nor `false`.
  """
  values = {"false": 0, "true": 1}
  which = choose(values, text, "value of compat")
  chosen = {name: both[which] for name, both in COMPAT.items()}
  if not ("swin" in backbone and method == "lora" and init == "roli"):
    chosen["lora_init"] = COMPAT["lora_init"][0]
  return chosen


def sizes() -> dict:
  """The sizes of a vit, swin, convnext, wrn or dm_wrn, see `models.create`.

  None: those of the weights. Other models have sizes of their own.
  """
  return {
    "patch": config_dict.placeholder(int),
    "width": config_dict.placeholder(object),
    "depth": config_dict.placeholder(object),
    "heads": config_dict.placeholder(object),
    "channels": config_dict.placeholder(int),
  }


def backbone(name: str, weights: str) -> dict:
  """A pretrained backbone and how it is computed.

  Args:
    name: the model's name, in `models.MODELS` or `models.FAMILIES`.
    weights: the name of shipped weights, or of published ones as --mode=zoo
      lists them, or a path: a file or directory that --mode=convert made, or a
      file that it could read.
  """
  return {
    "name": name,
    "weights": weights,
    # The side that images are resized to inside the model; 0: the weights'.
    "image_size": 0,
    **sizes(),
    # The activation of a ViT, XCiT or residual network, where a file of another
    # framework leaves it open: relu, gelu, silu or quick_gelu; "": the name's.
    "act": "",
    "norm_eps": 0.0,  # what normalisations add to variances; 0: the name's
    # Per channel, in units of [0, 1]; (): the name's, the file's own, or the
    # format's.
    "mean": (),
    "std": (),
    # What the feature of another framework's ViT is, `token` or `mean`, where
    # the names in its file leave it open; "": as `convert.load` chooses.
    "pool": "",
    # Which network in such a file, as `ema`; "": as `convert.load` chooses.
    "key": "",
    # Whether it is an error that something of a file has to be assumed.
    "strict": False,
    # bfloat16: of training and attacks; parameters, pixels and the judge of
    # attacks keep float32.
    "dtype": "float32",
    # Of a ViT: fused, by cuDNN. Of a ViT or Swin: looped, by head. "": looped
    # on TPUs v5e and v6e (docs/chips.md), elsewhere the model's own.
    "attention": "",
    "scan": False,  # whether equal blocks are one loop: compiles faster
    "remat": False,  # whether activations are computed twice: less memory
    # Whether full fine-tuning moves batch normalisation's running statistics.
    # Attacks, evaluation and all other methods have them frozen.
    "updates_stats": False,
  }


def stage(num_steps: int, **changes) -> ConfigDict:
  """A stage of training, as `probe`, `adapt` or `pretrain`.

  Args:
    num_steps: its number of steps; 0: those of `epochs`.
    **changes: fields below that differ.
  """
  section = ConfigDict(
    {
      "num_steps": num_steps,  # 0: `epochs` says
      "epochs": 0,
      "batch_size": 64,
      "accumulate": 1,  # parts that a batch is worked on in, one after another
      # None: the rate chosen for the cell, in config.rates.
      "lr": config_dict.placeholder(float),
      # Validated, and saved, every so many steps (0: an epoch's), at the start
      # and the end.
      "val_every": 20,
      "log_every": 5,
      # beta: of trades (6), mart (5) and autolora (6). lam: of twins (0.3).
      # smoothing: of the labels of at, half_at and clean, in [0, 1).
      "loss": {
        "name": "at",
        "smoothing": 0.0,
        "beta": config_dict.placeholder(float),
        "lam": config_dict.placeholder(float),
      },
      # Added to the loss: function_space or m2_mix; what is not said is as
      # roli_jax/objectives has it.
      "penalty": {
        "name": "none",
        # For function_space. simulator: adversarial, noise (std) or mixup.
        # distance: kl, symmetric_kl or l2.
        "simulator": "",
        "distance": "",
        "lam_fun": config_dict.placeholder(float),
        "lam_cons": config_dict.placeholder(float),
        "temperature": config_dict.placeholder(float),
        "std": config_dict.placeholder(float),
        # For m2_mix, with zero-shot heads. images: clean or adv.
        "weight": config_dict.placeholder(float),
        "beta": config_dict.placeholder(float),
        "tau": config_dict.placeholder(float),
        "reduction": "",
        "images": "",
      },
      # What it says goes before config.attack, for this stage's training. A
      # loss other than the one that fits: ce, kl, margin, dlr.
      "attack": {
        "name": "",
        "num_steps": config_dict.placeholder(int),
        "step_size": "",
        "random_start": config_dict.placeholder(bool),
        "loss": "",
      },
      # The decay of the trained weights' average, as 0.999, which is validated,
      # saved and tested in their place; 0: none.
      "ema": 0.0,
      # Adversarial weight perturbation: 0.01 with at, 0.005 with trades; 0:
      # none. begin: the share of the stage without.
      "awp": {"gamma": 0.0, "begin": 0.0},
      "optim": {
        "name": "adamw",  # or sgd, muon
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "momentum": 0.9,  # of sgd
        "weight_decay": 0.01,
        "no_decay": (".*bias",),
        # The largest norm of all trained leaves' gradient; 0: any.
        "clip_norm": 1.0,
        # (group, factor) of the rate; groups are backbone, peft and head.
        "multipliers": (),
        # What holds weights to where they began: none, l2sp (lam), ftp (k, mu),
        # spd (lam) or digrap (mu).
        "anchor": {
          "name": "none",
          "lam": config_dict.placeholder(float),
          "k": config_dict.placeholder(float),
          "mu": config_dict.placeholder(float),
        },
        # Whether it holds the head too: exclude or anchor_at_probe; "": not a
        # random one.
        "head": "",
      },
      # The learning rate: warmup, begin and end are shares of the stage.
      "schedule": {"warmup": 0.1, "decay": "cosine"},
      # The training radius: 0 until `begin`, linear to threat.eps at `end`.
      "radius": {"begin": 0.0, "end": 0.0},
    }
  )
  section.update(changes)
  return section


def pgd(num_steps: int) -> ConfigDict:
  """A PGD attack as the RoLI reference makes it, but for `keep`."""
  return ConfigDict(
    {
      "name": "pgd",
      "num_steps": num_steps,
      "step_size": "eps/4",
      "num_restarts": 1,
      "random_start": True,
      "keep": "sample",
      "loss": "ce",
      # For other attacks. None, here and above: the attack's default.
      "num_targets": config_dict.placeholder(int),
      "num_queries": config_dict.placeholder(int),
      "eot": config_dict.placeholder(int),
    }
  )


def autoattack() -> ConfigDict:
  """The standard AutoAttack, at its own budget."""
  attack = pgd(0)
  attack.update(name="autoattack", num_steps=config_dict.placeholder(int))
  return attack


def choose(options: dict, name: str, what: str):
  """Returns the option of that name, or raises a ValueError that lists all."""
  if name not in options:
    raise ValueError(f"unknown {what} {name!r}; there are {', '.join(options)}")
  return options[name]


# What a cell of a table may say; the rest comes from the config.
LINEAR = {"method": "linear", "init": "roli"}
RANLI = {"method": "full", "init": "ranli"}
ROLI = {"method": "full", "init": "roli"}
STD = {"method": "full", "init": "std"}
LONGER = {**RANLI, "probe_steps_added": True}
CURVE = {"curve": True}


def each(seeds: int, *given: dict, **fields) -> tuple[dict, ...]:
  """Cells of so many seeds, with these fields unless they say otherwise."""
  return tuple({"seeds": seeds, **fields, **cell} for cell in given)


def cells(*given: dict) -> dict:
  """The cells of a run, as roli_jax/experiment/stages.py reads them."""
  return {
    "cells": given,
    # Which of them alone runs, from 0; None: all.
    "only": config_dict.placeholder(int),
    # Ensembles of a stage with its probe that are tested: wise_ft, output, vrf.
    "ensembles": (),
  }


def evaluation() -> dict:
  """What --mode=evaluate tests, plan compiles for and publish writes."""
  return {
    "track": "",  # trackers, as tensorboard,wandb; docs/sharing.md
    "output": "",  # the directory that publish writes
    "repo": "",  # OWNER/NAME on Hugging Face's hub, that publish uploads to
    # Devices that plan compiles for without having them, as v5e:2x4, h100:8.
    "target": "",
    "checkpoint": "",  # restored; "": the best one of the last stage
    "radii": (),  # attacked at; (): threat.eps alone, of a curve also `curve`
    # Of the test split, in every test that has no number of its own; 0: all.
    "num_images": 0,
    "num_val_images": 0,  # of the validation split; 0: all
    "save_adv": False,  # whether adversarial images are kept, as npz
    "checks": True,  # whether an AutoAttack comes with a diagnosis
  }
