"""Backbones compute what the originals compute, from the originals' files."""

import re
import zlib

import jax
import numpy as np
import pytest

from roli_jax import convert, keys, models, peft, trees
from roli_jax.models import zoo
from tests import golden
from tests.covering import mostly_slow

# The model of each reference checkpoint, and the format of its names.
GOLDEN = {
  "timm_vit_tiny_patch16_224": ("vit_ti16", "timm"),
  "timm_vit_base_patch16_224": ("vit_b16", "ares"),
  "torchvision_vit_b_16_new": ("vit_b16", "torchvision"),
  "torchvision_vit_b_16_old": ("vit_b16", "torchvision"),
  "swin_tiny_patch4_window7_224_timm": ("swin_t", "timm"),
  "swin_base_patch4_window7_224_timm": ("swin_b", "timm"),
  "swin_base_patch4_window7_224_old": ("swin_b", "microsoft"),
  "timm_convnext_tiny": ("convnext_t", "timm"),
  "timm_convnext_base": ("convnext_b", "timm"),
  "facebook_convnext_tiny": ("convnext_t", "meta"),
  "resnet50": ("resnet50", "torchvision"),
  "wide_resnet50_2": ("wide_resnet50_2", "timm"),
  "cifar_wide_resnet_28_10": ("wrn_28_10", "robustbench"),
  "cifar_dm_wide_resnet_28_10_swish": ("dm_wrn_28_10", "robustbench"),
  "open_clip_vit_b_16_visual": ("clip_vit_b16", "open_clip"),
}
# Of full size these take minutes. `make test` has the smallest one, and of the
# other families toys as they were when all of these were right.
EACH = [
  pytest.param(name, marks=() if "tiny_patch16" in name else pytest.mark.slow)
  for name in GOLDEN
]

