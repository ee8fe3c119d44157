"""What a file of another framework can't tell of its network.

It is taken as in the model of that name, and said: by a warning, in the table
of `--mode=convert`, in the metadata of our own file, and in reports.
"""

from collections.abc import Collection, Mapping

from absl import logging

from roli_jax import models
from roli_jax.convert.bundle import Bundle
from roli_jax.convert.name_maps import LAYOUTS

OF_FORMAT = "of the format"  # how `Coverage.normalised_by` begins then

# Another network may have the tensors of these: none shows how many heads of a
# ViT attend, an XCiT's strides, whence a residual network's shortcuts come and
# whether it blurs, how a mobile one pads.
_TRACELESS = (
  models.Vit, models.Xcit, models.ResNet, models.PreactResNet, models.MobileNet,
)  # fmt: skip


def of(bundle: Bundle, told: Collection[str]) -> dict[str, str]:
  """Returns what is assumed of a bundle, by the argument that would tell it.

  Args:
    bundle: as it was read from a file of another framework.
    told: the arguments of `convert.load` that were given.
  """
  model, backbone = bundle.model, bundle.model.backbone
  (layout,) = (x for x in LAYOUTS if x.name == bundle.layout)
  acts = {act: name for name, act in models.ACTS.items()}
  found: dict[str, str] = {}
  if isinstance(backbone, _TRACELESS) and "heads" not in told:
    found["model"] = model.name
  if getattr(backbone, "act", None) in acts:
    found["act"] = acts[backbone.act]
  if hasattr(backbone, "eps"):
    found["norm_eps"] = f"{backbone.eps:g}"
  # Names don't tell whether a ViT's feature is the class token or, as under
  # timm's global_pool="avg", fc_norm=False, the mean of the others.
  if layout.pools and backbone.pool == "token":
    found["pool"] = "token"
  assert bundle.coverage is not None
  if bundle.coverage.normalised_by.startswith(OF_FORMAT):
    found["mean"], found["std"] = map(_numbers, (model.mean, model.std))
  # A ViT's positions tell it. A Swin's windows do by custom alone, and in a
  # convolutional network nothing does.
  if not isinstance(backbone, models.Vit):
    found["image_size"] = str(model.image_size)
  return {fact: value for fact, value in found.items() if fact not in told}


def _numbers(values: tuple[float, ...]) -> str:
  return " ".join(f"{x:g}" for x in values)


def said(assumed: Mapping[str, str]) -> str:
  """Returns the assumptions in one line, "" without any."""
  return ", ".join(f"{fact}={value}" for fact, value in assumed.items())


def tell(bundle: Bundle, what: str, strict: bool) -> None:
  """Warns of what is assumed of a bundle; under `strict` a ValueError says it.

  Args:
    bundle: any bundle.
    what: the name of its file.
    strict: whether nothing may be assumed.
  """
  if bundle.assumed and strict:
    raise ValueError(
      f"strict: {what} can't tell {said(bundle.assumed)}; say them, or take"
      " weights by a name of --mode=zoo, which does"
    )
  if bundle.assumed:
    logging.warning(
      "%s can't tell, and it is assumed: %s", what, said(bundle.assumed)
    )
  for note in bundle.coverage.notes() if bundle.coverage else ():
    logging.warning("%s: %s", what, note)
