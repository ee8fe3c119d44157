"""A function, a few images, and all attacks that a diagnosis tries on them."""

import dataclasses
from typing import Any

import jax
import numpy as np

from roli_jax import attacks, evaluate, keys, losses
from roli_jax.evaluate.checks import Check, judged
from roli_jax.evaluate.classifier import Classifier, Examples
from roli_jax.evaluate.tracing import KeyedLogits
from roli_jax.threat import ThreatModel
from roli_jax.types import Array, Float, Images, Keys, Labels, PyTree

STEPS = 50  # of the attacks that ask
SHARE = 0.01  # of images that may behave oddly, but one always may


@dataclasses.dataclass(frozen=True)
class Trials:
  """What the questions are asked of, with all that was tried so far.

  Attributes:
    function: the function.
    examples: at most 64 images.
    threat: the ball and the box, of one radius.
    results: those of the attacks that were tried, by name, ratio and fields.
  """

  function: Classifier
  examples: Examples
  threat: ThreatModel
  results: dict[tuple[Any, ...], evaluate.Result] = dataclasses.field(
    default_factory=dict
  )

  def attacked(
    self, name: str, ratio: float = 1.0, **fields: Any
  ) -> evaluate.Result:
    """The result of an attack, which is run when it is first asked for.

    Args:
      name: of `attacks.ATTACKS`.
      ratio: the attack's radius in units of that of the threat model, >= 0.
      **fields: the attack's own settings.
    """
    key = (name, ratio, *sorted(fields.items()))
    if key not in self.results:
      eps = float(self.threat.eps) * ratio
      threat = dataclasses.replace(self.threat, eps=eps)
      self.results[key] = evaluate.run_on(
        self.function,
        self.examples.images,
        self.examples.labels,
        attacks.build(name, threat, **fields),
        indices=self.examples.indices,
      )
    return self.results[key]

  @property
  def usual(self) -> evaluate.Result:
    """What all others are compared with: APGD on cross-entropy, 50 steps."""
    return self.attacked("apgd_ce", num_steps=STEPS)

  def missed(self, other: evaluate.Result) -> np.ndarray:
    """The images that APGD does not break and another attack does, bool [n]."""
    return self.usual.robust & ~other.robust

  def check(
    self,
    name: str,
    verdict: str,
    finding: str,
    odd: np.ndarray,
    allowed: float | int | None = None,
  ) -> Check:
    """A check with that verdict if more images are odd than are allowed.

    Args:
      name: the name of the check.
      verdict: `warn` or `fail`.
      finding: what was seen, in a line.
      odd: which images are, bool [n].
      allowed: how many may be, by chance; one, or 1%, by default.
    """
    if allowed is None:
      allowed = max(1, SHARE * len(odd))
    concerned = self.examples.indices[odd] if odd.sum() > allowed else ()
    return judged(name, verdict, finding, concerned)

  def climbed(self, x: np.ndarray, loss: str) -> tuple[np.ndarray, np.ndarray]:
    """The values of a loss that attacks climb, and its gradients, in float64.

    Args:
      x: [n, h, w, c], points near the images.
      loss: a name in `losses.SURROGATES`.
    """
    root = keys.root(self.function.seed)
    image_keys = keys.per_image(root, self.examples.indices)
    climb = self.function.programs.compiled(_climb, static_argnums=0)
    value, grads = climb(
      loss, self.function.params, x, self.examples.labels, image_keys
    )
    return np.asarray(value, np.float64), np.asarray(grads, np.float64)

  @property
  def images(self) -> np.ndarray:
    """The images in float32, as attacks and the judge see them."""
    return self.examples.images.astype(np.float32)

  def random_points(self, k: int) -> np.ndarray:
    """A random point of the ball around each image, the k-th."""
    key = keys.stream(keys.root(self.function.seed), "somewhere", k)
    image_keys = keys.per_image(key, self.examples.indices)
    return np.asarray(self.threat.sample(image_keys, self.images))


def _climb(
  fn: KeyedLogits,
  loss: str,
  params: PyTree,
  images: Images,
  labels: Labels,
  image_keys: Keys,
) -> tuple[Float[Array, " b"], Images]:
  """Each image's loss as attacks climb it, and its gradient in the pixels."""

  def values(x: Images) -> tuple[Float[Array, ""], Float[Array, " b"]]:
    with jax.default_matmul_precision("highest"):
      logits = fn(params, x, image_keys)
    value = losses.SURROGATES[loss].climb(logits, labels)
    return value.sum(), value

  grads, value = jax.grad(values, has_aux=True)(images)
  return value, grads
