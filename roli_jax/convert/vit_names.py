"""Names of ViTs in other formats: rules, as in `name_maps.py`."""

from roli_jax.convert.residual_names import Rules

_BLOCK = r"backbone/block(\d+)"

TIMM: Rules = (
  ("backbone/embed", "patch_embed.proj"),
  ("backbone/cls", "cls_token"),
  ("backbone/dist", "dist_token"),
  ("backbone/registers", "reg_token"),
  ("backbone/positions", "pos_embed"),
  (f"{_BLOCK}/attn/[qkv]", r"blocks.\1.attn.qkv"),
  (f"{_BLOCK}/attn/out", r"blocks.\1.attn.proj"),
  (rf"{_BLOCK}/gamma(\d)", r"blocks.\1.ls\2.gamma"),
  (_BLOCK, r"blocks.\1"),
  ("backbone/norm", "norm"),
  ("backbone/fc_norm", "fc_norm"),
  ("head/cls", "head"),
  ("head/dist", "head_dist"),
  ("head", "head"),
)

# These stand in front of timm's rules of other ViTs.
EVA02: Rules = (
  (f"{_BLOCK}/attn/([qkv])", r"blocks.\1.attn.\2_proj"),
  (f"{_BLOCK}/mlp/gate", r"blocks.\1.mlp.fc1_g"),
  (f"{_BLOCK}/mlp/fc1", r"blocks.\1.mlp.fc1_x"),
)
EVA02_FUSED: Rules = (
  (f"{_BLOCK}/attn/([qv])/bias", r"blocks.\1.attn.\2_bias"),
  (f"{_BLOCK}/mlp/gate", r"blocks.\1.mlp.fc1"),
)

_ROLI_BLOCK = r"enc.transformer.encoder.layer.\1"
ROLI: Rules = (
  ("backbone/embed", "enc.transformer.embeddings.patch_embeddings"),
  ("backbone/cls", "enc.transformer.embeddings.cls_token"),
  ("backbone/positions", "enc.transformer.embeddings.position_embeddings"),
  (f"{_BLOCK}/norm1", f"{_ROLI_BLOCK}.attention_norm"),
  (f"{_BLOCK}/norm2", f"{_ROLI_BLOCK}.ffn_norm"),
  (f"{_BLOCK}/attn/q", f"{_ROLI_BLOCK}.attn.query"),
  (f"{_BLOCK}/attn/k", f"{_ROLI_BLOCK}.attn.key"),
  (f"{_BLOCK}/attn/v", f"{_ROLI_BLOCK}.attn.value"),
  (f"{_BLOCK}/mlp", f"{_ROLI_BLOCK}.ffn"),
  (_BLOCK, _ROLI_BLOCK),
  ("backbone/norm", "enc.transformer.encoder.encoder_norm"),
  ("head", "head.last_layer"),
)


def torchvision(fc1: str, fc2: str) -> Rules:
  """Returns torchvision's, which has called the MLP's layers otherwise."""
  block = r"encoder.layers.encoder_layer_\1"
  return (
    ("backbone/embed", "conv_proj"),
    ("backbone/cls", "class_token"),
    ("backbone/positions", "encoder.pos_embedding"),
    (rf"{_BLOCK}/norm(\d)", rf"{block}.ln_\2"),
    (f"{_BLOCK}/attn/[qkv]", f"{block}.self_attention.in_proj_"),
    (f"{_BLOCK}/attn/out", f"{block}.self_attention.out_proj"),
    (f"{_BLOCK}/mlp/fc1", f"{block}.mlp.{fc1}"),
    (f"{_BLOCK}/mlp/fc2", f"{block}.mlp.{fc2}"),
    ("backbone/norm", "encoder.ln"),
    ("head", "heads.head"),
  )


def _resblocks(ours: str, prefix: str = "") -> Rules:
  """Returns open_clip's names of the blocks of either tower."""
  block = rf"{prefix}transformer.resblocks.\1"
  return (
    (rf"{ours}/norm(\d)", rf"{block}.ln_\2"),
    (f"{ours}/attn/[qkv]", f"{block}.attn.in_proj_"),
    (f"{ours}/attn/out", f"{block}.attn.out_proj"),
    (f"{ours}/mlp/fc1", f"{block}.mlp.c_fc"),
    (f"{ours}/mlp/fc2", f"{block}.mlp.c_proj"),
  )


def open_clip(prefix: str = "") -> Rules:
  """The visual tower's names; in a file of both it has a prefix."""
  return (
    ("backbone/embed", f"{prefix}conv1"),
    ("backbone/cls", f"{prefix}class_embedding"),
    ("backbone/positions", f"{prefix}positional_embedding"),
    ("backbone/pre_norm", f"{prefix}ln_pre"),
    *_resblocks(_BLOCK, prefix),
    ("backbone/norm", f"{prefix}ln_post"),
    ("head/kernel", f"{prefix}proj"),
  )


# What open_clip's files hold of the text tower.
TEXTS = (
  "positional_embedding", "text_projection", "logit_scale", "attn_mask",
  r"token_embedding\..*", r"ln_final\..*", r"transformer\..*",
)  # fmt: skip
CLIP_PLAIN = ("class_embedding", "positional_embedding", "proj")

CLIP_TEXT: Rules = (
  ("embed/embedding", "token_embedding.weight"),
  ("positions", "positional_embedding"),
  *_resblocks(r"block(\d+)"),
  ("norm", "ln_final"),
  ("projection/kernel", "text_projection"),
  ("logit_scale", "logit_scale"),
)

_GOOGLE_BLOCK = r"Transformer/encoderblock_\1"
_GOOGLE_ATTENTION = f"{_GOOGLE_BLOCK}/MultiHeadDotProductAttention_1"
GOOGLE: Rules = (
  ("backbone/embed", "embedding"),
  ("backbone/cls", "cls"),
  ("backbone/positions", "Transformer/posembed_input/pos_embedding"),
  (f"{_BLOCK}/norm1", f"{_GOOGLE_BLOCK}/LayerNorm_0"),
  (f"{_BLOCK}/norm2", f"{_GOOGLE_BLOCK}/LayerNorm_2"),
  (f"{_BLOCK}/attn/q", f"{_GOOGLE_ATTENTION}/query"),
  (f"{_BLOCK}/attn/k", f"{_GOOGLE_ATTENTION}/key"),
  (f"{_BLOCK}/attn/v", f"{_GOOGLE_ATTENTION}/value"),
  (f"{_BLOCK}/attn/out", f"{_GOOGLE_ATTENTION}/out"),
  (f"{_BLOCK}/mlp/fc1", f"{_GOOGLE_BLOCK}/MlpBlock_3/Dense_0"),
  (f"{_BLOCK}/mlp/fc2", f"{_GOOGLE_BLOCK}/MlpBlock_3/Dense_1"),
  ("backbone/norm", "Transformer/encoder_norm"),
  ("head", "head"),
)
