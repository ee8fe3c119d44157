"""From configs to stages."""

import dataclasses

import pytest

from configs import (
  cifar_roli,
  glyphs_pretrain,
  glyphs_roli,
  roli,
  tiny_roli,
)
from roli_jax.experiment import stage_tests
from roli_jax.experiment.run import build_run
from roli_jax.experiment.stages import expand


def expanded(arg="", **changes):
  config = glyphs_roli.get_config(arg).to_dict()
  return expand({**config, **changes})


def test_the_default_table_is_the_protocols():
  stages = expanded()
  cells = [(s.weights, s.train_size, s.method, s.init, s.seed) for s in stages]
  assert len(cells) == len(set(cells)) == 2 * 5 * 3 + 2 * 3
  for *setting, seeds in (
    ("robust", 50, 5),
    ("robust", 200, 5),
    ("standard", 200, 2),
  ):
    for cell in (("linear", "roli"), ("full", "ranli"), ("full", "roli")):
      assert {(*setting, *cell, k) for k in range(seeds)} <= set(cells)
  curves = [s.cell for s in stages if s.curve]
  assert curves == [
    "robust-full-ranli-n200-seed0",
    "robust-full-roli-n200-seed0",
  ]


@pytest.mark.parametrize("name", glyphs_roli.TABLES)
def test_a_stage_stands_after_the_one_it_starts_from(name):
  seen = set()
  for stage in expanded(f"table={name}"):
    assert stage.start is None or stage.start in seen
    seen.add(stage)


@pytest.mark.parametrize("name", tiny_roli.TABLES)
def test_on_photographs_every_init_has_the_same_rates_and_seeds(name):
  stages = expand(tiny_roli.get_config(f"table={name}").to_dict())
  is_grid = name.endswith("grid")
  asked = {}
  for stage in stages:
    assert stage.start is None or stage.start.seed == stage.seed
    if stage.name == "adapt" or name == "probe_grid":
      key = (stage.method, stage.init, stage.head_init, stage.num_steps)
      asked.setdefault(key, set()).add((is_grid and stage.lr, stage.seed))
  first, *others = asked.values()
  assert all(other == first for other in others)
  assert len(first) == (3 * 2 if is_grid else 5)


def test_one_cell_is_what_its_arguments_name():
  assert [s.cell for s in expanded("method=full,init=roli")] == [
    "robust-linear-roli-n200-seed0",
    "robust-full-roli-n200-seed0",
  ]
  (probe,) = expanded("method=linear,init=ranli")
  assert (probe.name, probe.init) == ("probe", "roli")
  (stage,) = expanded("init=ranli", seed=7)
  assert (stage.cell, stage.name) == ("robust-full-ranli-n200-seed7", "adapt")


def test_a_clean_probe_trains_clean():
  probe, stage = expanded("init=std")
  assert (probe.loss, probe.init, stage.loss) == ("clean", "std", "at")
  assert stage.start == probe


def test_controls_add_the_probes_steps_and_the_small_head():
  stages = expanded("table=controls")
  longer = [s for s in stages if s.num_steps == 120]
  assert {s.head_init for s in longer} == {"kaiming_fan_out", "small"}
  small = {s.cell for s in stages if s.head_init == "small"}
  assert "robust-full-ranli-small-n200-seed0" in small
  assert "robust-full-std-small-n200-seed4" in small


def test_a_grid_has_all_rates_and_chosen_probes():
  stages = expanded("table=grid")
  adapted = [s for s in stages if s.name == "adapt"]
  for stage in adapted:  # each init of a method, backbone and size has one grid
    setting = (stage.method, stage.weights, stage.train_size)
    rivals = [
      s for s in adapted if (s.method, s.weights, s.train_size) == setting
    ]
    others = [s for s in rivals if s.init == stage.init]
    assert {s.lr for s in rivals} == {s.lr for s in others}
    own = stage.method == "full"
    least = glyphs_roli.RATES if own else glyphs_roli.PEFT_RATES
    assert {s.lr for s in others} >= set(least)
  assert {s.lr for s in stages if s.name == "probe"} >= set(
    glyphs_roli.PROBE_RATES
  )


