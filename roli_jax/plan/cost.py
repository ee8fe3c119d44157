"""What training will cost, from shapes alone: FLOPs, bytes kept, hours.

Programs are traced and never compiled; there are neither weights nor data.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from roli_jax import models, trees
from roli_jax.models import Model
from roli_jax.peft import Method
from roli_jax.plan import traced
from roli_jax.types import Params, PyTree

# The share of the peak that training is taken to reach. An assumption, not a
# measurement.
EFFICIENCY = 0.4


class Gradient(NamedTuple):
  """What a gradient costs.

  Attributes:
    flops: FLOPs of the forward and the backward pass.
    kept: bytes that depend on the images and wait between the two.
    fused: the same where a compiler computes elementwise operations again in
      what reads them, and keeps what they came from if that is less, as a
      bfloat16 map in place of its float32 copy without the mean.
  """

  flops: int
  kept: int
  fused: int


@dataclasses.dataclass(frozen=True)
class Cost:
  """What one image costs.

  Attributes:
    forward: FLOPs of the logits.
    attack: the gradient by the pixels.
    update: the gradient by the trained leaves.
  """

  forward: int
  attack: Gradient
  update: Gradient

  @property
  def activations(self) -> int:
    """Bytes: the attack's are gone when the update begins."""
    return max(self.attack.kept, self.update.kept)

  @property
  def fused_activations(self) -> int:
    """The same, elementwise operations computed again."""
    return max(self.attack.fused, self.update.fused)


def of(model: Model, method: Method) -> Cost:
  """One image's cost, in evaluation mode and at the model's own size.

  A backbone is traced once for each method, in a few seconds, whatever the
  head's width.

  Attention of the kind `fused` is counted as `plain`: as many FLOPs, and more
  bytes than it keeps.

  Args:
    model: with the method's modules in it, `method.apply_to(model)`.
    method: which leaves train.
  """
  bare = _bare(model)
  params, _, _ = _shapes(bare)
  trained, _ = method.split(params)
  below = bool(jax.tree.leaves((trained.backbone, trained.peft)))
  forward, attack = _of_pixels(bare)
  update = _of_leaves(bare, method) if below else Gradient(forward, 0, 0)
  kernel = params.head["kernel"]
  width = kernel.shape[0]
  logits = 2 * width * model.num_classes
  return Cost(
    forward=forward + logits,
    attack=attack._replace(flops=attack.flops + 2 * logits),
    update=Gradient(  # the head's gradient needs the features
      update.flops + (3 if below else 2) * logits,
      *(x + width * kernel.dtype.itemsize for x in update[1:]),
    ),
  )


def num_bytes(tree: PyTree) -> int:
  """The bytes of a tree of arrays, or of their shapes."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def shapes(model: Model) -> Params:
  """The shapes of the model's parameters, backbones found again."""
  params = _shapes(_bare(model))[0]
  width = params.head["kernel"].shape[0]
  features = jax.ShapeDtypeStruct((1, width), jnp.float32)
  head = jax.eval_shape(model.head.init, jax.random.key(0), features)
  return dataclasses.replace(params, head=head["params"])


def _bare(model: Model) -> Model:
  """The model of equal cost that others share."""
  options: dict[str, Any] = {"attention": "plain", "drop_path": 0.0}
  if getattr(model.backbone, "attention", None) != "fused":
    del options["attention"]
  if not hasattr(model.backbone, "drop_path"):
    del options["drop_path"]
  model = dataclasses.replace(model, num_classes=2, head=models.heads.linear(2))
  return models.with_options(model, **options)


def step_flops(
  one: Cost,
  passes: tuple[int, int],
  *,
  adversarial: float | int = 1.0,
  needs_clean: bool = False,
  gradients: int = 1,
) -> int:
  """FLOPs per image of a step of adversarial training.

  Args:
    one: an image's cost.
    passes: forward and backward, of the attack: `attack.passes`. PGD-7 that
      keeps the best iterate has 8 and 7.
    adversarial: the share of images that are attacked, see `losses.Objective`.
    needs_clean: whether the clean images are trained on beside the attacked
      ones, whose attack is then led by the clean logits (TRADES).
    gradients: by the trained leaves; two with AWP.
  """
  attack = adversarial * attack_flops(one, passes)
  update = one.update.flops
  if needs_clean:
    update += one.update.flops
    attack += one.forward
  return round(attack) + gradients * update


def evaluation_flops(one: Cost, passes: tuple[int, int]) -> int:
  """FLOPs of an image's evaluation: clean, attacked, and checked afresh.

  At most: images that are misclassified anyway are not attacked.
  """
  return attack_flops(one, passes) + 2 * one.forward


