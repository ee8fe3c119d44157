"""Names of residual networks in other formats: rules, as in `name_maps.py`."""

import itertools

Rules = tuple[tuple[str, str], ...]


def _stages(
  count: int, first: int, block: str, *names: tuple[str, str]
) -> Rules:
  """Returns the rules of a ResNet's stages.

  Args:
    count: the number of stages.
    first: the foreign number of the first stage.
    block: the foreign name of a stage's blocks, its number in braces.
    *names: our and the foreign names within a block; \\1 is its number.
  """
  return tuple(
    (
      rf"backbone/stage{i}/block(\d+)/{ours}",
      rf"{block.format(first + i)}.\1.{theirs}",
    )
    for i in range(count)
    for ours, theirs in names
  )


_BN_CONV: Rules = ((r"norm(\d)", r"bn\2"), (r"conv(\d)", r"conv\2"))
_DOWNSAMPLE: Rules = (
  ("shortcut", "downsample.0"),
  ("shortcut_norm", "downsample.1"),
)
RESNET: Rules = (
  ("backbone/stem", "conv1"),
  ("backbone/stem_norm", "bn1"),
  *_stages(4, 1, "layer{}", *_BN_CONV, *_DOWNSAMPLE),
  ("head", "fc"),
)
WIDE_RESNET: Rules = (
  ("backbone/stem", "conv1"),
  *_stages(3, 1, "block{}.layer", *_BN_CONV, ("shortcut", "convShortcut")),
  ("backbone/norm", "bn1"),
  ("head", "fc"),
)


def robust_wrn(shortcut: str, norm: str) -> Rules:
  """Returns the rules of Huang et al.'s WRNs, of 2021 and of 2022.

  Args:
    shortcut: the foreign name of a block's shortcut.
    norm: the foreign name of the last normalisation.
  """
  return (
    ("backbone/stem", "stem_conv"),
    *_stages(3, 0, "blocks.{}.layer", *_BN_CONV, ("shortcut", shortcut)),
    ("backbone/norm", norm),
    ("head", "fc"),
  )


# Stages and blocks are counted from 1.
REGNET: Rules = (
  ("backbone/stem", "stem.conv"),
  ("backbone/stem_norm", "stem.bn"),
  *(
    (
      f"backbone/stage{i}/block{j}/{ours}",
      rf"s{i + 1}.b{j + 1}.{theirs}",
    )
    for i, j in itertools.product(range(4), range(30))
    for ours, theirs in (
      (r"conv(\d)", r"conv\1.conv"),
      (r"norm(\d)", r"conv\1.bn"),
      ("shortcut", "downsample.conv"),
      ("shortcut_norm", "downsample.bn"),
    )
  ),
  ("head", "head.fc"),
)
CIFAR_RESNET: Rules = (
  ("backbone/stem", "conv1"),
  ("backbone/stem_norm", "bn1"),
  *_stages(
    4, 1, "layer{}", *_BN_CONV, ("shortcut", "shortcut.0"),
    ("shortcut_norm", "shortcut.1"),
  ),
  ("head", "linear"),
)  # fmt: skip
PREACT_RESNET: Rules = (
  ("backbone/stem", "conv1"),
  *_stages(4, 1, "layer{}", *_BN_CONV, ("shortcut", "shortcut.0")),
  ("backbone/norm", "bn"),
  ("head", "linear"),
)
_DM_NORMS: Rules = (("norm1", "batchnorm_0"), ("norm2", "batchnorm_1"))
_DM_BLOCK: Rules = (
  *_DM_NORMS,
  ("conv1", "conv_0"),
  ("conv2", "conv_1"),
  ("shortcut", "shortcut"),
  ("excite", "se"),
  ("sparse1", "meansparse_0"),
  ("sparse2", "meansparse_1"),
  ("sparse3", "meansparse_2"),
)
DM_WIDE_RESNET: Rules = (
  ("backbone/stem", "init_conv"),
  *_stages(3, 0, "layer.{}.block", *_DM_BLOCK),
  ("backbone/norm", "batchnorm"),
  ("backbone/sparse", "meansparse_end"),
  ("head", "logits"),
)
DM_PREACT_RESNET: Rules = (
  ("backbone/stem", "conv_2d"),
  *_stages(
    4, 0, "layer_{}", *_DM_NORMS, (r"conv(\d)", r"conv_2d_\2"),
    ("shortcut", "shortcut"),
  ),
  ("backbone/norm", "batchnorm"),
  ("head", "logits"),
)  # fmt: skip
