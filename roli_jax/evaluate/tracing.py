"""May what was compiled for a user's function be used again in this call?

`jax.jit` keeps every array, flag and module that a function read from outside
its arguments (a closure, a global, `self`) as it was when the function was
traced. A user who trains the weights in a closure further and evaluates again
would be given the numbers of the old weights. To compile anew in each call is
always right, and may take minutes. So `programs` decides in each call, from the
function and the shapes of its arguments:

* Without params: nothing is kept. The weights are most likely in the closure,
  and differ in each call.
* With params: the function and its derivative are traced, which takes seconds
  and compiles nothing. If operations and all arrays that they read are those
  of the last call (see `_digest`), its compiled programs are used again; else
  all is compiled anew.
* A function with the attribute `is_pure` reads nothing but its arguments. It is
  not traced again, and all functions that are equal to it share its programs.

What comes out is `Programs`: the function in one form, whatever arguments the
user's takes; the jitted programs that others make of it; and what the traces
have shown: the number of classes, and whether there is a derivative.
"""

import dataclasses
import functools
import inspect
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import ClosedJaxpr, Jaxpr

from roli_jax import keys, trees
from roli_jax.attacks import search
from roli_jax.evaluate import convolutions
from roli_jax.files import journal
from roli_jax.types import Array, Float, Images, Keys, Logits, PyTree

# `(params, images, keys) -> logits`: the one form of all users' functions.
KeyedLogits = Callable[[PyTree, Images, Keys], Logits]


@dataclasses.dataclass(frozen=True, eq=False)
class Programs:
  """A function, and what has been compiled for it.

  Attributes:
    fn: `(params, images, keys) -> logits` in float32; on a CPU with its
      convolutions in order, see `convolutions`.
    num_classes: the width of its logits, >= 2.
    no_slope: why JAX can't differentiate it, "" where it can.
    is_fickle: whether it is another function each time it is traced, as with
      random numbers that NumPy draws in it.
    is_stale: whether JAX's own caches hold old traces of parts of it, which
      the programs then have to bypass; see `_bypassing_caches`.
  """

  fn: KeyedLogits
  num_classes: int
  no_slope: str = ""
  is_fickle: bool = False
  is_stale: bool = False
  _compiled: dict[Callable[..., Any], Any] = dataclasses.field(
    default_factory=dict
  )

  def compiled(self, program: Callable[..., Any], **options: Any) -> Any:
    """`program` with the function as its first argument, jitted once.

    Args:
      program: a function of a module, `(fn, *args) -> result`.
      **options: keywords of `jax.jit`; argument 0 is the first after `fn`.
    """
    if program not in self._compiled:
      fn = self.fn
      # A new closure for this object: JAX refers weakly to the functions that
      # it has compiled, and what is compiled dies with the object.
      jitted = jax.jit(lambda *args: program(fn, *args), **options)
      self._compiled[program] = (
        _bypassing_caches(jitted) if self.is_stale else jitted
      )
    return self._compiled[program]


# What was compiled in calls before, by the kind of their arguments: a digest of
# all that was traced ("" of a pure function, which needs none), and programs.
_Kept = dict[tuple[bool, str], tuple[str, Programs]]

# By the identity of a function, with a weak reference to it, since functions
# need not be hashable. An entry goes when its function does.
_KEPT: dict[Any, tuple[Any, _Kept]] = {}

# Functions that are `is_pure`, by their value.
_KEPT_PURE: dict[Any, _Kept] = {}

_contexts = itertools.count()


def _bypassing_caches(fn: Callable[..., Any]) -> Callable[..., Any]:
  """The function, traced without the traces that JAX has kept of its parts.

  A `jit` or `checkpoint` inside a function keeps its own trace by shapes, with
  what it read outside its arguments when it was first traced: weights that may
  have changed since. Metadata is part of the key of JAX's caches; under a name
  that was never used nothing is found there.
  """
  name = str(next(_contexts))

  def call(*args: Any) -> Any:
    with set_xla_metadata(roli_jax=name):
      return fn(*args)

  return call


