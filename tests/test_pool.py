"""A ViT's feature: the class token or a mean, and what a file tells of it."""

import jax
import numpy as np
import pytest

from configs import convert as convert_config
from configs import glyphs_roli
from roli_jax import convert, keys, models, trees
from roli_jax.convert import torch_file
from roli_jax.experiment import convert_command
from roli_jax.experiment.build import build_model
from roli_jax.experiment.run import build_run, expand_stages
from tests import golden
from tests.covering import covering

# Logits of timm 1.0.31's VisionTransformer(img_size=8, patch_size=2,
# in_chans=1, num_classes=3, embed_dim=32, depth=2, num_heads=2, ...) in
# float64, of weights made of their names: whether there is a class token, what
# is normalised, global_pool.
TIMM = {
  (True, "norm", "token"): (
    (-0.470341, 3.162046, 0.497064), (-0.363043, 1.627182, 0.275647),
  ),
  (True, "norm", "mean"): (
    (-0.475679, 1.017742, 0.192716), (-0.387374, 0.680419, 0.058911),
  ),
  (True, "fc_norm", "mean"): (
    (-0.585502, 1.493889, 0.173681), (-0.5776, 0.908446, 0.006565),
  ),
  (True, "fc_norm", "token"): (
    (-0.226061, 3.262712, 0.545941), (-0.417904, 1.776294, 0.31693),
  ),
  (False, "norm", "mean"): (
    (-0.437945, 1.120301, 0.182205), (-0.510161, 0.812114, 0.118608),
  ),
  (False, "fc_norm", "mean"): (
    (-0.480517, 1.540803, 0.170483), (-0.695607, 1.042669, 0.089044),
  ),
}  # fmt: skip
IMAGES = np.random.default_rng(0).random((2, 8, 8, 1), np.float32)


def state_of(cls, norm):
  """A state dict as such a ViT has it."""
  tensors = {
    "patch_embed.proj.weight": (32, 1, 2, 2), "patch_embed.proj.bias": (32,),
    "pos_embed": (1, 16 + cls, 32), f"{norm}.weight": (32,),
    f"{norm}.bias": (32,), "head.weight": (3, 32), "head.bias": (3,),
  }  # fmt: skip
  if cls:
    tensors["cls_token"] = (1, 1, 32)
  for i in range(2):
    for name, shape in {
      "norm1": (32,), "attn.qkv": (96, 32), "attn.proj": (32, 32),
      "norm2": (32,), "mlp.fc1": (128, 32), "mlp.fc2": (32, 128),
    }.items():  # fmt: skip
      tensors[f"blocks.{i}.{name}.weight"] = shape
      tensors[f"blocks.{i}.{name}.bias"] = shape[:1]
  return {k: golden.value(k, shape, "float32") for k, shape in tensors.items()}


def load(source, **told):
  return convert.load(source, told.pop("model", "glyph_vit_token"), **told)


def logits(bundle, **options):
  model = models.with_options(bundle.model, **options)
  return jax.jit(model.logits)(bundle.params, bundle.stats, IMAGES)


@pytest.mark.parametrize("cls, norm, pool", TIMM)
def test_each_way_to_pool_is_timms(cls, norm, pool):
  bundle = load(state_of(cls, norm), pool=pool)
  expected = np.array(TIMM[cls, norm, pool])
  np.testing.assert_allclose(logits(bundle), expected, atol=2e-5)
  for options in ({"scan": True}, {"remat": True}):
    got = logits(bundle, **options)
    np.testing.assert_allclose(got, expected, atol=2e-5)
  with jax.enable_x64(True):
    wide = jax.tree.map(np.float64, bundle.params)
    got = jax.jit(bundle.model.logits)(wide, {}, np.float64(IMAGES))
  np.testing.assert_allclose(got, expected, atol=2e-6)


@pytest.mark.parametrize(
  "cls, norm, pool",
  [
    (True, "norm", "token"), (True, "fc_norm", "mean"),
    (False, "norm", "mean"), (False, "fc_norm", "mean"),
  ],
)  # fmt: skip
def test_without_a_word_it_is_what_names_tell(cls, norm, pool):
  bundle = load(state_of(cls, norm))
  np.testing.assert_allclose(logits(bundle), TIMM[cls, norm, pool], atol=2e-5)
  if (cls, norm) == (True, "norm"):  # both have these names
    assert bundle.assumed["pool"] == "token"
    assert "pool" not in load(state_of(cls, norm), pool="token").assumed
  else:
    assert "pool" not in bundle.assumed


