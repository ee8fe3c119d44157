"""Weights as they are: clean accuracy and AutoAttack, without a training run.

  python -m roli_jax.main --mode=evaluate --config=configs/evaluate.py \
      --config.backbone.weights=robustbench:cifar10/Linf/Carmon2019Unlabeled \
      --config.data.name=cifar10

Weights with a name (--mode=zoo lists them) bring their model, threat model and
preprocessing, and the accuracies that are stated of them, beside which ours are
set. --mode=prepare with the same words fetches weights and data. Of a file,
--config.threat.norm=linf and --config.threat.eps=8/255 have to be said. Weights
for corruptions want --config.attack=corruptions:standard.

Rows of all weights that are tested in one --workdir stand side by side.
"""

from ml_collections import ConfigDict

from roli_jax.configs import common


def get_config() -> ConfigDict:
  return ConfigDict(
    {
      "seed": 0,
      "cpu_devices": 1,
      "mesh": common.mesh(),
      "data": common.data("cifar10", 0),
      "backbone": common.backbone("", ""),
      "threat": {"norm": "", "eps": ""},  # "": those of the weights' name
      "eval_attack": common.autoattack(),
      "eval_batch_size": 64,
      "curve": (),
      **common.evaluation(),
    }
  )
