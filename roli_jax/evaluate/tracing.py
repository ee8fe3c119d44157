"""A user's function, traced and compiled, and never out of date.

What is compiled for a function holds what that read outside its arguments when
it was traced: a weight in a closure, a flag, a module's mode. Used again after
one of these has changed, it would give the numbers of before.
"""

import functools
import inspect
import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import ClosedJaxpr, Jaxpr

from roli_jax import keys, trees
from roli_jax.attacks import search
from roli_jax.files import journal


class Programs:
  """What is compiled for one function; it dies with this object.

  Attributes:
    fn: `(params, images, keys) -> logits` in float32.
    num_classes: the width of its logits.
    no_slope: why JAX can't differentiate it, "" where it can.
    is_fickle: whether it is another function each time it is traced, as with
      random numbers that NumPy draws in it.

  Args:
    fn: the function.
    num_classes: its own.
    no_slope: its own.
    is_fickle: its own.
    is_stale: whether JAX knows parts of it as they were.
  """

  def __init__(
    self,
    fn: Callable[..., Any],
    num_classes: int,
    no_slope: str = "",
    is_fickle: bool = False,
    is_stale: bool = False,
  ):
    self.fn, self.num_classes, self.no_slope = fn, num_classes, no_slope
    self.is_fickle = is_fickle
    self._compiled: dict[Callable[..., Any], Callable[..., Any]] = {}
    self._is_stale = is_stale

  def compiled(self, program: Callable[..., Any], **options: Any) -> Any:
    """`program` with the function as its first argument, jitted.

    Args:
      program: a function of a module, `(fn, *args) -> result`.
      **options: keywords of `jax.jit`; argument 0 is the first after `fn`.
    """
    if program not in self._compiled:
      fn = self.fn
      # A closure of this object: JAX's caches know it weakly.
      jitted = jax.jit(lambda *args: program(fn, *args), **options)
      self._compiled[program] = _apart(jitted) if self._is_stale else jitted
    return self._compiled[program]


# By the identity of a function: a weak reference to it, and for each kind of
# arguments a digest of all that was traced, with what is compiled.
_KNOWN: dict[Any, tuple[Any, dict[Any, tuple[str, Programs]]]] = {}

# Those that read nothing but their arguments, by their value.
_PURE: dict[Any, dict[Any, tuple[str, Programs]]] = {}

_contexts = itertools.count()


def _apart(fn):
  """The function, in whose traces JAX uses no trace of before.

  An inner `jit` or `checkpoint` keeps what it read outside its arguments when
  it was first traced at these shapes: weights that have changed since.
  """
  name = str(next(_contexts))

  def call(*args):
    with set_xla_metadata(roli_jax=name):
      return fn(*args)

  return call


def programs(
  logits_fn: Callable[..., Any],
  params: Any,
  shape: tuple[int, ...],
  *,
  stochastic: bool = False,
) -> Programs:
  """The programs of `([params,] images[, key]) -> logits`.

  Without params the function is traced anew in each call. With params what is
  compiled is kept as long as the function lives. In each call the function is
  traced to see whether it, or an array that it reads outside its arguments, has
  changed since; then it is compiled anew. A function that says `is_pure`, as
  those of `step.make_predict` do, reads nothing but its arguments: what was
  traced once is right for good, for all functions that are equal to it.

  Args:
    logits_fn: the function; nothing has to be hashable.
    params: a tree of arrays, or None.
    shape: [b, h, w, c] of the images that it is tried on.
    stochastic: whether it takes a key last.

  Raises:
    ValueError: a function that can't be traced or gives no logits, or params
      that are no arrays.
  """
  if not callable(logits_fn):
    raise ValueError(
      f"logits_fn must be a function, got {type(logits_fn).__name__}"
    )
  pure = getattr(logits_fn, "is_pure", False)
  avals = _shapes(params)
  images = jax.ShapeDtypeStruct(shape, jnp.float32)
  image_keys = jax.eval_shape(keys.per_image, keys.root(0), np.arange(shape[0]))
  args = (avals, images, image_keys)
  known = {} if params is None else _known(logits_fn, pure)
  kind = (stochastic, str(jax.tree.flatten(args)))
  if pure and kind in known:
    return known[kind][1]
  keeps = pure or params is None
  get = (lambda: logits_fn) if keeps else _weakly(logits_fn)
  fn = _normal(get, params is not None, stochastic)
  num_classes = _num_classes(logits_fn, fn, args)

  def in_float32(*args):
    return fn(*args).astype(jnp.float32)

  if pure:
    digest, made = "", Programs(in_float32, num_classes)
  else:
    plain, no_slope = _traced(in_float32, args)
    digest = _digest(_apart(_traced)(in_float32, args)[0])
    if digest and kind in known and known[kind][0] == digest:
      return known[kind][1]
    is_stale = digest != _digest(plain)
    is_fickle = False
    if is_stale:
      again, _ = _apart(_traced)(in_float32, args)
      is_fickle = digest != _digest(again)
    made = Programs(in_float32, num_classes, no_slope, is_fickle, is_stale)
  if digest or pure:
    known[kind] = (digest, made)
  return made


