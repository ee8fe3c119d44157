"""RoLI on CIFAR: the recipe of the paper's repository, full fine-tuning.

  python -m roli_jax.main --config=configs/cifar_roli.py --workdir=runs/cifar

A robust Swin-B (ARES), linf, eps 8/255. Arguments, after a colon:
dataset=cifar10|cifar100, backbone=, method=full|linear|bias, init=roli|ranli.
Rates and lengths are the reference's; validation is once an epoch. Expected
numbers: none yet, this has not been run.
"""

from ml_collections import ConfigDict

from configs import common

NUM_TRAIN, BATCH = 45_000, 64
EPOCHS, WARMUP = 20, 10

# Peak rates: base rate * 64 / 256.
RATES = {
  "cifar10": (
    (".*/probe/.*", 0.0125),
    (".*-full-roli-.*", 2.5e-5),
    (".*-full-ranli-.*", 1.25e-4),
    (".*-bias-.*", 1.25e-3),
  ),
  "cifar100": (
    (".*/probe/.*", 0.025),
    (".*-full-roli-.*", 2.5e-5),
    (".*-full-ranli-.*", 1.25e-4),
    (".*-bias-.*", 1.25e-3),
  ),
}

ORIGIN = """\
the robust Swin-B of ARES 2.0 is
  ml.cs.tsinghua.edu.cn/~xiaoyang/aresbench/ckpt-imagenet/\
ARES_Swin_base_patch4_window7_224_AT.pth
Convert it, --mode=convert --config=configs/convert.py --config.source=THAT.pth
--config.output=weights, and give --config.backbone.weights=weights."""


def _stage(**changes) -> ConfigDict:
  an_epoch = NUM_TRAIN // BATCH
  return common.stage(
    EPOCHS * an_epoch,
    batch_size=BATCH,
    val_every=an_epoch,
    log_every=50,
    schedule={"warmup": WARMUP / EPOCHS, "decay": "cosine"},
    **changes,
  )


def get_config(text: str = "") -> ConfigDict:
  arg = common.parse_arg(
    text, dataset="cifar10", backbone="swin_b", method="full", init="roli"
  )
  return ConfigDict(
    {
      "seed": 0,
      "cpu_devices": 1,
      "data": {"name": arg.dataset, "train_size": NUM_TRAIN},
      "backbone": common.backbone(arg.backbone, "ares", ORIGIN),
      "head_init": "kaiming_fan_out",
      "threat": {"norm": "linf", "eps": "8/255"},
      "attack": common.pgd(7),
      "val_attack": common.pgd(10),
      "eval_attack": common.pgd(10),
      "eval_batch_size": 64,
      "probe": _stage(optim={"name": "sgd", "clip_norm": 0.0}),
      "adapt": _stage(optim={"name": "adamw", "clip_norm": 0.0}),
      "test": True,
      "curve": (),
      **common.evaluation(),
      "rates": common.choose(RATES, arg.dataset, "dataset"),
      "cells": ({"method": arg.method, "init": arg.init},),
    }
  )