# Parameters with a head of 1,000 classes (10 where images are CIFAR's) and
# without, as timm, torchvision, open_clip, MadryLab's robustness and
# RobustBench's classes count them; running statistics apart, and among them
# those of MeanSparse with its thresholds.
SIZES = {
  "vit_ti16": (5_717_416, 5_524_416, 0),
  "vit_ti32": (6_131_560, 5_938_560, 0),
  "vit_s16": (22_050_664, 21_665_664, 0),
  "vit_s32": (22_878_952, 22_493_952, 0),
  "vit_b16": (86_567_656, 85_798_656, 0),
  "vit_b32": (88_224_232, 87_455_232, 0),
  "vit_l16": (304_326_632, 303_301_632, 0),
  "vit_l32": (306_535_400, 305_510_400, 0),
  "deit_ti16": (5_717_416, 5_524_416, 0),
  "deit_s16": (22_050_664, 21_665_664, 0),
  "deit_b16": (86_567_656, 85_798_656, 0),
  "swin_t": (28_288_354, 27_519_354, 0),
  "swin_s": (49_606_258, 48_837_258, 0),
  "swin_b": (87_768_224, 86_743_224, 0),
  "swin_l": (196_532_476, 194_995_476, 0),
  "mimir_swin_b": (87_768_224, 86_743_224, 0),
  "mimir_swin_l": (196_794_556, 195_257_556, 0),
  "convnext_t": (28_589_128, 27_820_128, 0),
  "convnext_s": (50_223_688, 49_454_688, 0),
  "convnext_b": (88_591_464, 87_566_464, 0),
  "convnext_l": (197_767_336, 196_230_336, 0),
  "meansparse_swin_l": (196_532_476, 194_995_476, 252_768),
  "meansparse_convnext_l": (197_767_336, 196_230_336, 270_792),
  "vit_s16_cvst": (22_777_576, 22_392_576, 0),
  "vit_b16_cvst": (87_147_112, 86_378_112, 0),
  "convnext_t_cvst": (28_627_432, 27_858_432, 0),
  "convnext_s_cvst": (50_261_992, 49_492_992, 0),
  "convnext_b_cvst": (88_753_416, 87_728_416, 0),
  "convnext_l_cvst": (198_134_680, 196_597_680, 0),
  "xcit_s12": (26_253_304, 25_868_304, 10_656),
  "xcit_m12": (46_401_160, 45_888_160, 14_208),
  "xcit_l12": (103_792_648, 103_023_648, 21_312),
  "xcit_s12_cifar": (25_872_154, 25_868_304, 10_656),
  "xcit_m12_cifar": (45_893_290, 45_888_160, 14_208),
  "xcit_l12_cifar": (103_031_338, 103_023_648, 21_312),
  "resnet18": (11_689_512, 11_176_512, 9_600),
  "resnet34": (21_797_672, 21_284_672, 17_024),
  "resnet50": (25_557_032, 23_508_032, 53_120),
  "resnet101": (44_549_160, 42_500_160, 105_344),
  "resnet152": (60_192_808, 58_143_808, 151_424),
  "wide_resnet50_2": (68_883_240, 66_834_240, 68_224),
  "wide_resnet50_4": (223_439_144, 221_390_144, 98_432),
  "wide_resnet50_2_gelu": (68_883_240, 66_834_240, 68_224),
  "cifar_resnet18": (11_173_962, 11_168_832, 9_600),
  "cifar_resnet18_w128": (44_662_922, 44_652_672, 19_200),
  "cifar_resnet50": (23_520_842, 23_500_352, 53_120),
  "preact_resnet18": (11_172_170, 11_167_040, 7_808),
  "preact_resnet18_v1": (11_171_146, 11_166_016, 6_784),
  "dm_preact_resnet18": (12_548_426, 12_543_296, 7_808),
  "wrn_28_4": (5_849_050, 5_846_480, 7_200),
  "wrn_28_10": (36_479_194, 36_472_784, 17_952),
  "wrn_34_10": (46_160_474, 46_154_064, 22_432),
  "wrn_34_15": (103_819_674, 103_810_064, 33_632),
  "wrn_34_20": (184_531_674, 184_518_864, 44_832),
  "wrn_40_2": (2_243_546, 2_242_256, 5_408),
  "wrn_70_16": (266_796_506, 266_786_256, 78_880),
  "dm_wrn_28_10": (36_479_194, 36_472_784, 17_952),
  "dm_wrn_34_10": (46_160_474, 46_154_064, 22_432),
  "dm_wrn_34_20": (184_531_674, 184_518_864, 44_832),
  "dm_wrn_70_16": (266_796_506, 266_786_256, 78_880),
  "dm_wrn_82_8": (79_125_466, 79_120_336, 46_624),
  "dm_wrn_94_16": (365_915_610, 365_905_360, 107_552),
  "dm_wrn_106_16": (415_475_162, 415_464_912, 121_888),
  "wrn_34_r": (68_116_698, 68_111_568, 29_472),
  "wrn_a4": (147_291_738, 147_287_888, 87_456),
  "ra_wrn_70_16": (267_240_802, 267_232_152, 114_240),
  "meansparse_ra_wrn_70_16": (267_240_802, 267_232_152, 285_718),
  "meansparse_dm_wrn_70_16": (266_796_506, 266_786_256, 197_284),
  "meansparse_dm_wrn_94_16": (365_915_610, 365_905_360, 269_000),
  "clip_vit_b16": (86_568_424, 85_799_424, 0),
  "clip_vit_b32": (88_225_000, 87_456_000, 0),
  "clip_vit_l14": (304_204_776, 303_179_776, 0),
  "efficientnet_b0": (5_288_548, 4_007_548, 42_016),
  "efficientnet_lite0": (4_652_008, 3_371_008, 42_016),
  "mobilenetv3_l": (5_483_032, 4_202_032, 24_400),
  "regnetx_004": (5_157_512, 4_772_512, 36_672),
  "coatnet_0_rw": (27_435_562, 26_666_562, 11_584),
  "coatnet_2_rw": (73_868_400, 72_843_400, 30_080),
  "eva02_ti14": (5_695_144, 5_502_144, 0),
  "eva02_b14": (86_527_720, 85_758_720, 0),
  "tiny32": (1_543_912, 1_414_912, 0),
}


# Of each family one; `make test-all` has all.
COUNTED = (
  "vit_b16", "deit_s16", "swin_t", "convnext_t", "resnet18", "wrn_28_10",
  "dm_wrn_28_10", "clip_vit_b16", "dm_preact_resnet18",
)  # fmt: skip


# Of those that normalise before they convolve the arrays of these are made; all
# are counted by hand.
MADE = ("wrn_28_10", "dm_wrn_28_10", "preact_resnet18_v1", "dm_preact_resnet18")
PREACTS = [
  name
  for name in SIZES
  if isinstance(models.create(name, 2).backbone, models.PreactResNet)
]


def by_hand(net):
  """The numbers of parameters, and of statistics, that its sizes say."""
  params, stats, before = 9 * 3 * net.width, 0, net.width
  stages = zip(net.depths, net.widths, strict=True)
  for stage, (depth, c) in enumerate(stages):
    for i in range(depth):
      narrow = c // net.squeeze if net.squeeze else 0
      params += 2 * (before + c) + 9 * c * (before + c)
      params += 2 * c * narrow + c * bool(narrow) + narrow
      if before != c or (stage and not i):
        params += net.reach**2 * before * c
      stats += 2 * (before + c) + net.sparse * (2 * before + 4 * c + 3)
      before = c
  if net.last_norm:
    params, stats = params + 2 * c, stats + 2 * c + net.sparse * (2 * c + 1)
  return params, stats