def programs(
  logits_fn: Callable[..., Any],
  params: PyTree,
  shape: tuple[int, ...],
  *,
  stochastic: bool = False,
) -> Programs:
  """The programs of `([params,] images[, key]) -> logits`, kept or new.

  The module's first lines say when those of a call before are returned.

  Args:
    logits_fn: the function; nothing has to be hashable.
    params: a tree of arrays; None where the function takes none.
    shape: [b, h, w, c] of the images that it is traced with.
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
  images = jax.ShapeDtypeStruct(shape, jnp.float32)
  image_keys = jax.eval_shape(keys.per_image, keys.root(0), np.arange(shape[0]))
  args = (_shapes(params), images, image_keys)
  kept = {} if params is None else _kept(logits_fn, pure)
  kind = (stochastic, str(jax.tree.flatten(args)))
  if pure and kind in kept:
    return kept[kind][1]
  # Programs that are kept must not keep the function alive.
  get = (lambda: logits_fn) if pure or params is None else _weakly(logits_fn)
  fn = _in_one_form(get, params is not None, stochastic)
  num_classes = _num_classes(logits_fn, fn, args)

  def in_float32(*args: Any) -> Logits:
    return fn(*args).astype(jnp.float32)

  if pure:
    kept[kind] = ("", Programs(in_float32, num_classes))
    return kept[kind][1]
  jaxpr, no_slope = _traced(in_float32, args)
  digest = _fresh_digest(in_float32, args)
  if digest and kind in kept and kept[kind][0] == digest:
    return kept[kind][1]
  is_stale = digest != _digest(jaxpr)
  is_fickle = is_stale and digest != _fresh_digest(in_float32, args)
  fast = in_float32
  if jax.default_backend() == "cpu" and convolutions.has_any(jaxpr.jaxpr):
    fast = convolutions.made_fast(in_float32)
  new = Programs(fast, num_classes, no_slope, is_fickle, is_stale)
  if digest:
    kept[kind] = (digest, new)
  return new


def _shapes(params: PyTree) -> PyTree:
  """The params' shapes; what is no array is an error that names it."""

  def check(path: str, x: Any) -> None:
    try:
      jax.typeof(x)
    except TypeError as error:
      raise ValueError(
        f"params are a tree of arrays, and {path!r} of them is a"
        f" {type(x).__name__}: let the function close over it"
      ) from error

  if params is None:
    return ()
  trees.map_named(check, params)
  return jax.eval_shape(lambda tree: tree, params)


def _kept(logits_fn: Callable[..., Any], pure: bool) -> _Kept:
  """What is kept for the function; nothing for one that can't be recognised."""
  if pure:
    return _KEPT_PURE.setdefault(logits_fn, {})
  key: Any = id(logits_fn)
  if inspect.ismethod(logits_fn):  # another object each time it is named
    key = id(logits_fn.__self__), id(logits_fn.__func__)
  if key not in _KEPT:
    try:
      # Another function may be given the same id when this one is gone.
      reference = _reference(logits_fn, lambda _: _KEPT.pop(key, None))
    except TypeError:
      return {}
    _KEPT[key] = (reference, {})
  return _KEPT[key][1]


def _weakly(logits_fn: Callable[..., Any]) -> Callable[[], Any]:
  """A getter of the function that doesn't keep it alive, if there is one."""
  try:
    return _reference(logits_fn)
  except TypeError:  # of a class with slots
    return lambda: logits_fn


def _reference(
  logits_fn: Callable[..., Any], *when_gone: Callable[[Any], Any]
) -> weakref.ref[Any]:
  kind = weakref.WeakMethod if inspect.ismethod(logits_fn) else weakref.ref
  return kind(logits_fn, *when_gone)


def _in_one_form(
  get: Callable[[], Any], with_params: bool, stochastic: bool
) -> KeyedLogits:
  """The function that `get` returns, as one of params, images and keys."""

  def fn(params: PyTree, images: Images, image_keys: Keys) -> Any:
    logits_fn = get()
    if with_params:
      logits_fn = functools.partial(logits_fn, params)
    return search.keyed(logits_fn, stochastic)(images, image_keys)

  return fn


