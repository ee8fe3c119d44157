"""Pictures of images before and after an attack."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from roli_jax.files import extras

if TYPE_CHECKING:
  from matplotlib.figure import Figure
else:  # matplotlib is an extra, and slow to import
  Figure = Any


def examples(
  images: np.ndarray,
  adv: np.ndarray,
  labels: np.ndarray,
  clean_said: np.ndarray,
  adv_said: np.ndarray,
  *,
  eps: float | int,
  title: str = "",
  into: Any = None,
) -> Figure:
  """Draws clean images, what was added to them, and what came out.

  Args:
    images: [n, h, w, c] in [0, 1], n at least 1.
    adv: the adversarial images, of the same shape.
    labels: [n], classes or their names.
    clean_said: [n], the class that the model predicts of each clean image.
    adv_said: [n], the class that it predicts of each adversarial image.
    eps: the change of a pixel that is drawn black or white, in units of
      [0, 1]; grey is no change.
    title: a line above the figure; "" for none.
    into: the part of a figure, of matplotlib, to draw in; None: a new figure.

  Returns:
    The figure, or the part.
  """
  figure = into or empty(1.1 * len(images) + 1, 4.2)
  axes = figure.subplots(3, len(images), squeeze=False)
  added = (adv - images) / (2 * eps) + 0.5
  kinds = {"clean": images, f"change (±{eps:.2g})": added, "adversarial": adv}
  for line, (name, shown) in zip(axes, kinds.items(), strict=True):
    for axis, image in zip(line, shown, strict=True):
      axis.imshow(np.clip(image, 0, 1).squeeze(), cmap="gray", vmin=0, vmax=1)
      axis.set(xticks=[], yticks=[])
    line[0].set_ylabel(name)
  for line, guesses in ((0, clean_said), (2, adv_said)):
    for axis, label, guess in zip(axes[line], labels, guesses, strict=True):
      right = label == guess
      between = " " if len(f"{guess}{label}") < 8 else "\n"
      # Once an image: where it fell, what it is stands above.
      truth = "" if right or line else f"{between}(is {label})"
      axis.set_title(
        f"{guess}{truth}", color="black" if right else "#d1495b", fontsize=9
      )
  figure.suptitle(title, fontsize=9)
  return figure


def side_by_side(images: np.ndarray, attacked: Mapping[str, dict]) -> Figure:
  """Draws what was found against several models, one below the other.

  Args:
    images: [n, h, w, c] in [0, 1], n at least 1.
    attacked: the other arguments of `examples`, by the title of the model.

  Returns:
    The figure.
  """
  figure = empty(1.3 * len(images) + 1, 4.6 * len(attacked))
  parts = figure.subfigures(len(attacked), squeeze=False)[:, 0]
  for part, (title, found) in zip(parts, attacked.items(), strict=True):
    examples(images, **found, title=title, into=part)
  return figure


def empty(width: float | int, height: float | int) -> Figure:
  """Returns an empty figure of this size, in inches."""
  extras.need("matplotlib")
  from matplotlib import figure

  return figure.Figure(figsize=(width, height), layout="constrained")
