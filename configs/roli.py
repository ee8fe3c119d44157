"""The recipes of RoLI's repository: five data sets, six methods, two inits.

  python -m roli_jax.main --config=configs/roli.py:dataset=cub,method=lora

Arguments, after a colon:
  dataset=cub|stanforddogs|caltech256|cifar10|cifar100|folder
  method=full|linear|bias|lora|adapter|vpt, init=roli|ranli|std
  backbone=swin_b, or any other; tiny32 has defaults that suit two cores, and
      weights that configs/pretrain.py makes
  recipe=l2sp|ftp|spd|digrap|trades|mart|awp|epsilon: what the field adds, at
      its authors' numbers; none of them tuned here
  compat=true: as the reference's code does it, defects included

A robust Swin-B (ARES), linf, eps 8/255, PGD-7 in training and PGD-10 in tests.
Rates, decays and lengths are those that the authors wrote: RanLI's and RoLI's
were tuned apart. roli is the probe first, by the numbers of linear, then the
method; linear is the probe alone; vpt from a probe, which has no recipe of
theirs, takes vpt's own. folder is your own folder of images, by the numbers of
Stanford Dogs. Expected numbers: none yet, these have not been run.
"""

from ml_collections import ConfigDict

from roli_jax.configs import common

BATCH = 64
WARMUP = 10  # epochs

# Epochs, of which the first ten warm up; base rate and weight decay as the
# authors wrote them; prompts.
EPOCHS = {
  "cifar10": 20,
  "cifar100": 20,
  "caltech256": 40,
  "cub": 60,
  "stanforddogs": 40,
}
RECIPES = {
  "cifar10": {
    "linear": (0.05, 0.01),
    "full-ranli": (5e-4, 0.01),
    "full-roli": (1e-4, 0.01),
    "bias-ranli": (0.005, 0.001),
    "bias-roli": (0.005, 0.001),
    "adapter-ranli": (0.05, 0.01),
    "adapter-roli": (0.05, 0.01),
    "lora-ranli": (0.01, 1e-4),
    "lora-roli": (0.001, 1e-4),
    "vpt": (0.5, 0.001),
  },
  "cifar100": {
    "linear": (0.1, 0.001),
    "full-ranli": (5e-4, 0.001),
    "full-roli": (1e-4, 0.001),
    "bias-ranli": (0.005, 0.001),
    "bias-roli": (0.005, 0.01),
    "adapter-ranli": (0.005, 1e-4),
    "adapter-roli": (0.05, 1e-4),
    "lora-ranli": (0.05, 0.0),
    "lora-roli": (0.001, 1e-4),
    "vpt": (0.5, 0.01),
  },
  "caltech256": {
    "linear": (0.5, 0.01),
    "full-ranli": (5e-4, 1e-4),
    "full-roli": (1e-4, 1e-4),
    "bias-ranli": (0.001, 0.01),
    "bias-roli": (1e-5, 0.0),
    "adapter-ranli": (0.005, 1e-4),
    "adapter-roli": (5e-4, 0.0),
    "lora-ranli": (0.001, 1e-4),
    "lora-roli": (1e-4, 1e-4),
    "vpt": (0.05, 0.001),
  },
  "cub": {
    "linear": (1.0, 0.001),
    "full-ranli": (5e-4, 0.001),
    "full-roli": (1e-4, 0.01),
    "bias-ranli": (0.005, 0.001),
    "bias-roli": (5e-4, 1e-4),
    "adapter-ranli": (0.05, 1e-4),
    "adapter-roli": (0.05, 0.001),
    "lora-ranli": (0.005, 1e-4),
    "lora-roli": (0.005, 1e-4),
    "vpt": (0.05, 0.001),
  },
  "stanforddogs": {
    "linear": (1.0, 0.01),
    "full-ranli": (5e-4, 0.01),
    "full-roli": (5e-5, 0.001),
    "bias-ranli": (0.001, 1e-4),
    "bias-roli": (5e-5, 1e-4),
    "adapter-ranli": (0.005, 1e-4),
    "adapter-roli": (1e-4, 1e-4),
    "lora-ranli": (0.005, 1e-4),
    "lora-roli": (0.001, 0.01),
    "vpt": (0.05, 1e-4),
  },
}
TOKENS = {"cub": 20}
RECIPES["folder"] = RECIPES["stanforddogs"]
EPOCHS["folder"] = EPOCHS["stanforddogs"]

