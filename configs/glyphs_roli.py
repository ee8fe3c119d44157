"""Letters -> digits: what RoLI gains, on two CPU cores in some minutes.

  python -m roli_jax.main --config=configs/glyphs_roli.py --workdir=runs/demo

Robust and standard backbones, pretrained on rendered letters, are fine-tuned
adversarially on 50 and on 200 of scikit-learn's handwritten digits (linf, eps
0.1).

Arguments, after a colon:
  table=default|controls|sizes|methods|grid|methods_grid|full
  method=linear|full|bias|lora|adapter|vpt, init=roli|ranli|std: one cell, with
      config.seed
  recipe=adamw|l2sp|ftp|spd|digrap|trades|mart|awp|epsilon: what the field adds,
      at what was chosen by table=recipe_grid; alone it is full RoLI of five
      seeds with all tests, of adamw also ensembles with its probe
  compat=true: as RoLI's reference code does it, defects included
"""

from ml_collections import ConfigDict

from roli_jax.configs import common
from roli_jax.configs.common import (
  CURVE,
  LINEAR,
  LONGER,
  RANLI,
  ROLI,
  STD,
  each,
)

RATES = (3e-4, 1e-3, 3e-3, 1e-2)
PEFT_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # of what trains few weights
PROBE_RATES = (1e-2, 3e-2, 1e-1, 3e-1, 1.0)

# (pattern, rate): a stage's rate is that of the first pattern that matches
# <cell>/<stage>/<steps>. Each is the one of table=grid with the best mean
# validation accuracy (docs/results.md).
CHOSEN = (
  (".*-small-n1000-.*/probe/.*", 3e-2),
  (".*-small-.*/probe/.*", 1e-2),
  (".*-n50-.*/probe/.*", 3e-2),
  ("(standard-.*|.*-n1000-.*)/probe/.*", 1.0),
  (".*/probe/.*", 1e-1),
  (".*-(bias|vpt)-.*", 1e-1),
  (".*-lora-.*", 3e-2),
  (".*-adapter-ranli-.*", 3e-2),
  (".*-adapter-.*", 1e-2),
  ("standard-.*", 1e-2),
  (".*-full-ranli-n1000-.*", 1e-2),
  (".*-full-ranli-n50-.*", 3e-3),
  (".*-n50-.*", 1e-3),
  (".*-ranli-small-n200-.*/120", 1e-3),
  (".*", 3e-3),
)

# What was chosen on validation for each recipe (docs/results.md), in place of
# the authors' numbers.
CHOSEN_RECIPES: dict[str, dict] = {
  "ftp": {"lr": 1e-2},
  "spd": {"optim": {"anchor": {"lam": 0.5}}},
  "digrap": {"optim": {"anchor": {"mu": 0.1}}},
  "epsilon": {"radius": {"begin": 0.0, "end": 0.5}},
}

PEFT = tuple(
  {"method": method, "init": init}
  for method in ("bias", "lora", "adapter", "vpt")
  for init in ("ranli", "roli")
)
# More tests of a cell's first seed: attack, norm, eps, and how many images.
FAST = {"tests": (("autoattack_fast", "linf", "0.1", 100),)}
STANDARD = {
  "tests": (
    *FAST["tests"],
    ("autoattack", "linf", "0.1", 200),
    ("autoattack", "l2", "0.4", 200),
    ("autoattack", "l1", "0.6", 200),
  )
}


def _default(**of_roli) -> tuple[dict, ...]:
  roli = {**ROLI, **CURVE, **of_roli}
  return (
    *each(5, LINEAR, RANLI, ROLI, train_size=50),
    *each(5, LINEAR, {**RANLI, **CURVE}, roli),
    *each(2, LINEAR, RANLI, ROLI, weights="standard"),
  )


DEFAULT = _default(**FAST)
CONTROLS = (
  *each(5, LINEAR, RANLI, LONGER, STD, ROLI),
  *each(5, LINEAR, RANLI, LONGER, STD, ROLI, head_init="small"),
)
SIZES = tuple(
  cell
  for size in (50, 200, 1000)
  for head in ({}, {"head_init": "small"})
  for cell in each(5, LINEAR, RANLI, ROLI, train_size=size, **head)
)
METHODS = each(5, LINEAR, RANLI, ROLI, *PEFT)
FULL = (*_default(**STANDARD), *CONTROLS, *SIZES, *METHODS)