def _num_classes(
  logits_fn: Callable[..., Any], fn: KeyedLogits, args: Sequence[PyTree]
) -> int:
  """The width of the function's logits.

  Raises:
    ValueError: the function can't be traced, or what it returns is no logits.
  """
  shape = args[1].shape
  try:
    # A new function: JAX remembers traces by the function.
    out = jax.eval_shape(lambda *args: fn(*args), *args)
  except Exception as error:
    raise ValueError(_untraceable(logits_fn, shape, error)) from error
  if getattr(out, "ndim", None) != 2 or out.shape[0] != shape[0]:
    raise ValueError(
      f"expected logits [{shape[0]}, classes] for {shape[0]} images, got"
      f" {getattr(out, 'shape', type(out).__name__)}"
    )
  if out.shape[1] < 2:
    raise ValueError("expected logits of at least 2 classes, got 1")
  if not jnp.issubdtype(out.dtype, jnp.floating):
    raise ValueError(f"expected logits as floats, got {out.dtype}")
  return out.shape[1]


def _traced(fn: KeyedLogits, args: Sequence[PyTree]) -> tuple[ClosedJaxpr, str]:
  """All operations of the function and its gradient, and why it has none.

  The derivative is looked at too: it may have rules of its own, and these read
  arrays as well.

  Returns:
    Both in one jaxpr, and ""; or, where it can't be differentiated, the
    function alone and the first line of the error.
  """

  def slope(
    params: PyTree, images: Images, image_keys: Keys
  ) -> tuple[Logits, tuple[Float[Array, "..."]]]:
    logits, pull = jax.vjp(lambda x: fn(params, x, image_keys), images)
    return logits, pull(logits)

  try:
    return jax.make_jaxpr(slope)(*args), ""
  except Exception as error:
    # A new function: JAX remembers traces by the function.
    return jax.make_jaxpr(lambda *args: fn(*args))(*args), _first_line(error)


def _untraceable(
  logits_fn: Callable[..., Any], shape: Sequence[int], error: Exception
) -> str:
  """What went wrong, and what most likely mends it."""
  problem = (
    f"the function can't be traced by JAX on images {list(shape)}:"
    f" {_first_line(error)}"
  )
  if type(error).__name__ == "TraceContextError":  # flax's, not imported
    return problem + (
      "\nDoes a module change its own state? Call its eval() first, give the"
      " module itself as the function, and leave out nnx.jit."
    )
  if isinstance(error, TypeError) and "positional argument" in str(error):
    return problem + (
      "\nIt is called as fn(images), with params as fn(params, images), and"
      " with stochastic=True it takes a key last."
    )
  if hasattr(logits_fn, "apply"):
    return problem + (
      "\nIs it a module without its variables? Give its `apply` as the"
      " function, and the variables as params."
    )
  return problem + (
    "\nA network of NumPy, PyTorch or TensorFlow goes through"
    " evaluate.foreign(fn, vjp): docs/evaluation.md has examples."
  )


def _first_line(error: Exception) -> str:
  lines = str(error).strip().splitlines() or [""]
  return f"{type(error).__name__}: {lines[0]}"


def _fresh_digest(fn: KeyedLogits, args: Sequence[PyTree]) -> str:
  """The digest of the function as it is now, past all of JAX's caches."""
  jaxpr, _ = _bypassing_caches(_traced)(fn, args)
  return _digest(jaxpr)


def _digest(jaxpr: ClosedJaxpr) -> str:
  """A digest of the operations, as text, and of all arrays that they read.

  Two functions of the same digest compute the same. The text leaves addresses
  of Python objects out; where it has any, or calls Python on the host, two
  that look equal may differ: then there is no digest, "".
  """
  text = str(jaxpr)
  if "0xXX" in text or "callback" in text:
    return ""
  as_bytes = np.frombuffer(text.encode(), np.uint8)
  return journal.digest(as_bytes, *_constants(jaxpr))


def _constants(jaxpr: ClosedJaxpr | Jaxpr) -> Iterator[Any]:
  """Arrays that were read outside the arguments, at any depth of the jaxpr."""
  if isinstance(jaxpr, ClosedJaxpr):
    yield from jaxpr.consts
  for equation in jaxpr.eqns:
    for value in jax.tree.leaves(equation.params, is_leaf=_is_jaxpr):
      if _is_jaxpr(value):
        yield from _constants(value)


def _is_jaxpr(x: Any) -> bool:
  return isinstance(x, ClosedJaxpr | Jaxpr)
