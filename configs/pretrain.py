"""A backbone from random weights, on any data set.

  python -m roli_jax.main --config=configs/pretrain.py:dataset=cifar10

Arguments, after a colon:
  dataset=folder, with --config.data.root=ROOT, or any other
  backbone=tiny32, or any other
  loss=at|clean: adversarial or ordinary training
  size=32: the side in pixels that images in files are cut to
  cutout=8: the side of a black square in each training image; 0: none

Adversarial training by FGSM from a random start (Wong et al. 2020), in which
accuracy under PGD-10 chooses the checkpoint: an overfitted attack is seen
there. docs/pretraining.md has the recipe, and how to go on from what a run
wrote. It writes BACKBONE_robust.safetensors (or _standard) to the workdir, and
any config takes that as --config.backbone.weights.
"""

from ml_collections import ConfigDict, config_dict

from roli_jax.configs import common

# By the loss: the name of the weights that are made.
NAMES = {"at": "robust", "clean": "standard"}
# In memory, at sizes of their own. Glyphs are neither moved nor flipped.
GLYPHS = ("digits", "letters")
ARRAYS = ("cifar10", "cifar100")


def get_config(text: str = "") -> ConfigDict:
  arg = common.parse_arg(
    text, dataset="folder", backbone="tiny32", loss="at", size="32", cutout="0"
  )  # fmt: skip
  weights = common.choose(NAMES, arg.loss, "loss")
  return ConfigDict(
    {
      "seed": 0,
      "cpu_devices": common.CPU_DEVICES,
      "mesh": common.mesh(),
      "data": common.data(
        arg.dataset,
        0,
        **transforms(arg.dataset, _side(arg, "size"), _side(arg, "cutout")),
      ),
      # The weights that it goes on from, with the head that they have; "":
      # random ones.
      "backbone": common.backbone(arg.backbone, ""),
      "head_init": "small",
      "threat": {
        "norm": "linf",
        "eps": "0.1" if arg.dataset in GLYPHS else "8/255",
      },
      "attack": fgsm_rs(),
      "val_attack": common.pgd(10),
      "eval_attack": common.pgd(20),
      "eval_batch_size": 128,
      "pretrain": common.stage(
        0,
        epochs=30,
        batch_size=128,
        lr=1e-3,
        val_every=0,
        log_every=50,
        ema=0.999,
        loss={"name": arg.loss, "smoothing": 0.1},
        optim={"weight_decay": 0.05},
        radius={"begin": 0.0, "end": 0.3},
      ),
      "test": True,
      "curve": (),
      **common.evaluation(),
      "num_val_images": 1000,
      "rates": (),
      "cells": ({"weights": weights},),
    }
  )


def fgsm_rs() -> ConfigDict:
  """FGSM from a random start, as PGD with one step; with K steps, PGD-K.

  A step is 2.5 / (K + 1) eps long: 1.25 eps of one, eps / 4 of nine.
  """
  attack = common.pgd(1)
  steps = config_dict.FieldReference(1)
  attack.num_steps = steps
  attack.step_size = "eps*" + (2.5 / (steps + 1)).to_str()
  attack.keep = "last"  # nothing is judged
  return attack


def transforms(dataset: str, size: int = 32, cutout: int = 0) -> dict:
  """The transforms of a data set's images, as `common.data` has them.

  Args:
    dataset: the data set's name.
    size: the side in pixels that images in files are cut to.
    cutout: the side of a black square in each training image; 0: none.
  """
  if dataset in GLYPHS:
    return {}
  augment: tuple[str, ...] = (f"pad_crop:{max(size // 8, 1)}", "flip")
  if cutout:
    augment += (f"cutout:{cutout}",)
  if dataset in ARRAYS:
    return {"train_transforms": augment, "eval_transforms": ()}
  return {
    "train_transforms": (f"resize:{size}", f"random_crop:{size}", *augment),
    "eval_transforms": (f"resize:{size}", f"center_crop:{size}"),
  }


def _side(arg: ConfigDict, name: str) -> int:
  if not arg[name].isdecimal():
    raise ValueError(f"{name} is a side in pixels, got {arg[name]!r}")
  return int(arg[name])
