"""What a method has added, on its way out of a run and back."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from configs import convert as convert_config
from configs import glyphs_roli
from roli_jax import convert, peft, sharding, train, trees
from roli_jax.convert import torch_file
from roli_jax.experiment import convert_command
from roli_jax.experiment.run import build_run
from roli_jax.results import record
from tests.contracts.test_methods import FAMILIES, filled, net, noisy

IMAGES = np.random.default_rng(2).random((4, 8, 8, 1))
OPTIONS = {
  "lora": {"rank": 2, "alpha": 3},
  "adapter": {"reduction": 4},
  "vpt": {"tokens": 3, "deep": True},
  "vpt shallow": {"tokens": 3, "deep": False},
}


def bundle_of(family, name):
  """A net with what a method adds, all of it far from its start."""
  method = peft.METHODS[name.split()[0]](**OPTIONS[name])
  model = method.apply_to(net(family))
  params, stats = filled(model)
  params = dataclasses.replace(params, peft=noisy(params.peft))
  return convert.Bundle(model, params, stats), method


def logits(bundle, dtype=np.float32):
  params, stats, images = jax.tree.map(
    lambda x: np.asarray(x, dtype), (bundle.params, bundle.stats, IMAGES)
  )
  return jax.jit(bundle.model.logits)(params, stats, images)


@pytest.mark.parametrize("family", FAMILIES)
def test_folded_lora_computes_the_same(family):
  bundle, method = bundle_of(family, "lora")
  with jax.enable_x64(True):
    wide = dataclasses.replace(
      bundle,
      params=jax.tree.map(lambda x: np.asarray(x, np.float64), bundle.params),
    )
    merged = peft.merge(wide, method)
    assert not merged.params.peft and merged.model == net(family)
    expected = logits(wide, np.float64)
    np.testing.assert_allclose(
      logits(merged, np.float64), expected, rtol=1e-10, atol=1e-12
    )
    without = dataclasses.replace(
      merged, params=dataclasses.replace(wide.params, peft={})
    )
    assert np.abs(logits(without, np.float64) - expected).max() > 1e-2


def test_folded_lora_keeps_its_precision():
  bundle, method = bundle_of("vit", "lora")
  merged = peft.merge(bundle, method)
  leaves = jax.tree.leaves(merged.params)
  assert {np.asarray(leaf).dtype for leaf in leaves} == {np.dtype(np.float32)}
  np.testing.assert_allclose(
    logits(merged), logits(bundle), rtol=1e-5, atol=1e-6
  )


def test_merging_leaves_the_bundle_as_it_was():
  bundle, method = bundle_of("vit", "lora")
  before = {k: np.array(v) for k, v in trees.paths(bundle.params).items()}
  peft.merge(bundle, method)
  for path, leaf in trees.paths(bundle.params).items():
    np.testing.assert_array_equal(leaf, before[path])


@pytest.mark.parametrize("name", ["adapter", "vpt"])
def test_what_no_kernel_can_hold_is_not_merged(name):
  bundle, method = bundle_of("vit", name)
  with pytest.raises(ValueError, match=f"{name} can't be merged.*state_dict"):
    peft.merge(bundle, method)


def test_a_plain_bundle_merges_to_itself():
  bundle = convert.Bundle(net("vit"), *filled(net("vit")))
  assert peft.merge(bundle, peft.full()) is bundle


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("family", ["vit", "glyph_swin"])
def test_a_state_dict_comes_back_bit_for_bit(family, name):
  bundle, method = bundle_of(family, name)
  state = peft.state_dict(bundle)
  head = dataclasses.replace(
    bundle.params, peft={}, head=noisy(bundle.params.head)
  )
  bare = dataclasses.replace(bundle, model=net(family), params=head)
  again = peft.load(bare, state, method.name, **OPTIONS[name])
  assert again.model == bundle.model
  assert trees.paths(again.params).keys() == trees.paths(bundle.params).keys()
  for path, leaf in trees.paths(again.params).items():
    np.testing.assert_array_equal(leaf, trees.paths(bundle.params)[path])


HEAD = {"classifier.weight": (10, 8), "classifier.bias": (10,)}


@pytest.mark.parametrize(
  "family, name, some, count",
  [
    (
      "vit",
      "lora",
      {
        **HEAD,
        "blocks.0.attn.query_lora.A": (2, 8),
        "blocks.1.attn.value_lora.B": (8, 2),
      },
      2 + 2 * 4,
    ),
    (
      "vit",
      "adapter",
      {
        "blocks.0.adapter.down.weight": (2, 8),
        "blocks.0.adapter.down.bias": (2,),
        "blocks.1.adapter.up.weight": (8, 2),
      },
      2 + 2 * 4,
    ),
    (
      "vit",
      "vpt",
      {"prompts.0.prompt": (3, 8), "prompts.1.prompt": (3, 8)},
      2 + 2,
    ),
    ("vit", "vpt shallow", {"prompts.0.prompt": (3, 8)}, 2 + 1),
    (
      "glyph_swin",
      "lora",
      {
        "classifier.weight": (10, 32),
        "layers.1.blocks.0.attn.query_lora.A": (2, 32),
        "layers.0.blocks.1.attn.value_lora.B": (16, 2),
      },
      2 + 4 * 4,
    ),
    (
      "glyph_swin",
      "adapter",
      {
        "layers.0.blocks.0.adapter.down.weight": (4, 16),
        "layers.1.blocks.1.adapter.up.weight": (32, 8),
        "layers.1.blocks.1.adapter.up.bias": (32,),
      },
      2 + 4 * 4,
    ),
    (
      "glyph_swin",
      "vpt",
      {"prompts.0.1.prompt": (3, 16), "prompts.1.0.prompt": (3, 32)},
      2 + 4,
    ),
    ("glyph_swin", "vpt shallow", {"prompts.0.0.prompt": (3, 16)}, 2 + 1),
  ],
)
def test_a_state_dict_has_the_names_of_pytorch(family, name, some, count):
  state = peft.state_dict(bundle_of(family, name)[0])
  assert {key: state[key].shape for key in some} == some
  assert len(state) == count


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A run of LoRA and of adapters, from a random head: two steps of each."""
  folder = tmp_path_factory.mktemp("exchange")
  model = net("glyph_vit_token")
  file = folder / "weights.safetensors"
  convert.save(convert.Bundle(model, *filled(model)), file)
  config = glyphs_roli.get_config(f"backbone={model.name}")
  config.backbone.weights = str(file)
  config.cells = tuple(
    {"method": name, "init": "ranli"} for name in ("lora", "adapter")
  )
  config.test, config.curve, config.data.train_size = False, (), 32
  config.num_val_images = 40
  for attack in (config.attack, config.val_attack, config.eval_attack):
    attack.num_steps = 1
  config.adapt.update(
    num_steps=2, val_every=2, log_every=1, batch_size=16, lr=1e-2
  )
  one = Mesh(np.array(jax.devices()[:1]), ("data",))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, "mesh", lambda *_: one)
    train.run(config.to_dict(), folder / "run")
    yield folder, config.to_dict()


