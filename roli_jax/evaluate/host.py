"""Networks that JAX can't trace, called on the host: PyTorch, ONNX, NumPy."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from roli_jax.types import Images, Logits

# NumPy arrays in, whatever NumPy takes for an array out.
Forward = Callable[[np.ndarray], Any]
Backward = Callable[[np.ndarray, np.ndarray], Any]


def foreign(
  fn: Forward, vjp: Backward | None = None
) -> Callable[[Images], Logits]:
  """Returns a function of images for attacks, which calls one on the host.

  Both are given float32 arrays that they may write to, in batches of whatever
  size the evaluation has just then, perhaps from several threads. An image's
  logits must not depend on the others of its batch: PyTorch's modules want
  `eval()` first.

  Args:
    fn: `images -> logits`, [b, h, w, c] in the box to [b, k].
    vjp: `(images, cotangents) -> gradients`, those of
      `(fn(images) * cotangents).sum()` in the images; [b, h, w, c] and [b, k]
      to [b, h, w, c]. None: there is no derivative, and attacks that climb one
      are refused.

  Returns:
    `images -> logits` in float32, for `evaluate.run` without `params`, for
    attacks, and inside `jax.jit`.
  """

  def logits_fn(x: Images) -> Logits:
    # The width is the function's own, and no argument says it.
    some = np.asarray(fn(np.zeros(x.shape, np.float32)))
    if some.ndim != 2 or len(some) != len(x):
      raise ValueError(
        f"expected logits [{len(x)}, classes] for {len(x)} images, got"
        f" {list(some.shape)}"
      )
    return _called(fn, some.shape, x)

  if vjp is None:
    return logits_fn
  with_slope = jax.custom_vjp(logits_fn)
  with_slope.defvjp(
    lambda x: (logits_fn(x), x),
    lambda x, g: (_called(vjp, x.shape, x, g).astype(x.dtype),),
  )
  return with_slope


def _called(
  fn: Callable[..., Any], shape: tuple[int, ...], *args: jax.Array | np.ndarray
) -> jax.Array:
  """Returns what the function makes of the arrays, float32 of that shape."""

  def call(*args: Any) -> np.ndarray:
    # Copies, which can be written to: what JAX gives can't.
    return np.asarray(fn(*(np.array(x, np.float32) for x in args)), np.float32)

  out = jax.ShapeDtypeStruct(shape, np.float32)
  return jax.pure_callback(call, out, *args, vmap_method="sequential")
