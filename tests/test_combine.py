"""Ensembles of a probe and its fine-tuned model, in a whole tiny run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from configs import glyphs_roli
from roli_jax import (
  attacks,
  corruptions,
  ensembles,
  evaluate,
  sharding,
  step,
  train,
)
from roli_jax.experiment import ensembles_run, stage_tests
from roli_jax.experiment.build import build_model
from roli_jax.experiment.measure import Corruption
from roli_jax.experiment.run import build_run, expand_stages
from roli_jax.experiment.start_and_resume import initial_variables
from roli_jax.results import record
from roli_jax.threat import ThreatModel


def small():
  config = glyphs_roli.get_config("recipe=adamw,init=roli")
  for section in (config.probe, config.adapt):
    section.num_steps, section.val_every, section.batch_size = 3, 3, 16
    section.lr = 0.01
  config.data.train_size = 20
  config.num_val_images, config.num_images = 40, 50
  config.curve, config.test = (), True
  config.attack.num_steps = 1
  config.val_attack.num_steps = config.eval_attack.num_steps = 2
  config.ensembles = ("wise_ft", "output", "vrf")
  tests = (("corruptions:glyphs", "", "5", 40, 1),)
  config.cells = ({"method": "full", "init": "roli", "tests": tests},)
  return config.to_dict()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """The run's directory, its parts and rows; few alphas, few a and b."""
  with pytest.MonkeyPatch.context() as patch:
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    patch.setattr(sharding, "mesh", lambda *_: mesh)
    patch.setattr(ensembles_run, "ALPHAS", (0.0, 0.5, 1.0))
    patch.setattr(ensembles_run, "A", (0.3, 1.0))
    patch.setattr(ensembles_run, "B", (0.3,))
    path = tmp_path_factory.mktemp("combine") / "run"
    config = small()
    rows = train.run(config, path)
    again = train.run(config, path)
    assert len(again) == len(rows)
    yield path, build_run(config), rows


def robust(rows, stage, split="test", attack="pgd"):
  (row,) = record.where(rows, stage=stage, split=split, attack=attack)
  return row["value"]


@pytest.mark.parametrize("family", ["wise_ft", "output"])
@pytest.mark.slow
def test_the_ends_of_a_frontier_are_the_two_models(whole, family):
  _, _, rows = whole
  for split in ("val", "test"):
    own = "none" if split == "val" else "pgd"
    assert robust(rows, f"{family}-1", split, own) == pytest.approx(
      robust(rows, "adapt", split, own), abs=0.01
    )
  assert robust(rows, f"{family}-0", "test", "none") == pytest.approx(
    robust(rows, "probe", "test", "none"), abs=0.01
  )


@pytest.mark.parametrize("family", ["wise_ft", "output"])
@pytest.mark.slow
def test_what_is_chosen_is_the_best_on_validation(whole, family):
  _, _, rows = whole
  held = {a: robust(rows, f"{family}-{a}", "val") for a in ("0", "0.5", "1")}
  best = max(held, key=lambda a: held[a])
  assert robust(rows, family) == robust(rows, f"{family}-{best}")


@pytest.mark.slow
def test_every_ensemble_has_all_tests(whole):
  _, _, rows = whole
  for stage in ("adapt", "wise_ft", "vrf"):
    corrupted = record.where(rows, stage=stage, norm="severity", eps=5.0)
    assert len(corrupted) == 5 and {r["n"] for r in corrupted} == {40}
  assert len(record.where(rows, stage="output", split="test")) == 2


@pytest.mark.slow
def test_no_frontier_is_drawn_of_what_has_no_alpha(whole):
  path, _, rows = whole
  tests = record.where(rows, split="test")
  assert not [row for row in tests if row["stage"].startswith("vrf-")]
  assert (path / "finished.json").is_file()


@pytest.mark.slow
def test_a_corruption_is_of_the_image_and_not_of_its_place(whole):
  _, made, _ = whole
  source = made.data["test"]
  test = Corruption("glyph_noise", 3)
  rows = np.array([7, 3, 11])
  some = test.pixels(source, rows)
  np.testing.assert_array_equal(some, test.pixels(source, np.arange(12))[rows])
  assert some.dtype == np.float32 and some.min() >= 0 and some.max() <= 1
  assert np.abs(some - source.pixels(rows)).max() > 0.05


@pytest.mark.slow
def test_the_guide_corrupts_each_image_by_one_type(whole):
  _, made, _ = whole
  source = made.data["test"]
  rows = np.array([0, 200])
  corrupted = Corruption("guide", 3).pixels(source, rows)
  for k, name in enumerate(("shot_noise", "zoom_blur")):
    assert corruptions.guide(int(rows[k]), len(source)) == name
    index = int(source.indices[rows[k]])
    image = np.rint(255 * source.pixels(rows)[k]).astype(np.uint8)
    expected = corruptions.apply(name, image, 3, index)
    np.testing.assert_allclose(corrupted[k], expected / 255, atol=1e-6)


@pytest.mark.slow
def test_both_are_features_and_the_logits_that_are_judged(whole):
  _, made, _ = whole
  stage = expand_stages(made)[-1]
  model = build_model(made, stage)
  variables = initial_variables(made, stage)
  images = made.data["test"].pixels(np.arange(8))
  features, logits = step.make_both(model)(variables, images)
  assert features.shape == (8, 64)
  np.testing.assert_allclose(
    logits, step.make_predict(model)(variables, images), atol=1e-5
  )


def test_weights_that_a_probe_has_not_are_not_mixed():
  config = small()
  config["cells"] = ({"method": "lora", "init": "roli"},)
  made = build_run(config)
  with pytest.raises(ValueError, match="take output or vrf"):
    ensembles_run.check(made, expand_stages(made))


def test_an_unknown_set_of_corruptions_is_refused_before_training():
  config = small()
  tests = (("corruptions:glyph", "", "", 0),)
  config["cells"] = ({"method": "full", "init": "roli", "tests": tests},)
  made = build_run(config)
  with pytest.raises(ValueError, match="did you mean 'glyphs'"):
    stage_tests.check(made, expand_stages(made))


def test_an_attack_on_one_model_overstates_what_both_withstand():
  """Of two experts, each sure where the other isn't, both have to fall."""
  images = np.full((4, 1, 1, 2), 0.5, np.float32)
  labels = np.zeros(4, np.int32)

  def predict(weights, x):
    height = x.reshape(len(x), -1) @ weights - 0.4 * weights.sum()
    return 20 * jnp.stack([height, -height], -1)

  first, second = (np.eye(2, dtype=np.float32)[i] for i in (0, 1))
  both = ensembles.output_space(predict, predict)
  attack = attacks.build("pgd", ThreatModel("linf", 0.2), num_steps=20)
  whole = evaluate.run(
    both, images, labels, attack, params=(first, second, jnp.float32(0.5))
  )
  one = evaluate.run(predict, images, labels, attack, params=second)
  judged = both((first, second, jnp.float32(0.5)), one.adv)
  still = (np.asarray(judged).argmax(-1) == labels).mean()
  assert whole.robust.mean() <= still


@pytest.mark.slow
def test_a_chosen_ensemble_goes_by_its_own_name(whole):
  _, made, _ = whole
  stage = expand_stages(made)[-1]
  renamed = dataclasses.replace(stage, name="vrf")
  assert renamed.directory != stage.directory
