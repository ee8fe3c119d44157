"""Names of networks of inverted residuals: rules, as in `name_maps.py`."""

from roli_jax.convert.residual_names import Rules

_BLOCK = r"backbone/stage(\d+)/block(\d+)"


def _timm(block: str, foreign: str, *parts: tuple[str, str]) -> Rules:
  """Returns the rules of blocks, of our and the foreign names within one."""
  return tuple(
    (f"{block}/{ours}", f"{foreign}.{theirs}") for ours, theirs in parts
  )


# The first stage does not widen, and counts its parts from the second.
MOBILENETV3: Rules = (
  ("backbone/stem", "conv_stem"),
  ("backbone/stem_norm", "bn1"),
  *_timm(
    r"backbone/stage0/block(\d+)", r"blocks.0.\1",
    ("depthwise", "conv_dw"), ("depthwise_norm", "bn1"),
    ("project", "conv_pw"), ("project_norm", "bn2"),
  ),
  *_timm(
    _BLOCK, r"blocks.\1.\2",
    ("expand", "conv_pw"), ("expand_norm", "bn1"),
    ("depthwise", "conv_dw"), ("depthwise_norm", "bn2"),
    ("excite/fc1", "se.conv_reduce"), ("excite/fc2", "se.conv_expand"),
    ("project", "conv_pwl"), ("project_norm", "bn3"),
  ),
  ("backbone/last", "blocks.6.0.conv"),
  ("backbone/last_norm", "blocks.6.0.bn1"),
  ("backbone/wide", "conv_head"),
  ("head", "classifier"),
)  # fmt: skip


def coatnet(gates: str) -> Rules:
  """Returns the rules of timm's CoAtNets, which differ in the name of gates."""
  return (
    ("backbone/stem0", "stem.conv1"),
    ("backbone/stem_norm", "stem.norm1"),
    ("backbone/stem1", "stem.conv2"),
    # A block that attends; the first of a stage has a stride of 2.
    (r"backbone/stage(\d+)/block0/norm1", r"stages.\1.blocks.0.norm1.norm"),
    *_timm(
      _BLOCK, r"stages.\1.blocks.\2",
      ("norm", "pre_norm"),
      ("expand", "conv1_1x1"), ("expand_norm", "norm1"),
      ("depthwise", "conv2_kxk"), ("depthwise_norm", "norm2"),
      ("excite", gates), ("project", "conv3_1x1"),
      ("shortcut", "shortcut.expand"),
      ("attn/[qkv]", "attn.qkv"), ("attn/out", "attn.proj"),
      ("attn/relative_bias", "attn.rel_pos.relative_position_bias_table"),
    ),
    (_BLOCK, r"stages.\1.blocks.\2"),
    ("backbone/norm", "norm"),
    ("head", "head.fc"),
  )  # fmt: skip


# Blocks of each stage of the smallest EfficientNet, whose originals count them
# through.
_DEPTHS = (1, 2, 2, 3, 3, 4, 1)


def _through(foreign: str, *parts: tuple[str, str]) -> Rules:
  """Returns the rules of blocks that are counted from the first to the last.

  Args:
    foreign: the foreign name of a block, its number in braces.
    *parts: our and the foreign names within a block.
  """
  blocks = [(i, j) for i, depth in enumerate(_DEPTHS) for j in range(depth)]
  return tuple(
    (f"backbone/stage{i}/block{j}/{ours}", f"{foreign.format(n)}.{theirs}")
    for n, (i, j) in enumerate(blocks)
    for ours, theirs in parts
  )


EFFICIENTNET: Rules = (
  ("backbone/stem", "_conv_stem"),
  ("backbone/stem_norm", "_bn0"),
  *_through(
    "_blocks.{}",
    ("expand", "_expand_conv"), ("expand_norm", "_bn0"),
    ("depthwise", "_depthwise_conv"), ("depthwise_norm", "_bn1"),
    ("excite/fc1", "_se_reduce"), ("excite/fc2", "_se_expand"),
    ("project", "_project_conv"), ("project_norm", "_bn2"),
  ),
  ("backbone/last", "_conv_head"),
  ("backbone/last_norm", "_bn1"),
  ("head", "_fc"),
)  # fmt: skip
TRANSFORMERS_EFFICIENTNET: Rules = (
  ("backbone/stem", "efficientnet.embeddings.convolution"),
  ("backbone/stem_norm", "efficientnet.embeddings.batchnorm"),
  *_through(
    "efficientnet.encoder.blocks.{}",
    ("expand", "expansion.expand_conv"),
    ("expand_norm", "expansion.expand_bn"),
    ("depthwise", "depthwise_conv.depthwise_conv"),
    ("depthwise_norm", "depthwise_conv.depthwise_norm"),
    ("excite/fc1", "squeeze_excite.reduce"),
    ("excite/fc2", "squeeze_excite.expand"),
    ("project", "projection.project_conv"),
    ("project_norm", "projection.project_bn"),
  ),
  ("backbone/last", "efficientnet.encoder.top_conv"),
  ("backbone/last_norm", "efficientnet.encoder.top_bn"),
  ("head", "classifier"),
)  # fmt: skip
