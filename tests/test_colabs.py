"""The notebooks run from top to bottom, made small, and show what they say."""

import ast
import base64
import dataclasses
import importlib
import inspect
import io
import re

import jax
import nbclient
import nbformat
import numpy as np
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from PIL import Image

from roli_jax import convert, keys, models
from tests import cli, test_tfds

COLABS = sorted((cli.ROOT / "colabs").glob("*.ipynb"))
NAMES = [path.stem for path in COLABS]


def read(name):
  return nbformat.read(cli.ROOT / "colabs" / f"{name}.ipynb", as_version=4)


def cells_of(book):
  """The code cells' syntax, by id; what is IPython's becomes Python."""
  plain = TransformerManager().transform_cell
  return {
    cell.id: ast.parse(plain(cell.source))
    for cell in book.cells
    if cell.cell_type == "code"
  }


def parameters(book):
  """Names and values of the first code cell, which holds nothing else."""
  found = {}
  for line in next(iter(cells_of(book).values())).body:
    assert isinstance(line, ast.Assign), ast.unparse(line)
    (target,) = line.targets
    found[target.id] = ast.literal_eval(line.value)
  return found


def run(name, folder, **changed):
  """What each cell showed, by its id, with some parameters changed."""
  book = read(name)
  known = parameters(book)
  assert changed.keys() <= known.keys()
  (first,) = [
    c for c in book.cells if "parameters" in c.metadata.get("tags", ())
  ]
  lines = [f"{key} = {value!r}" for key, value in changed.items()]
  cell = nbformat.v4.new_code_cell("\n".join(lines))
  book.cells.insert(book.cells.index(first) + 1, cell)
  client = nbclient.NotebookClient(
    book, timeout=600, resources={"metadata": {"path": str(folder)}}
  )
  environment = cli.environment() | {
    "PYTHONPATH": str(cli.ROOT),
    "IPYTHONDIR": str(folder / "ipython"),
  }
  client.execute(env=environment)
  return {c.id: c.outputs for c in book.cells if c.cell_type == "code"}


def text(outputs):
  """All that was printed, or shown as Markdown or text."""
  found = []
  for output in outputs:
    shown = output.get("data", {})
    plain = output.get("text", shown.get("text/plain", ""))
    found.append(shown.get("text/markdown", plain))
  return "\n".join(found)


def is_picture(outputs):
  """Whether one PNG was shown on which something is drawn.

  Axes, their text and nothing in them are black on white, and little of it.
  """
  (png,) = [
    o.data["image/png"] for o in outputs if "image/png" in o.get("data", {})
  ]
  picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
  pixels = np.asarray(picture, np.int32)
  coloured = np.ptp(pixels, axis=2) > 40
  dark = pixels.max(2) < 200
  size = min(pixels.shape[:2])
  return size > 80 and (coloured.mean() > 2e-3 or dark.mean() > 0.2)


@pytest.mark.slow
def test_the_quickstart_compares_three_ways(tmp_path):
  shown = run(
    "roli_quickstart", tmp_path,
    SEEDS=1, TRAIN_SIZE=50, STEPS=1, RADII=("0.2",), ATTACK_STEPS=2,
  )  # fmt: skip
  table = text(shown["table"])
  for way in ("linear probe (RoLI)", "full RanLI", "full RoLI"):
    assert re.search(rf"\| robust \| {re.escape(way)} \|.* \d+\.\d \|", table)
  assert "| full RoLI − full RanLI, robust | robust |" in table
  assert re.search(r"\| 0\.2 \| \d+\.\d \| \d+\.\d \|", table)
  for cell in ("data", "bars", "curve", "examples"):
    assert is_picture(shown[cell]), cell
  assert (tmp_path / "runs" / "quickstart" / "report.md").is_file()


@pytest.fixture
def cifar(tmp_path):
  """A look-alike of CIFAR, and weights of a toy that takes colours."""
  test_tfds.prepare(tmp_path / "tfds", "cifar10")
  grey = models.create("glyph_vit_token", 5)
  model = dataclasses.replace(grey, mean=(0.5,) * 3, std=(0.5,) * 3)
  bundle = convert.Bundle(model, *jax.jit(model.init)(keys.root(0)))
  convert.save(bundle, tmp_path / "toy.safetensors")
  return {
    "DATA": "tfds",
    "CHECKPOINT": "toy.safetensors",
    "MODEL": "glyph_vit_token",
    "FORMAT": "",
  }


