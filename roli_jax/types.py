"""The names that annotations share, and the three trees of a model.

Shapes in annotations are checked when the tests run (jaxtyping and beartype)
and cost nothing otherwise. Where jaxtyping is not installed they are there for
the reader alone.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from roli_jax import trees

try:
  from jaxtyping import Array, Bool, Float, Int, Integer, Key
except ModuleNotFoundError:
  if not TYPE_CHECKING:

    class _Inert:
      def __class_getitem__(cls, _: Any) -> Any:
        return Any

    Bool = Float = Int = Integer = Key = _Inert
    Array = Any

PyTree = Any

# In [0, 1]; [b, h, w, c] for models, any shape for attacks.
Images = Float[Array | np.ndarray, "b *image"]
Labels = Integer[Array | np.ndarray, "b"]
# A number, or one for each image.
PerImage = (
  float | Float[Array | np.ndarray, ""] | Float[Array | np.ndarray, "b"]
)
Logits = Float[Array | np.ndarray, "b k"]
Keys = Key[Array, "b"]  # one per image, see keys.per_image

LogitsFn = Callable[[Images], Logits]

__all__ = [
  "Array",
  "Bool",
  "Float",
  "Images",
  "Int",
  "Integer",
  "Key",
  "Keys",
  "Labels",
  "Logits",
  "LogitsFn",
  "Params",
  "PerImage",
  "PyTree",
  "Variables",
]


@trees.tree_class
class Params:
  """A model's parameters as three trees, each with a fate of its own.

  Attributes:
    backbone: the pretrained tree; the same leaves for every method.
    peft: what a method adds beside it; `{}` for linear, full and bias.
    head: the classifier on the pooled features.
  """

  backbone: PyTree
  peft: PyTree
  head: PyTree


Variables = tuple[Params, PyTree]  # parameters and running statistics
