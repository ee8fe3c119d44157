"""What two backbones share."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from roli_jax.models.seams import Seams
from roli_jax.types import Array, Float


def plain_attention(
  q: Float[Array, "*b n h c"],
  k: Float[Array, "*b n h c"],
  v: Float[Array, "*b n h c"],
  bias: Any = 0.0,
) -> Float[Array, "*b n h c"]:
  """softmax(q k^T / sqrt(c) + bias) v, the softmax in float32 or wider."""
  wide = jnp.promote_types(q.dtype, jnp.float32)
  scores = jnp.einsum(
    "...qhc,...khc->...hqk", q, k, preferred_element_type=wide
  )
  scores = scores * jnp.asarray(q.shape[-1] ** -0.5, wide) + bias
  weights = jax.nn.softmax(scores).astype(v.dtype)
  return jnp.einsum("...hqk,...khc->...qhc", weights, v)


def attention(
  q: Float[Array, "b n h c"],
  k: Float[Array, "b n h c"],
  v: Float[Array, "b n h c"],
) -> Float[Array, "b n h c"]:
  """The same by JAX's own, whose softmax is float32 whatever it is given."""
  if q.dtype == jnp.float64:
    return plain_attention(q, k, v)
  return jax.nn.dot_product_attention(q, k, v)


def fused_attention(
  q: Float[Array, "b n h c"],
  k: Float[Array, "b n h c"],
  v: Float[Array, "b n h c"],
) -> Float[Array, "b n h c"]:
  """The same in one kernel of cuDNN, which keeps no [n, n] array.

  On NVIDIA GPUs, in half precision, with heads of a multiple of 8 and at most
  128 channels; differentiable once. Its gradient wants an even number of
  tokens, so an odd one gets a last token that nobody attends to.

  Raises:
    ValueError: arrays of another precision.
  """
  if q.dtype not in (jnp.bfloat16, jnp.float16):
    raise ValueError(
      f"fused attention computes in bfloat16 or float16, got {q.dtype}; set"
      " the model's dtype to bfloat16, or take attention=xla"
    )
  b, n = q.shape[:2]
  pad = ((0, 0), (0, n % 2), (0, 0), (0, 0))
  mixed = jax.nn.dot_product_attention(
    *(jnp.pad(x, pad) for x in (q, k, v)),
    key_value_seq_lengths=jnp.full(b, n, jnp.int32) if n % 2 else None,
    implementation="cudnn",
  )
  return mixed[:, :n]


ATTENTIONS = {"xla": attention, "fused": fused_attention}


class Attention(nn.Module):
  """Multi-head self-attention with q, k, v as three projections.

  Attributes:
    num_heads: divides the width.
    seams: where a method may enter.
    kind: which of `ATTENTIONS`.
  """

  num_heads: int
  seams: Seams = Seams()
  kind: str = "xla"

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    heads = (*x.shape[:2], self.num_heads, -1)
    q, k, v = (
      self.seams.dense(x.shape[-1], name=name)(x).reshape(heads)
      for name in ("q", "k", "v")
    )
    mixed = ATTENTIONS[self.kind](q, k, v)
    return nn.Dense(x.shape[-1], name="out")(mixed.reshape(x.shape))


def exact_gelu(x: Float[Array, "*any"]) -> Float[Array, "*any"]:
  """x times the normal distribution up to x, no approximation by tanh."""
  return nn.gelu(x, approximate=False)


class Mlp(nn.Module):
  """Two layers with an exact GELU between them.

  Attributes:
    hidden: the width between.
    dense: makes the layers.
  """

  hidden: int
  dense: Callable[..., nn.Module] = nn.Dense

  @nn.compact
  def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
    hidden = exact_gelu(self.dense(self.hidden, name="fc1")(x))
    return self.dense(x.shape[-1], name="fc2")(hidden)


