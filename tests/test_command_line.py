"""Words to commands, and whole commands in this process."""

import shutil
import subprocess
import sys

import pytest
from absl import flags

from roli_jax import main
from roli_jax.experiment import command_line
from tests import cli

COPY = """
from ml_collections import ConfigDict

from roli_jax.configs import common


def get_config(text=""):
  arg = common.parse_arg(text, name="pgd")
  attack = {"name": arg.name, "num_steps": 7, "random_start": True, "eot": 1}
  return ConfigDict({"seed": 0, "eval_attack": attack, "sizes": (1, 2)})
"""


@pytest.fixture
def mine(tmp_path):
  """A user's own config."""
  file = tmp_path / "mine.py"
  file.write_text(COPY)
  return str(file)


def config(*words):
  return command_line.parse(words).config


@pytest.mark.parametrize("name", command_line.shipped())
def test_a_config_that_ships_goes_by_name_from_anywhere(
  name, root, tmp_path, monkeypatch
):
  by_path = config(f"--config={root}/configs/{name}.py")
  monkeypatch.chdir(tmp_path)
  path = list(sys.path)
  assert config(f"--config={name}") == by_path
  shutil.copy(root / "configs" / f"{name}.py", tmp_path / "copy.py")
  assert config("--config=copy.py") == by_path
  assert sys.path == path and "roli_jax_config" not in sys.modules


def test_what_ships_are_configs(root):
  files = {file.stem for file in (root / "configs").glob("*.py")}
  assert command_line.shipped().keys() == files - {"common"}


def test_a_config_imports_its_neighbours(mine, tmp_path):
  text = "from .mine import get_config as mine\n\n\ndef get_config():\n"
  (tmp_path / "b.py").write_text(f"{text}  return mine('name=fgsm')\n")
  got = config(f"--config={tmp_path / 'b.py'}")
  assert got["eval_attack"]["name"] == "fgsm"
  (tmp_path / "mine.py").write_text(COPY.replace("arg.name", "'square'"))
  got = config(f"--config={tmp_path / 'b.py'}")
  assert got["eval_attack"]["name"] == "square"


@pytest.mark.parametrize(
  "text, message",
  [
    ("def get_config(:\n", "SyntaxError"),
    ("import no_such_module\n", ":1: ModuleNotFoundError"),
    ("def get_config():\n  return undefined\n", ":2: NameError"),
    ("def get_config():\n  return {}['lr']\n", ":2: KeyError: 'lr'"),
    ("def get_config():\n  pass\n", "returns None"),
    ("def config():\n  return {}\n", "get_config"),
    ("def get_config():\n  raise ValueError('no lr')\n", "no lr"),
  ],
)
def test_what_a_config_file_raises_is_its_users(
  text, message, tmp_path, capsys, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "mine.py").write_text(text)
  assert main.run(["--config=mine.py"]) == 2
  said = capsys.readouterr().err
  assert message in said and len(said.splitlines()) <= 6
  assert "has no field" not in said


@pytest.mark.parametrize(
  "word, message",
  [
    ("--config=glyphs_rol", "did you mean 'glyphs_roli'"),
    ("--config=common", "unknown config 'common'"),
    ("--config=bench.py", "--config=bench ships with roli_jax"),
    ("--config=nowhere/mine.py", "there is no config at nowhere/mine.py"),
    ("--config=bench:x=1", "TypeError"),
  ],
)
def test_a_config_that_is_not_there(word, message, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match=message):
    command_line.parse([word])


@pytest.mark.parametrize(
  "words, field, value",
  [
    (["--config.seed=3"], "seed", 3),
    (["--config.seed", "3"], "seed", 3),
    (["-config.seed=3", "--config.seed=4"], "seed", 4),
    (["--config.seed", "-1", "--mode=plan"], "seed", -1),
    (["--config.sizes=(3,)"], "sizes", (3,)),
    (["--config.eval_attack=fgsm"], "eval_attack.name", "fgsm"),
    (["--config.eval_attack", "fgsm"], "eval_attack.name", "fgsm"),
    (["--config.attack=fgsm", "--mode=evaluate"], "eval_attack.name", "fgsm"),
    (
      ["--noconfig.eval_attack.random_start"],
      "eval_attack.random_start",
      False,
    ),
  ],
)
def test_fields_stand_anywhere(words, field, value, mine):
  for given in ([*words, f"--config={mine}"], ["--config", mine, *words]):
    got = config(*given)
    for key in field.split("."):
      got = got[key]
    assert got == value


