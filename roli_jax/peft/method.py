"""What a fine-tuning method is: where it enters, and which leaves it trains."""

import dataclasses
from typing import Any

from roli_jax import trees
from roli_jax.models import Seams
from roli_jax.types import Params

GROUPS = ("backbone", "peft", "head")
FROZEN = "frozen"


@dataclasses.dataclass(frozen=True)
class Method:
  """A way to fine-tune.

  Attributes:
    name: as in `peft.METHODS`.
    seams: how it enters a backbone.
    groups: path pattern -> `backbone`, `peft`, `head` or `frozen`; the first
      match wins, and every leaf must be covered.
    train_mode: whether the training forward is stochastic (dropout) and moves
      running statistics. Methods that freeze most of the encoder keep it in
      evaluation mode, as in the RoLI reference.
  """

  name: str
  seams: Seams
  groups: tuple[tuple[str, str], ...]
  train_mode: bool = False

  def labels(self, params: Params) -> Any:
    """The group of every trained leaf; None for the frozen ones."""
    groups = [(p, None if g == FROZEN else g) for p, g in self.groups]
    return trees.label(params, groups)

  def trains(self, params: Params) -> Any:
    """Whether each leaf is trained."""
    return trees.label(params, [(p, g != FROZEN) for p, g in self.groups])


_HEAD = ("head/.*", "head")
_REST = (".*", FROZEN)

LINEAR = Method("linear", Seams(), (_HEAD, _REST))
FULL = Method(
  "full", Seams(), (_HEAD, ("backbone/.*", "backbone")), train_mode=True
)
BIAS = Method("bias", Seams(), (_HEAD, ("backbone/.*bias", "backbone"), _REST))
