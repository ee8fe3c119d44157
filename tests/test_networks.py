"""Networks in checkpoints: what is around them, which one is taken."""

import itertools

import jax
import ml_dtypes
import numpy as np
import pytest

from roli_jax import convert, models, peft, trees
from roli_jax.convert import networks
from tests.covering import covering


def drawn(model, seed=0):
  """Random arrays in the place of parameters and statistics."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(x.dtype),
    model.shapes(),
  )


def state_of(name, seed):
  model = models.create(name, 3)
  bundle = convert.Bundle(model, *drawn(model, seed))
  return convert.to_state_dict(bundle, "timm")


@pytest.fixture(scope="module")
def state():
  return state_of("glyph_resnet", 0)


@pytest.fixture(scope="module")
def other():
  return state_of("glyph_resnet", 1)


def load(source, **told):
  return convert.load(source, told.pop("model", "glyph_resnet"), **told)


def is_of(bundle, state):
  """Whether the bundle is made of this state dict."""
  back = convert.to_state_dict(bundle, "timm")
  return back.keys() == state.keys() and all(
    np.array_equal(back[key], state[key]) for key in state
  )


def under(prefix, state):
  return {f"{prefix}{key}": value for key, value in state.items()}


PREFIXES = (
  "", "module.", "model.", "backbone.", "encoder.", "module.backbone.",
  "backbone.module.", "model.encoder.module._orig_mod.", "net.", "0.",
  "student.net.", "anything.at.all.",
)  # fmt: skip
WRAPPERS = {
  "nothing": lambda s: s,
  "model": lambda s: {"model": s, "epoch": 3, "args": {"lr": 0.1}},
  "net": lambda s: {"net": s, "acc": 93.1},
  "a list of one": lambda s: {"state_dict": [s]},
  "a tuple": lambda s: (s, {"param_groups": [{"lr": 0.1}]}),
  "dicts in dicts": lambda s: {"a": {"b": [{"weights": s}]}},
  "ema.module": lambda s: {"ema": {"module": s, "decay": 0.9}},
  "an optimizer": lambda s: {
    "optimizer": {"state": {0: {"exp_avg": np.ones((3, 3))}}},
    "params": s,
  },
}


@pytest.mark.parametrize(
  "wrapper, prefix", covering(itertools.product(WRAPPERS, PREFIXES))
)
def test_what_is_around_a_network_comes_off(wrapper, prefix, state):
  bundle = load(WRAPPERS[wrapper](under(prefix, state)))
  assert is_of(bundle, state)
  assert bundle.coverage.wrapped.endswith(prefix.strip("."))
  assert not bundle.coverage.others and not bundle.coverage.notes()


TOYS = {
  "glyph_vit_token": ("timm", "torchvision", "roli"),
  "glyph_swin": ("timm", "microsoft", "roli"),
  "glyph_convnext": ("timm", "meta"),
  "glyph_wrn": ("robustbench",),
}


@pytest.mark.parametrize(
  "name, format", [(name, f) for name, fs in TOYS.items() for f in fs]
)
def test_a_prefix_comes_off_the_names_of_each_layout(name, format):
  model = models.create(name, 3)
  plain = convert.Bundle(model, *drawn(model))
  state = under("module.encoder.", convert.to_state_dict(plain, format))
  bundle = load(state, model=name, format=format)
  for path, leaf in trees.paths(plain.params).items():
    np.testing.assert_array_equal(trees.paths(bundle.params)[path], leaf)


def robustness(state, other=None, mean=0.25, std=0.5):
  """As MadryLab's package saves it: the attacker holds the model again."""
  stat = np.ones((1, 1, 1), np.float32)
  return {
    "module.normalizer.new_mean": stat * mean,
    "module.normalizer.new_std": stat * std,
    **under("module.model.", state),
    "module.attacker.normalize.new_mean": stat * mean,
    "module.attacker.normalize.new_std": stat * std,
    **under("module.attacker.model.", other or state),
  }


def test_madrylabs_files_are_read_with_their_mean_and_deviation(state, other):
  bundle = load({"model": robustness(state, other), "epoch": 90})
  assert is_of(bundle, state)
  assert (bundle.model.mean, bundle.model.std) == ((0.25,), (0.5,))
  assert bundle.coverage.normalised_by == "of the file"
  assert bundle.coverage.wrapped == "model.module.model"
  (note,) = bundle.coverage.notes()
  assert "key=" in note and "model.module.attacker.model" in note
  attacker = load(robustness(state, other), key="attacker")
  assert is_of(attacker, other) and attacker.model.mean == (0.25,)


def test_the_normalisation_is_that_of_the_network_itself(state):
  file = robustness(state)
  file["module.attacker.normalize.new_mean"] = np.full(1, 0.75, np.float32)
  assert load(file).model.mean == (0.25,)
  # Nobody can say which of two is meant.
  file["module.other.mean"] = np.full(1, 0.75, np.float32)
  file["module.other.std"] = np.full(1, 0.5, np.float32)
  with pytest.raises(ValueError, match=r"unexpected: .*mean"):
    load(file)


