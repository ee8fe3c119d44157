"""Plans: every published recipe, from shapes alone."""

import functools
import json
import pathlib

import pytest

from configs import cifar_roli, common, glyphs_roli, pretrain, roli
from roli_jax.plan import plan
from tests import cli
from tests.covering import mostly_slow

_FILE = pathlib.Path(__file__).parent / "fixtures" / "recipes.json"
REFERENCE = json.loads(_FILE.read_text())
# One only evaluates.
RECIPES = [c for c in REFERENCE["configs"] if not c.get("eval_only")]
# Theirs and ours; of a head, its bias is all there is.
NO_DECAY = {
  "head.last_layer.bias": ".*bias",
  "*bias*": ".*bias",
}
METHODS = {"finetune": "full"}  # theirs, ours


def name_of(recipe):
  return pathlib.Path(recipe["config"]).with_suffix("").as_posix()


def _each():
  """Each method and init, and each data set; the others in `make test-all`."""
  known: set = set()
  for recipe in RECIPES:
    about = {recipe["method"], recipe["init"], recipe["dataset"]}
    marks = pytest.mark.slow if about <= known else ()
    known |= about
    yield pytest.param(recipe, id=name_of(recipe), marks=marks)


EACH = list(_each())


def planned(recipe, compat):
  method = METHODS.get(recipe["method"], recipe["method"])
  return cell(recipe["dataset"], method, recipe["init"], compat)


@functools.cache
def cell(dataset, method, init, compat="true"):
  text = f"dataset={dataset},method={method},init={init},compat={compat}"
  return plan.outline(roli.get_config(text).to_dict())


def test_there_are_fifty_published_recipes():
  assert len(RECIPES) == 50 and len({name_of(r) for r in RECIPES}) == 50


@pytest.mark.parametrize("recipe", EACH)
def test_a_recipe_under_compat_is_the_references(recipe):
  made = planned(recipe, "true")
  data = REFERENCE["datasets"][recipe["dataset"]]
  stage = made["stages"][-1]
  assert stage["epochs"] == recipe["epochs"]
  assert stage["steps"] == recipe["epochs"] * data["steps_per_epoch"]
  assert stage["peak_lr"] == pytest.approx(recipe["peak_lr"], rel=1e-12)
  last = pytest.approx(recipe["last_epoch_lr"], rel=1e-9)
  assert stage["last_epoch_lr"] == last
  assert stage["optimizer"] == recipe["optimizer"]
  assert stage["weight_decay"] == recipe["weight_decay"]
  assert stage["no_decay"] == [NO_DECAY[name] for name in recipe["no_decay"]]
  assert stage["trainable_params"] == recipe["trainable_params"]
  assert made["total_params"] == recipe["total_params"]
  assert stage["prompt_tokens"] == recipe.get("prompt_tokens")


@pytest.mark.parametrize("recipe", EACH)
def test_by_default_the_optimizer_is_the_one_its_authors_wrote(recipe):
  method = METHODS.get(recipe["method"], recipe["method"])
  text = f"dataset={recipe['dataset']},method={method},init={recipe['init']}"
  stage = plan.outline(roli.get_config(text).to_dict())["stages"][-1]
  assert stage["optimizer"] == recipe["optimizer_in_config"]
  assert stage["weight_decay"] == recipe["weight_decay_in_config"]
  assert stage["peak_lr"] == pytest.approx(recipe["peak_lr"], rel=1e-12)


@pytest.mark.parametrize("recipe", EACH)
def test_roli_is_the_probes_recipe_first(recipe):
  stages = planned(recipe, "true")["stages"]
  if recipe["init"] != "roli":
    assert len(stages) == 1
    return
  (probe,) = (
    planned(other, "true")["stages"]
    for other in RECIPES
    if (other["method"], other["dataset"]) == ("linear", recipe["dataset"])
  )
  assert stages[0] == probe[0] and len(stages) == 2


