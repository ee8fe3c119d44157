"""Layers and loops that several backbones share."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from roli_jax.models.hooks import Hooks
from roli_jax.types import Array, Float, PyTree

# A block's rate of `drop_path`; an array where blocks are one loop.
Rate = float | Float[Array, ""]
Activation = Callable[[jax.Array], jax.Array]


@jax.custom_vjp
def attention(
  q: Float[Array | np.ndarray, "*b m h c"],
  k: Float[Array | np.ndarray, "*b n h c"],
  v: Float[Array | np.ndarray, "*b n h c"],
  bias: float | Float[Array | np.ndarray, "..."] = 0.0,
) -> Float[Array, "*b m h c"]:
  """softmax(q k^T / sqrt(c) + bias) v, the softmax in float32 or wider.

  Its gradient is written out, which takes less time than what JAX derives on a
  CPU (docs/backbones.md). It can be differentiated again.

  Args:
    q: the queries of m tokens, by head.
    k: the keys of n tokens.
    v: the values of the same n tokens.
    bias: added to the scores; broadcasts to [*b, h, m, n].
  """
  return _attend(q, k, v, bias)[0]


def _attend(
  q: Array | np.ndarray,
  k: Array | np.ndarray,
  v: Array | np.ndarray,
  bias: float | Array | np.ndarray,
) -> tuple[Array, tuple[Any, ...]]:
  """Returns the result, and what its gradient needs, heads before tokens."""
  wide = jnp.promote_types(q.dtype, jnp.float32)
  q, k, v = (x.swapaxes(-3, -2) for x in (q, k, v))
  scores = jnp.einsum(
    "...qc,...kc->...qk", _scaled(q), k, preferred_element_type=wide
  )
  weights = jax.nn.softmax(scores + bias).astype(v.dtype)
  mixed = jnp.einsum("...qk,...kc->...qc", weights, v)
  return mixed.swapaxes(-3, -2), (q, k, v, bias, weights, mixed)


def _scaled(q: Array | np.ndarray) -> Array | np.ndarray:
  return q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)


def _attend_backward(
  saved: tuple[Any, ...], g: Float[Array, "*b m h c"]
) -> tuple[Any, ...]:
  q, k, v, bias, weights, mixed = saved
  g = g.swapaxes(-3, -2)
  dv = jnp.einsum("...qk,...qc->...kc", weights, g)
  dweights = jnp.einsum("...qc,...kc->...qk", g, v)
  dscores = weights * (dweights - (g * mixed).sum(-1, keepdims=True))
  dq = _scaled(jnp.einsum("...qk,...kc->...qc", dscores, k))
  dk = jnp.einsum("...qk,...qc->...kc", dscores, _scaled(q))
  _, narrow = jax.vjp(lambda x: jnp.broadcast_to(x, dscores.shape), bias)
  dbias = narrow(dscores.astype(jnp.result_type(bias)))
  return (*(x.swapaxes(-3, -2) for x in (dq, dk, dv)), *dbias)


attention.defvjp(_attend, _attend_backward)


def looped_attention(
  q: Float[Array | np.ndarray, "*b m h c"],
  k: Float[Array | np.ndarray, "*b n h c"],
  v: Float[Array | np.ndarray, "*b n h c"],
  bias: float | Float[Array | np.ndarray, "..."] = 0.0,
) -> Float[Array, "*b m h c"]:
  """`attention`, one head after another; the gradient computes each again.

  One head's scores stay in a TPU's on-chip memory, where those of all heads go
  to its main memory and back several times (docs/chips.md).
  """
  by_head = [jnp.moveaxis(x, -2, 0)[..., None, :] for x in (q, k, v)]
  if jnp.ndim(bias):
    bias = jnp.asarray(bias)
    shape = (*bias.shape[:-3], q.shape[-2], *bias.shape[-2:])
    each = jnp.moveaxis(jnp.broadcast_to(bias, shape), -3, 0)
    by_head.append(each[..., None, :, :])

  def head(one: list[Array]) -> Array:
    return attention(*one)

  mixed = jax.lax.map(jax.checkpoint(head), by_head)
  return jnp.moveaxis(mixed[..., 0, :], 0, -2)


def fused_attention(
  q: Float[Array, "b m h c"],
  k: Float[Array, "b n h c"],
  v: Float[Array, "b n h c"],
) -> Float[Array, "b m h c"]:
  """`attention` in one kernel of cuDNN, which keeps no [n, n] array.

  On NVIDIA GPUs, in half precision, with heads of a multiple of 8 and at most
  128 channels; differentiable once. Its gradient wants an even number of
  tokens, so an odd one gets a last token that nobody attends to.

  Raises:
    ValueError: arrays of another precision.
  """
  if q.dtype not in (jnp.bfloat16, jnp.float16):
    raise ValueError(
      f"fused attention computes in bfloat16 or float16, got {q.dtype}; set"
      " the model's dtype to bfloat16, or take attention=plain"
    )

  def even(x: Float[Array, "b n h c"]) -> Float[Array, "b m h c"]:
    return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))

  b, n = k.shape[:2]
  mixed = jax.nn.dot_product_attention(
    *map(even, (q, k, v)),
    key_value_seq_lengths=jnp.full(b, n, jnp.int32) if n % 2 else None,
    implementation="cudnn",
  )
  return mixed[:, : q.shape[1]]


def causal_attention(
  q: Float[Array, "b n h c"],
  k: Float[Array, "b n h c"],
  v: Float[Array, "b n h c"],
) -> Float[Array, "b n h c"]:
  """`attention` in which a token sees itself and those before it."""
  n = q.shape[1]
  later = jnp.triu(jnp.full((1, 1, n, n), -jnp.inf), 1)
  return attention(q, k, v, later)


ATTENTIONS: dict[str, Callable[..., jax.Array]] = {
  "plain": attention,
  # JAX's own, with a softmax in float32 even of float64. The numbers of the
  # shipped weights are made with it, to the last bit.
  "xla": jax.nn.dot_product_attention,
  "fused": fused_attention,
  "looped": looped_attention,  # for TPUs
}


class Attention(nn.Module):
  """Multi-head self-attention with q, k, v as three projections.

  Attributes:
    num_heads: divides the width.
    attend: mixes the values, as `attention` does.
    hooks: where a method may enter.
    first: the result has this many tokens m, from the first; None: all n.
    key_bias: whether keys have a bias.
  """

  num_heads: int
  attend: Callable[..., jax.Array]
  hooks: Hooks
  first: int | None
  key_bias: bool = True

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b m d"]:
    asking = x[:, : self.first]

    def by_head(name: str, tokens: jax.Array, use_bias: bool) -> jax.Array:
      dense = self.hooks.dense(x.shape[-1], use_bias=use_bias, name=name)
      return dense(tokens).reshape(*tokens.shape[:2], self.num_heads, -1)

    q, k = by_head("q", asking, True), by_head("k", x, self.key_bias)
    mixed = self.attend(q, k, by_head("v", x, True))
    return nn.Dense(x.shape[-1], name="out")(mixed.reshape(asking.shape))


@jax.custom_jvp
def gelu(x: Float[Array | np.ndarray, "*any"]) -> Float[Array, "*any"]:
  """x times the normal distribution up to x, no approximation by tanh.

  Its derivative is computed in the same pass, and kept for the gradient.
  """
  return jnp.multiply(x, _normal_below(x))


def _normal_below(x: Array | np.ndarray) -> Array:
  return 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))


@gelu.defjvp
def _gelu_jvp(
  primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
  (x,), (dx,) = primals, tangents
  below = _normal_below(x)
  density = jnp.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
  return x * below, dx * (below + x * density)


def erfc_gelu(x: Float[Array, "*any"]) -> Float[Array, "*any"]:
  """`gelu` by JAX's formula, which is slower.

  The numbers of the shipped weights are made with it, to the last bit.
  """
  return jax.nn.gelu(x, approximate=False)


def quick_gelu(x: Float[Array, "*any"]) -> Float[Array, "*any"]:
  """x sigmoid(1.702 x), in place of the GELU in OpenAI's own weights."""
  return x * jax.nn.sigmoid(1.702 * x)


