"""One step of training, and prediction: pure functions, not jitted here.

Shapes: b images in a batch, [b, h, w, c]; k classes; d features.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from roli_jax import attacks, keys, losses, models, objectives, trees
from roli_jax.models import Model
from roli_jax.optim.schedules import Schedule
from roli_jax.peft import Method
from roli_jax.state import TrainState, averaged
from roli_jax.statistics import Counts
from roli_jax.types import (
  Array,
  Float,
  Images,
  Int,
  Key,
  Keys,
  Labels,
  Logits,
  PyTree,
  Variables,
)


def make_predict(model: Model) -> Callable[[Any, Images], Logits]:
  """Returns `((params, stats), images) -> logits`, in evaluation mode."""
  return _Predict(_without_drops(model))


def make_both(
  model: Model,
) -> Callable[[Any, Images], tuple[Float[Array, "b d"], Logits]]:
  """Returns `((params, stats), images) -> (features, logits)`, as above."""
  return _Both(_without_drops(model))


def _without_drops(model: Model) -> Model:
  """Returns the model without dropped paths, which evaluation never has."""
  if getattr(model.backbone, "drop_path", 0):
    model = models.with_options(model, drop_path=0.0)
  return model


# By name: `image` [b, h, w, c], `label` and `index` [b].
Examples = Mapping[str, Array | np.ndarray]
# Of an `objectives.Batch`, by name: `clean`, `adv` [b, h, w, c], `labels` and
# `indices` [b], and two keys.
Fields = dict[str, Any]


# Functions of equal models are equal, and read nothing but their arguments: an
# evaluation compiles them once.
@dataclasses.dataclass(frozen=True)
class _Predict:
  model: Model
  is_pure: ClassVar[bool] = True

  def __call__(self, variables: Variables, images: Images) -> Logits:
    return self.model.logits(*variables, images)


@dataclasses.dataclass(frozen=True)
class _Both:
  model: Model
  is_pure: ClassVar[bool] = True

  def __call__(
    self, variables: Variables, images: Images
  ) -> tuple[Float[Array, "b d"], Logits]:
    features = self.model.features(*variables, images)
    head = {"params": variables[0].head}
    logits: Any = self.model.head.apply(head, features)
    return features, logits


@dataclasses.dataclass(frozen=True)
class WeightAttack:
  """Adversarial weight perturbation (Wu et al. 2020, AWP).

  The gradient is taken where the loss is higher: each trained leaf w of two
  axes at least is moved by gamma |w| along its own gradient. The optimizer then
  steps from w itself. The authors move every such weight, and take the
  direction from one step of SGD on a copy: the gradient's own.

  Attributes:
    gamma: >= 0; the authors use 0.01 with adversarial training and 0.005 with
      TRADES. 0: no perturbation.
    begin: the share of the stage before the perturbation begins, in [0, 1].
  """

  gamma: float | int = 0.0
  begin: float | int = 0.0

  def __post_init__(self) -> None:
    if not self.gamma >= 0:
      raise ValueError(f"awp.gamma must be >= 0, got {self.gamma}")
    if not 0 <= self.begin <= 1:
      raise ValueError(f"awp.begin is a share in [0, 1], got {self.begin}")

  def moved(
    self, trained: PyTree, grads: PyTree, strength: float | Float[Array, ""]
  ) -> PyTree:
    """Returns the perturbed leaves, at which the gradient is taken.

    Args:
      trained: the leaves that train.
      grads: the loss's gradients by them.
      strength: the share of the perturbation that is made, in [0, 1].
    """

    def move(w: Array, g: Array) -> Array:
      if w.ndim < 2:
        return w
      # The guard keeps a gradient of 0 from making it 0 / 0.
      ratio = jnp.linalg.norm(w) / (jnp.linalg.norm(g) + 1e-20)
      return w + (strength * self.gamma * ratio * g).astype(w.dtype)

    return jax.tree.map(move, trained, grads)


@trees.tree_class
class Gradient:
  """The gradient of a batch, and the state that its passes changed.

  Attributes:
    grads: gradients of the mean loss by the trained leaves, of their shapes.
    counts: loss, correct and seen, summed over the batch.
    stats: running statistics after the batch.
    memory: the criterion's memory after the batch.
  """

  grads: PyTree
  counts: Counts
  stats: PyTree
  memory: PyTree


def make_train_step(
  model: Model,
  method: Method,
  objective: losses.Objective | objectives.Criterion,
  attack: attacks.Attack,
  radius: Schedule,
  tx: optax.GradientTransformation,
  white: int = 255,
  awp: WeightAttack = WeightAttack(),
  num_steps: int = 1,
  num_parts: int = 1,
  ema: float | int = 0.0,
) -> Callable[..., tuple[TrainState, Counts]]:
  """Returns a step of adversarial training: attack, gradient, update.

  Trained and frozen leaves are split before the gradient is taken: gradient,
  clipping and optimizer see trained leaves only, and the mistake of clipping
  or decaying a frozen one can't be made.

  Args:
    model: the classifier.
    method: chooses the leaves that train.
    objective: the loss that training lowers.
    attack: finds the adversarial images, in evaluation mode.
    radius: the attack's radius by step, as a share of its eps.
    tx: the optimizer of the trained leaves.
    white: the value of a white pixel, > 0; default 255.
    awp: the perturbation of the weights; none by default.
    num_steps: the number of steps of the whole stage, >= 1; `awp.begin` is a
      share of it.
    num_parts: how many parts of equal size a batch is attacked and
      differentiated in, one after another (gradient accumulation), >= 1: memory
      is a part's. The gradient is the whole batch's, to rounding; running
      statistics and the criterion's memory move with each part.
    ema: the decay of the trained leaves' average, in [0, 1); 0: the state has
      none.

  Returns:
    `(state, batch, key) -> (state, counts)`. A batch has `image` [b, h, w, c],
    `label` [b] and `index` [b]. The key is the stage's own; the noise of an
    image at a step is folded from it, the step and the image.
  """
  criterion = objectives.of(objective)
  attack_batch = _make_attack(model, attack, radius, criterion, white)
  gradient_of = _make_gradient(model, method, criterion)

  def train_step(
    state: TrainState, batch: Examples, key: Key[Array, ""]
  ) -> tuple[TrainState, Counts]:
    trained, frozen = method.split(state.params)
    parts = {name: batch[name] for name in ("image", "label", "index")}
    if num_parts == 1:
      attacked = attack_batch(state, key, parts)
      gradient_at = functools.partial(gradient_of, state, frozen, attacked)
    else:
      parts = jax.tree.map(functools.partial(_dealt, num_parts), parts)

      def attack_part(numbered: tuple[Fields, Int[Array, ""]]) -> Fields:
        part, turn = numbered
        one = attack_batch(state, key, part)
        draws = {
          name: jax.random.fold_in(one[name], turn)
          for name in ("key", "dropout")
        }
        return one | draws

      attacked = jax.lax.map(attack_part, (parts, jnp.arange(num_parts)))
      gradient_at = functools.partial(
        _accumulate, gradient_of, state, frozen, attacked
      )
    gradient = gradient_at(trained)
    grads = gradient.grads
    if awp.gamma:
      begun = jnp.where(state.step >= awp.begin * num_steps, 1.0, 0.0)
      grads = gradient_at(awp.moved(trained, grads, begun)).grads
    now = _update(state, trained, frozen, grads, gradient, tx)
    if ema:
      now = averaged(now, method.split(now.params)[0], ema)
    return now, gradient.counts

  return train_step


def _make_attack(
  model: Model,
  attack: attacks.Attack,
  radius: Schedule,
  criterion: objectives.Criterion,
  white: int,
) -> Callable[[TrainState, Key[Array, ""], Examples], Fields]:
  """Returns `(state, key, batch) -> fields`, which attacks the batch."""

  def attack_batch(
    state: TrainState, key: Key[Array, ""], batch: Examples
  ) -> Fields:
    images = batch["image"].astype(jnp.float32) / white
    labels, indices = batch["label"], batch["index"]
    image_keys = keys.per_image(keys.stream(key, "attack", state.step), indices)
    return {
      "clean": images,
      "adv": attacked(state, images, labels, image_keys),
      "labels": labels,
      "indices": indices,
      "key": keys.stream(key, "criterion", state.step),
      "dropout": keys.stream(key, "dropout", state.step),
    }

  def attacked(
    state: TrainState, images: Images, labels: Labels, image_keys: Keys
  ) -> Images:
    scaled = attack.scaled(radius(state.step))

    def logits_fn(x: Images) -> Logits:
      return model.logits(state.params, state.stats, x)

    if not criterion.adversarial:
      return images
    if criterion.adversarial == 1.0:
      target = logits_fn(images) if scaled.loss == "kl" else labels
      return scaled(logits_fn, images, target, image_keys)
    # Every other image: both halves of every device's part, so that none of
    # them has to move.
    # (By pairs, and not by a stride: GPUs' compilers abort at strided labels
    # that feed a product, jaxlib 0.10.2.)
    halves = images.reshape(-1, 2, *images.shape[1:])
    first = labels.reshape(-1, 2)[:, 0], image_keys.reshape(-1, 2)[:, 0]
    adv = scaled(logits_fn, halves[:, 0], *first)
    return jnp.stack([adv, halves[:, 1]], 1).reshape(images.shape)

  return attack_batch


def _make_gradient(
  model: Model, method: Method, criterion: objectives.Criterion
) -> Callable[[TrainState, PyTree, Fields, PyTree], Gradient]:
  """Returns `(state, frozen, fields, trained) -> Gradient` of the mean loss."""

  def gradient_of(
    state: TrainState, frozen: PyTree, fields: Fields, trained: PyTree
  ) -> Gradient:
    batch = objectives.Batch(**fields)
    forward = objectives.Forward(model, method.train_mode, batch.dropout)

    def loss(
      trained: PyTree,
    ) -> tuple[Float[Array, ""], tuple[Counts, PyTree, PyTree]]:
      params = trees.merge(trained, frozen)
      out = criterion(forward, params, state.stats, state.memory, batch)
      counts = Counts(
        loss=out.values.sum(),
        correct=losses.correct(out.logits, batch.labels).sum(),
        seen=jnp.asarray(len(batch.labels)),
      )
      return out.values.mean(), (counts, out.stats, out.memory)

    grads, (counts, stats, memory) = jax.grad(loss, has_aux=True)(trained)
    return Gradient(grads=grads, counts=counts, stats=stats, memory=memory)

  return gradient_of


def _dealt(num_parts: int, rows: Array) -> Array:
  """Returns rows [b, ...] as parts [num_parts, b / num_parts, ...].

  Each part has its share of each device's rows, so that none has to move.
  """
  return rows.reshape(-1, num_parts, *rows.shape[1:]).swapaxes(0, 1)


def _accumulate(
  gradient_of: Callable[[TrainState, PyTree, Fields, PyTree], Gradient],
  state: TrainState,
  frozen: PyTree,
  attacked: Fields,
  trained: PyTree,
) -> Gradient:
  """Returns the gradient of a batch in parts, taken one after another.

  Args:
    gradient_of: from `_make_gradient`.
    state: before the batch.
    frozen: the leaves that don't train.
    attacked: the fields of all parts, [num_parts, ...] each.
    trained: the leaves that train.
  """
  num_parts = len(attacked["labels"])

  def add(total: Gradient, part: Fields) -> tuple[Gradient, None]:
    moved = dataclasses.replace(state, stats=total.stats, memory=total.memory)
    one = gradient_of(moved, frozen, part, trained)
    return dataclasses.replace(
      one,
      grads=jax.tree.map(
        lambda old, new: old + new / num_parts, total.grads, one.grads
      ),
      counts=jax.tree.map(jnp.add, total.counts, one.counts),
    ), None

  none = Counts(loss=jnp.zeros(()), correct=0, seen=0)
  start = Gradient(
    grads=jax.tree.map(jnp.zeros_like, trained),
    counts=jax.tree.map(jnp.asarray, none),
    stats=state.stats,
    memory=state.memory,
  )
  return jax.lax.scan(add, start, attacked)[0]


def _update(
  state: TrainState,
  trained: PyTree,
  frozen: PyTree,
  grads: PyTree,
  gradient: Gradient,
  tx: optax.GradientTransformation,
) -> TrainState:
  """Returns the state after the optimizer's step."""
  updates, opt_state = tx.update(grads, state.opt_state, trained)
  trained = optax.apply_updates(trained, updates)
  return dataclasses.replace(
    state,
    step=state.step + 1,
    params=trees.merge(trained, frozen),
    stats=gradient.stats,
    opt_state=opt_state,
    memory=gradient.memory,
  )
