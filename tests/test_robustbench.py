"""Networks of RobustBench compute what its classes compute."""

import functools
import json

import jax
import numpy as np
import pytest

from roli_jax import convert, models, trees
from roli_jax.convert import state_dict
from roli_jax.models import (
  ConvNext,
  Entry,
  PreactResNet,
  ResNet,
  Swin,
  Vit,
  WideResNet,
  Xcit,
)
from roli_jax.models.zoo import CIFAR, RAW
from tests import golden
from tests.covering import mostly_slow

CIFAR_RESNET = functools.partial(ResNet, (2, 1, 1, 1), small=True)
PREACT = functools.partial(
  PreactResNet, depths=(2, 1, 1, 1), widths=(8, 16, 32, 64), width=8
)
STAGED = functools.partial(PreactResNet, (2, 1, 1), (12, 20, 16), width=8)
SILU = {"act": jax.nn.silu}
CONVNEXT = functools.partial(ConvNext, (16, 20, 24, 28), (1, 1, 1, 1))
# By the names of `models.MODELS` and `FAMILIES` of which they are small ones.
SMALL = {
  "cifar_resnet18": functools.partial(
    CIFAR_RESNET, bottleneck=False, inner=8, width=8
  ),
  "cifar_resnet18_w128": functools.partial(
    CIFAR_RESNET, bottleneck=False, inner=12, width=12
  ),
  "cifar_resnet50": functools.partial(
    CIFAR_RESNET, bottleneck=True, inner=8, width=8
  ),
  "preact_resnet18": PREACT,
  "preact_resnet18_v1": functools.partial(PREACT, raw=True, last_norm=False),
  "dm_preact_resnet18": functools.partial(
    PREACT, depths=(2, 2, 2, 2), raw=True, reach=3, same=True, **SILU
  ),
  "wrn_34_r": STAGED,
  "wrn_a4": functools.partial(STAGED, **SILU),
  "wrn": functools.partial(WideResNet, 16, 1),
  "dm_wrn": functools.partial(WideResNet, 10, 1, same=True),
  "ra_wrn_70_16": functools.partial(
    PreactResNet, (2, 1, 1), (16, 24, 32), 8, same=True, squeeze=4, **SILU
  ),
  "meansparse_ra_wrn_70_16": functools.partial(
    PreactResNet, (2, 1, 1), (12, 20, 24), 8, same=True, squeeze=4, sparse=True,
    **SILU,
  ),
  "meansparse_dm_wrn": functools.partial(
    WideResNet, 10, 1, same=True, sparse=True, **SILU
  ),
  "mimir_swin_l": functools.partial(
    Swin, 12, (2, 1, 1), (2, 3, 4), patch=2, window=8, eps=1e-6
  ),
  "meansparse_swin_l": functools.partial(
    Swin, 12, (2, 1, 1, 1), (2, 3, 4, 6), patch=2, sparse=True
  ),
  "meansparse_convnext_l": functools.partial(CONVNEXT, sparse=True),
  "vit_s16_cvst": functools.partial(
    Vit, 16, 24, 2, 2, 96, stem=((4, 2), (8, 2), (16, 2), (32, 2))
  ),
  "convnext_t_cvst": functools.partial(CONVNEXT, stem=((8, 2), (16, 2))),
  "convnext_b_cvst": functools.partial(
    CONVNEXT, stem=((8, 2), (12, 2), (16, 1))
  ),
  "xcit_s12": functools.partial(Xcit, 16, 2, 2),
  "xcit_s12_cifar": functools.partial(Xcit, 16, 2, 2, patch=4),
}  # fmt: skip
# The layout of names of each.
LAYOUT = {
  **dict.fromkeys(("cifar_resnet18", "cifar_resnet50"), "cifar_resnet"),
  "cifar_resnet18_w128": "resnet",
  **dict.fromkeys(("preact_resnet18", "preact_resnet18_v1"), "preact_resnet"),
  "dm_preact_resnet18": "dm_preact_resnet",
  "wrn_34_r": "robust_wrn",
  "wrn_a4": "robust_wrn_norm1",
  "wrn": "wide_resnet",
  "mimir_swin_l": "swin_old",
  "meansparse_swin_l": "swin_sparse",
  "meansparse_convnext_l": "convnext_sparse",
  "vit_s16_cvst": "vit_stem",
  **dict.fromkeys(("convnext_t_cvst", "convnext_b_cvst"), "convnext_stem"),
  **dict.fromkeys(("xcit_s12", "xcit_s12_cifar"), "xcit"),
}  # the others': dm_wide_resnet
# The format of its names, where it isn't RobustBench's.
FORMAT = {
  "resnet": "torchvision",
  **dict.fromkeys(
    (
      "swin_old",
      "swin_sparse",
      "vit_stem",
      "convnext_stem",
      "convnext_sparse",
      "xcit",
    ),
    "timm",
  ),
}
FACTS = json.loads((golden.FOLDER / "robustbench" / "facts.json").read_text())


