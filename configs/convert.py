"""A file of weights, from elsewhere to roli_jax or back.

  python -m roli_jax.main --mode=convert --config=configs/convert.py \
      --config.source=FILE --config.output=DIR

Reads safetensors, .npz and PyTorch checkpoints under any name (nothing in them
is executed), says what became of each tensor, and writes
DIR/<model>.safetensors, which any config takes as
--config.backbone.weights=DIR. Of a source that is ours (a bundle, or a run's
checkpoint) --config.format says what to write: DIR/<model>.pth.
"""

from ml_collections import ConfigDict

from roli_jax.configs import common


def get_config() -> ConfigDict:
  return ConfigDict(
    {
      # A file, a directory with a bundle or a checkpoint, or a name that
      # --mode=zoo lists.
      "source": "",
      "output": "",  # a directory
      "model": "",  # its name, or its family's; "": found by shapes
      "format": "",  # timm, torchvision, ...; "": found by names
      # Per channel; (): the file's own, or else the format's.
      "mean": (),
      "std": (),
      "num_classes": 0,  # of a new zero head; 0: the file's classifier
      "image_size": 0,  # that positions are resampled to; 0: the file's
      **common.sizes(),  # of a family; None: what the tensors show
      # The activation of a ViT or residual network: relu, gelu, silu or
      # quick_gelu; "": the model's.
      "act": "",
      "norm_eps": 0.0,  # what normalisations add to variances; 0: the model's
      # A ViT's feature: token or mean, where names don't tell; "": token.
      "pool": "",
      # Which network in a file that has several: ema, state_dict, ...
      "key": "",
      "strict": False,  # whether it is an error that something is assumed
      "cpu_devices": 1,
    }
  )
