"""Letters -> digits: what RoLI gains, on two CPU cores in a few minutes.

  python -m roli_jax.main --config=configs/glyphs_roli.py --workdir=runs/demo

Robust and standard backbones, pretrained on rendered letters, are fine-tuned
adversarially on 200 of scikit-learn's handwritten digits (linf, eps 0.1).
Arguments, after a colon: `table=default|controls|sizes|grid|full`, or one cell
by `method=linear|full|bias` and `init=roli|ranli|std`.
"""

from ml_collections import ConfigDict

from configs import common

GRID = (3e-4, 1e-3, 3e-3, 1e-2)


def get_config(arg: str = "") -> ConfigDict:
  arg = common.parse_arg(
      arg, dataset="digits", backbone="glyph_vit", method="", init="", table=""
  )
  config = ConfigDict({
      # Of the subset, the head, the order and the noise. Seed k of a cell is
      # this one plus k.
      "seed": 0,
      "data": {"name": arg.dataset, "train_size": 200},
      "backbone": {"name": arg.backbone, "weights": "robust"},
      "head_init": "kaiming_fan_out",
      "threat": {"norm": "linf", "eps": "0.1"},
      "attack": common.pgd(7),
      "val_attack": common.pgd(10),
      "eval_attack": common.pgd(20),
      "eval_batch_size": 128,
      "probe": common.stage(60),
      "adapt": common.stage(60),
      "test": True,
      # Radii of the accuracy curve, beside threat.eps.
      "curve": ("0.025", "0.05", "0.075", "0.125", "0.15", "0.175", "0.2"),
      # What --mode=evaluate restores ("": the best checkpoint of the last
      # stage), and the radii that it attacks at ((): threat.eps alone).
      "checkpoint": "",
      "radii": (),
      "rates": ((".*/probe/.*", 1e-1), (".*", 3e-3)),
      "grid": GRID,
      "cells": (),
  })
  if arg.method or arg.init:
    config.cells = ({
        "method": arg.method or "full",
        "init": arg.init or "roli",
        "curve": True,
    },)
  else:
    config.cells = TABLES[arg.table or "default"]
  return config


def _cells(weights: str, seeds: int, *cells: dict) -> tuple[dict, ...]:
  return tuple({"weights": weights, "seeds": seeds, **cell} for cell in cells)


LINEAR = {"method": "linear", "init": "roli"}
RANLI = {"method": "full", "init": "ranli"}
ROLI = {"method": "full", "init": "roli"}
STD = {"method": "full", "init": "std"}
SMALL = {**RANLI, "head_init": "small"}

DEFAULT = (
    *_cells("robust", 5, LINEAR, {**RANLI, "curve": True}, {**ROLI, "curve": True}),
    *_cells("standard", 2, LINEAR, RANLI, ROLI),
)
TABLES = {"default": DEFAULT}