@pytest.fixture(autouse=True)
def small(monkeypatch):
  """The small ones are all models that there are."""
  entries = {
    name: Entry(backbone, RAW if name in LAYOUT else CIFAR, 32)
    for name, backbone in SMALL.items()
  }
  entries["dm_preact_resnet18"] = Entry(SMALL["dm_preact_resnet18"], CIFAR, 32)
  monkeypatch.setattr(models, "MODELS", entries)
  monkeypatch.setattr(models, "FAMILIES", {})


def state_of(name):
  """The state dict that the original was given, but for what is dropped."""
  model = models.create(name, 10)
  shapes = model.shapes()
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
  layout = LAYOUT.get(name, "dm_wide_resnet")
  bundle = convert.Bundle(model, *zeros, layout)
  state = convert.to_state_dict(bundle, FORMAT.get(layout, "robustbench"))
  return {
    key: golden.value(key, state[key].shape, state[key].dtype.name)
    for key in sorted(state)
  }


@pytest.mark.parametrize("name", SMALL)
def test_names_and_parameters_are_the_originals(name):
  model, state = models.create(name, 10), state_of(name)
  params, _ = model.shapes()
  assert FACTS[name] == {
    "tensors": len(state),
    "parameters": trees.size(params),
    "digest": golden.digest(state),
  }


FAST = (
  "preact_resnet18_v1", "dm_preact_resnet18", "meansparse_ra_wrn_70_16",
  "vit_s16_cvst", "xcit_s12_cifar",
)  # fmt: skip


@pytest.mark.parametrize("name", mostly_slow(SMALL, *FAST))
def test_numbers_are_the_originals(name):
  state = state_of(name)
  told = {"mean": RAW[0], "std": RAW[1]}
  if models.MODELS[name].normalisation == CIFAR:
    told = {}  # as the format's
  bundle = convert.load(state, name, **told)
  model, gold = bundle.model, golden.arrays(name, "robustbench")
  images = np.random.default_rng(5).random((2, 32, 32, 3), np.float32)

  @jax.jit
  def see(params, stats, x):
    def loss(x):
      logits = model.logits(params, stats, x)
      return (logits**2).sum(), logits

    slope, logits = jax.grad(loss, has_aux=True)(x)
    features = model.features(params, stats, x)
    return features, logits, slope[:, 3::8, 5::8]

  with jax.enable_x64(True):
    params, stats = jax.tree.map(np.float64, (bundle.params, bundle.stats))
    found = see(params, stats, np.float64(images))
  for what, array in zip(("features", "logits", "slope"), found, strict=True):
    np.testing.assert_allclose(array, gold[f"{what}_f64"], 0, 1e-9)
  back = convert.to_state_dict(bundle, state_dict.format_of(bundle))
  assert back.keys() == state.keys()
  for key, tensor in state.items():
    np.testing.assert_array_equal(back[key], tensor, err_msg=key)


@pytest.mark.parametrize(
  "name, told",
  [
    ("mimir_swin_l", "mimir_swin_l"),
    ("vit_s16_cvst", "vit_s16_cvst"),
    ("convnext_b_cvst", "convnext_b_cvst"),
    ("xcit_s12_cifar", "xcit_s12"),
  ],
)
def test_a_bare_file_is_recognised_or_its_model_is_assumed(name, told):
  """Strides leave no trace in an XCiT's file."""
  bundle = convert.load(state_of(name))
  assert bundle.model.name == told
  assert bundle.assumed.get("model", name) == told
  if name != told:
    assert "model" not in convert.load(state_of(name), name).assumed
