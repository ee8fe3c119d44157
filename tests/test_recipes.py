"""The published recipes, end to end, on small data in the real formats.

CIFAR as TFDS prepares it with a toy ViT, and birds with JSON splits with a toy
Swin: every method from a random head and from a probe, for two steps.
"""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from configs import roli
from roli_jax import convert, data, keys, models, peft, train, trees
from roli_jax.experiment.build import build_method
from roli_jax.experiment.run import build_run
from roli_jax.experiment.stages import expand
from roli_jax.experiment.start_and_resume import initial_variables
from roli_jax.experiment.train_stage import best_variables
from roli_jax.files import checkpoint
from roli_jax.results import record
from tests import pictures, test_tfds

BACKBONES = {"cifar10": "glyph_vit_token", "cub": "glyph_swin"}
LOSSES = {"autolora": {"loss": "autolora"}}
CELLS = [
  {"method": method, "init": init, **LOSSES.get(method, {})}
  for method, init in itertools.product(peft.METHODS, ("ranli", "roli"))
]
# Of photographs as small as the toys.
SMALL = {
  "train_transforms": ("resize:10", "random_crop:8", "flip"),
  "eval_transforms": ("resize:10", "center_crop:8"),
}


@pytest.fixture(autouse=True)
def _one_device(devices):
  devices(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Both data sets, and weights of toys that take colours."""
  folder = tmp_path_factory.mktemp("recipes")
  test_tfds.prepare(folder / "tfds", "cifar10")
  birds = {
    split: {f"{c:03d}.bird {c}/{split}_{i}.jpg": c for c in (1, 2, 3)
            for i in range(count)}
    for split, count in (("train", 8), ("val", 2), ("test", 3))
  }  # fmt: skip
  pictures.splits(folder / "cub", "images", **birds)
  for name in BACKBONES.values():
    grey = models.create(name, 5)
    model = dataclasses.replace(grey, mean=(0.5,) * 3, std=(0.5,) * 3)
    variables = jax.jit(model.init)(keys.root(0))
    bundle = convert.Bundle(model, *variables)
    convert.save(bundle, folder / f"{name}.safetensors")
  return folder


def config_of(folder, dataset, cells, **changes):
  """The recipe, made small."""
  backbone = BACKBONES[dataset]
  config = roli.get_config(f"dataset={dataset},backbone={backbone}").to_dict()
  config["backbone"]["weights"] = str(folder / f"{backbone}.safetensors")
  root = {"cifar10": "tfds", "cub": "cub"}[dataset]
  config["data"] |= {"root": str(folder / root), **changes}
  if dataset == "cub":
    config["data"] |= SMALL
  config["cells"] = tuple(cells)
  for stage in ("probe", "adapt"):
    config[stage] |= {"num_steps": 2, "batch_size": 8, "log_every": 1}
  for attack in ("attack", "val_attack", "eval_attack"):
    config[attack] |= {"num_steps": 1}
  return config


@pytest.mark.slow
@pytest.mark.parametrize("dataset", BACKBONES)
def test_every_method_trains_from_a_random_head_and_from_a_probe(
  folder, dataset, tmp_path
):
  config = config_of(folder, dataset, CELLS)
  rows = train.run(config, tmp_path / "run")
  tested = record.where(rows, split="test", attack="pgd", stage="adapt")
  said = {(row["method"], row["init"]) for row in tested}
  assert said == {
    (cell["method"], cell["init"])
    for cell in CELLS
    if cell["method"] != "linear"
  }
  probes = record.where(rows, split="test", attack="pgd", stage="probe")
  assert len(probes) == 1  # once for all that start from it
  assert {row["data"] for row in rows} == {dataset}
  made = build_run(config)
  stages = expand(config, len(made.data["train"]))
  for stage in stages:
    before, _ = initial_variables(made, stage)
    after, _ = best_variables(made, stage, tmp_path / "run")
    trains = trees.paths(build_method(made, stage).trains(before).backbone)
    ended = trees.paths(after.backbone)
    for name, leaf in trees.paths(before.backbone).items():
      if not trains[name]:
        np.testing.assert_array_equal(leaf, ended[name])


def test_data_in_files_is_told_of_in_the_report(folder, tmp_path, capsys):
  from roli_jax.results import report

  cells = [{"method": "linear", "init": "roli"}]
  path = tmp_path / "run"
  train.run(config_of(folder, "cub", cells), path)
  assert "Images by class" in capsys.readouterr().out
  report.write(path)
  text = (path / "report.md").read_text()
  assert "| 2 | 8 | 2 | 3 |" in text
  assert "| linear | 99 |" in text and "percent trained" in text


class _Killed(Exception):
  pass


def _parameters(config, path):
  made = build_run(config)
  (stage,) = expand(config, len(made.data["train"]))
  return trees.paths(best_variables(made, stage, path)[0])


@pytest.fixture(scope="module")
def never_killed(folder, tmp_path_factory):
  """The config of a run, by the main thread alone, and its parameters."""
  whole = config_of(folder, "cub", [{"method": "lora", "init": "ranli"}])
  # 24 images are three steps: the second validation is within an epoch.
  whole["adapt"] |= {"num_steps": 5, "val_every": 2}
  path = tmp_path_factory.mktemp("whole") / "run"
  train.run(whole, path)
  return whole, _parameters(whole, path)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", (0, 1, 2))
def test_killed_in_an_epoch_it_ends_at_the_same_bits_with_any_workers(
  never_killed, tmp_path, monkeypatch, num_workers
):
  whole, parameters = never_killed
  config = {**whole, "data": {**whole["data"], "num_workers": num_workers}}

  batches = data.train_batches

  def dying(*args, **kwargs):
    stream = batches(*args, **kwargs)
    yield from itertools.islice(stream, 3)
    raise _Killed

  with monkeypatch.context() as patch:
    patch.setattr(data, "train_batches", dying)
    with pytest.raises(_Killed):
      train.run(config, tmp_path / "run")
  # It goes on with another number of them, too.
  config["data"]["num_workers"] = 2 - num_workers
  train.run(config, tmp_path / "run")
  ours = _parameters(config, tmp_path / "run")
  for name, leaf in parameters.items():
    np.testing.assert_array_equal(leaf, ours[name], err_msg=name)


@pytest.mark.slow
def test_a_probe_is_taken_from_the_run_beside(folder, tmp_path, monkeypatch):
  bias = config_of(folder, "cub", [{"method": "bias", "init": "roli"}])
  train.run(bias, tmp_path / "one")
  lora = config_of(folder, "cub", [{"method": "lora", "init": "roli"}])
  trained = []
  whole = train.train_stage

  def spied(run, stage, path, *rest):
    with_steps = checkpoint.directory(path, stage).exists()
    trained.append((stage.name, with_steps))
    return whole(run, stage, path, *rest)

  monkeypatch.setattr(train, "train_stage", spied)
  rows = train.run(lora, tmp_path / "two")
  assert trained == [("probe", True), ("adapt", False)]
  said = [
    record.where(of, stage="probe", split="test")
    for of in (rows, record.read(tmp_path / "one" / "results.jsonl"))
  ]
  values = [[row["value"] for row in of] for of in said]
  assert values[0] == values[1] and len(values[0]) == 2
  # Another probe is not taken.
  lora["probe"] |= {"lr": 0.5}
  trained.clear()
  train.run(lora, tmp_path / "three")
  assert trained[0] == ("probe", False)