ACTS: dict[str, Activation] = {
  "relu": jax.nn.relu,
  "gelu": gelu,
  "silu": jax.nn.silu,
  "quick_gelu": quick_gelu,
}


class MeanSparse(nn.Module):
  """x, or its channel's mean where x is close to it (Amini et al. 2024).

  Close is nearer than `threshold` standard deviations. Mean, variance and
  threshold are set after training, from the data; they are kept among the
  running statistics, and no training moves them. What is replaced has no
  gradient, as in the published networks.
  """

  @nn.compact
  def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
    def kept(name: str, shape: tuple[int, ...]) -> jax.Array:
      values = self.variable("batch_stats", name, jnp.zeros, shape).value
      return jnp.asarray(values, x.dtype)

    channels = (*(1,) * (x.ndim - 1), x.shape[-1])
    mean = kept("mean", channels[-1:]).reshape(channels)
    var = kept("var", channels[-1:]).reshape(channels)
    near = kept("threshold", ()) * jnp.sqrt(var)
    return jnp.where(jnp.abs(x - mean) < near, mean, x)


def scaled(
  module: nn.Module, name: str, x: Float[Array, "... d"], start: float | int
) -> Float[Array, "... d"]:
  """x times a factor of each channel, which `module` learns from `start`."""
  gamma = module.param(name, nn.initializers.constant(start), x.shape[-1:])
  return gamma.reshape(*(1,) * (x.ndim - 1), -1) * x


