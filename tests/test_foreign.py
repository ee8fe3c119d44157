"""Other frameworks' files: what is read, what is refused, what is said."""

import pickle

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from roli_jax import convert, keys, models, trees
from roli_jax.convert import torch_file
from tests import golden


@pytest.fixture(scope="module")
def state():
  """A toy ViT as timm would save it, with a classifier of 5."""
  model = models.create("glyph_vit_token", 5)
  bundle = convert.Bundle(model, *jax.jit(model.init)(keys.root(0)))
  return convert.to_state_dict(bundle, "timm")


@pytest.fixture(scope="module")
def plain(state):
  return load(state)


def load(source, **told):
  return convert.load(source, "glyph_vit_token", **told)


def same(a, b):
  for path, leaf in trees.paths(a.params).items():
    np.testing.assert_array_equal(trees.paths(b.params)[path], leaf)


WRAPPED = {
  "model": lambda state: {"model": state, "epoch": 3},
  "state_dict": lambda state: {"state_dict": state, "arch": "vit"},
  "parallel": lambda state: {f"module.{k}": v for k, v in state.items()},
  "compiled": lambda state: {
    f"_orig_mod.module.{k}": v for k, v in state.items()
  },
  "lightning": lambda state: {
    "state_dict": {f"model.{k}": v for k, v in state.items()}
  },
  "averaged": lambda state: {
    "state_dict": {k: v + 1 for k, v in state.items()},
    "state_dict_ema": state,
    "optimizer": {"state": {0: {"exp_avg": np.ones(3)}}},
  },
  "sequential": lambda state: {
    "0.mean": np.float32([0.25]), "0.std": np.float32([0.5]),
    **{f"1.{k}": v for k, v in state.items()},
  },
  "normalised": lambda state: {
    "normalize.mean": np.full((1, 1, 1, 1), 0.25, np.float32),
    "normalize.std": np.full((1, 1, 1, 1), 0.5, np.float32),
    **{f"model.{k}": v for k, v in state.items()},
  },
}  # fmt: skip


@pytest.mark.parametrize("kind", WRAPPED)
def test_what_training_wraps_around_weights_comes_off(kind, state, plain,
                                                      tmp_path):  # fmt: skip
  wrapped = WRAPPED[kind](state)
  bundle = load(wrapped)
  same(plain, bundle)
  if kind in ("sequential", "normalised"):
    assert (bundle.model.mean, bundle.model.std) == ((0.25,), (0.5,))
    assert bundle.coverage.normalised_by == "of the file"
  if kind == "averaged":
    assert bundle.coverage.wrapped == "state_dict_ema"


def test_half_precision_is_widened_and_double_kept(state, plain):
  half = {k: v.astype(ml_dtypes.bfloat16) for k, v in state.items()}
  assert {leaf.dtype for leaf in jax.tree.leaves(load(half).params)} == {
    np.dtype(np.float32)
  }
  double = {k: v.astype(np.float64) for k, v in state.items()}
  assert jax.tree.leaves(load(double).params)[0].dtype == np.float64


def test_a_number_of_classes_drops_the_files_classifier(state):
  bundle = load(state, num_classes=3)
  assert bundle.model.num_classes == 3
  assert not bundle.params.head["kernel"].any()
  assert bundle.coverage.dropped == ("head.bias", "head.weight")
  headless = {k: v for k, v in state.items() if not k.startswith("head")}
  assert load(headless, num_classes=3).coverage.dropped == ()
  with pytest.raises(ValueError, match="num_classes"):
    load(headless)


def test_mean_and_std_are_those_given_or_the_formats():
  state = golden.state_dict(golden.specs()["cifar_wide_resnet_28_10"])
  assert convert.load(state).model.mean == (0.4914, 0.4822, 0.4465)
  told = convert.load(state, mean=(0, 0, 0), std=(1, 1, 1))
  assert (told.model.mean, told.model.std) == ((0,) * 3, (1,) * 3)
  assert told.coverage.normalised_by == "as given"
  with pytest.raises(ValueError, match="3 finite numbers as mean"):
    convert.load(state, mean=(0.5,))


