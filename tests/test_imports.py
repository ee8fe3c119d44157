"""Imports point down the floors; what is heavy loads where it is used."""

import ast
import pathlib
import subprocess
import sys

import pytest

FLOORS = (
  ("trees", "keys", "specs", "types", "processes", "extras", "configs"),
  (
    "models", "losses", "projections", "threat", "optim", "data",
    "corruptions", "metrics", "sharding", "record", "checkpoint", "progress",
    "table", "workdir", "journal", "compat",
    "groups", "tabular", "tokenizer", "mixup",
  ),
  ("state", "attacks", "peft", "convert", "criteria", "ensembles"),
  ("tracing", "cost", "exchange", "zeroshot"),
  ("classifier",),
  ("pool", "checks"),
  ("ledger", "result"),
  ("engine",),
  ("evaluate", "step"),
  ("diagnosis",),
  ("parts",),
  ("measure", "adopt"),
  ("score",),
  ("combine", "comparison"),
  ("report",),
  ("train", "plots", "bench", "plan", "sweep", "guide", "command_line"),
  ("main",),
)  # fmt: skip

FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}

# Inside a floor, what rests on what.
WITHIN = {
  ("types", "trees"),
  ("keys", "types"),
  ("threat", "projections"),
  ("journal", "workdir"),
  ("data", "progress"),
  ("table", "compat"),
  ("peft", "convert"),
}

# What the core may import at the top of a module.
CORE = {
  "absl", "flax", "jax", "jaxtyping", "numpy", "optax", "orbax",
  "roli_jax", *sys.stdlib_module_names,
}  # fmt: skip


def _modules(root):
  for path in sorted((root / "roli_jax").rglob("*.py")):
    yield path, path.relative_to(root / "roli_jax").parts[0].removesuffix(".py")


def _imports(nodes):
  for node in nodes:
    if isinstance(node, ast.ImportFrom):
      names = [f"{node.module}.{alias.name}" for alias in node.names]
      yield from names if node.module == "roli_jax" else [node.module]
    elif isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)


def test_imports_point_down_the_floors(root):
  wrong = []
  for path, module in _modules(root):
    if module == "__init__":
      continue
    for name in _imports(ast.walk(ast.parse(path.read_text()))):
      package, _, rest = name.partition(".")
      target = rest.split(".")[0]
      if package != "roli_jax" or target in ("", module):
        continue
      lazy = module in ("report", "main")  # these import within functions
      below = FLOOR[target] < FLOOR[module] or (module, target) in WITHIN
      if not below and not (lazy and target == "plots"):
        wrong.append(f"{module} imports {target}")
  assert not wrong


def test_every_module_stands_on_a_floor(root):
  names = {module for _, module in _modules(root)} - {"__init__"}
  assert names <= FLOOR.keys()


def test_modules_import_the_core_alone_at_the_top(root):
  wrong = [
    f"{path.name}: {name}"
    for path, _ in _modules(root)
    for name in _imports(ast.parse(path.read_text()).body)
    if name.split(".")[0] not in CORE
  ]
  assert not wrong


def test_linen_stays_in_models_and_peft(root):
  for path, module in _modules(root):
    imported = set(_imports(ast.walk(ast.parse(path.read_text()))))
    uses = any(name.split(".")[0] == "flax" for name in imported)
    assert not uses or module in ("models", "peft"), path


def test_configs_import_nothing_of_ours_but_configs(root):
  for path in (root / "configs").glob("*.py"):
    for name in _imports(ast.walk(ast.parse(path.read_text()))):
      assert name in ("ml_collections", "roli_jax.configs"), path


@pytest.mark.parametrize(
  "line, absent",
  [
    ("import roli_jax", "jax"),
    ("from roli_jax import attacks, threat, evaluate", "flax"),
    ("from roli_jax import train", "ml_collections"),
    ("from roli_jax import report", "matplotlib"),
  ],
)
def test_what_is_heavy_is_not_imported(line, absent):
  code = f"import sys; {line}; sys.exit({absent!r} in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_core_imports_where_only_the_core_is_installed(root):
  hidden = (
    "grain", "ml_collections", "tensorflow_datasets", "jaxtyping", "sklearn",
    "matplotlib", "scipy", "PIL", "safetensors",
  )  # fmt: skip
  code = f"""
import importlib.abc, sys
class Hide(importlib.abc.MetaPathFinder):
  def find_spec(self, name, path=None, target=None):
    if name.split('.')[0] in {hidden!r}:
      raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Hide())
import roli_jax
for name in dir(roli_jax):
  if name in {sorted(FLOOR.keys() - {"bench", "plots"})!r}:
    getattr(roli_jax, name)
"""
  done = subprocess.run([sys.executable, "-c", code], cwd=root)
  assert done.returncode == 0


def test_an_unknown_submodule_lists_those_there_are():
  import roli_jax

  with pytest.raises(AttributeError, match="attacks"):
    _ = roli_jax.atacks
  assert "evaluate" in dir(roli_jax)
  assert pathlib.Path(roli_jax.attacks.__file__).is_file()
