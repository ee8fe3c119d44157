"""Names of what has stages, Swin and ConvNeXt, as in `name_maps.py`."""

from roli_jax.convert.residual_names import Rules

_STAGE = r"backbone/stage(\d+)"


def swin(head: str, prefix: str = "", late: bool = False) -> Rules:
  """Swin's names; `late`: a merge belongs to the end of the stage before."""
  block = rf"{prefix}layers.\1.blocks.\2"
  merges = tuple(
    (f"backbone/stage{i}/merge", f"{prefix}layers.{i - late}.downsample")
    for i in range(1, 10)
  )
  return (
    ("backbone/embed", f"{prefix}patch_embed.proj"),
    ("backbone/embed_norm", f"{prefix}patch_embed.norm"),
    *merges,
    (rf"{_STAGE}/block(\d+)/attn/[qkv]", f"{block}.attn.qkv"),
    (rf"{_STAGE}/block(\d+)/attn/out", f"{block}.attn.proj"),
    (
      rf"{_STAGE}/block(\d+)/attn/relative_bias",
      f"{block}.attn.relative_position_bias_table",
    ),
    (rf"{_STAGE}/block(\d+)", block),
    ("backbone/norm", f"{prefix}norm"),
    ("head", head),
  )


# Of the original Swin: what it can make again from its sizes.
SWIN_BUFFERS = (r".*\.relative_position_index", r".*\.attn_mask")


def convnext(prefix: str, *head: tuple[str, str]) -> Rules:
  """timm's names of a ConvNeXt, under a prefix, with those of a head."""
  stage = rf"{prefix}stages.\1"
  return (
    ("backbone/stage0/embed", f"{prefix}stem.0"),
    ("backbone/stage0/patch_norm", f"{prefix}stem.1"),
    (f"{_STAGE}/patch_norm", f"{stage}.downsample.0"),
    (f"{_STAGE}/embed", f"{stage}.downsample.1"),
    (rf"{_STAGE}/block(\d+)/conv", rf"{stage}.blocks.\2.conv_dw"),
    (rf"{_STAGE}/block(\d+)", rf"{stage}.blocks.\2"),
    ("backbone/norm", f"{prefix}head.norm"),
    *head,
  )


CONVNEXT_META: Rules = (
  ("backbone/stage0/embed", "downsample_layers.0.0"),
  ("backbone/stage0/patch_norm", "downsample_layers.0.1"),
  (f"{_STAGE}/patch_norm", r"downsample_layers.\1.0"),
  (f"{_STAGE}/embed", r"downsample_layers.\1.1"),
  (rf"{_STAGE}/block(\d+)/conv", r"stages.\1.\2.dwconv"),
  (rf"{_STAGE}/block(\d+)/mlp/fc(\d)", r"stages.\1.\2.pwconv\3"),
  (rf"{_STAGE}/block(\d+)", r"stages.\1.\2"),
  ("backbone/norm", "norm"),
  ("head", "head"),
)