BROKEN = {
  "missing": (lambda s: s.pop("blocks.1.norm2.bias"), "missing.*1.norm2.bias"),
  "left over": (lambda s: s.update(x=np.ones(2)), "unexpected: x"),
  "misshapen": (
    lambda s: s.update({"norm.weight": np.ones(31)}),
    r"norm.weight \(31,\) \(expected \(32,\)\)",
  ),
  "not finite": (
    lambda s: s.update({"pos_embed": s["pos_embed"] * np.nan}),
    "pos_embed holds values that are not finite",
  ),
  "another head": (
    lambda s: s.update({"head.bias": np.ones(6)}),
    r"head.bias \(6,\) \(expected \(5,\)\)",
  ),
  "head of another width": (
    lambda s: s.update({"head.weight": np.ones((5, 8))}),
    r"head.weight \(5, 8\) \(expected \(5, 32\)\)",
  ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_tensor_that_is_wrong_is_an_error_that_lists_it(kind, state):
  broken, (harm, message) = dict(state), BROKEN[kind]
  harm(broken)
  with pytest.raises(ValueError, match=message):
    load(broken)


@pytest.mark.parametrize(
  "told, message",
  [
    ({"model": "vit_b17"}, "did you mean 'vit_b16'"),
    ({"format": "tim"}, "did you mean 'timm'"),
    pytest.param(
      {"model": "swin_b"}, "of no layout of swin_b", marks=pytest.mark.slow
    ),
    ({"model": "swin_b", "format": "torchvision"}, "no names for a swin_b"),
    ({"model": "vit_ti16"}, "of another shape"),
  ],
)
def test_the_wrong_architecture_is_refused(told, message, state):
  with pytest.raises(ValueError, match=message):
    convert.load(state, **told)


def test_shapes_of_no_model_name_the_nearest(state):
  state = {k: v[..., :16] for k, v in state.items()}
  with pytest.raises(ValueError, match="nearest is glyph_vit_token, from"):
    convert.load(state)


class Malice:
  def __reduce__(self):
    import os

    return os.system, ("touch harm",)


def test_a_malicious_checkpoint_is_refused_by_name(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  path = tmp_path / "x.pth"
  path.write_bytes(pickle.dumps({"model": Malice()}, 2))
  with pytest.raises(ValueError, match=r"(posix|nt)\.system"):
    convert.load(path)
  assert not (tmp_path / "harm").exists()


def test_a_truncated_checkpoint_is_refused(state, tmp_path):
  path = tmp_path / "x.pth"
  torch_file.write(path, state)
  whole = path.read_bytes()
  path.write_bytes(whole[: len(whole) // 2])
  with pytest.raises(ValueError, match="truncated"):
    convert.load(path)


def test_what_is_no_state_dict_is_refused(tmp_path):
  path = tmp_path / "x.pth"
  torch_file.write(path, {})
  with pytest.raises(ValueError, match="no tensors"):
    convert.load(path)
  with pytest.raises(ValueError, match="there are no weights"):
    convert.load(tmp_path / "y.pth")


def test_rolis_own_checkpoints_come_back_with_and_without_resize(state):
  ours = load(state)
  plain = convert.to_state_dict(ours, "roli")
  assert {"0.mean", "0.std", "1.head.last_layer.weight"} <= plain.keys()
  assert "1.enc.transformer.encoder.layer.0.attn.query.weight" in plain
  resized = {
    f"{int(key[0]) + 1}{key[1:]}": value for key, value in plain.items()
  }
  for source in (plain, resized):
    bundle = load({"model": source})
    same(ours, bundle)
    back = convert.to_state_dict(bundle, "roli")
    assert back.keys() == source.keys()


def test_a_file_that_normalises_otherwise_can_become_rolis(state):
  bundle = load(WRAPPED["normalised"](state))
  back = convert.to_state_dict(bundle, "roli")
  assert back["0.mean"] == 0.25 and "1.head.last_layer.bias" in back


# Of timm 1.0.31: positions of vit_tiny at 224 fitted to images of 160.
def test_positions_are_resampled_as_timm_does():
  spec = golden.specs()["timm_vit_tiny_patch16_224"]
  bundle = convert.load(golden.state_dict(spec), image_size=160)
  assert bundle.coverage.resampled == ("pos_embed",)
  assert bundle.model.image_size == 160
  got = bundle.params.backbone["positions"]
  assert got.shape == (1, 101, 192)
  whole = convert.load(golden.state_dict(spec)).params.backbone["positions"]
  np.testing.assert_array_equal(got[:, 0], whole[:, 0])  # the class token's
  expected = golden.arrays("timm_vit_tiny_160", "interpolation")["positions"]
  np.testing.assert_allclose(got[0, :, :4], expected, atol=2e-6)


def test_a_swin_is_resampled_to_another_window():
  spec = golden.specs()["swin_tiny_patch4_window7_224_timm"]
  state = golden.state_dict(spec)
  bundle = convert.load(state, image_size=256)
  assert len(bundle.coverage.resampled) == 12
  table = bundle.params.backbone["stage0"]["block0"]["attn"]["relative_bias"]
  assert table.shape == (225, 3)
  again = convert.load(convert.to_state_dict(bundle, "timm"))
  assert again.model.image_size == 256
  features = jax.eval_shape(
    bundle.model.features, bundle.params, {}, jnp.zeros((1, 32, 32, 3))
  )
  assert features.shape == (1, 768)
  with pytest.raises(ValueError, match="multiple of 32"):
    convert.load(state, image_size=250)


def test_a_constant_table_stays_constant(state):
  state = {**state, "pos_embed": np.ones_like(state["pos_embed"])}
  got = load(state, image_size=12).params.backbone["positions"]
  np.testing.assert_allclose(got, np.ones((1, 37, 32)), rtol=1e-6)


def test_ours_takes_options_too(plain, tmp_path):
  path = tmp_path / "x.safetensors"
  convert.save(plain, path)
  bundle = convert.load(path, image_size=12, mean=(0.1,), num_classes=4)
  assert bundle.model.image_size == 12 and bundle.model.mean == (0.1,)
  assert bundle.params.head["kernel"].shape == (32, 4)
  with pytest.raises(ValueError, match="is a glyph_vit_token, not a vit_b16"):
    convert.load(path, "vit_b16")


def test_a_directory_is_read_if_it_says_enough(plain, tmp_path):
  with pytest.raises(ValueError, match="there is neither"):
    convert.load(tmp_path)
  convert.save(plain, tmp_path / "x.safetensors")
  same(plain, convert.load(tmp_path))
  convert.save(plain, tmp_path / "y.safetensors")
  with pytest.raises(ValueError, match=r"x.safetensors.*y.safetensors"):
    convert.load(tmp_path)
