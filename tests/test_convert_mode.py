"""--mode=convert as a user types it, and toys of each family all the way."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from configs import glyphs_roli
from roli_jax import convert, keys, models, train, trees
from roli_jax.convert import torch_file
from tests import cli

CONVERT = ("--mode=convert", "--config=configs/convert.py")


def bundle_of(name, seed=0):
  model = models.create(name, 37)
  return convert.Bundle(model, *jax.jit(model.init)(keys.root(seed)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A Swin's file as Microsoft's, converted, and a run that starts from it."""
  folder = tmp_path_factory.mktemp("convert")
  bundle = bundle_of("glyph_swin")
  torch_file.write(
    folder / "swin.pth", convert.to_state_dict(bundle, "microsoft")
  )
  return folder


@pytest.fixture(scope="module")
def converted(folder):
  return cli.run(
    *CONVERT, f"--config.source={folder}/swin.pth",
    f"--config.output={folder}/out",
  )  # fmt: skip


def test_a_file_becomes_a_bundle_and_says_how(folder, converted):
  assert converted.returncode == 0, converted.stderr
  for said in ("glyph_swin", "swin_old", "bit for bit", "check that they are"):
    assert said in converted.stdout
  bundle = convert.load(folder / "out")
  seen = np.load(folder / "out" / "glyph_swin.check.npz")
  logits = bundle.model.logits(bundle.params, {}, seen["images"])
  np.testing.assert_allclose(logits, seen["logits"], atol=1e-4)


FAMILY = functools.partial(
  models.create, "vit", 5, 8, patch=4, width=32, depth=1, heads=4, channels=1
)


def projected():
  """CLIP's tower, whose head has no bias."""
  model = models.create("glyph_clip", 5)
  return dataclasses.replace(model, head=models.heads.projection(5))


def distilled():
  model = models.create("glyph_vit_token", 5)
  backbone = model.backbone.clone(distilled=True)
  return dataclasses.replace(model, backbone=backbone)


@pytest.mark.parametrize(
  "made, format, suffix",
  [
    (FAMILY, "timm", ".pth"),
    (functools.partial(FAMILY, width=128, heads=2), "google", ".npz"),
    (distilled, "timm", ".pth"),
    (projected, "timm", ".pth"),
  ],
)
def test_a_bundle_becomes_another_formats_file(made, format, suffix, tmp_path):
  """What tensors don't show is told when it is read back."""
  model = made()
  bundle = convert.Bundle(model, *jax.jit(model.init)(keys.root(0)))
  convert.save(bundle, tmp_path / "ours.safetensors")
  done = cli.run(
    *CONVERT, f"--config.source={tmp_path}/ours.safetensors",
    f"--config.output={tmp_path}/out", f"--config.format={format}",
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  again = convert.load(tmp_path / "out" / f"{model.name}{suffix}", model.name,
                       heads=models.sizes(model).get("heads"))  # fmt: skip
  x = np.random.default_rng(0).random((2, 8, 8, model.channels), np.float32)
  found = again.model.logits(again.params, {}, x)
  expected = model.logits(bundle.params, {}, x)
  np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_same_again_is_left_and_another_refused(folder, converted):
  path = folder / "out" / "glyph_swin.safetensors"
  before = path.read_bytes()
  words = [*CONVERT, f"--config.output={folder}/out"]
  again = cli.run(*words, f"--config.source={folder}/swin.pth")
  assert again.returncode == 0, again.stderr
  before = path.read_bytes()
  other = bundle_of("glyph_swin", seed=1)
  convert.save(other, folder / "other.safetensors", "timm")
  refused = cli.run(*words, f"--config.source={folder}/other.safetensors")
  assert refused.returncode == 2 and "holds other weights" in refused.stderr
  assert path.read_bytes() == before
  assert sorted(p.name for p in path.parent.iterdir()) == [
    "glyph_swin.check.npz", "glyph_swin.safetensors",
  ]  # fmt: skip


@pytest.mark.slow
def test_a_run_starts_from_it_and_goes_back_to_pytorch(folder, converted):
  done = cli.run(
    f"{cli.GLYPHS}:backbone=glyph_swin,method=full,init=roli", *cli.TINY,
    f"--config.backbone.weights={folder}/out", f"--workdir={folder}/run",
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  (stage,) = (folder / "run" / "checkpoints").glob("*/adapt/*")
  back = cli.run(
    *CONVERT, f"--config.source={stage}", f"--config.output={folder}/back",
    "--config.format=timm",
  )  # fmt: skip
  assert back.returncode == 0, back.stderr
  state = torch_file.read(folder / "back" / "glyph_swin.pth")
  assert state["head.fc.weight"].shape == (10, 64 // 2)
  ours, theirs = convert.load(stage), convert.load(state, "glyph_swin")
  for path, leaf in trees.paths(ours.params).items():
    np.testing.assert_array_equal(trees.paths(theirs.params)[path], leaf)


@pytest.mark.parametrize(
  "words, message",
  [
    ([], "--config.source="),
    (["--config.source=x.pth"], "--config.output="),
    (["--config.source=x.pth", "--config.output=y"], "no weights at x.pth"),
    (["--config.source=README.md", "--config.output=y"], "can't be read"),
    (["--config.soruce=x"], "did you mean 'source'"),
  ],
)
def test_a_mistake_is_told_in_a_few_words(words, message):
  done = cli.run(*CONVERT, *words)
  assert done.returncode == 2, done.stdout
  assert message in done.stderr and len(done.stderr.splitlines()) <= 6


@pytest.mark.slow
@pytest.mark.parametrize(
  "name, moves",
  [
    ("glyph_vit_token", False),
    ("glyph_clip", False),
    ("glyph_convnext", False),
    ("glyph_resnet", True),
    ("glyph_wrn", False),
  ],
)
def test_the_demo_starts_from_any_family(name, moves, tmp_path):
  file = tmp_path / "weights.safetensors"
  bundle = bundle_of(name)
  convert.save(bundle, file)
  config = glyphs_roli.get_config(f"backbone={name},method=full,init=ranli")
  config.backbone.weights = str(file)
  config.backbone.updates_stats = moves
  config.backbone.dtype = "bfloat16" if name == "glyph_clip" else "float32"
  config.backbone.scan = name == "glyph_vit_token"
  config.backbone.remat = name == "glyph_convnext"
  config.curve = ()
  config.data.train_size = 50
  config.num_val_images, config.num_images = 40, 50
  for attack in (config.attack, config.val_attack, config.eval_attack):
    attack.num_steps = 1
  for stage in (config.probe, config.adapt):
    stage.update(num_steps=2, val_every=2, log_every=1, batch_size=16)
  rows = train.run(config.to_dict(), tmp_path / "run")
  assert {row["backbone"] for row in rows} == {name}
  stages = sorted((tmp_path / "run" / "checkpoints").glob("*/*/*"))
  for stage in stages:
    before, after = trees.paths(bundle.stats), trees.paths(
      convert.load(sorted(stage.glob("0*"))[-1]).stats
    )  # fmt: skip
    changed = [k for k in before if (before[k] != after[k]).any()]
    assert bool(changed) == (moves and stage.parent.name == "adapt")
