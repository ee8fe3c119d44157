"""ConvNeXt (Liu et al. 2022): a convolutional net built like a transformer."""

import functools

from flax import linen as nn

from roli_jax.models import layers
from roli_jax.models.conv import Conv
from roli_jax.models.hooks import Hooks
from roli_jax.models.stem import Convs, ConvStem
from roli_jax.types import Array, Float

_norm = functools.partial(nn.LayerNorm, epsilon=1e-6)


class Block(nn.Module):
  """x + gamma * mlp(norm(depthwise 7 x 7 (x))).

  Attributes:
    sparse: see `ConvNext`.
    hooks: where a method may enter.
  """

  sparse: bool
  hooks: Hooks

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], rate: layers.Rate
  ) -> Float[Array, "b h w c"]:
    """The map after the block; `rate` is that of `layers.drop_path`."""
    width = x.shape[-1]
    y = Conv(width, 7, groups=width, use_bias=True, name="conv")(x)
    y = _norm(name="norm")(y)
    y = layers.Mlp(4 * width, self.hooks.dense, sparse=self.sparse, name="mlp")(
      y
    )
    if self.hooks.branch:
      y = self.hooks.branch(name="branch")(y)
    y = layers.drop_path(self, layers.scaled(self, "gamma", y, 1e-6), rate)
    return x + (layers.MeanSparse(name="sparse")(y) if self.sparse else y)


class Stage(nn.Module):
  """Patches of the stage's stride, normalised; then blocks.

  Attributes:
    width: the number of channels of the stage.
    patch: side of a patch, the stage's stride.
    stem: of the first stage, see `ConvNext`.
    first: whether the stage is the stem, which normalises after the patches,
      where the others do before.
    rates: a rate for each block, see `layers.drop_path`.
    sparse: see `ConvNext`.
    hooks: where a method may enter.
    scan: see `layers.repeat`.
    remat: see `layers.repeat`.
  """

  width: int
  patch: int
  stem: Convs
  first: bool
  rates: tuple[float, ...]
  sparse: bool
  hooks: Hooks
  scan: bool
  remat: bool

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
    x = self._embedded(x)
    make = functools.partial(Block, self.sparse, self.hooks)
    blocks = range(len(self.rates))
    return layers.repeat(
      self, make, blocks, x, self.rates, scan=self.scan, remat=self.remat
    )

  def _embedded(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
    if self.first and self.stem:
      return layers.gelu(ConvStem(self.stem, name="stem")(x))
    norm = _norm(name="patch_norm")
    embed = layers.PatchEmbed(self.patch, self.width, name="embed")
    rows, columns = (side // self.patch for side in x.shape[1:3])
    x = norm(embed(x)) if self.first else embed(norm(x))
    return x.reshape(-1, rows, columns, self.width)


class ConvNext(nn.Module):
  """A ConvNeXt whose feature is the normalised mean of its last map.

  Attributes:
    widths: the number of channels of each stage.
    depths: blocks of each stage.
    patch: side of the stem's patches in pixels.
    stem: convolutions in place of those patches, of their stride: see
      `ConvStem`; empty: there are none.
    sparse: whether `layers.MeanSparse` stands before each activation, and after
      each branch.
    drop_path: the last block's rate of `layers.drop_path`, in training.
    hooks: where a method may enter.
    scan: see `layers.repeat`.
    remat: see `layers.repeat`.
  """

  widths: tuple[int, ...]
  depths: tuple[int, ...]
  patch: int = 4
  stem: Convs = ()
  sparse: bool = False
  drop_path: float = 0.0
  hooks: Hooks = Hooks()
  scan: bool = False
  remat: bool = False

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], *, train: bool = False
  ) -> Float[Array, "b d"]:
    del train  # no running statistics
    make = functools.partial(
      Stage,
      sparse=self.sparse,
      hooks=self.hooks,
      scan=self.scan,
      remat=self.remat,
    )
    rates = layers.drop_rates(self.drop_path, self.depths)
    stages = enumerate(zip(self.widths, rates, strict=True))
    for i, (width, block_rates) in stages:
      patch = 2 if i else self.patch
      x = make(width, patch, self.stem, i == 0, block_rates, name=f"stage{i}")(
        x
      )
    return _norm(name="norm")(x.mean((1, 2)))