def attack_flops(one: Cost, passes: tuple[int, int]) -> int:
  """FLOPs of an attack; a backward pass comes with a forward one."""
  forward, backward = passes
  return backward * one.attack.flops + (forward - backward) * one.forward


def hours(
  total: float | int, peak: float | int, efficiency: float | int = EFFICIENCY
) -> float:
  """The hours of so many FLOPs at this share of a chip's peak, in FLOP/s."""
  return total / (peak * efficiency) / 3600


def flops(fn: Callable[..., Any], *shapes: Any) -> int:
  """The FLOPs of products and convolutions in `fn(*shapes)`.

  A multiply-add is two. Elementwise work is left out, as in "model FLOPs
  utilisation", and so is what the result does not need. A loop counts times
  its length; of branches the last counts, which is `platform_dependent`'s
  default: a convolution is one, however a CPU computes it. A convolution's
  padding counts, as in published figures; the zeros between the values of a
  strided one's gradient don't.

  Args:
    fn: a function of trees of arrays.
    *shapes: trees of `jax.ShapeDtypeStruct`, or of arrays.

  Raises:
    ValueError: products inside a `while_loop`, whose length is not known.
  """
  return traced.count(jax.make_jaxpr(fn)(*shapes).jaxpr)


def gradient(
  fn: Callable[..., Any], shapes: Sequence[Any], by: int, images: int
) -> tuple[int, Gradient]:
  """FLOPs of `fn(*shapes)`, and the cost of its gradient, for that batch.

  Kept are the arrays that depend on the images and that the backward pass
  reads of the forward one: each once, whatever reads it and in what layout;
  neither weights nor the arguments themselves. With `remat` they are the
  blocks' inputs, and what is kept inside the one block that keeps the most.

  This is autodiff's choice. What XLA needs besides is the memory that it works
  in, as the widest layer's, which does not grow with the depth; a CPU's also
  keeps copies of arrays in other layouts, and computes convolutions otherwise
  (tests/test_cost.py compares them).

  Args:
    fn: returns an array.
    shapes: its arguments as trees of `jax.ShapeDtypeStruct`.
    by: which argument the gradient is taken by.
    images: which argument holds the images.
  """

  def pulled(seed, *args):
    def at(x):
      return fn(*args[:by], x, *args[by + 1 :])

    result, pull = jax.vjp(at, args[by])
    return result, pull(jnp.full(result.shape, seed, result.dtype))

  # The backward pass is what depends on the seed.
  seed = jax.ShapeDtypeStruct((), jnp.float32)
  program = traced.Program(jax.make_jaxpr(pulled)(seed, *shapes).jaxpr)
  leaves = [len(jax.tree.leaves(shape)) for shape in shapes]
  start = 1 + sum(leaves[:images])
  pixels = program.inputs[start : start + leaves[images]]
  ops = program.needed(program.outputs)
  forward = traced.work(program.needed(program.outputs[:1]))
  kept = traced.bytes_kept(program, {program.inputs[0]}, set(pixels))
  return forward, Gradient(traced.work(ops), *kept)


# Of which a cost is an image's share: what is done once for a batch, as the sum
# of a kernel and its LoRA, is not done for each image.
_BATCH = 64


@functools.cache
def _shapes(model: Model) -> tuple[Params, PyTree, jax.ShapeDtypeStruct]:
  """The shapes of parameters, running statistics and images."""
  params, stats = jax.eval_shape(lambda: model.init(jax.random.key(0)))
  shape = (_BATCH, model.image_size, model.image_size, model.channels)
  return params, stats, jax.ShapeDtypeStruct(shape, jnp.float32)


@functools.cache
def _of_pixels(model: Model) -> tuple[int, Gradient]:
  """The cost of the backbone's features and their gradient by the pixels."""
  return _shared(*gradient(model.features, _shapes(model), by=2, images=2))


@functools.cache
def _of_leaves(model: Model, method: Method) -> Gradient:
  """The cost of the features' gradient by the backbone's trained leaves."""
  params, stats, images = _shapes(model)
  halves = method.split(params)

  def features(trained, frozen, stats, images):
    return model.features(trees.merge(trained, frozen), stats, images)

  shapes = (*halves, stats, images)
  return _shared(*gradient(features, shapes, by=0, images=3))[1]


def _shared(forward: int, cost: Gradient) -> tuple[int, Gradient]:
  """One image's share."""
  return forward // _BATCH, Gradient(*(number // _BATCH for number in cost))