def test_parameters_by_hand_are_the_originals():
  for name in PREACTS:
    net = models.create(name, 10).backbone
    whole, backbone, running = SIZES[name]
    assert by_hand(net) == (backbone, running), name
    assert whole == backbone + 10 * (net.widths[-1] + 1), name


@pytest.mark.parametrize(
  "name",
  mostly_slow([n for n in SIZES if n in MADE or n not in PREACTS], *COUNTED),
)
def test_parameter_counts_are_the_originals(name):
  of_cifar = models.MODELS[name].normalisation == zoo.CIFAR
  model = models.create(name, 10 if of_cifar else 1000)
  params, stats = model.shapes()
  whole, backbone, running = SIZES[name]
  assert trees.size(params) == whole
  assert trees.size(params.backbone) == backbone
  assert trees.size(stats) == running


def test_all_but_our_own_are_counted():
  assert {n for n in models.MODELS if not n.startswith("glyph")} == {*SIZES}


@pytest.fixture(scope="module", params=EACH)
def made(request):
  """A checkpoint: its name, what is known of it, its arrays, its bundle."""
  name = request.param
  spec = golden.specs()[name]
  state = golden.state_dict(spec, dropped=True)
  told = {"mean": spec["mean"], "std": spec["std"]}
  return name, spec, state, convert.load(state, *GOLDEN[name], **told)


def wide(tree):
  """In float64, of the same values."""
  return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def ours(tap):
  """The module of ours that a tap of timm's, torchvision's or others is of."""
  for pattern, name in (
    (r"(?:visual\.transformer\.res)?blocks\.(\d+)", r"block\1"),
    (r"encoder\.layers\.encoder_layer_(\d+)", r"block\1"),
    (r"visual\.ln_pre", "pre_norm"),
    (r"(?:layers|stages)\.(\d)", r"stage\1"),
  ):
    match = re.fullmatch(f"tap/{pattern}", tap)
    if match:
      return match.expand(name)
  # Stages of residual networks are counted from 1 there.
  match = re.fullmatch(r"tap/(?:layer|block)(\d)", tap)
  return match and f"stage{int(match[1]) - 1}"


def test_features_and_logits_are_the_originals(made):
  """So are gradients by the pixels, where they are known."""
  name, spec, _, bundle = made
  model, gold = bundle.model, golden.arrays(name)

  def probed(images, params, stats):
    features = model.features(params, stats, images)
    return (features * golden.probe(spec)[None]).sum()

  @jax.jit
  def see(params, stats, images):
    seen = model.outputs(params, stats, images)
    means = {
      tap: seen[ours(tap)].reshape(2, -1, seen[ours(tap)].shape[-1]).mean(1)
      for tap in gold
      # A ViT's last block, of the class token alone, says what features do.
      if ours(tap) in seen and seen[ours(tap)].shape[1] > 1
    }
    slope = None
    if "grad_sub_f64" in gold:
      slope = jax.grad(probed)(images, params, stats)
    return seen[""], model.logits(params, stats, images), means, slope

  with jax.enable_x64(True):
    images = golden.images(spec).astype(np.float64)
    found = see(*wide((bundle.params, bundle.stats)), images)
  features, said, taps, slope = found
  assert features.dtype == np.float64
  logits = gold.get("logits_f64", gold.get("projection_f64"))
  np.testing.assert_allclose(features, gold["features_f64"], 0, 1e-9)
  np.testing.assert_allclose(said, logits, 0, 1e-9)
  assert len(taps) >= 3 or not any(key.startswith("tap/") for key in gold)
  for tap, mean in taps.items():
    few = gold[tap].shape[1]
    np.testing.assert_allclose(mean[:, :few], gold[tap], 0, 1e-9, err_msg=tap)
  if slope is None:
    return
  size = slope.shape[1]
  if size == 224:
    blocks = np.asarray(slope).reshape(2, 14, 16, 14, 16, 3).sum((2, 4))
    np.testing.assert_allclose(blocks, gold["grad_block_f64"], 0, 5e-9)
  every = 15 if size == 224 else 3
  at = slope[:, 1::every, 1::every]
  np.testing.assert_allclose(at, gold["grad_sub_f64"], 0, 1e-9)


