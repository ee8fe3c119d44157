"""Classifiers on pooled features."""

import functools
import math

from flax import linen as nn

HEAD_INITS = ("kaiming_fan_out", "small")


def linear(num_classes: int, init: str = "kaiming_fan_out") -> nn.Dense:
  """A linear head, `[b, d] -> [b, num_classes]`.

  Args:
    num_classes: at least 2.
    init: of its weights. `kaiming_fan_out`: N(0, 2 / num_classes), bias
      -ln 99, the RoLI reference's random head, much larger than usual.
      `small`: N(0, 0.02^2), bias 0, as in timm's vision transformers.
  """
  if num_classes < 2:
    raise ValueError(f"a head needs at least 2 classes, got {num_classes}")
  if init not in HEAD_INITS:
    raise ValueError(f"unknown head_init {init!r}; there are {HEAD_INITS}")
  return _linear(num_classes, init)


# Equal heads are equal, and share their compiled programs. (Not `linear`: its
# calls with and without the default would be others.)
@functools.cache
def _linear(num_classes, init):
  if init == "small":
    return nn.Dense(num_classes, kernel_init=nn.initializers.normal(0.02))
  return nn.Dense(
    num_classes,
    kernel_init=nn.initializers.normal(math.sqrt(2 / num_classes)),
    bias_init=nn.initializers.constant(-math.log(99)),
  )


@functools.cache
def projection(width: int) -> nn.Dense:
  """A linear map without bias, `[b, d] -> [b, width]`: CLIP's embedding."""
  return nn.Dense(width, use_bias=False)
