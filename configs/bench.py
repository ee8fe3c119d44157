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
        "against_torch",  # a line says so where torch is not installed
        "memory",
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
      "torch_models": ("vit_s16", "vit_b16"),
      "torch_batch": 8,  # on a CPU
      "torch_pairs": 10,  # of a step of ours and one of each of PyTorch's
      # On a GPU. Let JAX leave some of its memory to PyTorch:
      # XLA_PYTHON_CLIENT_PREALLOCATE=false.
      "torch_batch_sizes_gpu": (64, 128, 256),
      "torch_attention_gpu": "fused",  # of ours: see models.with_options
      "memory_models": ("vit_b16", "swin_b"),
      "memory_methods": ("full", "linear", "lora"),
      "memory_batch": 64,
      "backbones": ("vit_s16", "vit_b16", "swin_b", "convnext_b", "resnet50"),
      "backbone_batch": 8,
      "backbone_runs": 5,
      "attack_images": 64,  # letters that AutoAttack is timed on
      "loader_runs": 3,
      "loader_images": 400,  # JPEGs that are written for it
      "attack_images_224": 8,  # of 224 x 224, for a few steps; 0: none
    }
  )