def test_single_precision_errs_by_little(made):
  name, spec, _, bundle = made
  gold, model = golden.arrays(name), bundle.model

  @jax.jit
  def see(params, stats, images):
    return (
      model.features(params, stats, images),
      model.logits(params, stats, images),
    )

  found = see(bundle.params, bundle.stats, golden.images(spec))
  logits = gold.get("logits_f64", gold.get("projection_f64"))
  for got, expected in zip(found, (gold["features_f64"], logits), strict=True):
    np.testing.assert_allclose(got, expected, 0, 2e-5)


def test_a_state_dict_comes_back_bit_for_bit(made):
  name, spec, whole, _ = made
  state = {key: whole[key] for key, *_, dropped in spec["keys"] if not dropped}
  assert golden.digest(state) == spec["fingerprint"]["weights"]
  bundle = convert.load(state)  # model and format told from the file
  assert bundle.model.name == GOLDEN[name][0]
  back = convert.to_state_dict(bundle, GOLDEN[name][1])
  assert back.keys() == state.keys()
  for key, tensor in state.items():
    assert back[key].dtype == tensor.dtype and back[key].shape == tensor.shape
    np.testing.assert_array_equal(back[key], tensor, err_msg=key)


@pytest.fixture(scope="module")
def vit_base():
  return golden.state_dict(golden.specs()["timm_vit_base_patch16_224"])


@pytest.mark.slow
@pytest.mark.parametrize("name", golden.specs("peft"))
def test_what_a_method_adds_is_the_originals(name, vit_base):
  spec = golden.specs("peft")[name]
  method = {"prompt": "vpt"}.get(spec["transfer"], spec["transfer"])
  bundle = convert.load(vit_base, "vit_b16", mean=spec["mean"], std=spec["std"])
  added = golden.state_dict(spec)
  bundle = peft.load(bundle, added, method, **spec["options"])
  gold = list(golden.arrays(name, "peft").values())

  @jax.jit
  def see(params, images):
    model = bundle.model
    return model.features(params, {}, images), model.logits(params, {}, images)

  images = golden.images(spec)
  for got, expected in zip(see(bundle.params, images), gold, strict=True):
    np.testing.assert_allclose(got, expected, 0, 3e-5)
  with jax.enable_x64(True):
    both = see(wide(bundle.params), images.astype(np.float64))
    for got, expected in zip(both, gold, strict=True):
      np.testing.assert_allclose(got, expected, 0, 1e-9)


def pinned(name):
  """What a toy of fixed random arrays says, in float64."""
  model = models.create(name, 3)

  def drawn(path, x):
    rng = np.random.default_rng(zlib.crc32(path.encode()))
    noise = rng.standard_normal(x.shape) / max(x.size // x.shape[-1], 4) ** 0.5
    return 1 + noise / 10 if path.endswith(("scale", "gamma", "var")) else noise

  variables = trees.map_named(drawn, model.shapes())
  shape = (2, model.image_size, model.image_size, model.channels)
  images = np.random.default_rng(0).uniform(size=shape)

  @jax.jit
  def see(params, stats, images):
    logits = model.logits(params, stats, images)
    slope = jax.grad(lambda x: (model.logits(params, stats, x) ** 2).sum())
    return logits, model.features(params, stats, images), slope(images)

  with jax.enable_x64(True):
    return jax.device_get(see(*variables, images))


TOYS = [name for name in models.MODELS if name.startswith("glyph")]
VARIANTS = (
  "glyph_vit_stem", "glyph_convnext_stem", "glyph_xcit", "glyph_eva",
  "glyph_coatnet",
)  # fmt: skip


@pytest.mark.parametrize("name", mostly_slow(TOYS, *{*TOYS} - {*VARIANTS}))
def test_toys_compute_what_they_did_when_the_large_were_right(name):
  # JAX's own attention has a softmax in float32, even among float64.
  error = 1e-6 if name == "glyph_vit" else 1e-9
  with np.load(golden.FOLDER / "backbones" / "toys.npz") as file:
    for i, found in enumerate(pinned(name)):
      np.testing.assert_allclose(found, file[f"{name}/{i}"], error, error)


def test_what_a_method_adds_must_fit():
  model = models.create("glyph_vit_token", 3)
  bundle = convert.Bundle(
    model, *jax.jit(model.init)(keys.root(0)), classes=("a", "b", "c")
  )
  added = {"classifier.weight": np.ones((5, 32)), "classifier.bias": np.ones(5)}
  with pytest.raises(ValueError, match=r"missing: blocks.0.attn.query_lora.A"):
    peft.load(bundle, added, "lora")
  with pytest.raises(ValueError, match="did you mean 'lora'"):
    peft.load(bundle, added, "lra")
  other = peft.load(bundle, added, "linear")
  assert other.model.num_classes == 5 and not other.classes
