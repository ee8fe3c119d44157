"""What README.md and the pages of docs/ print works as printed."""

import pathlib
import re
import shlex

import numpy as np
import pytest

from configs import cifar_roli, roli
from roli_jax import convert, models
from roli_jax.convert import registry
from roli_jax.experiment import command_line
from roli_jax.sweep import runs

ROOT = pathlib.Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def _commands():
  """Each command that a page prints, with the page: words after the program."""
  for page in PAGES:
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.M | re.S)
    text = "".join(blocks).replace("\\\n", " ")
    for line in re.findall(
      r"^ *(?:python -m roli_jax\.main|roli) (.*)", text, re.M
    ):
      yield page.stem, *shlex.split(line, comments=True)


COMMANDS = list(_commands())


def _python(page):
  return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def test_the_library_example_runs_and_trains(root, capsys, devices):
  devices(1)
  code, _ = _python(root / "docs" / "library.md")
  names = {}
  exec(code, names)
  result = names["result"]
  assert result.clean.mean() > 0.8 and result.robust.mean() > 0.4
  assert "value" in capsys.readouterr().out


def test_your_own_model_is_attacked_in_ten_lines(root, capsys, devices):
  devices(1)
  (code,) = _python(root / "README.md")
  assert len(code.splitlines()) <= 10
  exec(code.replace("(32, 8", "(16, 8"), {})
  assert "'apgd_ce'" in capsys.readouterr().out


@pytest.mark.slow
def test_the_attack_example_runs_and_goes_on(
  root, capsys, devices, tmp_path, monkeypatch
):
  devices(1)
  monkeypatch.chdir(tmp_path)
  _, code = _python(root / "docs" / "library.md")
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


def test_commands_stand_on_all_pages_that_print_them():
  assert len(COMMANDS) >= 60
  pages = {page for page, *_ in COMMANDS}
  assert {"README", "first_run", "recipes", "install", "zoo"} <= pages


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_printed_command_is_understood(words, root, monkeypatch):
  monkeypatch.chdir(root)
  # What the reader fills in, or the shell.
  given = [
    re.sub(r"\bmine\.py", "configs/glyphs_roli.py", word).replace(
      "$table", "default"
    )
    for word in words[1:]
    if word != "$MUON"
  ]
  if "..." in given:
    return
  if not any(word.startswith("--config=") for word in given):
    given.append("--config=glyphs_roli")  # in place of the run's own
  command = command_line.parse(given)
  assert command.mode in command_line.MODES
  if command.mode == "sweep":
    cells = runs.swept_runs(
      command.swept, lambda words: command_line.parse(words).config
    )
    assert len(list(cells)) > 1


def test_every_module_stands_on_the_map(root):
  page = (root / "docs" / "architecture.md").read_text()
  block = page.split("## The map")[1].split("```")[1]
  named = set(re.findall(r"(\w+)(?:\.py|/)", block))
  modules = {path.stem for path in (root / "roli_jax").iterdir()}
  small = {
    "keys", "trees", "specs", "types", "statistics", "sharding", "progress",
    "distributed",
  }  # fmt: skip
  hidden = {"__init__", "__pycache__", "weights"}
  assert modules - small - hidden <= named


def test_links_arrive_in_a_checkout():
  for page in PAGES:
    for name in re.findall(r"\]\((?!http)([^\s)#]+)", page.read_text()):
      assert (page.parent / name).is_file(), (page.name, name)


def test_an_interval_says_what_it_is(root):
  paths = [*PAGES, *(root / "colabs").glob("*.ipynb")]
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
