"""Bundles, and the weights that ship with the package."""

import dataclasses
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

from roli_jax import attacks, convert, data, evaluate, keys, models, step, trees
from roli_jax.threat import ThreatModel


@pytest.fixture(scope="module")
def bundle():
  model = models.create("glyph_vit", num_classes=7)
  return convert.Bundle(model, *model.init(keys.root(0)))


def test_a_bundle_comes_back_bit_for_bit(bundle, tmp_path):
  path = tmp_path / "x.safetensors"
  convert.save(bundle, path)
  again = convert.load(path)
  assert again.model == bundle.model
  for name, leaf in trees.paths(bundle.params).items():
    np.testing.assert_array_equal(trees.paths(again.params)[name], leaf)
  assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_whoever_reads_other_files_reads_a_bundle(bundle, tmp_path):
  path, other = tmp_path / "x.safetensors", tmp_path / "other"
  convert.save(bundle, path)
  other.touch()
  assert path.stat().st_mode == other.stat().st_mode


def test_another_number_of_classes_puts_a_zero_head(bundle, tmp_path):
  path = tmp_path / "x.safetensors"
  convert.save(bundle, path)
  other = convert.load(path, num_classes=3)
  assert other.model.num_classes == 3
  assert other.params.head["kernel"].shape == (64, 3)
  assert not other.params.head["kernel"].any()


def broken(bundle, tmp_path, **leaves):
  params = dataclasses.replace(
    bundle.params, head={**bundle.params.head, **leaves}
  )
  path = tmp_path / "x.safetensors"
  convert.save(dataclasses.replace(bundle, params=params), path)
  return path


def test_leaves_that_are_not_the_models_are_listed(bundle, tmp_path):
  path = broken(bundle, tmp_path, extra=jnp.ones(2), bias=jnp.ones(3))
  with pytest.raises(ValueError) as error:
    convert.load(path)
  assert "head/extra" in str(error.value) and "(3,)" in str(error.value)


def test_weights_that_are_not_finite_are_refused(bundle, tmp_path):
  path = broken(bundle, tmp_path, bias=jnp.full(7, jnp.nan))
  with pytest.raises(ValueError, match="head/bias"):
    convert.load(path)


def test_statistics_that_are_not_finite_are_refused(tmp_path):
  model = models.create("glyph_resnet", num_classes=3)
  params, stats = model.init(keys.root(0))
  stats["stem_norm"]["var"] = jnp.full(16, jnp.inf)
  path = tmp_path / "x.safetensors"
  convert.save(convert.Bundle(model, params, stats), path)
  with pytest.raises(ValueError, match="stem_norm/var"):
    convert.load(path)


@pytest.mark.parametrize("content", [b"", b"not a file of tensors"])
def test_other_files_are_refused(content, tmp_path):
  path = tmp_path / "x.safetensors"
  path.write_bytes(content)
  with pytest.raises(ValueError, match="can't be read"):
    convert.load(path)


def test_a_file_of_unknown_names_says_which_it_has(tmp_path):
  from safetensors import numpy as safetensors

  path = tmp_path / "x.safetensors"
  safetensors.save_file({"a": np.ones(2)}, path, {"format": "pt"})
  with pytest.raises(ValueError, match=r"\(a, ...\) are of no layout.*timm"):
    convert.load(path)


def test_weights_are_found_by_name_or_path(bundle, tmp_path):
  path = tmp_path / "x.safetensors"
  convert.save(bundle, path)
  assert convert.find("glyph_vit", str(path)) == path
  assert convert.find("glyph_vit", "robust").is_file()
  with pytest.raises(ValueError, match=r"robust, standard; give a file"):
    convert.find("glyph_vit", "robst")


# Accuracy on all 3,700 test letters: clean, and under PGD-20 at eps 0.1.
SHIPPED = {"robust": (0.989, 0.779), "standard": (0.995, 0.125)}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_weights_are_small_and_as_good_as_the_readme_says(name, root):
  path = convert.find("glyph_vit", name)
  assert path.stat().st_size < 1_000_000
  bundle = convert.load(path)
  letters = data.build("letters", "test")
  few = letters.take(np.arange(0, 3700, 5))
  result = evaluate.run(
    step.make_predict(bundle.model),
    few.pixels(),
    few.labels,
    attacks.build("pgd", ThreatModel("linf", 0.1), num_steps=20),
    params=(bundle.params, bundle.stats),
    indices=few.indices,
  )
  clean, robust = SHIPPED[name]
  # 740 of the 3,700, on another version of the font renderer perhaps.
  assert result.clean.mean() == pytest.approx(clean, abs=0.02)
  assert result.robust.mean() == pytest.approx(robust, abs=0.04)
  said = f"| {name} | {100 * clean:.1f} | {100 * robust:.1f} |"
  assert said in re.sub(r" +", " ", (root / "README.md").read_text())
  assert json.dumps(models.to_spec(bundle.model))
