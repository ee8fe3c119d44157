"""What the README prints works as printed."""

import importlib
import re

import numpy as np
import pytest

from configs import cifar_roli, glyphs_roli, roli
from roli_jax import convert, main, models
from roli_jax.convert import registry

CONFIGS = (
  "glyphs_roli",
  "glyphs_pretrain",
  "bench",
  "cifar_roli",
  "convert",
  "evaluate",
  "guide",
  "pretrain",
  "roli",
  "tiny_roli",
)


@pytest.fixture(scope="module")
def readme(root):
  return (root / "README.md").read_text()


def test_the_library_example_runs_and_trains(readme, capsys, devices):
  devices(1)
  code, _ = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
  names = {}
  exec(code, names)
  result = names["result"]
  assert result.clean.mean() > 0.8 and result.robust.mean() > 0.4
  assert "value" in capsys.readouterr().out


def test_the_attack_example_runs_and_goes_on(
  readme, capsys, devices, tmp_path, monkeypatch
):
  devices(1)
  monkeypatch.chdir(tmp_path)
  _, code = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
  names = {}
  exec(code.replace("(32, 8", "(16, 8"), names)
  assert "pass gradients" in capsys.readouterr().out
  assert list((tmp_path / "runs" / "aa").glob("apgd_ce-*.npz"))


def test_the_example_of_sizes_runs(root, capsys, tmp_path, monkeypatch):
  text = (root / "docs" / "backbones.md").read_text()
  monkeypatch.chdir(tmp_path)
  code, _ = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
  exec(code, {})
  sizes = "{'patch': 4, 'width': 64, 'depth': 2, 'heads': 2}"
  assert f"vit {sizes}" in capsys.readouterr().out


@pytest.mark.slow
def test_the_example_of_weights_runs(root, capsys, tmp_path, monkeypatch):
  text = (root / "docs" / "backbones.md").read_text()
  monkeypatch.chdir(tmp_path)
  _, code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
  names = {}
  exec(code, names)
  said = capsys.readouterr().out
  assert "('head.bias', 'head.weight') ('pos_embed',)" in said
  assert "(2, 192) (2, 101, 192)" in said
  assert names["logits"].shape == (2, 100)


def test_the_example_of_another_architecture_runs(
  root, capsys, devices, tmp_path, monkeypatch
):
  devices(1)
  text = (root / "docs" / "backbones.md").read_text()
  monkeypatch.chdir(tmp_path)
  (code,) = re.findall(r"```\n(import.*?)```", text, re.DOTALL)
  names = {}
  exec(code, names)
  assert names["result"].clean.all() and not names["result"].robust.all()
  assert "robust" in capsys.readouterr().out


def test_the_table_of_models_names_all(root):
  text = (root / "docs" / "backbones.md").read_text()
  table = text.split("## Models and formats")[1].split("Wrappers")[0]
  patterns = [
    re.sub(r"{(.*?)}", lambda m: f"({m[1].replace(',', '|')})", cell)
    for cell in re.findall(r"`([^`]+)`", table)
  ]
  for name in models.MODELS:
    known = any(re.fullmatch(pattern, name) for pattern in patterns)
    assert known or name.startswith("glyph"), name
  for format in convert.FORMATS:
    assert re.search(rf"\b{format}\b", table), format


def test_what_it_says_of_the_example_holds(readme):
  assert len(re.findall(r"^python -m roli_jax\.main", readme, re.M)) == 28
  for config in re.findall(r"--config=configs/(\w+)\.py", readme):
    assert config in CONFIGS
  for config, text in re.findall(
    r"configs/((?:cifar_)?roli)\.py:(\S+)", readme
  ):
    importlib.import_module(f"configs.{config}").get_config(text)
  for table in re.findall(r":table=(\w+)", readme):
    assert table in glyphs_roli.TABLES
  for mode in re.findall(r"--mode=(\w+)", readme):
    assert mode in main.MODES


def test_every_module_stands_on_the_map(readme, root):
  block = readme.split("## The map")[1].split("```")[1]
  named = set(re.findall(r"(\w+)(?:\.py|/)", block))
  modules = {path.stem for path in (root / "roli_jax").iterdir()}
  small = {
    "keys", "trees", "specs", "types", "statistics", "sharding", "progress",
    "distributed",
  }  # fmt: skip
  hidden = {"__init__", "__pycache__", "weights"}
  assert modules - small - hidden <= named


def test_the_readme_names_files_that_are_there(readme, root):
  for name in re.findall(r"\]\((\S+?)\)", readme):
    assert (root / name).is_file(), name


def test_an_interval_says_what_it_is(root):
  paths = [root / "README.md", *(root / "docs").glob("*.md")]
  paths += [*(root / "colabs").glob("*.ipynb")]
  paths += [*(root / "roli_jax").rglob("*.py")]
  for path in paths:
    text = re.sub(r'(\s|"|\\n|,)+', " ", path.read_text())
    kinds = set(re.findall(r"95% (\S* ?)interval", text))
    assert kinds <= {"Student ", "Wilson "}, (path.name, kinds)


def test_recipes_name_the_weights_they_need():
  for name, weights in roli.WEIGHTS.items():
    config = cifar_roli.get_config(f"backbone={name}")
    assert (config.backbone.name, config.backbone.weights) == (name, weights)
    if name != "tiny32":  # which ships
      checkpoint = registry.named(weights)
      assert checkpoint.model == name and not checkpoint.why_not()
  assert cifar_roli.get_config().backbone.name == "swin_b"
  assert np.isclose(8 / 255, eval(config.threat.eps))