@pytest.mark.parametrize(
  "names", [("mean", "std"), ("mu", "sigma"), ("new_mean", "new_std")]
)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1), (1, 1, 1, 1)])
def test_a_mean_has_any_of_its_names_and_shapes(names, shape, state):
  stats = {
    f"normalize.{name}": np.full(shape, value, np.float32)
    for name, value in zip(names, (0.25, 0.5), strict=True)
  }
  bundle = load({**stats, **under("model.", state)})
  assert (bundle.model.mean, bundle.model.std) == ((0.25,), (0.5,))


def test_one_mean_is_that_of_all_channels():
  state = convert.to_state_dict(
    convert.Bundle(
      model := models.create("wrn_28_10", 2),
      *jax.tree.map(
        lambda x: np.zeros(x.shape, x.dtype),
        model.shapes(),
      ),
    ),
    "robustbench",
  )
  stat = np.full(1, 0.5, np.float32)
  file = {"mean": stat, "std": stat, **under("model.", state)}
  assert convert.load(file, "wrn_28_10").model.mean == (0.5,) * 3


def test_a_mean_is_floats(state):
  stats = {"mean": np.ones(1, np.int64), "std": np.ones(1, np.complex64)}
  with pytest.raises(ValueError, match="mean is int64"):
    load({**stats, **under("model.", state)})


@pytest.mark.parametrize("std", [0.0, -1.0])
def test_a_deviation_is_positive(std, state):
  with pytest.raises(ValueError, match="positive numbers as std"):
    load(robustness(state, std=std))
  with pytest.raises(ValueError, match="positive numbers as std"):
    load(state, std=(std,))


AVERAGES = {
  "AveragedModel": lambda s: {"n_averaged": np.array(3), **under("module.", s)},
  "Lightning's": lambda s: {**s, "num_updates": np.array(7)},
  "plain": lambda s: s,
  "ema.module": lambda s: {"module": s, "decay": 0.999},
}


@pytest.mark.parametrize(
  "key", ["ema", "model_ema", "state_dict_ema", "ema_state_dict", "swa_model"]
)
@pytest.mark.parametrize("kind", AVERAGES)
@pytest.mark.parametrize("first", [True, False])
def test_averaged_weights_go_first_and_are_told(kind, key, first, state, other):
  both = [("model", other), (key, AVERAGES[kind](state))]
  bundle = load(dict(both if first else both[::-1]))
  assert is_of(bundle, state)
  (note,) = bundle.coverage.notes()
  assert note.startswith(key) and note.endswith("key= takes another: model")
  assert is_of(load(dict(both), key="model"), other)
  assert is_of(load(dict(both), key=key), state)


def test_what_was_there_before_averaging_is_not_averaged(state, other):
  assert is_of(load({"model_before_swa": other, "model": state}), state)


def test_averages_within_one_dict_go_first(state, other):
  """As ema_pytorch has it, or who registers a copy as a module."""
  flat = {
    **under("online_model.", other), **under("ema_model.", state),
    "initted": np.array(True), "step": np.array(9),
  }  # fmt: skip
  bundle = load(flat)
  assert is_of(bundle, state) and bundle.coverage.wrapped == "ema_model"
  assert is_of(load(flat, key="online_model"), other)
  inside = {**other, **under("ema.", state)}
  assert is_of(load(inside), state)
  assert is_of(load(inside, key="."), other)


NO_NETWORKS = {
  "no arrays": ({"decay": np.float32(0.99), "shadow_params": [1]}, ""),
  "a list": (
    {"decay": 0.99, "shadow_params": [np.ones((3, 3)), np.ones(3)]},
    "ema.shadow_params",
  ),
  "other names": ({"encoder.w": np.ones((3, 3))}, "ema"),
}


@pytest.mark.parametrize("kind", NO_NETWORKS)
def test_the_next_is_tried_where_one_is_no_network(kind, state):
  within, named = NO_NETWORKS[kind]
  file = {"ema": within, "model": state}
  bundle = load(file)
  assert is_of(bundle, state) and bundle.coverage.wrapped == "model"
  assert bundle.coverage.others == named  # what may be meant is told
  with pytest.raises(ValueError, match="of no layout"):
    load(file, key="ema")


def test_the_next_is_tried_where_one_is_another_model(state):
  file = {"ema": state_of("glyph_convnext", 0), "model": state}
  assert is_of(load(file), state)
  convnext = load(file, model="glyph_convnext")
  assert convnext.coverage.wrapped == "ema"


@pytest.mark.parametrize("key", ["a.b", "b.model", "b"])
def test_a_key_is_a_path_or_a_name(key, state, other):
  file = {"b": {"model": other}, "model": other, "a": {"b": {"model": state}}}
  wanted = state if key == "a.b" else other
  assert is_of(load(file, key=key), wanted)
  assert is_of(load(file, key="model"), other)


@pytest.mark.parametrize("key", ["emma", "model.x", "odel"])
def test_an_unknown_key_lists_those_there_are(key, state):
  file = {"model": state, "ema": {"module": state}}
  with pytest.raises(ValueError, match=r"no network '.*ema\.module, model"):
    load(file, key=key)