@pytest.mark.parametrize(
  "dataset", mostly_slow(REFERENCE["datasets"], "cub", "stanforddogs")
)
def test_what_has_no_recipe_takes_its_neighbours(dataset):
  ours, theirs, probe = (
    cell(dataset, *which)["stages"]
    for which in (("vpt", "roli"), ("vpt", "ranli"), ("linear", "roli"))
  )
  assert ours == [*probe, *theirs]


def test_the_threat_is_the_references():
  common_part = REFERENCE["common"]
  config = roli.get_config("compat=true")
  assert config.threat.norm == common_part["norm"]
  assert config.threat.eps == common_part["eps"]
  steps = (config.attack.num_steps, config.val_attack.num_steps)
  assert (
    steps
    == (7, 10)
    == (
      common_part["train_attack_steps"],
      common_part["val_attack_steps"],
    )
  )
  assert config.compat.pgd_best == "batch"


def test_cifar_roli_is_roli_on_cifar():
  assert cifar_roli.get_config() == roli.get_config("dataset=cifar10")
  text = "dataset=cifar100,method=lora,init=ranli"
  assert cifar_roli.get_config(text) == roli.get_config(text)


def test_bytes_and_hours_are_those_of_the_shapes():
  made = plan.make(roli.get_config("method=linear").to_dict())
  assert made["bytes"]["params"] == 4 * made["total_params"]
  trained = made["stages"][-1]["trainable_params"]
  assert made["bytes"]["trainable"] == 4 * trained
  # SGD's momentum, the step, the rate.
  assert 0 <= made["bytes"]["optimizer"] - 4 * trained < 64
  hours, about = made["hours"], made["assumed"]
  assert set(hours) == {"h100", "h200", "tpu_v5e", "tpu_v5p"}
  seconds = about["flops"] / about["peak_flops"]["h100"] / about["efficiency"]
  assert hours["h100"] == pytest.approx(seconds / 3600)


def test_an_average_takes_as_much_as_what_it_is_of():
  config = pretrain.get_config("dataset=digits,backbone=glyph_vit_token")
  with_one, config.pretrain.ema = plan.make(config.to_dict()), 0.0
  without = plan.make(config.to_dict())
  more = with_one["bytes"]["optimizer"] - without["bytes"]["optimizer"]
  assert more == with_one["bytes"]["trainable"] > 0


def test_full_fine_tuning_costs_more_than_probing():
  probe, full = (
    plan.make(roli.get_config(f"method={m},init=ranli").to_dict())
    for m in ("linear", "full")
  )
  assert 1 < full["assumed"]["flops"] / probe["assumed"]["flops"] < 1.3
  assert full["bytes"]["activations"] > probe["bytes"]["activations"]


def test_a_table_of_many_cells_is_planned_too():
  made = plan.make(glyphs_roli.get_config("table=default").to_dict())
  assert len(made["stages"]) == 36
  assert made["dataset"] == "digits" and made["backbone"] == "glyph_vit"


def test_plan_needs_neither_data_nor_weights(tmp_path):
  done = cli.run(
    "--mode=plan", "--config=configs/cifar_roli.py:method=lora",
    f"--workdir={tmp_path}",
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert "780,298" in done.stdout and "hours on h200" in done.stdout
  made = json.loads((tmp_path / "plan.json").read_text())
  assert [stage["stage"] for stage in made["stages"]] == ["probe", "adapt"]


@pytest.mark.parametrize(
  "text, message",
  [
    ("method=lore", "lora"),
    ("dataset=cub200", "stanforddogs"),
    ("compat=yes", "true"),
    ("finetune=full", "method"),
  ],
)
def test_arguments_that_can_not_be_are_refused(text, message):
  with pytest.raises(ValueError, match=message):
    roli.get_config(text)


def test_every_switch_is_in_the_configs():
  config = roli.get_config()
  assert set(config.compat) == set(common.COMPAT)
