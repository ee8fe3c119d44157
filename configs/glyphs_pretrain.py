"""Letters from nothing: the two backbones that ship with the package.

  python -m roli_jax.main --config=configs/glyphs_pretrain.py \
      --workdir=runs/pretrain

Writes `glyph_vit_robust.safetensors` (adversarial training, linf, eps 0.1) and
its twin `glyph_vit_standard.safetensors` (clean training) to the workdir; with
backbone=, after a colon, those of a toy of another family: glyph_vit_token,
glyph_clip, glyph_swin, glyph_convnext, glyph_resnet, glyph_wrn, glyph_preact,
glyph_deit, glyph_mobile, glyph_regnet.
The radius rises from 0 over the first 30% of the steps; without that, training
stays at chance for long.
"""

from ml_collections import ConfigDict

from roli_jax.configs import common, pretrain


def get_config(text: str = "") -> ConfigDict:
  arg = common.parse_arg(text, backbone="glyph_vit")
  config = pretrain.get_config(f"dataset=letters,backbone={arg.backbone}")
  config.data.train_size = 74_000
  config.attack = common.pgd(4)
  config.num_val_images = 0
  config.pretrain = common.stage(
    5000,
    lr=3e-3,
    batch_size=128,
    val_every=500,
    log_every=50,
    radius={"begin": 0.0, "end": 0.3},
  )
  config.cells = (
    {"weights": "robust", "loss": "at"},
    {"weights": "standard", "loss": "clean"},
  )
  return config
