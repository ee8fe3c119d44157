"""The Guide benchmark: six data sets, two losses, three protocols and two more.

  python -m roli_jax.main \
      --config=configs/guide.py:dataset=flowers,loss=trades,protocol=fft50

Arguments, after a colon:
  dataset=caltech101|aircraft|flowers|pets|cars|uc_merced
  loss=at|trades
  protocol=fft5|fft50|lp50: the Guide's; roli|roli_peft: ours
  backbone=convnext_base.fb_in22k: an id of the Guide's, or a model of ours;
      its weights are looked for in weights/<backbone>
  method=lora|bias|adapter|vpt, of roli_peft

"A Guide to Robust Generalization" (Heuillet et al. 2025, arXiv 2508.14079). The
attack, the loss, the tests and AdamW's settings are its repository's; rates and
decays are the vector that most of its stored searches ended with. What is not
as in the Guide: a plain batch of 1,024 where it accumulates gradients (take
--config.adapt.batch_size= and .probe.batch_size= that fit); one decay for
backbone and head, the backbone's; float32, not mixed precision; and the best
epoch by validation is tested, not the last. All of it, and how to search rates,
is in docs/guide.md. Expected numbers: none yet, these have not been run.

roli and roli_peft are ours: 50 epochs of LP, then 50 of the method from that
head, at rates of our own choice that nothing has tuned.
"""

from ml_collections import ConfigDict

from roli_jax.configs import common

DATASETS = ("caltech101", "aircraft", "flowers", "pets", "cars", "uc_merced")

# What a protocol trains: epochs, method, init of the head.
PROTOCOLS = {
  "fft5": (5, "full", "ranli"),
  "fft50": (50, "full", "ranli"),
  "lp50": (50, "linear", "roli"),
  "roli": (50, "full", "roli"),
  "roli_peft": (50, "", "roli"),
}
PEFT = ("lora", "bias", "adapter", "vpt")
LOSSES = {"at": {"name": "at"}, "trades": {"name": "trades", "beta": 1.0}}

# Full fine-tuning: the backbone's and the head's rate, decay. Linear probe:
# rate, decay.
LR, HEAD_LR, DECAY = 1.2165e-4, 3.996e-3, 1.001e-6
PROBE_LR, PROBE_DECAY = 1.2165e-4, 7.608e-4
# Ours: a probe that is to be started from has to converge in few steps.
ROLI_PROBE_LR, PEFT_LR = 1e-2, 1e-3

# Our models by what stands before the dot in the Guide's ids.
MODELS = {
  "coatnet_0_rw_224": "coatnet_0_rw",
  "coatnet_2_rw_224": "coatnet_2_rw",
  "convnext_base": "convnext_b",
  "convnext_tiny": "convnext_t",
  "deit_small_patch16_224": "deit_s16",
  "deit_tiny_patch16_224": "deit_ti16",
  "efficientnet-b0": "efficientnet_b0",
  "eva02_base_patch14_224": "eva02_b14",
  "eva02_tiny_patch14_224": "eva02_ti14",
  "mobilenetv3_large_100": "mobilenetv3_l",
  "swin_base_patch4_window7_224": "swin_b",
  "swin_tiny_patch4_window7_224": "swin_t",
  "vit_base_patch16_224": "vit_b16",
  "vit_base_patch16_clip_224": "clip_vit_b16",
  "vit_small_patch16_224": "vit_s16",
}

# Attack, norm, eps, number of images (0: all).
TESTS = (
  ("autoattack", "linf", "4/255", 0),
  ("autoattack", "l2", "2.0", 0),
  ("autoattack", "l1", "75", 0),
  ("corruptions:guide", "", "3", 0),  # severity 3
)


def _apgd() -> ConfigDict:
  """From the image itself, first step 2 eps, halved by the loss."""
  attack = common.pgd(10)
  attack.update(name="apgd_ce", random_start=False)
  return attack


def _stage(
  epochs: int, loss: str, lr: float, decay: float, head: float
) -> ConfigDict:
  return common.stage(
    0,
    epochs=epochs,
    batch_size=1024,
    lr=lr,
    val_every=0,
    log_every=1,
    loss=LOSSES[loss],
    schedule={"warmup": 0.0, "decay": "constant"},
    optim={
      "b2": 0.95,
      "weight_decay": decay,
      "no_decay": (".*bias", ".*norm.*"),
      "clip_norm": 0.0,
      "multipliers": (("head", head),),
    },
  )


def get_config(text: str = "") -> ConfigDict:
  arg = common.parse_arg(
    text, dataset="caltech101", loss="trades", protocol="fft50",
    backbone="convnext_base.fb_in22k", method="",
  )  # fmt: skip
  common.choose(dict.fromkeys(DATASETS), arg.dataset, "dataset")
  common.choose(LOSSES, arg.loss, "loss")
  epochs, method, init = common.choose(PROTOCOLS, arg.protocol, "protocol")
  if arg.method and arg.protocol != "roli_peft":
    raise ValueError(f"method= belongs to protocol=roli_peft; got {text!r}")
  if not method:
    method = arg.method or "lora"
    common.choose(dict.fromkeys(PEFT), method, "method")
  family = arg.backbone.removeprefix("robust_").partition(".")[0]
  name = MODELS.get(family, family)
  backbone = common.backbone(name, f"weights/{arg.backbone}")
  # As in the Guide, whose training moves them.
  backbone["updates_stats"] = name.startswith(
    ("coatnet", "efficientnet", "mobilenet", "regnet", "resnet")
  )
  lr, head = {
    ("full", "ranli"): (LR, HEAD_LR / LR),
    ("full", "roli"): (LR, 1.0),  # one rate, as RoLI has it
  }.get((method, init), (PEFT_LR, 1.0))
  probe_lr = PROBE_LR if arg.protocol == "lp50" else ROLI_PROBE_LR
  return ConfigDict(
    {
      "seed": 0,
      "cpu_devices": 1,
      "mesh": common.mesh(),
      "data": common.data(arg.dataset, 0),
      "backbone": backbone,
      # The nearest to PyTorch's own, U(+-1 / sqrt(d)), which the Guide has.
      "head_init": "small",
      "peft": common.methods(),
      "compat": common.compat("false", name, method, init),
      "threat": {"norm": "linf", "eps": "4/255"},
      "attack": _apgd(),
      "val_attack": _apgd(),
      "eval_attack": common.autoattack(),
      "eval_batch_size": 64,
      "probe": _stage(50, arg.loss, probe_lr, PROBE_DECAY, 1.0),
      "adapt": _stage(epochs, arg.loss, lr, DECAY, head),
      "test": True,
      "curve": (),
      **common.evaluation(),
      "rates": (),
      **common.cells({"method": method, "init": init, "tests": TESTS}),
    }
  )