@pytest.mark.slow
def test_cifar_goes_from_a_file_of_weights_to_a_model(cifar, tmp_path):
  shown = run(
    "cifar_roli_tpu", tmp_path,
    **cifar, EPOCHS=2, BATCH_SIZE=16, TRAIN_ATTACK_STEPS=1,
    TEST_ATTACK_STEPS=2, NUM_IMAGES=8, CHECKS=False,
  )  # fmt: skip
  assert "| read back | bit for bit |" in text(shown["convert"])
  assert "| hours on tpu_v5e |" in text(shown["plan"])
  trained = text(shown["train"])
  for way in ("linear probe (RoLI)", "full RoLI"):
    assert re.search(rf"\| ares \| {re.escape(way)} \|.* \d+\.\d \|", trained)
  attacked = text(shown["attack"])
  assert re.search(r"\| AutoAttack linf 0\.03\d+ \| 8 \|", attacked)
  restored = text(shown["restore"])
  assert "glyph_vit_token full of ares-full-roli-n54-seed0" in restored
  for cell in ("training", "broken", "examples"):
    assert is_picture(shown[cell]), cell


def test_a_model_of_ones_own_is_attacked_and_judged(tmp_path):
  shown = run(
    "attack_your_model", tmp_path,
    TRAIN_STEPS=30, NUM_IMAGES=16, ATTACK_STEPS=5, ATTACK_QUERIES=50,
  )  # fmt: skip
  said = text(shown["attack"])
  clean, robust = (
    float(re.search(rf"{name}: (\d+\.\d)%", said)[1])
    for name in ("clean", "robust")
  )
  assert clean > 50 and robust < clean
  assert "'apgd_ce'" in said
  for cell in ("broken", "examples", "curve"):
    assert is_picture(shown[cell]), cell
  checks = text(shown["checks"])
  assert "| pass | gradient_is_right |" in checks
  assert "| info | worst_case |" in checks and "| fail |" not in checks


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_kept_without_what_it_showed(name):
  book = read(name)
  nbformat.validate(book)
  assert (book.nbformat, book.nbformat_minor) == (4, 5)
  assert book.metadata.kernelspec.name == "python3"
  assert book.metadata.keys() == {"kernelspec", "language_info"}
  assert book.metadata.language_info == {"name": "python"}
  for cell in book.cells:
    assert re.fullmatch(r"[a-z-]+", cell.id), cell.id
    assert cell.metadata.keys() <= {"tags"}
    if cell.cell_type == "code":
      assert cell.outputs == [] and cell.execution_count is None


@pytest.mark.parametrize("name", NAMES)
def test_parameters_come_first_each_with_its_comment_and_are_used(name):
  book = read(name)
  first, install = [c for c in book.cells if c.cell_type == "code"][:2]
  assert first.metadata.tags == ["parameters"] and install.id == "install"
  for block in first.source.split("\n\n"):
    *comment, assignment = block.splitlines()
    assert comment and all(line.startswith("# ") for line in comment), block
    assert re.match(r"[A-Z_]+ = ", assignment), block
  rest = "".join(c.source for c in book.cells[2:] if c.cell_type == "code")
  for parameter in parameters(book):
    assert re.search(rf"\b{parameter}\b", rest), parameter


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_defines_nothing_but_the_users_model(name):
  for cell, tree in cells_of(read(name)).items():
    if (name, cell) != ("attack_your_model", "model"):
      for node in ast.walk(tree):
        assert not isinstance(node, ast.FunctionDef | ast.ClassDef), cell


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_uses_public_names_that_say_what_they_are(name):
  trees = cells_of(read(name))
  nodes = [node for tree in trees.values() for node in ast.walk(tree)]
  modules = {}
  for node in nodes:
    if isinstance(node, ast.ImportFrom) and node.module.startswith("roli_jax"):
      for alias in node.names:
        module = importlib.import_module(f"{node.module}.{alias.name}")
        modules[alias.asname or alias.name] = module
  assert modules
  used = set()
  for node in nodes:
    if isinstance(node, ast.Attribute):
      assert not node.attr.startswith("_"), node.attr
      if isinstance(node.value, ast.Name) and node.value.id in modules:
        used.add(node.value.id)
        module = modules[node.value.id]
        found = getattr(module, node.attr)
        if not module.__name__.startswith("roli_jax.configs"):
          assert inspect.getdoc(found), f"{module.__name__}.{node.attr}"
  assert used == modules.keys()


@pytest.mark.parametrize("name", NAMES)
def test_what_a_notebook_says_stands_elsewhere_too(name):
  said = "\n".join(c.source for c in read(name).cells)
  for file in re.findall(r"(?:docs|colabs|configs)/\w+\.\w+", said):
    assert (cli.ROOT / file).is_file(), file
  results = " ".join((cli.ROOT / "docs" / "results.md").read_text().split())
  for number in re.findall(r"[+-]\d+\.\d \[.*?\]", " ".join(said.split())):
    assert number in results, number