@pytest.mark.parametrize("cls, norm, pool", covering(TIMM))
def test_it_comes_back_from_bundles_and_state_dicts(cls, norm, pool, tmp_path):
  state = state_of(cls, norm)
  bundle = load(state, pool=pool)
  convert.save(bundle, tmp_path / "ours")
  again = convert.load(tmp_path / "ours")
  assert again.model == bundle.model
  assert models.from_spec(models.to_spec(bundle.model)) == bundle.model
  for back in (bundle, again):
    np.testing.assert_array_equal(logits(back), logits(bundle))
    theirs = convert.to_state_dict(back, "timm")
    assert theirs.keys() == state.keys()
    for key, value in state.items():
      np.testing.assert_array_equal(theirs[key], value)
  drawn, _ = bundle.model.init(keys.root(0))
  trees.check_same(drawn, bundle.params, "drawn anew")


def test_a_bundle_of_ours_can_be_pooled_otherwise(tmp_path):
  bundle = load(state_of(True, "norm"))
  convert.save(bundle, tmp_path / "ours")
  other = convert.load(tmp_path / "ours", pool="mean")
  np.testing.assert_allclose(
    logits(other), TIMM[True, "norm", "mean"], atol=2e-5
  )


def test_all_tokens_of_the_last_block_are_computed_for_a_mean():
  bundle = load(state_of(True, "norm"), pool="mean")
  outputs = bundle.model.outputs(bundle.params, {}, IMAGES)
  assert outputs["block1"].shape == (2, 17, 32)
  np.testing.assert_allclose(
    outputs["norm"][:, 1:].mean(1), outputs[""], atol=1e-6
  )


@pytest.mark.parametrize("cls, norm, pool", TIMM)
def test_a_model_is_told_from_shapes(cls, norm, pool, monkeypatch):
  toys = {k: v for k, v in models.MODELS.items() if k.startswith("glyph")}
  monkeypatch.setattr(models, "MODELS", toys)
  bundle = load(state_of(cls, norm), model=None, pool=pool)
  assert bundle.model.name == "glyph_vit_token"


MISTAKES = {
  "another word": (lambda: load(state_of(True, "norm"), pool="avg"), "'avg'"),
  "no class token": (
    lambda: load(state_of(False, "norm"), pool="token"), "no class token",
  ),
  "both norms": (
    lambda: load(
      {**state_of(True, "norm"), "fc_norm.weight": np.ones(32, np.float32)}
    ),
    "unexpected: norm.bias",
  ),
  "torchvision has none": (
    lambda: convert.to_state_dict(
      load(state_of(True, "norm"), pool="mean"), "torchvision"
    ),
    "torchvision has no ViT whose feature is a mean",
  ),
  "nor reads any": (
    lambda: load(
      convert.to_state_dict(load(state_of(True, "norm")), "torchvision"),
      pool="mean",
    ),
    "not of models that are pooled so",
  ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MISTAKES)
def test_what_can_not_be_meant_is_refused(kind):
  make, message = MISTAKES[kind]
  with pytest.raises(ValueError, match=message):
    make()


@pytest.mark.parametrize("pool", ["token", "mean"])
def test_a_network_without_tokens_has_no_pool(pool):
  model = models.create("glyph_resnet", 3)
  bundle = convert.Bundle(model, *model.init(keys.root(0)))
  state = convert.to_state_dict(bundle, "timm")
  with pytest.raises(ValueError, match="pool"):
    load(state, model="glyph_resnet", pool=pool)


def test_converting_tells_what_it_assumed_and_takes_a_word(tmp_path):
  file = tmp_path / "vit.pth"
  torch_file.write(file, state_of(True, "norm"))
  config = convert_config.get_config().to_dict() | {
    "source": str(file), "model": "glyph_vit_token",
  }  # fmt: skip
  _, facts = convert_command.run(config | {"output": f"{tmp_path}/a"})
  assert "pool=token" in str(facts)
  told = {"output": f"{tmp_path}/b", "pool": "mean", "key": "."}
  path, facts = convert_command.run(config | told)
  assert "pool=token" not in str(facts)
  np.testing.assert_allclose(
    logits(convert.load(path)), TIMM[True, "norm", "mean"], atol=2e-5
  )


@pytest.mark.parametrize("pool, key", [("", ""), ("mean", "ema")])
def test_a_run_takes_the_words_too(pool, key, tmp_path, monkeypatch):
  state, file = state_of(True, "norm"), tmp_path / "w.npz"
  np.savez(
    file, **{f"{n}.{k}": state[k] for n in ("ema", "net") for k in state}
  )
  config = glyphs_roli.get_config("backbone=glyph_vit_token,method=linear")
  config.backbone.update(weights=str(file), pool=pool, key=key)
  said = []
  monkeypatch.setattr(
    convert.assumptions.logging, "warning", lambda *words: said.append(words)
  )
  run = build_run(config.to_dict())
  (stage,) = expand_stages(run)
  assert build_model(run, stage).backbone.pool == (pool or "token")
  # Of what is assumed; and of the network, unless a word chooses it.
  assert len(said) == (1 if key else 2)
  assert ("pool=token" in str(said)) == (not pool)
  config.backbone.key = "best"
  with pytest.raises(ValueError, match=r"no network 'best'.*ema, net"):
    build_run(config.to_dict()).load(str(file))