@pytest.mark.parametrize(
  "arg, words, steps, start",
  [
    ("pgd", [], 7, True),
    ("pgd", ["=pgd"], 7, True),
    ("pgd", ["=apgd_ce"], None, None),
    ("pgd", ["=apgd_ce", ".num_steps=7"], 7, None),
    ("pgd", [".num_steps=7", "=apgd_ce"], 7, None),
    ("pgd", [".num_steps=7", ".name=apgd_ce"], 7, None),
    ("apgd_ce", ["=apgd_ce"], 7, True),
    ("apgd_ce", ["=pgd"], None, None),
  ],
)
def test_another_attack_keeps_none_of_the_configs_settings(
  arg, words, steps, start, mine
):
  """It depends on which attack is named, not on whether one is."""
  fields = [f"--config.eval_attack{word}" for word in words]
  got = config(f"--config={mine}:name={arg}", *fields)["eval_attack"]
  assert (got["num_steps"], got["random_start"]) == (steps, start)


@pytest.mark.parametrize(
  "words, path",
  [
    (["--config=glyphs_roli"], "runs/glyphs_roli"),
    ([f"{cli.GLYPHS}:method=full,init=roli"],
     "runs/glyphs_roli-method=full-init=roli"),
    (["--config=glyphs_roli:method=full|lora", "--mode=sweep"],
     "runs/sweep-glyphs_roli-method=full_lora"),
    (["--config=glyphs_roli", "--workdir", "x"], "x"),
  ],
)  # fmt: skip
def test_the_workdir_is_named_after_the_config(words, path, root, monkeypatch):
  monkeypatch.chdir(root)
  assert str(command_line.parse(words).workdir) == path


def test_runs_leave_nothing_behind(mine, tmp_path, capsys, monkeypatch):
  """Neither flags nor words of one run are the next one's."""
  monkeypatch.setattr(sys, "argv", ["roli", "--config=nonsense"])
  known = set(flags.FLAGS)
  assert main.run(["--help", f"--config={mine}", "--config.seed=3"]) == 0
  assert "seed: 3" in capsys.readouterr().out
  assert main.run(["--mode=report", f"--workdir={tmp_path}"]) == 2
  assert "config.json" in capsys.readouterr().err
  assert main.run(["--help", f"--config={mine}"]) == 0
  assert "seed: 0" in capsys.readouterr().out
  assert set(flags.FLAGS) == known and sys.argv[1:] == ["--config=nonsense"]


def test_a_plan_is_made_in_a_process_that_has_computed(tmp_path, capsys):
  for i, method in enumerate(("linear", "lora")):
    words = [f"--config=glyphs_roli:method={method}", "--mode=plan"]
    assert main.run([*words, f"--workdir={tmp_path}/{i}"]) == 0
    assert f"{tmp_path}/{i}" in capsys.readouterr().out.replace("\n", "")
    assert (tmp_path / str(i) / "plan.json").is_file()


@pytest.mark.slow
def test_a_whole_run_and_what_follows_it(tmp_path, capsys):
  where = f"--workdir={tmp_path / 'run'}"
  train = ("--config=glyphs_roli:method=linear", *cli.TINY, where)
  few = ("--config.attack=fgsm", "--config.num_images=8")
  assert main.run(train) == 0
  assert main.run(["--mode=evaluate", where, *few]) == 0
  assert "FGSM" in capsys.readouterr().out
  assert main.run(train) == 0
  assert main.run([*train, "--config.seed=1"]) == 2
  assert "seed: 0 -> 1" in capsys.readouterr().err


def test_an_interruption_is_no_error(monkeypatch, capsys):
  def interrupted(_):
    raise KeyboardInterrupt

  monkeypatch.setattr(main, "_run_one", interrupted)
  assert main.run(["--config=glyphs_roli"]) == 2
  assert "goes on where it was" in capsys.readouterr().err


def test_help_is_there_at_once():
  code = (
    "import sys; from roli_jax import main; main.run(['--help']);"
    "sys.exit(bool({'jax', 'numpy', 'ml_collections'} & sys.modules.keys()))"
  )
  done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
  assert done.returncode == 0