def test_equal_names_are_equal_directories():
  stages = expanded("table=full")
  by_directory = {}
  for stage in stages:
    by_directory.setdefault(stage.directory, []).append(stage)
  for same in by_directory.values():
    bare = {dataclasses.replace(s, curve=False, tests=()) for s in same}
    assert len(bare) == 1


def test_a_rate_can_be_set_for_all():
  config = glyphs_roli.get_config("init=ranli").to_dict()
  config["adapt"]["lr"] = 0.5
  assert [s.lr for s in expand(config)] == [0.5]


def test_a_path_of_weights_names_a_plain_directory():
  config = glyphs_roli.get_config("init=ranli").to_dict()
  config["backbone"]["weights"] = "/data/my weights/vit.safetensors"
  (stage,) = expand(config)
  assert "/" not in stage.cell and stage.cell.endswith("-full-ranli-n200-seed0")


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"cells": ({"methd": "full"},)}, "methd"),
    ({"cells": ({"method": "full", "init": "rolli"},)}, "roli"),
    ({"rates": ()}, "config.adapt.lr"),
    ({"cells": ({**glyphs_roli.RANLI, "rates": (-1.0,)},)}, "> 0"),
  ],
)
def test_tables_that_can_not_be_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    expanded("init=ranli", **changes)


def test_pretraining_is_one_stage_for_each_twin():
  config = glyphs_pretrain.get_config().to_dict()
  stages = expand(config)
  assert [(s.weights, s.loss, s.name) for s in stages] == [
    ("robust", "at", "pretrain"),
    ("standard", "clean", "pretrain"),
  ]


def test_the_cifar_recipe_has_the_references_rates():
  config = cifar_roli.get_config().to_dict()
  probe, stage = expand(config, 45_000)
  assert (probe.lr, stage.lr) == (0.0125, 2.5e-5)
  ranli = cifar_roli.get_config("dataset=cifar100,init=ranli").to_dict()
  assert expand(ranli, 45_000)[0].lr == 1.25e-4


def test_with_the_backbone_in_the_package_the_recipe_is_a_small_one():
  config, whole = (
    cifar_roli.get_config(text) for text in ("backbone=tiny32", "")
  )
  assert (config.backbone.name, config.backbone.weights) == ("tiny32", "robust")
  images = (config.num_val_images, config.num_images)
  assert images == (500, 1000) and config.cpu_devices == 2
  assert config.probe.lr == 0.2
  assert (whole.num_val_images, whole.num_images) == (0, 0)
  probe, adapt = expand(config.to_dict())
  for stage in (probe, adapt):
    assert (stage.num_steps, stage.train_size) == (300, 2000)
  for section in ("threat", "attack", "val_attack", "eval_attack"):
    assert config[section] == whole[section]
  (cell,), (same,) = config.cells, whole.cells
  assert {k: cell[k] for k in same} == same
  # At half the radius, too, and by AutoAttack.
  assert config.curve == ("4/255",) and adapt.curve and not probe.curve
  assert adapt.tests == (("autoattack", "linf", "8/255", 200),)
  # A folder of one's own may have fewer.
  folder = roli.get_config("dataset=folder,backbone=tiny32")
  assert folder.data.train_size == 0 and folder.probe.num_steps == 300


def test_an_unknown_argument_lists_the_known():
  with pytest.raises(ValueError, match="table"):
    glyphs_roli.get_config("tabel=grid")
  with pytest.raises(ValueError, match="controls"):
    glyphs_roli.get_config("table=control")


def test_a_test_is_of_the_configs_images_or_its_own_number():
  own = (
    ("fgsm", "linf", "0.1", 30), ("", "linf", "0.05", 20),
    ("corruptions:glyphs", "", "3", 0),
  )  # fmt: skip
  cell = {"method": "linear", "init": "roli", "curve": True, "tests": own}
  changes = {"cells": (cell,), "num_images": 50, "num_val_images": 40}
  made = build_run({**glyphs_roli.get_config().to_dict(), **changes})
  (probe,) = expand(made.config)
  first, fgsm, same, *corruptions = stage_tests.tests(made, probe)
  assert (first.num_images, fgsm.num_images, same.num_images) == (50, 30, 20)
  # Without a name it is the config's attack, with its steps.
  assert (same.attack.name, same.attack.num_steps) == ("pgd", 20)
  assert {test.num_images for test in corruptions} == {50}