class PatchEmbed(nn.Module):
  """A convolution whose stride is its size, as one matrix product.

  The kernel has the shape of the convolution's, [patch, patch, c, width]. On a
  CPU a product inside a loop is several times faster than a convolution.

  Attributes:
    patch: side of a patch; divides the map's sides.
    width: channels after it.
    use_bias: whether a bias is added.
  """

  patch: int
  width: int
  use_bias: bool = True

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b n d"]:
    b, h, w, c = x.shape
    p = self.patch
    if h % p or w % p:
      raise ValueError(f"patches of {p} do not tile images of {h} x {w}")
    kernel = self.param(
      "kernel", nn.initializers.lecun_normal(), (p, p, c, self.width)
    )
    x = x.reshape(b, h // p, p, w // p, p, c).swapaxes(2, 3)
    x = x.reshape(b, (h // p) * (w // p), p * p * c)
    x = x @ kernel.reshape(-1, self.width)
    if not self.use_bias:
      return x
    bias = self.param("bias", nn.initializers.zeros, (self.width,))
    return x + bias.reshape(1, 1, -1)


class Conv(nn.Module):
  """A convolution; one of 1 x 1 is a matrix product.

  Attributes:
    width: channels after it.
    size: side of the kernel, odd.
    stride: of both sides.
    groups: 1, or as many as there are channels (depthwise).
    use_bias: whether a bias is added.
    same: whether a stride's odd padding stands after, as in TensorFlow and
      Haiku; otherwise it is half the kernel on each side, as in PyTorch.
  """

  width: int
  size: int
  stride: int = 1
  groups: int = 1
  use_bias: bool = False
  same: bool = False

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
    shape = (self.size, self.size, x.shape[-1] // self.groups, self.width)
    # He et al. 2015, by fan-out, as ResNets begin.
    start = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
    kernel = self.param("kernel", start, shape)
    x, kernel = nn.dtypes.promote_dtype(x, kernel)
    if self.size == 1:
      x = x[:, :: self.stride, :: self.stride] @ kernel[0, 0]
    else:
      x = jax.lax.conv_general_dilated(
        x,
        kernel,
        (self.stride, self.stride),
        "SAME" if self.same else ((self.size // 2, self.size // 2),) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=self.groups,
      )
    if not self.use_bias:
      return x
    bias = self.param("bias", nn.initializers.zeros, (self.width,))
    return x + bias.reshape(1, 1, 1, -1)


def repeat(
  parent: nn.Module,
  make: Callable[..., nn.Module],
  names: Sequence[str],
  x: Any,
  *each: Sequence[Any],
  scan: bool = False,
  remat: bool = False,
) -> Any:
  """x through a block for each name, one after another.

  Args:
    parent: whose `__call__` this stands in.
    make: makes a block, `make(name=...)`, which is called with x.
    names: of the blocks.
    x: any tree of arrays; a block keeps its shapes.
    *each: further arguments of the blocks, one for each name.
    scan: whether the blocks, which must be alike, are one loop: compiled once
      whatever their number. Their arrays keep their names and shapes, and are
      stacked on the way, which costs a copy of them.
    remat: whether a block's activations are computed again for its gradient.
  """
  if not scan or len(names) < 2 or parent.is_initializing():
    for name, *more in zip(names, *each, strict=True):
      block = make(name=name)
      call = nn.remat(type(block).__call__) if remat else type(block).__call__
      x = call(block, x, *more)
    return x

  def stacked(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

  alike = {
    collection: stacked([tree[name] for name in names])
    for collection, tree in parent.variables.items()
    if names[0] in tree
  }
  moving = [c for c in alike if parent.is_mutable_collection(c)]
  unbound = make(parent=None)

  def body(x, these):
    variables, more = these
    return unbound.apply(variables, x, *more, mutable=moving)

  body = jax.checkpoint(body) if remat else body
  x, moved = jax.lax.scan(body, x, (alike, [stacked(e) for e in each]))
  for collection, tree in moved.items():
    for i, name in enumerate(names):
      one = jax.tree.map(lambda leaf, i=i: leaf[i], tree)
      parent.put_variable(collection, name, one)
  return x
