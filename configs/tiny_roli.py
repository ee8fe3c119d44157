"""RoLI on photographs: tiny32, fine-tuned adversarially on few images.

  python -m roli_jax.main --config=configs/tiny_roli.py:size=200 \
      --config.backbone.weights=WEIGHTS --workdir=runs/photos

Arguments, after a colon:
  dataset=cifar10, or any other; images in files are cut to 32 x 32
  size=200: how many images to train on
  table=default|longer|methods, and what chooses their rates on validation:
      probe_grid|grid|longer_grid|methods_grid; docs/results.md
"""

from ml_collections import ConfigDict

from roli_jax.configs import common, pretrain
from roli_jax.configs.common import (
  LINEAR,
  LONGER,
  RANLI,
  ROLI,
  STD,
  each,
)

EPS = "8/255"
# Of AdamW, the same for every init. A probe trains a head alone.
RATES = (1e-4, 3e-4, 1e-3)
PROBE_RATES = (1e-2, 1e-1, 1.0)

# (pattern, rate): a stage's rate is that of the first pattern that matches
# <cell>/<stage>/<steps>. Of full fine-tuning, chosen on CIFAR-10's validation
# images at size=200 (docs/photographs.md); others are to be chosen.
CHOSEN = (
  (".*-small-.*/probe/.*", 1e-2),
  (".*-std-.*/probe/.*", 1e-1),
  (".*/probe/.*", 1.0),
  (".*-full-ranli-n200-.*", 1e-3),
  (".*-full-roli-small-n200-.*", 1e-4),
  (".*", 3e-4),
)

SMALL = {"head_init": "small"}
# The backbone has under 8% at 8/255: every seed at half of it, too, by
# eval_attack (""; named, an attack has its own number of steps).
HALF = {"tests": (("", "linf", "4/255", 0, 5),)}
FAST = {"tests": (*HALF["tests"], ("autoattack_fast", "linf", EPS, 100))}
PEFT = tuple(
  {"method": method, "init": init}
  for method in ("bias", "lora")
  for init in ("ranli", "roli")
)
DEFAULT = (
  *each(5, LINEAR, {**RANLI, **FAST}, STD, {**ROLI, **FAST}, **HALF),
  *each(5, LINEAR, {**RANLI, **FAST}, {**ROLI, **FAST}, **SMALL, **HALF),
)
LONG = each(5, LONGER, {**LONGER, **SMALL}, **HALF)
METHODS = each(5, *PEFT, **HALF)


def _grid(cells: tuple[dict, ...], rates: tuple[float, ...]) -> tuple:
  """Two seeds of every cell at every rate."""
  plain = [{k: v for k, v in c.items() if k != "tests"} for c in cells]
  return tuple({**cell, "seeds": 2, "rates": rates} for cell in plain)


# In the order in which they are run: adaptations start from probes at the rate
# that was chosen for those.
TABLES = {
  "probe_grid": _grid(
    tuple({**c, "method": "linear"} for c in DEFAULT if c["init"] != "ranli"),
    PROBE_RATES,
  ),
  "grid": _grid(tuple(c for c in DEFAULT if c["method"] != "linear"), RATES),
  "default": DEFAULT,
  "longer_grid": _grid(LONG, RATES),
  "longer": LONG,
  "methods_grid": _grid(METHODS, RATES),
  "methods": METHODS,
}


def get_config(text: str = "") -> ConfigDict:
  arg = common.parse_arg(text, dataset="cifar10", size="200", table="default")
  if not arg.size.isdecimal():
    raise ValueError(f"size is a number of images, got {arg.size!r}")
  size = int(arg.size)
  few = 0 < size < 1000
  stage = {
    "num_steps": 100 if few else 300,
    "batch_size": 32 if few else 64,
    "val_every": 50 if few else 100,
    "log_every": 10,
  }
  return ConfigDict(
    {
      "seed": 0,
      "cpu_devices": common.CPU_DEVICES,
      "mesh": common.mesh(),
      "data": common.data(
        arg.dataset, size, **pretrain.transforms(arg.dataset)
      ),
      "backbone": common.backbone("tiny32", "robust"),
      "head_init": "kaiming_fan_out",
      "peft": common.methods(),
      "compat": common.compat("false", "tiny32", "full", "roli"),
      "threat": {"norm": "linf", "eps": EPS},
      "attack": common.pgd(7),
      "val_attack": common.pgd(10),
      "eval_attack": common.pgd(20),
      "eval_batch_size": 128,
      "probe": common.stage(**stage),
      "adapt": common.stage(**stage),
      "test": not arg.table.endswith("grid"),
      "curve": (),
      **common.evaluation(),
      "num_images": 500,
      "num_val_images": 300,
      "rates": CHOSEN,
      **common.cells(*common.choose(TABLES, arg.table, "table")),
    }
  )
