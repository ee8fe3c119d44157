"""Names of variants of transformers in other formats, as in `name_maps.py`.

Of those with a stem of convolutions, of MeanSparse and of XCiT.
"""

from roli_jax.convert.residual_names import Rules

_LAYERS = ("conv", "norm")  # of a `ConvStem`, which has at most four of each


def _singh(ours: str, theirs: str) -> Rules:
  """Returns the rules of a stem of RobustBench's Singh2023Revisiting.

  Args:
    ours: its path.
    theirs: the name of what numbers its layers and activations through.
  """
  return tuple(
    (f"{ours}/{layer}{i}", f"{theirs}.{3 * i + j}")
    for i in range(4)
    for j, layer in enumerate(_LAYERS)
  )


# All these stand in front of the rules of the family.
STEM_CONVNEXT: Rules = _singh("backbone/stage0/stem", "stem.stem")
STEM_VIT: Rules = (
  *_singh("backbone/embed", "patch_embed.proj.stem"),
  ("backbone/embed_out", "patch_embed.proj.stem.12"),
)

_BLOCK = r"backbone/stage(\d+)/block(\d+)"
SPARSE_SWIN: Rules = (
  (rf"{_BLOCK}/sparse(\d)", r"layers.\1.blocks.\2.meansparse\3"),
  (f"{_BLOCK}/sparse_mlp", r"layers.\1.blocks.\2.mlp.meansparse2"),
  (f"{_BLOCK}/mlp/sparse", r"layers.\1.blocks.\2.mlp.meansparse1"),
)
SPARSE_CONVNEXT: Rules = (
  (f"{_BLOCK}/sparse", r"stages.\1.blocks.\2.drop_path.1"),
  (f"{_BLOCK}/mlp/sparse", r"stages.\1.blocks.\2.mlp.act.0"),
)
# Beside these, for the batches that they have their statistics of.
SPARSE_COUNTERS = (r".*\.(flag_update_statistics|batch_num|momentum|epsilon)",)


def xcit(positions: str, *of_class: tuple[str, str]) -> Rules:
  """Returns the rules of an XCiT.

  Args:
    positions: the foreign name of what projects the waves of places.
    *of_class: our and the foreign names of layers of the last two blocks, where
      they aren't the same.
  """
  block, our_block = r"blocks.\1", r"backbone/block(\d+)"
  last, our_last = r"cls_attn_blocks.\1", r"backbone/class(\d+)"
  return (
    *(
      (f"backbone/embed/{layer}{i}", f"patch_embed.proj.{2 * i}.{j}")
      for i in range(4)
      for j, layer in enumerate(_LAYERS)
    ),
    ("backbone/fourier", f"{positions}.token_projection"),
    ("backbone/cls", "cls_token"),
    (f"{our_block}/attn/[qkv]", f"{block}.attn.qkv"),
    (f"{our_block}/attn/out", f"{block}.attn.proj"),
    (f"{our_block}/local/norm", f"{block}.local_mp.bn"),
    (f"{our_block}/local", f"{block}.local_mp"),
    (our_block, block),
    (f"{our_last}/attn/out", f"{last}.attn.proj"),
    *((f"{our_last}/{ours}", f"{last}.{name}") for ours, name in of_class),
    (our_last, last),
    ("backbone/norm", "norm"),
    ("head", "head"),
  )
