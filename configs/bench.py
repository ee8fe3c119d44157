"""What the benchmark times.

python -m roli_jax.main --mode=bench --config=configs/bench.py
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict(
    {
      "cpu_devices": 1,
      "suites": ("import", "compile", "step", "seeds", "autoattack"),
      "model": "glyph_vit",
      "methods": ("full", "linear"),
      "batch_sizes": (64, 128),
      "runs": 20,
      "attack_images": 64,  # letters that AutoAttack is timed on
      "attack_images_224": 8,  # of 224 x 224, for a few steps; 0: none
    }
  )
