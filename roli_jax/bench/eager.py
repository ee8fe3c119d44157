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


def lacking() -> str:
  """Why torch can't run where JAX does; "" if it can."""
  try:
    import torch
  except ImportError:
    return "torch is not installed"
  where = jax.default_backend()
  if where == "cpu" or (where == "gpu" and torch.cuda.is_available()):
    return ""
  return f"JAX runs on a {where}, which torch has not"


def set_num_threads(count: int) -> None:
  """How many of a CPU's threads torch computes with."""
  import torch

  torch.set_num_threads(count)


def vit(model: models.Model) -> Any:
  """A ViT of the model's sizes, random: `[b, c, h, w]` in [0, 1] to logits.

  Raises:
    ValueError: the model is none, or its feature is not the class token.
  """
  own: Any = model.backbone
  if not isinstance(own, models.Vit) or own.clip or own.pool != "token":
    raise ValueError(
      f"torch_models must be ViTs with a class token, got {model.name!r}; take"
      " vit_s16, vit_b16, ..."
    )
  import torch
  from torch import nn

  make_block = _block(own)

  class PatchEmbed(nn.Module):
    def __init__(self):
      super().__init__()
      self.proj = nn.Conv2d(model.channels, own.width, own.patch, own.patch)

    def forward(self, x):
      return self.proj(x).flatten(2).transpose(1, 2)

  class Vit(nn.Module):
    def __init__(self):
      super().__init__()
      num_tokens = 1 + (model.image_size // own.patch) ** 2
      self.patch_embed = PatchEmbed()
      self.cls_token = nn.Parameter(torch.zeros(1, 1, own.width))
      self.pos_embed = nn.Parameter(torch.zeros(1, num_tokens, own.width))
      self.blocks = nn.Sequential(*(make_block() for _ in range(own.depth)))
      self.norm = nn.LayerNorm(own.width, eps=own.eps)
      self.head = nn.Linear(own.width, model.num_classes)
      for name, values in (("mean", model.mean), ("std", model.std)):
        each = torch.tensor(values).reshape(1, -1, 1, 1)
        self.register_buffer(name, each, persistent=False)

    def forward(self, x):
      x = self.patch_embed((x - self.mean) / self.std)
      x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
      x = self.norm(self.blocks(x + self.pos_embed))
      return self.head(x[:, 0])

  return Vit()


def _block(own):
  """The class of a ViT's blocks, of the widths of ours."""
  from torch import nn
  from torch.nn import functional

  class Attention(nn.Module):
    def __init__(self):
      super().__init__()
      self.qkv = nn.Linear(own.width, 3 * own.width)
      self.proj = nn.Linear(own.width, own.width)

    def forward(self, x):
      qkv = self.qkv(x).reshape(*x.shape[:2], 3, own.num_heads, -1)
      q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
      mixed = functional.scaled_dot_product_attention(q, k, v)
      return self.proj(mixed.transpose(1, 2).reshape(x.shape))

  class Mlp(nn.Module):
    def __init__(self):
      super().__init__()
      self.fc1 = nn.Linear(own.width, own.hidden)
      self.act = nn.GELU()
      self.fc2 = nn.Linear(own.hidden, own.width)

    def forward(self, x):
      return self.fc2(self.act(self.fc1(x)))

  class Block(nn.Module):
    def __init__(self):
      super().__init__()
      self.norm1 = nn.LayerNorm(own.width, eps=own.eps)
      self.attn = Attention()
      self.norm2 = nn.LayerNorm(own.width, eps=own.eps)
      self.mlp = Mlp()

    def forward(self, x):
      x = x + self.attn(self.norm1(x))
      return x + self.mlp(self.norm2(x))

  return Block


def like(model: models.Model, params: Params) -> Any:
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
  net: Any,
  images: Any,
  labels: Any,
  start: Any,
  eps: float,
  num_steps: int,
  frozen: bool,
) -> Any:
  """Each image's iterate of the highest cross-entropy, the last among them.

  `attacks.Pgd` with `keep="sample"` in Linf, its steps eps / 4 long.

  Args:
    net: images to logits.
    images: `[b, c, h, w]` in [0, 1].
    labels: `[b]`.
    start: where it begins, within the ball and the box.
    eps: the radius.
    num_steps: K; there are K + 1 forward passes and K backward.
    frozen: whether the gradient is by the pixels alone; see `FORMS`.
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
  net: Any,
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
    net: of `like`, whose parameters it may share with other steps.
    method: `full` or `linear`.
    batch: ours: images are uint8, channels last.
    eps: the radius in Linf.
    num_steps: of the attack.
    frozen: see `FORMS`.

  Returns:
    A function that makes the step and returns the loss.
  """
  import torch

  where = next(net.parameters()).device
  pixels = torch.tensor(batch["image"], device=where)
  pixels = pixels.permute(0, 3, 1, 2).contiguous()
  labels = torch.tensor(batch["label"], device=where).long()
  trained = {"full": net, "linear": net.head}[method]
  net.requires_grad_(False)
  trained.requires_grad_(True)
  optimizer = torch.optim.AdamW(trained.parameters(), lr=0.0, weight_decay=0.0)

  def step():
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
    return loss.item()  # which a GPU finishes its work for

  return step


def passes(net: Any, step: Callable[[], Any]) -> tuple[int, int]:
  """How many forward and backward passes the net makes in one step."""
  made: collections.Counter[str] = collections.Counter()

  def seen(module, inputs, logits):
    made["forward"] += 1
    if logits.requires_grad:
      logits.register_hook(lambda _: made.update(["backward"]))

  handle = net.register_forward_hook(seen)
  step()
  handle.remove()
  return made["forward"], made["backward"]


def product(side: int, dtype: str) -> Callable[[], float]:
  """A call of the product of two square matrices."""
  import torch

  where = "cuda" if _on_gpu() else "cpu"
  a = torch.ones(side, side, dtype=getattr(torch, dtype), device=where)
  return lambda: (a @ a)[0, 0].item()


def _on_gpu():
  return jax.default_backend() == "gpu"


def _losses(net, x, labels):
  """Each image's cross-entropy; on a GPU the net computes in bfloat16."""
  import torch

  with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
    loss = torch.nn.functional.cross_entropy
    return loss(net(x), labels, reduction="none")


def _better(best, highest, x, values):
  """Of two candidates with their losses, the one to keep; a tie keeps."""
  import torch

  wins = values > highest
  kept = torch.where(wins.reshape(-1, 1, 1, 1), x, best)
  return kept, torch.where(wins, values, highest)
