"""What an evaluation refuses: arguments that can't be meant as they are.

Each function raises a ValueError that says what was expected, before any image
is attacked. What can be evaluated, but may not be believed, is for `checks`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from roli_jax import losses
from roli_jax.attacks import Attack
from roli_jax.evaluate.classifier import Classifier


def image_shape(images: np.ndarray) -> tuple[int, ...]:
  """The shape of one image; a ValueError for what is no batch of images."""
  if images.ndim < 2 or not len(images):
    raise ValueError(f"expected images [n, h, w, c], got {images.shape}")
  return images.shape[1:]


def check_inputs(
  images: np.ndarray, labels: np.ndarray, indices: np.ndarray, attack: object
) -> None:
  """Raises a ValueError for images, labels, indices or radii of no sense.

  Args:
    images: [n, ...], floats in the box of the attack's threat model.
    labels: [n], integers.
    indices: [n], integers.
    attack: an `Attack` that is a pytree, or None.
  """
  n = len(images)
  if not jnp.issubdtype(images.dtype, jnp.floating):
    raise ValueError(
      f"expected floating-point images in [0, 1], got {images.dtype};"
      " divide by 255?"
    )
  if attack is not None and not isinstance(attack, Attack):
    raise ValueError(
      "expected an attack, from attacks.build(name, threat) or of a class of"
      " your own under attacks.Attack, got"
      f" {attack!r:.80}"
    )
  if attack is not None and jax.tree_util.all_leaves([attack]):
    raise ValueError(
      f"{type(attack).__name__} is no pytree: put"
      " @jax.tree_util.register_dataclass above its class"
    )
  low, high = (attack.threat.low, attack.threat.high) if attack else (0, 1)
  if not np.all((images >= low) & (images <= high)):
    raise ValueError(
      f"expected images in [{low}, {high}], got values in"
      f" [{images.min()}, {images.max()}]; normalise inside the function"
    )
  for name, values in (("labels", labels), ("indices", indices)):
    if values.shape != (n,) or not np.issubdtype(values.dtype, np.integer):
      raise ValueError(
        f"expected {name} as {n} integers, got {values.dtype} {values.shape}"
      )
  eps = np.asarray(attack.threat.eps) if attack else np.zeros(())
  if eps.shape not in ((), (n,)):
    raise ValueError(f"expected one eps, or {n} of them, got {eps.shape}")
  if not np.all(np.isfinite(eps) & (eps >= 0)):
    raise ValueError(f"eps must be finite and >= 0, got {eps.min()}")
  step_size = getattr(attack, "step_size", None)
  if step_size is not None and np.ndim(step_size):
    raise ValueError(
      "evaluation takes one step_size for all images, got one for each; None"
      " is a quarter of each image's eps"
    )


def check_function(
  function: Classifier, labels: np.ndarray, attack: Attack | None
) -> None:
  """Raises a ValueError for labels or an attack that the function can't bear.

  Attacks without a backward pass need no derivative.
  """
  num_classes = function.programs.num_classes
  if labels.min() < 0 or labels.max() >= num_classes:
    raise ValueError(
      f"expected labels in [0, {num_classes}), the width of the logits, got"
      f" {labels.min()} to {labels.max()}"
    )
  if attack is None:
    return
  if attack.loss == "kl":
    raise ValueError(
      "the loss kl climbs from clean logits, in training; here take ce, margin"
      " or dlr"
    )
  if function.programs.no_slope and attack.passes[1]:
    raise ValueError(
      f"{attack.name} climbs gradients, and the function has none"
      f" ({function.programs.no_slope}); take `square`, or give it a"
      " derivative: the vjp of evaluate.foreign, or jax.custom_vjp"
      " (docs/evaluation.md)"
    )


def check_numbers(logits: np.ndarray, indices: np.ndarray) -> None:
  """Raises a ValueError for clean logits, [n, k], that rank no class first.

  -inf is the lowest logit: of a class that is masked.
  """
  bad = ~losses.is_ranking(logits)
  if not bad.any():
    return
  kinds = {
    "NaN": np.isnan(logits[bad]).any(),
    "+inf": np.isposinf(logits[bad]).any(),
    "-inf for every class": np.isneginf(logits[bad]).all(1).any(),
  }
  found = ", ".join(name for name, is_there in kinds.items() if is_there)
  raise ValueError(
    f"the logits of {int(bad.sum())} of {len(bad)} clean images are not numbers"
    f" ({found}), first of image {indices[bad][0]}: attacks would mean nothing."
    " Does a low precision overflow?"
  )