def test_a_bundle_holds_one_network(state, tmp_path):
  convert.save(load(state), tmp_path / "x")
  with pytest.raises(ValueError, match=r"no network 'ema'.*one alone"):
    convert.load(tmp_path / "x", key="ema")


def test_an_average_without_statistics_says_that_there_is_another(state):
  """As those have it that average parameters alone."""
  few = {k: v for k, v in state.items() if "running" not in k}
  with pytest.raises(ValueError, match=r"ema \(key= .*: model\).*missing:"):
    load({"ema": few, "model": state})


def test_what_stands_beside_a_network_is_not_passed_over(state):
  inside = {k: v for k, v in state.items() if not k.startswith("fc")}
  head = {k: v for k, v in state.items() if k.startswith("fc")}
  assert is_of(load({**under("module.backbone.", inside), **head}), state)
  assert is_of(
    load({**under("module.backbone.", inside), **under("module.", head)}), state
  )
  with pytest.raises(ValueError, match=r"unexpected: adapter\.weight"):
    load({**under("backbone.", state), "adapter.weight": np.ones((3, 3))})
  with pytest.raises(
    ValueError, match=r"unexpected: fc\.weight .beside backbone"
  ):
    load({**under("backbone.", state), "fc.weight": np.ones((3, 3))})


def test_what_a_pickle_can_tie_in_knots_has_an_end(state, monkeypatch):
  monkeypatch.setattr(networks, "_MOST", 10**4)
  knot = {"model": state}
  knot["self"], knot["list"] = knot, [knot] * 9
  deep, bare = {"a": np.ones(2)}, {}
  for _ in range(60):
    deep, bare = {"x": deep, "y": deep}, [bare, bare]
  for source in (knot, deep, bare):
    with pytest.raises(ValueError, match="without an end"):
      networks.find(source, "it")
  with pytest.raises(ValueError, match="300 networks in one dict"):
    networks.find({f"{i}.init_conv.weight": np.ones(1) for i in range(300)}, "")


# Dtypes.

WRONG = {
  "int8": np.int8, "uint8": np.uint8, "int32": np.int32, "int64": np.int64,
  "bool": np.bool_, "complex64": np.complex64,
  "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
  "float8_e5m2": ml_dtypes.float8_e5m2,
  "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
}  # fmt: skip


@pytest.mark.parametrize("leaf", ["conv1.weight", "fc.bias", "running_var"])
@pytest.mark.parametrize("dtype", WRONG)
def test_weights_are_floats_of_sixteen_bits_or_more(dtype, leaf, state):
  quantized = {
    k: v.astype(WRONG[dtype]) if k.endswith(leaf) else v
    for k, v in state.items()
  }
  for told in ({}, {"num_classes": 4}):
    with pytest.raises(ValueError, match=f"{leaf} is {dtype}"):
      load({"model": quantized}, **told)


def test_a_bundle_and_an_added_part_are_no_integers_either(state, tmp_path):
  bundle = load(state)
  bundle.params.head["bias"] = np.ones(3, np.int8)
  convert.save(bundle, tmp_path / "x")
  with pytest.raises(ValueError, match="head/bias is int8"):
    convert.load(tmp_path / "x")
  classifier = {
    "classifier.weight": np.ones((3, 32), np.int8),
    "classifier.bias": np.ones(3, np.float32),
  }
  with pytest.raises(ValueError, match=r"classifier\.weight is int8"):
    peft.load(load(state), classifier, "linear")


def test_bytes_that_have_lost_their_dtype_are_no_weights(state, tmp_path):
  """As numpy.savez leaves bfloat16."""
  half = {k: v.astype(ml_dtypes.bfloat16) for k, v in state.items()}
  np.savez(tmp_path / "x.npz", **half)
  with pytest.raises(ValueError, match=r"is \|V2"):
    load(tmp_path / "x.npz")


def test_the_other_byte_order_is_turned(state, tmp_path):
  np.savez(tmp_path / "x.npz", **{k: v.astype(">f4") for k, v in state.items()})
  bundle = load(tmp_path / "x.npz")
  assert all(leaf.dtype.isnative for leaf in jax.tree.leaves(bundle.params))
  kernel = bundle.params.head["kernel"]
  np.testing.assert_array_equal(kernel.T, state["fc.weight"])


def test_counters_of_whole_numbers_are_no_weights(state):
  counters = [k for k in state if k.endswith("num_batches_tracked")]
  assert counters and {state[k].dtype for k in counters} == {np.dtype("int64")}
  bundle = load({**state, "step": np.array(3)})
  assert set(counters) | {"step"} <= set(bundle.coverage.ignored)


def test_every_name_is_found_by_itself(state, other):
  file = {"model": robustness(state, other), "ema": {"module": other}}
  names = [network.name for network in networks.find(file, "it")]
  assert names[0] == "ema.module" and len(set(names)) == 3
  for name, (a, b) in itertools.product(names, [(state, other)]):
    bundle = load(file, key=name)
    assert bundle.coverage.wrapped == name
    assert is_of(bundle, a) or is_of(bundle, b)
