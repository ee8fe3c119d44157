"""RoLI on CIFAR-10: the recipe of the paper's repository, full fine-tuning.

  python -m roli_jax.main --config=configs/cifar_roli.py --workdir=runs/cifar

The arguments are those of configs/roli.py, whose data set is CIFAR-10 here:
  python -m roli_jax.main \
      --config=configs/cifar_roli.py:dataset=cifar100,method=lora,init=ranli
Expected numbers: none yet, this has not been run.
"""

from ml_collections import ConfigDict

from roli_jax.configs import roli


def get_config(text: str = "") -> ConfigDict:
  return roli.get_config(text, dataset="cifar10")
