"""Imports point down the floors; what is heavy loads where it is used."""

import ast
import graphlib
import pathlib
import subprocess
import sys

import pytest

# A room may import any that stands before it, none after it.
FLOORS = (
  ("trees", "types", "keys", "specs", "projections", "threat", "sharding",
   "distributed", "progress", "statistics", "configs"),
  ("files", "models", "data", "losses", "attacks", "optim", "corruptions"),
  ("convert", "peft", "clip", "objectives", "ensembles", "state", "step"),
  ("evaluate", "results"),
  ("experiment", "plan", "bench", "sweep"),
  ("train", "main"),
)  # fmt: skip
ROOMS = [room for floor in FLOORS for room in floor]

# What the core may import at the top of a module.
CORE = {
  "absl", "flax", "jax", "jaxtyping", "numpy", "optax", "orbax",
  "roli_jax", *sys.stdlib_module_names,
}  # fmt: skip


def _modules(root):
  for path in sorted((root / "roli_jax").rglob("*.py")):
    yield path, path.relative_to(root / "roli_jax").parts[0].removesuffix(".py")


def _imports(nodes):
  """Dotted names: of modules, or of what is imported from them."""
  for node in nodes:
    if isinstance(node, ast.ImportFrom):
      yield from (f"{node.module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)


def _of(path):
  return ast.walk(ast.parse(path.read_text()))


def test_a_room_imports_none_that_stands_after_it(root):
  wrong = []
  for path, room in _modules(root):
    if room == "__init__":
      continue
    for name in _imports(_of(path)):
      package, _, rest = name.partition(".")
      other = rest.split(".")[0]
      if package != "roli_jax" or other in ("", room):
        continue
      if ROOMS.index(other) > ROOMS.index(room):
        wrong.append(f"{path.name} imports {other}")
  assert not wrong


def test_no_modules_import_each_other(root):
  names = {}
  for path, _ in _modules(root):
    parts = path.relative_to(root).with_suffix("").parts
    names[".".join(parts).removesuffix(".__init__")] = path
  graph = {
    name: {
      found
      for imported in _imports(_of(path))
      for found in (imported, imported.rpartition(".")[0])
      # A room's own `__init__` brings its modules together.
      if found in names and found not in (name, "roli_jax")
      and not name.startswith(f"{found}.")
    }
    for name, path in names.items()
  }  # fmt: skip
  graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_the_root_has_rooms_and_fifteen_modules(root):
  found = {room for _, room in _modules(root)} - {"__init__"}
  assert found == {*ROOMS}
  files = list((root / "roli_jax").glob("*.py"))
  assert len(files) - 1 <= 15


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
      assert name.startswith(("ml_collections", "roli_jax.configs")), path


@pytest.mark.parametrize(
  "line, absent",
  [
    ("import roli_jax", "jax"),
    ("from roli_jax import main; main.run(['--help'])", "numpy"),
    ("from roli_jax import main; main.run(['--help'])", "ml_collections"),
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
    "matplotlib", "scipy", "PIL", "safetensors", "pyarrow", "datasets",
    "huggingface_hub", "tensorboardX", "wandb", "plotly", "ray", "submitit",
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
  if name in {sorted({*ROOMS} - {"bench"})!r}:
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
