"""Methods of fine-tuning: their modules, and the leaves that they train."""

import dataclasses
from collections.abc import Callable
from typing import Any

from flax import linen as nn

from roli_jax import models, specs, trees
from roli_jax.models import Hooks
from roli_jax.peft import modules
from roli_jax.types import Params

GROUPS = ("backbone", "peft", "head")
FROZEN = "frozen"


@dataclasses.dataclass(frozen=True)
class Method:
  """A way to fine-tune.

  Attributes:
    name: a name in `peft.METHODS`.
    groups: pairs of a pattern of paths and `backbone`, `peft`, `head` or
      `frozen`; the first match wins, and every leaf must be covered.
    hooks: the modules that it adds to a backbone; none by default.
    scale: the factor of LoRA's products; 0 if the tested model has none.
    train_mode: whether the backbone is in training mode, where it drops paths
      and may move running statistics. Methods that freeze most of it keep it
      in evaluation mode, as in the RoLI reference.
  """

  name: str
  groups: tuple[tuple[str, str], ...]
  hooks: Hooks = Hooks()
  scale: float | int = 0.0
  train_mode: bool = False

  def labels(self, params: Params) -> Any:
    """Returns the group of every trained leaf, None for the frozen ones."""
    groups = [(p, None if g == FROZEN else g) for p, g in self.groups]
    return trees.label(params, groups)

  def trains(self, params: Params) -> Any:
    """Returns for each leaf whether it is trained."""
    return trees.label(params, [(p, g != FROZEN) for p, g in self.groups])

  def split(self, params: Params) -> tuple[Params, Params]:
    """Splits parameters into trained and frozen ones, with None elsewhere."""
    return trees.split(params, self.trains(params))

  def apply_to(self, model: models.Model) -> models.Model:
    """Returns the model with the method's modules in its backbone.

    Raises:
      ValueError: the backbone has no place for them.
    """
    backbone: Any = model.backbone
    if self.hooks.tokens and not isinstance(backbone, models.Vit | models.Swin):
      raise ValueError(
        f"vpt puts tokens into a ViT or a Swin, which {model.name} is not: take"
        " linear, full, bias, lora or adapter"
      )
    return dataclasses.replace(model, backbone=backbone.clone(hooks=self.hooks))


_HEAD = ("head/.*", "head")
_PEFT = ("peft/.*", "peft")
_REST = (".*", FROZEN)


@dataclasses.dataclass(frozen=True)
class _With:
  """A function with options, equal to another where both are equal.

  A `functools.partial` is equal to itself alone: methods of equal options would
  make other models of one, and compile its programs anew.
  """

  make: Callable[..., Any]
  options: tuple[tuple[str, Any], ...]

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    return self.make(*args, **dict(self.options), **kwargs)


def _with(make: Callable[..., Any], **options: Any) -> _With:
  return _With(make, tuple(sorted(options.items())))


def linear() -> Method:
  """Trains the head alone."""
  return Method("linear", (_HEAD, _REST))


def full() -> Method:
  """Trains all leaves."""
  return Method("full", (_HEAD, ("backbone/.*", "backbone")), train_mode=True)


def bias() -> Method:
  """Trains the head and all biases of convolutions, layers and normalisations.

  In a Swin also the biases by relative position, as in the RoLI reference.
  """
  return Method("bias", (_HEAD, ("backbone/.*bias", "backbone"), _REST))


def lora(
  rank: int = 16,
  alpha: float | int = 16,
  init: str = "standard",
  dropout: float | int = 0.0,
) -> Method:
  """LoRA on the queries and values of every block (Hu et al. 2022).

  In a ConvNeXt it is on the two pointwise layers; in a ResNet on every
  convolution of the blocks' second branch, whose kernel is taken as a matrix.

  Args:
    rank: the rank of the product a b, >= 1.
    alpha: the product is scaled by alpha / rank, > 0.
    init: `standard`: a is uniform and b zero. `both_zero`, of the RoLI
      reference: a saddle point, where both gradients are 0.
    dropout: the rate of dropout before a in training, in [0, 1); convolutions
      have none.

  Raises:
    ValueError: a value out of its range.
  """
  starts = {"standard": modules.UNIFORM, "both_zero": modules.ZEROS}
  start = specs.lookup(starts, init, "lora init")
  scale = _lora_scale("lora", rank, alpha)
  _check_dropout("lora", dropout)
  hooks = _lora_hooks(dropout, rank=rank, scale=scale, a_init=start)
  return Method("lora", (_HEAD, _PEFT, _REST), hooks, scale)


