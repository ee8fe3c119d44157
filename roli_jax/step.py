"""One step of training, and prediction: pure functions, not jitted here."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from roli_jax import attacks, keys, losses, models, trees
from roli_jax.metrics import Counts
from roli_jax.models import Model
from roli_jax.optim.schedules import Schedule
from roli_jax.peft import Method
from roli_jax.state import TrainState
from roli_jax.types import Array, Images, Key, Labels, Logits, Params, PyTree

Batch = Mapping[str, Any]


def make_predict(model: Model) -> Callable[[Any, Images], Logits]:
  """`((params, stats), images) -> logits` in evaluation mode."""
  if getattr(model.backbone, "drop_path", 0):  # which evaluation never does
    model = models.with_options(model, drop_path=0.0)
  return _make_predict(model)


@functools.cache  # the same function for equal models, so that it compiles once
def _make_predict(model):
  def predict(variables: tuple[Params, PyTree], images: Images) -> Logits:
    return model.logits(*variables, images)

  return predict


def make_train_step(
  model: Model,
  method: Method,
  objective: losses.Objective,
  attack: attacks.Attack,
  radius: Schedule,
  tx: optax.GradientTransformation,
  white: int = 255,
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

  Returns:
    `(state, batch, key) -> (state, counts)`. The key is the stage's own; the
    noise of an image at a step is folded from it, the step and the image.
  """

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

    if not objective.adversarial:
      return images, images
    if objective.adversarial == 1.0:
      target = logits_fn(images) if scaled.loss == "kl" else labels
      return scaled(logits_fn, images, target, image_keys), images
    # Every other image: both halves of every device's part, so that none of
    # them has to move.
    clean = images.reshape(-1, 2, *images.shape[1:])
    adv = scaled(logits_fn, clean[:, 0], labels[::2], image_keys[::2])
    mixed = jnp.stack([adv, clean[:, 1]], 1).reshape(images.shape)
    return mixed, images

  def train_step(state, batch, key):
    adv, clean = inputs(state, batch, key)
    labels: Labels = batch["label"]
    trained, frozen = method.split(state.params)
    dropout = keys.stream(key, "dropout", state.step)

    def loss(trained):
      params = trees.merge(trained, frozen)

      def forward(x, stats):
        return model(params, stats, x, train=method.train_mode, key=dropout)

      logits, stats = forward(adv, state.stats)
      clean_logits = None
      if objective.needs_clean:
        clean_logits, stats = forward(clean, stats)
      values = objective(clean=clean_logits, adv=logits, labels=labels)
      counts = Counts(
        loss=values.sum(),
        correct=losses.correct(logits, labels).sum(),
        seen=jnp.asarray(len(labels)),
      )
      return values.mean(), (counts, stats)

    grads, (counts, stats) = jax.grad(loss, has_aux=True)(trained)
    updates, opt_state = tx.update(grads, state.opt_state, trained)
    trained = optax.apply_updates(trained, updates)
    state = TrainState(
      step=state.step + 1,
      params=trees.merge(trained, frozen),
      stats=stats,
      opt_state=opt_state,
    )
    return state, counts

  return train_step
