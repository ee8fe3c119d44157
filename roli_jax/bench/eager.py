"""The PGD step in plain PyTorch, as people write it: ours is timed beside it.

Torch is no requirement: it is imported where it is asked for. The parameters
have timm's names, so that ours can be copied.
"""

import collections
from collections.abc import Callable, Mapping
from typing import Any

import jax

from roli_jax import convert, models
from roli_jax.types import Params

# Whether the weights are frozen while the attack lasts. If not, and all of them
# train, `backward` in the attack fills their gradients, for nothing.
FORMS = {"as written": False, "frozen in the attack": True}

Tensor = Any  # torch.Tensor
Module = Any  # torch.nn.Module


def lacking() -> str:
  """Why torch can't run where JAX does; "" if it can."""
  try:
    import torch
  except ImportError:
    return "torch is not installed"
  backend = jax.default_backend()
  if backend == "cpu" or (backend == "gpu" and torch.cuda.is_available()):
    return ""
  return f"JAX runs on a {backend}, which torch has not"


def set_num_threads(count: int) -> None:
  """Sets the number of a CPU's threads that torch computes with, >= 1."""
  import torch

  torch.set_num_threads(count)


def vit(model: models.Model) -> Module:
  """A ViT of the model's sizes, random: `[b, c, h, w]` in [0, 1] to logits.

  Raises:
    ValueError: the model is no ViT, or its feature is not the class token.
  """
  sizes = model.backbone
  if (
    not isinstance(sizes, models.Vit)
    or sizes.clip
    or sizes.stem
    or sizes.pool != "token"
  ):
    raise ValueError(
      f"torch_models must be ViTs with a class token, got {model.name!r}; take"
      " vit_s16, vit_b16, ..."
    )
  import torch
  from torch import nn

  Block = _block_class(sizes)

  class PatchEmbed(nn.Module):
    def __init__(self) -> None:
      super().__init__()
      self.proj = nn.Conv2d(
        model.channels, sizes.width, sizes.patch, sizes.patch
      )

    def forward(self, x: Tensor) -> Tensor:
      return self.proj(x).flatten(2).transpose(1, 2)

  class Vit(nn.Module):
    def __init__(self) -> None:
      super().__init__()
      num_tokens = 1 + (model.image_size // sizes.patch) ** 2
      self.patch_embed = PatchEmbed()
      self.cls_token = nn.Parameter(torch.zeros(1, 1, sizes.width))
      self.pos_embed = nn.Parameter(torch.zeros(1, num_tokens, sizes.width))
      self.blocks = nn.Sequential(*(Block() for _ in range(sizes.depth)))
      self.norm = nn.LayerNorm(sizes.width, eps=sizes.eps)
      self.head = nn.Linear(sizes.width, model.num_classes)
      for name, values in (("mean", model.mean), ("std", model.std)):
        each = torch.tensor(values).reshape(1, -1, 1, 1)
        self.register_buffer(name, each, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
      x = self.patch_embed((x - self.mean) / self.std)
      x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
      x = self.norm(self.blocks(x + self.pos_embed))
      return self.head(x[:, 0])

  return Vit()


def _block_class(sizes: models.Vit) -> type[Module]:
  """The class of a ViT's blocks, of the widths of ours."""
  from torch import nn
  from torch.nn import functional

  class Attention(nn.Module):
    def __init__(self) -> None:
      super().__init__()
      self.qkv = nn.Linear(sizes.width, 3 * sizes.width)
      self.proj = nn.Linear(sizes.width, sizes.width)

    def forward(self, x: Tensor) -> Tensor:
      qkv = self.qkv(x).reshape(*x.shape[:2], 3, sizes.num_heads, -1)
      q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
      mixed = functional.scaled_dot_product_attention(q, k, v)
      return self.proj(mixed.transpose(1, 2).reshape(x.shape))

  class Mlp(nn.Module):
    def __init__(self) -> None:
      super().__init__()
      self.fc1 = nn.Linear(sizes.width, sizes.hidden)
      self.act = nn.GELU()
      self.fc2 = nn.Linear(sizes.hidden, sizes.width)

    def forward(self, x: Tensor) -> Tensor:
      return self.fc2(self.act(self.fc1(x)))

  class Block(nn.Module):
    def __init__(self) -> None:
      super().__init__()
      self.norm1 = nn.LayerNorm(sizes.width, eps=sizes.eps)
      self.attn = Attention()
      self.norm2 = nn.LayerNorm(sizes.width, eps=sizes.eps)
      self.mlp = Mlp()

    def forward(self, x: Tensor) -> Tensor:
      x = x + self.attn(self.norm1(x))
      return x + self.mlp(self.norm2(x))

  return Block


def like(model: models.Model, params: Params) -> Module:
  """`vit` with copies of these weights, where JAX runs; on a GPU compiled."""
  import torch

  net = vit(model)
  state = convert.to_state_dict(convert.Bundle(model, params, {}), "timm")
  net.load_state_dict({k: torch.tensor(v) for k, v in state.items()})
  if not _on_gpu():
    return net
  # A step needs up to five programs. Torch keeps eight for all networks
  # together, and would leave what is beyond them uncompiled.
  torch.compiler.reset()
  return torch.compile(net.cuda(), dynamic=False)


def pgd(
  net: Module,
  images: Tensor,
  labels: Tensor,
  start: Tensor,
  eps: float,
  num_steps: int,
  frozen: bool,
) -> Tensor:
  """Each image's iterate of the highest cross-entropy, the last among them.

  `attacks.Pgd` with `keep="sample"` in Linf, its steps eps / 4 long.

  Args:
    net: maps images to logits [b, k].
    images: [b, c, h, w] in [0, 1].
    labels: [b].
    start: [b, c, h, w], where the attack begins, within the ball and the box.
    eps: the radius, > 0.
    num_steps: K; there are K + 1 forward passes and K backward.
    frozen: whether the gradient is taken by the pixels alone; see `FORMS`.

  Returns:
    [b, c, h, w], within the ball and the box.
  """
  import torch

  low, high = (images - eps).clamp(0, 1), (images + eps).clamp(0, 1)
  x = best = start
  highest = torch.full((len(x),), -torch.inf, device=x.device, dtype=x.dtype)
  for _ in range(num_steps):
    x = x.detach().requires_grad_()
    values = _losses(net, x, labels)
    best, highest = _better(best, highest, x.detach(), values.detach())
    if frozen:
      (grads,) = torch.autograd.grad(values.sum(), x)
    else:
      values.sum().backward()
      grads = x.grad
    x = (x.detach() + eps / 4 * grads.sign()).clamp(low, high)
  with torch.no_grad():
    values = _losses(net, x, labels)
  return _better(best, highest, x, values)[0]


def make_step(
  net: Module,
  method: str,
  batch: Mapping[str, Any],
  eps: float,
  num_steps: int,
  frozen: bool,
) -> Callable[[], float]:
  """One step of PGD adversarial training with AdamW, always on this batch.

  The rate is 0, as ours is in the bench: the weights stay, and with them what
  the attack has to do.

  Args:
    net: made by `like`; other steps may share its parameters.
    method: `full` or `linear`.
    batch: `image`, uint8 [b, h, w, c], and `label` [b].
    eps: the radius in Linf, > 0.
    num_steps: gradient steps of the attack, >= 1.
    frozen: see `FORMS`.

  Returns:
    A function that makes the step and returns the loss.
  """
  import torch

  device = next(net.parameters()).device
  pixels = torch.tensor(batch["image"], device=device)
  pixels = pixels.permute(0, 3, 1, 2).contiguous()
  labels = torch.tensor(batch["label"], device=device).long()
  trained = {"full": net, "linear": net.head}[method]
  net.requires_grad_(False)
  trained.requires_grad_(True)
  optimizer = torch.optim.AdamW(trained.parameters(), lr=0.0, weight_decay=0.0)

  def step() -> float:
    images = pixels.float() / 255
    noise = torch.empty_like(images).uniform_(-eps, eps)
    start = (images + noise).clamp(0, 1)
    net.eval()
    trained.requires_grad_(not frozen)
    adv = pgd(net, images, labels, start, eps, num_steps, frozen)
    trained.requires_grad_(True)
    net.train()
    optimizer.zero_grad()
    loss = _losses(net, adv, labels).mean()
    loss.backward()
    optimizer.step()
    return loss.item()  # waits until a GPU has finished

  return step


def passes(net: Module, step: Callable[[], Any]) -> tuple[int, int]:
  """Counts the forward and backward passes of the net in one step."""
  counts: collections.Counter[str] = collections.Counter()

  def count(module: Module, inputs: tuple[Tensor, ...], logits: Tensor) -> None:
    counts["forward"] += 1
    if logits.requires_grad:
      logits.register_hook(lambda _: counts.update(["backward"]))

  handle = net.register_forward_hook(count)
  step()
  handle.remove()
  return counts["forward"], counts["backward"]


def product(side: int, dtype: str) -> Callable[[], float]:
  """A call of the product of two square matrices."""
  import torch

  device = "cuda" if _on_gpu() else "cpu"
  a = torch.ones(side, side, dtype=getattr(torch, dtype), device=device)
  return lambda: (a @ a)[0, 0].item()


def _on_gpu() -> bool:
  return jax.default_backend() == "gpu"


def _losses(net: Module, x: Tensor, labels: Tensor) -> Tensor:
  """Each image's cross-entropy; on a GPU the net computes in bfloat16."""
  import torch

  with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
    loss = torch.nn.functional.cross_entropy
    return loss(net(x), labels, reduction="none")


def _better(
  best: Tensor, highest: Tensor, x: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
  """Each image's candidate of the higher loss, and that loss; a tie keeps.

  Candidates are [b, c, h, w], `best` and `x`, and their losses [b].
  """
  import torch

  wins = values > highest
  kept = torch.where(wins.reshape(-1, 1, 1, 1), x, best)
  return kept, torch.where(wins, values, highest)