def autolora(rank: int = 8, alpha: float | int = 8) -> Method:
  """Trains all leaves and a branch of LoRA that exists in training alone.

  For the loss `autolora` (Xu et al. 2024), whose clean images see the branch.
  Attacks, validation and tests do not, since they have no keys for dropout:
  they see the backbone and the head.

  The branch is the same as in `lora`. The authors' is in all convolutions of a
  ResNet's blocks, its a begins as N(0, 1), and its alpha is 1.

  Args:
    rank: the rank of the product a b, >= 1; the authors use 8.
    alpha: the product is scaled by alpha / rank, > 0.

  Raises:
    ValueError: a value out of its range.
  """
  scale = _lora_scale("autolora", rank, alpha)
  hooks = _lora_hooks(
    0.0, rank=rank, scale=scale, a_init=modules.UNIFORM, passing=True
  )
  groups = (_HEAD, _PEFT, ("backbone/.*", "backbone"))
  return Method("autolora", groups, hooks, train_mode=True)


def _lora_scale(method: str, rank: int, alpha: float | int) -> float:
  _check(method, rank=rank)
  if not alpha > 0:
    raise ValueError(f"{method}.alpha must be > 0, got {alpha}")
  return alpha / rank


def _lora_hooks(dropout: float | int, **options: Any) -> Hooks:
  return Hooks(
    dense=_with(_lora_dense, dropout=dropout, **options),
    kernel=_with(modules.lora_kernel, **options),
  )


def _lora_dense(
  features: int, *, name: str, use_bias: bool = True, **options: Any
) -> nn.Module:
  if name == "k":  # which alone may lack a bias
    return nn.Dense(features, use_bias, name=name)
  return modules.LoraDense(features, name=name, **options)


def adapter(reduction: int = 8, init: str = "near_identity") -> Method:
  """An adapter after the second branch of every block (Pfeiffer et al. 2021).

  In a ViT and a Swin that is after the MLP; in a convolutional net it maps each
  place of the feature map by itself.

  Args:
    reduction: the width is divided by it inside the adapter, >= 1.
    init: `near_identity`: it adds 0 at the start, and all weights learn.
      `all_zero`, of the RoLI reference: only the last bias of each learns.

  Raises:
    ValueError: a value out of its range.
  """
  starts = {"near_identity": modules.UNIFORM, "all_zero": modules.ZEROS}
  start = specs.lookup(starts, init, "adapter init")
  _check("adapter", reduction=reduction)
  branch = _with(modules.Adapter, reduction=reduction, down_init=start)
  return Method("adapter", (_HEAD, _PEFT, _REST), Hooks(branch=branch))


def vpt(
  tokens: int = 10,
  deep: bool = True,
  dropout: float | int = 0.1,
  order: str = "fixed",
) -> Method:
  """Visual prompts for a ViT or a Swin (Jia et al. 2022).

  Args:
    tokens: the number of prompts in each block, >= 1.
    deep: whether every block has prompts, or only the first.
    dropout: the rate of dropout of prompts in training, in [0, 1).
    order: `fixed`; `as_is`, of the RoLI reference: a Swin's windows get the
      prompts of other images of the batch, see `Hooks.mixed`.

  Raises:
    ValueError: a value out of its range.
  """
  orders = {"fixed": False, "as_is": True}
  mixed = specs.lookup(orders, order, "prompt order")
  _check("vpt", tokens=tokens)
  _check_dropout("vpt", dropout)
  make = _with(modules.Prompts, tokens=tokens, dropout=dropout)
  hooks = Hooks(tokens=make, deep=deep, mixed=mixed)
  return Method("vpt", (_HEAD, _PEFT, _REST), hooks)


def _check(method: str, **counts: int) -> None:
  for name, count in counts.items():
    if count < 1:
      raise ValueError(f"{method}.{name} must be >= 1, got {count}")


def _check_dropout(method: str, rate: float | int) -> None:
  if not 0 <= rate < 1:
    raise ValueError(f"{method}.dropout is a share in [0, 1), got {rate}")


METHODS = {
  make.__name__: make
  for make in (linear, full, bias, lora, adapter, vpt, autolora)
}