def stage_of(folder, name):
  (stage,) = (folder / "run" / "checkpoints").glob(f"*-{name}-*/adapt/*")
  return stage


def last_step(folder, name):
  return stage_of(folder, name) / "00000002"


def converted(source, output, **fields):
  config = {**convert_config.get_config().to_dict(), **fields}
  return convert_command.run(
    config | {"source": str(source), "output": str(output)}
  )


@pytest.mark.parametrize("format", ["", "timm"])
def test_lora_of_a_run_becomes_a_plain_model(finished, format, tmp_path):
  source = last_step(finished[0], "lora")
  whole, method = peft.restore(source)
  assert (method.name, method.scale) == ("lora", 1)
  # Two steps, of which the first moves b and the second a.
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(whole.params))
  path, facts = converted(source, tmp_path, format=format)
  assert path.suffix == (".pth" if format else ".safetensors")
  assert {p.name for p in tmp_path.iterdir()} == {
    path.name, "glyph_vit_token.check.npz",
  }  # fmt: skip
  state = torch_file.read(path) if format else path
  told = {"mean": whole.model.mean, "std": whole.model.std} if format else {}
  plain = convert.load(state, "glyph_vit_token", **told)
  assert not plain.params.peft
  np.testing.assert_allclose(logits(plain), logits(whole), rtol=1e-4, atol=1e-5)
  assert ("lora", "folded") in [fact[:2] for fact in facts]


def test_adapters_of_a_run_are_written_beside(finished, tmp_path):
  source = last_step(finished[0], "adapter")
  whole, _ = peft.restore(source)
  path, _ = converted(source, tmp_path)
  beside = tmp_path / "glyph_vit_token.adapter.safetensors"
  assert {p.name for p in tmp_path.iterdir()} == {
    path.name, beside.name, "glyph_vit_token.check.npz",
  }  # fmt: skip
  plain, added = convert.load(path), convert.files.read(beside)
  again = peft.load(plain, added, "adapter")
  np.testing.assert_array_equal(logits(again), logits(whole))
  seen = np.load(tmp_path / "glyph_vit_token.check.npz")
  shown = again.model.logits(again.params, again.stats, seen["images"])
  np.testing.assert_allclose(shown, seen["logits"], rtol=1e-4, atol=1e-5)


def test_another_models_name_is_refused(finished, tmp_path):
  source = last_step(finished[0], "lora")
  with pytest.raises(ValueError, match="is a glyph_vit_token, not a glyph_vit"):
    converted(source, tmp_path, model="glyph_vit")
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["lora", "adapter"])
def test_loading_what_a_method_has_added_to_says_what_to_do(finished, name):
  source = stage_of(finished[0], name)
  with pytest.raises(ValueError, match=f"of {name}, .*--mode=convert"):
    convert.load(source)


@pytest.mark.parametrize("name", ["lora", "adapter"])
def test_a_run_of_a_method_is_evaluated_again(finished, name):
  folder, config = finished
  stage = stage_of(folder, name)
  asked = stage.relative_to(folder / "run" / "checkpoints")
  rows = train.evaluate(
    {**config, "checkpoint": str(asked), "num_images": 40}, folder / "run"
  )
  (row,) = record.where(rows, attack="pgd")
  assert row["method"] == name and row["n"] == 40
  whole, _ = peft.restore(stage)  # the best, as rows are of
  clean = record.where(rows, attack="none")[0]["value"]
  source = build_run(config).data["test"]
  said = whole.model.logits(whole.params, {}, source.pixels(slice(0, 40)))
  correct = said.argmax(-1) == source.labels[:40]
  assert clean == pytest.approx(float(correct.mean()))