def _grid(table: tuple[dict, ...]) -> tuple[dict, ...]:
  """Every cell of a table at every rate; probes have a grid of their own."""
  cells = []
  for cell in table:
    cell = {k: v for k, v in cell.items() if k not in ("curve", "tests")}
    if cell.get("train_size", 200) != 200:
      cell["seeds"] = 3  # it takes an hour as it is
    # Where a best rate lay at the edge of RATES.
    edge = cell.get("weights") == "standard" or cell.get("train_size") == 1000
    if cell["init"] != "ranli":
      cells.append({**cell, "method": "linear", "rates": PROBE_RATES})
    if cell in each(5, *PEFT):
      edge = cell["method"] in ("bias", "vpt")
      rates = (*PEFT_RATES, 3e-1) if edge else PEFT_RATES
      cells.append({**cell, "rates": rates, "seeds": 3})
    elif cell["method"] != "linear":
      cells.append({**cell, "rates": (*RATES, 3e-2) if edge else RATES})
  # Probes first: adaptations start from theirs, at its chosen rate.
  return tuple(sorted(cells, key=lambda cell: cell["method"] != "linear"))


# Tests of the field's methods, on all seeds or on two.
SEEDS = 5
UNSEEN = (
  ("apgd_t", "linf", "0.1", 50, SEEDS),
  ("apgd_t", "l2", "0.4", 50, SEEDS),
  ("apgd_t", "l1", "0.6", 50, SEEDS),
  ("corruptions:glyphs", "", "", 0, SEEDS),
  ("autoattack_fast", "linf", "0.1", 200, 2),
)
RECIPE = each(SEEDS, {**ROLI, **CURVE, "tests": UNSEEN})
# The two best on validation get AutoAttack as well, on the first seed.
BEST = ("awp", "trades")
STANDARD_TEST = ("autoattack", "linf", "0.1", 200)
RECIPE_GRID = each(3, {**ROLI, "rates": (3e-3, 1e-2)})

TABLES = {
  "recipe": RECIPE,
  "recipe_grid": RECIPE_GRID,
  "default": DEFAULT,
  "controls": CONTROLS,
  "sizes": SIZES,
  "methods": METHODS,
  "grid": _grid(FULL),
  "methods_grid": _grid(METHODS),
  "full": FULL,
}


def get_config(text: str = "") -> ConfigDict:
  arg = common.parse_arg(
    text, dataset="digits", backbone="glyph_vit", method="", init="", table="",
    recipe="", compat="false",
  )  # fmt: skip
  config = ConfigDict(
    {
      # Decides the subset, the head, the order and the noise. Seed k of a cell
      # is this one plus k.
      "seed": 0,
      "cpu_devices": common.CPU_DEVICES,
      "mesh": common.mesh(),
      "data": common.data(arg.dataset, 200),
      "backbone": common.backbone(arg.backbone, "robust"),
      "head_init": "kaiming_fan_out",
      "peft": common.methods(),
      "compat": common.compat(
        arg.compat, arg.backbone, arg.method, arg.init or "roli"
      ),
      "threat": {"norm": "linf", "eps": "0.1"},
      "attack": common.pgd(7),
      "val_attack": common.pgd(10),
      "eval_attack": common.pgd(20),
      "eval_batch_size": 128,
      "probe": common.stage(60),
      "adapt": common.stage(60),
      # Whether stages are tested; those of a grid are not: its rates are
      # chosen on validation.
      "test": True,
      # Radii of the accuracy curve, beside threat.eps.
      "curve": ("0.025", "0.05", "0.075", "0.125", "0.15", "0.175", "0.2"),
      **common.evaluation(),
      "rates": CHOSEN,
      **common.cells(),
    }
  )
  if arg.table and (arg.method or arg.init):
    raise ValueError("a table has its own cells: give it, or method and init")
  if arg.recipe:
    common.follow(config, arg.recipe, CHOSEN_RECIPES)
    config.checks = False  # of 18 evaluations of one architecture
  if arg.method or arg.init:
    cell = {"method": arg.method or "full", "init": arg.init or "roli"}
    config.cells = ({**cell, **CURVE},)
  else:
    table = arg.table or ("recipe" if arg.recipe else "default")
    config.cells = common.choose(TABLES, table, "table")
    if (arg.recipe, table) == ("adamw", "recipe"):
      config.ensembles = ("wise_ft", "output", "vrf")
    if arg.recipe in BEST and table == "recipe":
      tests = (*UNSEEN, STANDARD_TEST)
      config.cells = ({**RECIPE[0], "tests": tests},)
  config.test = not arg.table.endswith("grid")
  return config
