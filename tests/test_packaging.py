"""What is installed: bounds, extras and what a user without one is told."""

import json
import re
import shutil
import subprocess
import sys
import tomllib

import numpy as np
import pytest

from roli_jax import corruptions, data, main
from roli_jax.data import decode, glyphs, tfds
from roli_jax.results import page
from roli_jax.results.pictures import empty
from roli_jax.sweep.engines import ENGINES
from tests import cli, pictures

TEST_TOOLS = {
  "beartype", "hypothesis", "jaxtyping", "mypy", "playwright", "pytest",
  "pytest-xdist", "ruff", "zstandard",
}  # fmt: skip


@pytest.fixture(scope="module")
def project(root):
  with (root / "pyproject.toml").open("rb") as file:
    return tomllib.load(file)["project"]


def lines(file):
  text = re.sub(r"\s*#.*", "", file.read_text())
  return sorted(filter(None, text.splitlines()))


def names(requirements):
  return {re.match(r"[\w-]+", line)[0] for line in requirements}


def test_requirements_are_those_of_the_package(project, root):
  extras = project["optional-dependencies"]
  users = project["dependencies"] + extras["data"] + extras["plots"]
  assert lines(root / "requirements.txt") == sorted(users)
  tests = ["-r requirements.txt", *extras["test"][1:]]
  for name in ("docs", "hub", "notebooks", "track", "slurm", "ray"):
    tests += extras[name]
  assert lines(root / "requirements-test.txt") == sorted(tests)


def test_users_get_no_test_tools_and_no_accelerator(project):
  extras = project["optional-dependencies"]
  assert extras["all"] == ["roli_jax[data,hub,plots,notebooks,track,slurm,ray]"]
  assert extras["test"][0] == "roli_jax[all]"
  assert names(extras["test"][1:]) == TEST_TOOLS
  for name, requirements in extras.items():
    if name not in ("test", "all"):
      assert not names(requirements) & TEST_TOOLS
  for name in ("cuda12", "cuda13", "tpu"):
    assert extras[name] == [f"jax[{name}]"]


IMAGE = np.zeros((32, 32, 3), np.uint8)
letters = glyphs.letters.__wrapped__
jpeg = corruptions.CORRUPTIONS["jpeg_compression"]

# What is called with a folder of images where a package is not installed.
CALLS = {
  "digits": ("sklearn", "data", lambda _: data.build("digits", "train")),
  "letters": ("PIL", "data", lambda _: letters("val")),
  "fonts": ("matplotlib", "plots", lambda _: letters("val")),
  "folder": (
    "PIL",
    "data",
    lambda path: data.build({"name": "folder", "root": str(path)}, "train"),
  ),
  "cifar": (
    "tensorflow_datasets",
    "data",
    lambda path: tfds._read("cifar10", path, "test"),
  ),
  "picture": ("PIL", "data", lambda _: decode.from_array(IMAGE)),
  "corruption": (
    "PIL",
    "data",
    lambda _: jpeg(np.random.default_rng(0), IMAGE, 1),
  ),
  "plots": ("matplotlib", "plots", lambda _: empty(1, 1)),
  "page": ("plotly", "plots", lambda path: page.write(path, [])),
  "slurm": ("submitit", "slurm", lambda _: next(ENGINES["submitit"]([]))),
  "ray": ("ray", "ray", lambda _: next(ENGINES["ray"]([]))),
}


@pytest.mark.parametrize("call", CALLS)
def test_who_lacks_an_extra_is_told_its_name(call, tmp_path, monkeypatch):
  package, extra, function = CALLS[call]
  pictures.tree(tmp_path, train=1, val=1, test=1)
  monkeypatch.setitem(sys.modules, package, None)
  with pytest.raises((ModuleNotFoundError, ValueError)) as error:
    function(tmp_path)
  assert f"{package} is not installed" in str(error.value)
  assert f'pip install "roli_jax[{extra}]"' in str(error.value)


@pytest.mark.parametrize(
  "package", ["grain", "matplotlib", "plotly", "sklearn"]
)
def test_a_run_that_lacks_an_extra_does_not_begin(
  package, tmp_path, monkeypatch, capsys
):
  monkeypatch.setitem(sys.modules, package, None)
  assert (
    main.run(["--config=glyphs_roli", f"--workdir={tmp_path / 'run'}"]) == 2
  )
  said = capsys.readouterr().err
  assert f"{package} is not installed" in said and "roli_jax[" in said
  assert len(said.splitlines()) <= 6


@pytest.fixture(scope="module")
def installed(root, tmp_path_factory):
  """A directory that a wheel was installed into, without what it needs."""
  folder = tmp_path_factory.mktemp("wheel")
  leave = shutil.ignore_patterns(".*", "runs", "build", "*.egg-info")
  shutil.copytree(root, folder / "source", ignore=leave)
  pip = [sys.executable, "-m", "pip", "--quiet"]
  made = [*pip, "wheel", "--no-deps", "--wheel-dir", folder, folder / "source"]
  subprocess.run(made, check=True)
  (wheel,) = folder.glob("*.whl")
  to = ["--no-deps", "--target", folder / "installed"]
  subprocess.run([*pip, "install", *to, wheel], check=True)
  return folder / "installed"


@pytest.mark.slow
def test_a_wheel_has_configs_and_weights_and_nothing_else(installed, root):
  found = {
    str(path.relative_to(installed))
    for path in installed.rglob("*.*")
    if "dist-info" not in str(path) and "__pycache__" not in str(path)
  }
  stub = "roli_jax/configs/__init__.py"
  ours = {
    str(path.relative_to(root))
    for path in (root / "roli_jax").rglob("*.*")
    if path.suffix in (".csv", ".py", ".safetensors", ".html", ".css", ".js")
  }
  configs = {f"roli_jax/{p.relative_to(root)}" for p in root.glob("configs/*")}
  assert found == ours - {stub} | {c for c in configs if c.endswith(".py")}


@pytest.mark.slow
def test_a_wheel_runs_one_cell_where_there_is_no_checkout(installed, tmp_path):
  environment = {**cli.environment(), "PYTHONPATH": str(installed)}
  words = ("--config=glyphs_roli:method=full,init=roli", *cli.TINY)
  for command in ([installed / "bin" / "roli"], cli.command()):
    done = subprocess.run(
      [*command, *words], cwd=tmp_path, env=environment, text=True,
      capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
  (run,) = (tmp_path / "runs").glob("glyphs_roli*")
  assert (run / "report.md").is_file()
  config = json.loads((run / "config.json").read_text())
  assert config["commit"] is None