def _shapes(params):
  """The params' shapes; what is no array is an error that names it."""

  def shape(path, x):
    try:
      return jax.eval_shape(lambda x: x, x)
    except TypeError as error:
      raise ValueError(
        f"params are a tree of arrays, and {path!r} of them is a"
        f" {type(x).__name__}: let the function close over it"
      ) from error

  return () if params is None else trees.map_named(shape, params)


def _known(logits_fn, pure):
  """What is known of the function; nothing of one that can't be known."""
  if pure:
    return _PURE.setdefault(logits_fn, {})
  key: Any = id(logits_fn)
  if inspect.ismethod(logits_fn):  # another object each time it is named
    key = id(logits_fn.__self__), id(logits_fn.__func__)
  if key not in _KNOWN:
    try:
      reference = _reference(logits_fn, lambda _: _KNOWN.pop(key, None))
    except TypeError:
      return {}
    _KNOWN[key] = (reference, {})
  return _KNOWN[key][1]


def _weakly(logits_fn):
  """A way to the function that doesn't keep it alive, if there is one."""
  try:
    return _reference(logits_fn)
  except TypeError:
    return lambda: logits_fn


def _reference(logits_fn, *called):
  kind = weakref.WeakMethod if inspect.ismethod(logits_fn) else weakref.ref
  return kind(logits_fn, *called)


def _normal(get, with_params, stochastic):
  """The function as one of params, images and keys."""

  def fn(params, images, image_keys):
    logits_fn = get()
    own = functools.partial(logits_fn, params) if with_params else logits_fn
    return search.keyed(own, stochastic)(images, image_keys)

  return fn


def _num_classes(logits_fn, fn, args):
  """The width of the function's logits; an error if there are none."""
  _, images, _ = args
  try:
    # A new function: JAX remembers traces by the function.
    out = jax.eval_shape(lambda *args: fn(*args), *args)
  except Exception as error:
    raise ValueError(_untraceable(logits_fn, images.shape, error)) from error
  _check_logits(out, images.shape[0])
  return out.shape[1]


def _traced(fn, args):
  """All that the function and its gradient do, and why it has no gradient.

  The derivative is looked at too: it may have rules of its own, and these read
  arrays as well.
  """

  def slope(params, images, image_keys):
    logits, pull = jax.vjp(lambda x: fn(params, x, image_keys), images)
    return logits, pull(logits)

  try:
    return jax.make_jaxpr(slope)(*args), ""
  except Exception as error:
    return jax.make_jaxpr(lambda *args: fn(*args))(*args), _first_line(error)


def _check_logits(out, count):
  if getattr(out, "ndim", None) != 2 or out.shape[0] != count:
    raise ValueError(
      f"expected logits [{count}, classes] for {count} images, got"
      f" {getattr(out, 'shape', type(out).__name__)}"
    )
  if out.shape[1] < 2:
    raise ValueError("expected logits of at least 2 classes, got 1")
  if not jnp.issubdtype(out.dtype, jnp.floating):
    raise ValueError(f"expected logits as floats, got {out.dtype}")


def _untraceable(logits_fn, shape, error):
  said = (
    f"the function can't be traced by JAX on images {list(shape)}:"
    f" {_first_line(error)}"
  )
  if type(error).__name__ == "TraceContextError":  # flax's, not imported
    return said + (
      "\nDoes a module change its own state? Call its eval() first, give the"
      " module itself as the function, and leave out nnx.jit."
    )
  if isinstance(error, TypeError) and "positional argument" in str(error):
    return said + (
      "\nIt is called as fn(images), with params as fn(params, images), and"
      " with stochastic=True it takes a key last."
    )
  if hasattr(logits_fn, "apply"):
    return said + (
      "\nIs it a module without its variables? Give its `apply` as the"
      " function, and the variables as params."
    )
  return said + (
    "\nA network of NumPy, PyTorch or TensorFlow goes through"
    " jax.pure_callback: docs/evaluation.md has the ten lines."
  )


def _first_line(error):
  lines = str(error).strip().splitlines() or [""]
  return f"{type(error).__name__}: {lines[0]}"


def _digest(closed: ClosedJaxpr) -> str:
  """A digest of the operations as text and of the constants' values.

  The text leaves out addresses. Where there are any, as of a callback to the
  host, two that are equal may differ: "".
  """
  text = str(closed)
  if "0xXX" in text or "callback" in text:
    return ""
  return journal.digest(np.frombuffer(text.encode(), np.uint8),
                        *_constants(closed))  # fmt: skip


def _constants(closed: ClosedJaxpr) -> Iterator[Any]:
  yield from closed.consts
  yield from _inner(closed.jaxpr)


def _inner(jaxpr: Jaxpr) -> Iterator[Any]:
  def is_program(x):
    return isinstance(x, ClosedJaxpr | Jaxpr)

  for equation in jaxpr.eqns:
    for value in jax.tree.leaves(equation.params, is_leaf=is_program):
      if isinstance(value, ClosedJaxpr):
        yield from _constants(value)
      elif isinstance(value, Jaxpr):
        yield from _inner(value)
