"""What the benchmark times.

python -m roli_jax.main --mode=bench --config=configs/bench.py
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict(
    {
      "cpu_devices": 1,
      "suites": (
        "import",
        "compile",
        "step",
        "recipes",
        "seeds",
        "backbone",
        "autoattack",
        "loader",
      ),
      "model": "glyph_vit",
      "methods": ("full", "linear"),
      "batch_sizes": (64, 128),
      "runs": 20,
      "backbones": ("vit_s16", "vit_b16", "swin_b", "convnext_b", "resnet50"),
      "backbone_batch": 8,
      "backbone_runs": 5,
      "attack_images": 64,  # letters that AutoAttack is timed on
      "loader_runs": 3,
      "loader_images": 400,  # JPEGs that are written for it
      "attack_images_224": 8,  # of 224 x 224, for a few steps; 0: none
    }
  )