# Robust backbones, by our models: published weights by their names, or what
# ships. For another, --config.backbone.weights= says which.
WEIGHTS = {
  "swin_b": "ares:Swin_base_patch4_window7_224",
  "swin_s": "ares:Swin_small_patch4_window7_224",
  "vit_b16": "ares:ViT_base_patch16_224",
  "vit_s16": "ares:ViT_small_patch16_224",
  "convnext_b": "ares:ConvNext_Base",
  "resnet50": "ares:ResNet50",
  "tiny32": "robust",
}


def _stage(
  epochs: int, optimizer: str, recipe: tuple[float, float]
) -> ConfigDict:
  base_rate, decay = recipe
  return common.stage(
    0,
    epochs=epochs,
    batch_size=BATCH,
    lr=base_rate * BATCH / 256,
    val_every=0,
    log_every=50,
    schedule={"warmup": WARMUP / epochs, "decay": "cosine"},
    optim={"name": optimizer, "weight_decay": decay, "clip_norm": 0.0},
  )


def get_config(text: str = "", dataset: str = "cub") -> ConfigDict:
  arg = common.parse_arg(
    text, dataset=dataset, backbone="swin_b", method="full", init="roli",
    table="default", recipe="", compat="false",
  )  # fmt: skip
  common.choose({"default": ()}, arg.table, "table")
  recipes = common.choose(RECIPES, arg.dataset, "dataset")
  epochs = EPOCHS[arg.dataset]
  # A clean probe's adaptation has the numbers of an adversarial one's.
  tuned = "ranli" if arg.init == "ranli" else "roli"
  named = {name: name for name in ("linear", "vpt")}
  known = {name: name for name in (*named, "full", "bias", "adapter", "lora")}
  method = common.choose(known, arg.method, "method")
  recipe = recipes[named.get(method, f"{method}-{tuned}")]
  switches = common.compat(arg.compat, arg.backbone, method, tuned)
  if arg.backbone.startswith("swin"):
    switches["droppath_rate"] = 0.5
  methods = common.methods()
  methods["vpt"]["tokens"] = TOKENS.get(arg.dataset, 10)
  config = ConfigDict(
    {
      "seed": 0,
      "cpu_devices": 1,
      "mesh": common.mesh(),
      "data": common.data(arg.dataset, 0),
      "backbone": common.backbone(arg.backbone, WEIGHTS.get(arg.backbone, "")),
      "head_init": "kaiming_fan_out",
      "peft": methods,
      "compat": switches,
      "threat": {"norm": "linf", "eps": "8/255"},
      "attack": common.pgd(7),
      "val_attack": common.pgd(10),
      "eval_attack": common.pgd(10),
      "eval_batch_size": 64,
      "probe": _stage(epochs, "sgd", recipes["linear"]),
      "adapt": _stage(epochs, "adamw", recipe),
      "test": True,
      "curve": (),
      **common.evaluation(),
      "rates": (),
      **common.cells({"method": method, "init": arg.init}),
    }
  )
  if arg.backbone == "tiny32":
    _make_small(config)
  if arg.recipe:
    common.follow(config, arg.recipe)
  return config


def _make_small(config: ConfigDict) -> None:
  """Makes the run small enough for two cores.

  All of a data set: data.train_size, num_val_images, num_images and the stages'
  num_steps are 0.
  """
  config.cpu_devices = common.CPU_DEVICES
  if config.data.name != "folder":  # which may have fewer
    config.data.train_size = 2000
  config.num_val_images, config.num_images = 500, 1000
  # The backbone has under 8% at 8/255.
  config.curve = ("4/255",)
  tested = {"curve": True, "tests": (("autoattack", "linf", "8/255", 200),)}
  config.cells = tuple({**cell, **tested} for cell in config.cells)
  for section in (config.probe, config.adapt):
    section.num_steps, section.val_every, section.log_every = 300, 100, 10
  # Chosen on CIFAR-10's validation images (docs/photographs.md).
  config.probe.lr = 0.2
