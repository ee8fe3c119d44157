"""What the benchmark times.

python -m roli_jax.main --mode=bench --config=configs/bench.py
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict(
    {
      "cpu_devices": 1,
      "suites": ("import", "compile", "step", "seeds"),
      "model": "glyph_vit",
      "methods": ("full", "linear"),
      "batch_sizes": (64, 128),
      "runs": 20,
    }
  )
