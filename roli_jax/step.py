"""One step of training, and prediction: pure functions, not jitted here."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from roli_jax import attacks, keys, losses, models, objectives, trees
from roli_jax.models import Model
from roli_jax.optim.schedules import Schedule
from roli_jax.peft import Method
from roli_jax.state import TrainState
from roli_jax.statistics import Counts
from roli_jax.types import Array, Float, Images, Key, Logits, Params, PyTree

Batch = Mapping[str, Any]


def make_predict(model: Model) -> Callable[[Any, Images], Logits]:
  """`((params, stats), images) -> logits` in evaluation mode."""
  return _make_predict(_still(model))


def make_both(
  model: Model,
) -> Callable[[Any, Images], tuple[Float[Array, "b d"], Logits]]:
  """`((params, stats), images) -> (features, logits)` in evaluation mode."""
  return _make_both(_still(model))


def _still(model):
  """Without dropped paths, which evaluation never has."""
  if getattr(model.backbone, "drop_path", 0):
    model = models.with_options(model, drop_path=0.0)
  return model


@functools.cache  # the same function for equal models, so that it compiles once
def _make_predict(model):
  def predict(variables: tuple[Params, PyTree], images: Images) -> Logits:
    return model.logits(*variables, images)

  return predict


@functools.cache
def _make_both(model):
  def both(variables, images):
    features = model.features(*variables, images)
    head = {"params": variables[0].head}
    return features, model.head.apply(head, features)

  return both


@dataclasses.dataclass(frozen=True)
class WeightAttack:
  """Adversarial weight perturbation (Wu et al. 2020, AWP).

  The gradient is taken where the loss is higher: each trained leaf w of two
  axes at least is moved by gamma |w| along its own gradient, and the step that
  comes of it is taken from w itself. The authors move every such weight, and
  take the direction from one step of SGD on a copy: the gradient's own.

  Attributes:
    gamma: >= 0; the authors use 0.01 with adversarial training and 0.005 with
      TRADES. 0: no perturbation.
    begin: the share of the stage without one.
  """

  gamma: float | int = 0.0
  begin: float | int = 0.0

  def __post_init__(self):
    if not self.gamma >= 0:
      raise ValueError(f"awp.gamma must be >= 0, got {self.gamma}")
    if not 0 <= self.begin <= 1:
      raise ValueError(f"awp.begin is a share in [0, 1], got {self.begin}")

  def moved(self, trained: Any, grads: Any, strength: Any) -> Any:
    """The leaves where the gradient is taken.

    Args:
      trained: the leaves that train.
      grads: of the loss, by them.
      strength: of the perturbation, in [0, 1].
    """

    def move(w, g):
      if w.ndim < 2:
        return w
      ratio = jnp.linalg.norm(w) / (jnp.linalg.norm(g) + 1e-20)
      return w + (strength * self.gamma * ratio * g).astype(w.dtype)

    return jax.tree.map(move, trained, grads)


def _dealt(num_parts: int, rows: Array) -> Array:
  """Rows [b, ...] as parts [num_parts, b / num_parts, ...].

  Each part has its share of each device's rows, so that none has to move.
  """
  return rows.reshape(-1, num_parts, *rows.shape[1:]).swapaxes(0, 1)


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
) -> Callable[[TrainState, Batch, Key[Array, ""]], tuple[TrainState, Counts]]:
  """A step of adversarial training.

  Trained and frozen leaves are split before the gradient is taken: gradient,
  clipping and optimizer see trained leaves only, and the mistake of clipping
  or decaying a frozen one can't be made.

  Args:
    model: the classifier.
    method: which leaves train.
    objective: what is lowered.
    attack: what finds the adversarial images, in evaluation mode.
    radius: scales the attack by step.
    tx: of the trained leaves.
    white: the value of a white pixel.
    awp: what is done to the weights.
    num_steps: of the whole stage.
    num_parts: a batch is attacked, and its gradient taken, in so many parts of
      equal size, one after another (gradient accumulation): memory is a part's.
      The gradient is the whole batch's, to rounding; running statistics and
      the criterion's memory move with each part.

  Returns:
    `(state, batch, key) -> (state, counts)`. The key is the stage's own; the
    noise of an image at a step is folded from it, the step and the image.
  """
  criterion = objectives.of(objective)

  def inputs(state, batch, key):
    """The images to train on, and the clean ones."""
    images = batch["image"].astype(jnp.float32) / white
    labels = batch["label"]
    scaled = attack.scaled(radius(state.step))
    image_keys = keys.per_image(
      keys.stream(key, "attack", state.step), batch["index"]
    )

    def logits_fn(x):
      return model.logits(state.params, state.stats, x)

    if not criterion.adversarial:
      return images, images
    if criterion.adversarial == 1.0:
      target = logits_fn(images) if scaled.loss == "kl" else labels
      return scaled(logits_fn, images, target, image_keys), images
    # Every other image: both halves of every device's part, so that none of
    # them has to move.
    clean = images.reshape(-1, 2, *images.shape[1:])
    adv = scaled(logits_fn, clean[:, 0], labels[::2], image_keys[::2])
    mixed = jnp.stack([adv, clean[:, 1]], 1).reshape(images.shape)
    return mixed, images

  def gradient(trained, frozen, moving, part, draws):
    """The gradient of a part's mean loss, its counts, and what has moved."""
    (adv, clean), labels, indices = part
    dropout, drawn = draws
    forward = objectives.Forward(model, method.train_mode, dropout)
    views = objectives.Views(
      clean=clean, adv=adv, labels=labels, indices=indices, key=drawn
    )

    def loss(trained):
      params = trees.merge(trained, frozen)
      out = criterion(forward, params, *moving, views)
      counts = Counts(
        loss=out.values.sum(),
        correct=losses.correct(out.logits, labels).sum(),
        seen=jnp.asarray(len(labels)),
      )
      return out.values.mean(), (counts, (out.stats, out.memory))

    return jax.grad(loss, has_aux=True)(trained)

  def train_step(state, batch, key):
    trained, frozen = method.split(state.params)
    streams = tuple(
      keys.stream(key, name, state.step) for name in ("dropout", "criterion")
    )
    batch = {name: batch[name] for name in ("image", "label", "index")}
    if num_parts == 1:
      part = (inputs(state, batch, key), batch["label"], batch["index"])

      def gradient_at(trained):
        moving = (state.stats, state.memory)
        grads, rest = gradient(trained, frozen, moving, part, streams)
        return grads, *rest
    else:
      parts = jax.tree.map(functools.partial(_dealt, num_parts), batch)
      seen = jax.lax.map(lambda part: inputs(state, part, key), parts)

      def gradient_at(trained):
        def add(sums, turn):
          (grads, counts, moving), (part, k) = sums, turn
          draws = tuple(jax.random.fold_in(stream, k) for stream in streams)
          more, (count, moving) = gradient(trained, frozen, moving, part, draws)
          more = jax.tree.map(lambda g: g / num_parts, more)
          added = jax.tree.map(jnp.add, (grads, counts), (more, count))
          return (*added, moving), None

        none = Counts(loss=jnp.zeros(()), correct=0, seen=0)
        start = (
          jax.tree.map(jnp.zeros_like, trained),
          jax.tree.map(jnp.asarray, none),
          (state.stats, state.memory),
        )
        each = ((seen, parts["label"], parts["index"]), jnp.arange(num_parts))
        return jax.lax.scan(add, start, each)[0]

    grads, counts, (stats, memory) = gradient_at(trained)
    if awp.gamma:
      begun = jnp.where(state.step >= awp.begin * num_steps, 1.0, 0.0)
      grads, *_ = gradient_at(awp.moved(trained, grads, begun))
    updates, opt_state = tx.update(grads, state.opt_state, trained)
    trained = optax.apply_updates(trained, updates)
    state = TrainState(
      step=state.step + 1,
      params=trees.merge(trained, frozen),
      stats=stats,
      opt_state=opt_state,
      memory=memory,
    )
    return state, counts

  return train_step