class Mlp(nn.Module):
  """Two layers with an exact GELU between them.

  Attributes:
    hidden: the width between them.
    dense: makes the layers, called as `nn.Dense` is.
    act: the GELU.
    sparse: whether `MeanSparse` stands before it.
  """

  hidden: int
  dense: Callable[..., nn.Module] = nn.Dense
  act: Activation = gelu
  sparse: bool = False

  @nn.compact
  def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
    hidden = self.dense(self.hidden, name="fc1")(x)
    if self.sparse:
      hidden = MeanSparse(name="sparse")(hidden)
    return self.dense(x.shape[-1], name="fc2")(self.act(hidden))


class PatchEmbed(nn.Module):
  """A convolution whose stride is its size, as one matrix product.

  The kernel has the shape of the convolution's, [patch, patch, c, width]. On a
  CPU a product inside a loop is several times faster than a convolution.

  Attributes:
    patch: side of a patch in pixels; divides the map's sides.
    width: the width d of a token.
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


def drop_path(
  module: nn.Module, x: Float[Array, " b *any"], rate: Rate
) -> Float[Array, " b *any"]:
  """x, or in training for a share of the images zero (Huang et al. 2016).

  What stays is scaled to keep the mean. Training is where the module has keys
  for dropout.

  Args:
    module: whose `__call__` this stands in.
    x: the output of a residual branch.
    rate: the share, in [0, 1).
  """
  never = isinstance(rate, float) and not rate
  if never or not module.has_rng("dropout"):
    return x
  stays = 1 - jnp.asarray(rate, x.dtype)
  shape = (len(x), *(1,) * (x.ndim - 1))
  kept = jax.random.bernoulli(module.make_rng("dropout"), 1.0 - rate, shape)
  return jnp.where(kept, x / stays, 0)


def drop_rates(
  most: float | int, depths: Sequence[int]
) -> list[tuple[float, ...]]:
  """The rate of each block of each stage: linear from 0 to the last's, `most`.

  Args:
    most: in [0, 1).
    depths: blocks of each stage.
  """
  rates = iter(np.linspace(0, most, sum(depths)).tolist())
  return [tuple(itertools.islice(rates, depth)) for depth in depths]


Prompts = Float[Array, "b p d"] | None


def prompts(
  hooks: Hooks,
  x: Float[Array, "b n d"],
  num_prompted: int,
  depth: int,
  fan: int,
) -> tuple[Prompts, list[Prompts]]:
  """Prompts that a method puts before the first block, and into each block.

  Args:
    hooks: the method's hooks.
    x: the tokens.
    num_prompted: this many blocks, from the first, have prompts of their own,
      <= depth; if not all, the others keep what the one before has made of its
      own.
    depth: number of blocks, >= 1.
    fan: see `Hooks.tokens`.

  Returns:
    The first block's prompts, or None; for each block those that replace the
    prompts that come to it, or None.
  """
  if not (hooks.tokens and num_prompted):
    return None, [None] * depth
  each = [
    hooks.tokens(fan=fan, name=f"tokens{i}")(x) for i in range(num_prompted)
  ]
  return each[0], each if num_prompted == depth else [None] * depth


def repeat(
  parent: nn.Module,
  make: Callable[..., nn.Module],
  blocks: range,
  x: Array,
  *each: Sequence[Any],
  scan: bool = False,
  remat: bool = False,
) -> Array:
  """x through the blocks, one after another.

  Args:
    parent: whose `__call__` this stands in.
    make: makes a block, `make(name=...)`, which is called with x.
    blocks: the numbers of the blocks, which name them `block0`, `block1`, ...
    x: tokens or a map, [b, ...]; in a loop its shape stays.
    *each: further arguments of the blocks, one for each of them.
    scan: whether the blocks, which must be alike, are one loop: compiled once
      whatever their number. Their arrays keep their names and shapes, and are
      stacked on the way, which costs a copy of them. Dropout draws other
      numbers.
    remat: whether a block's activations are computed again for its gradient.
  """
  names = [f"block{i}" for i in blocks]
  if not scan or len(names) < 2 or parent.is_initializing():
    for name, *more in zip(names, *each, strict=True):
      block = make(name=name)
      call = nn.remat(type(block).__call__) if remat else type(block).__call__
      x = call(block, x, *more)
    return x

  def stacked(trees: Sequence[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

  alike = {
    collection: stacked([tree[name] for name in names])
    for collection, tree in parent.variables.items()
    if names[0] in tree
  }
  moving = [c for c in alike if parent.is_mutable_collection(c)]
  unbound = make(parent=None)
  keys = {}
  if parent.has_rng("dropout"):
    key = parent.make_rng("dropout")
    keys = {"dropout": jax.random.split(key, len(names))}

  def body(x: Array, block: tuple[PyTree, PyTree, PyTree]) -> tuple[Any, ...]:
    variables, more, keys = block
    return unbound.apply(variables, x, *more, mutable=moving, rngs=keys)

  body = jax.checkpoint(body) if remat else body
  x, moved = jax.lax.scan(body, x, (alike, [stacked(e) for e in each], keys))
  for collection, tree in moved.items():
    for i, name in enumerate(names):
      one = jax.tree.map(lambda leaf, i=i: leaf[i], tree)
      parent.put_variable(collection, name, one)
  return x
