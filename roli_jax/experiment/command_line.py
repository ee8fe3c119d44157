"""What the words of a command line stand for: a mode, a workdir, a config.

Nothing outlives a call of `parse`: flags are absl's and ml_collections', but
values of their own, and `sys.argv` and `sys.path` are left alone.
"""

import dataclasses
import importlib.util
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

MODES = (
  "train", "evaluate", "report", "plan", "convert", "bench", "sweep",
)  # fmt: skip

_ATTACKS = ("attack", "val_attack", "eval_attack")
_SHORT = re.compile(rf"(--?config\.)({'|'.join(_ATTACKS)})(=.*)?", re.DOTALL)
_FIELD = re.compile(r"--?(no)?config\.")


@dataclasses.dataclass(frozen=True)
class Command:
  """A command line, understood.

  Attributes:
    mode: one of `MODES`.
    workdir: the run's directory, given or named after the config.
    config: the resolved config, as nested dicts; {} of a sweep, and where help
      was asked for without one.
    swept: of a sweep the words that its cells' configs come from, `--config=`
      first; otherwise empty.
    flags: the flags besides: `help`, `sweep_print`, `coordinator`,
      `num_processes`, `process`.
  """

  mode: str
  workdir: pathlib.Path
  config: dict[str, Any]
  swept: tuple[str, ...]
  flags: flags.FlagValues


def parse(words: Sequence[str]) -> Command:
  """Understands the words that follow the program's name.

  Raises:
    ValueError: a user's mistake, with a message for them: an unknown flag,
      field or config, a value of another type, whatever a config file raises.
  """
  try:
    return _parse(words)
  except Exception as error:  # absl and ml_collections have kinds of their own
    raise ValueError(_said(error)) from error


def load(source: str) -> Any:
  """The `ConfigDict` of a config file.

  The file is run as it is; `from . import x` in it imports a file beside it.

  Args:
    source: `NAME` of a config that ships with the package, or `FILE.py`; after
      a colon, what its `get_config` takes, `key=value,...`.

  Raises:
    ValueError: there is none, it returns no config, or it raises an error.
  """
  from ml_collections import ConfigDict

  name, colon, arg = source.partition(":")
  file = _find(name).absolute()
  try:
    config = _get_config(file, *([arg] if colon else []))
  except ValueError:
    raise
  except Exception as error:
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f":{f.lineno}" for f in frames if f.filename == str(file)]
    raise ValueError(
      f"{file}{''.join(lines[-1:])}: {type(error).__name__}: {error}"
    ) from error
  if not isinstance(config, ConfigDict | dict):
    raise ValueError(f"get_config of {file} returns {config!r}, no ConfigDict")
  return config if isinstance(config, ConfigDict) else ConfigDict(config)


def shipped() -> dict[str, pathlib.Path]:
  """The configs that ship with the package, by name."""
  from roli_jax import configs

  folder = pathlib.Path(next(iter(configs.__path__)))
  return {
    file.stem: file
    for file in sorted(folder.glob("*.py"))
    if "\ndef get_config(" in file.read_text()
  }


def _find(name: str) -> pathlib.Path:
  from roli_jax import specs

  if "/" not in name and os.sep not in name and not name.endswith(".py"):
    return specs.lookup(shipped(), name, "config")
  file = pathlib.Path(name)
  if not file.is_file():
    ours = file.stem in shipped()
    hint = f"; --config={file.stem} ships with roli_jax" if ours else ""
    raise ValueError(f"there is no config at {file}{hint}")
  return file


def _get_config(file, *arg):
  """Runs the file as a package, so that it may import its neighbours."""
  name = "roli_jax_config"
  spec: Any = importlib.util.spec_from_file_location(
    name, file, submodule_search_locations=[str(file.parent)]
  )
  module = importlib.util.module_from_spec(spec)
  sys.modules[name] = module
  try:
    spec.loader.exec_module(module)
    return module.get_config(*arg)
  finally:  # the next file is another
    for key in [k for k in sys.modules if k.split(".")[0] == name]:
      del sys.modules[key]


def _flags(**strings: str) -> flags.FlagValues:
  """All flags but a config's fields, and strings by name."""
  values = flags.FlagValues()
  told: dict[str, Any] = {"flag_values": values}
  flags.DEFINE_enum("mode", "train", MODES, "What to do.", **told)
  flags.DEFINE_string("workdir", "", "The run's directory.", **told)
  flags.DEFINE_bool("sweep_print", False, "Prints a sweep's commands.", **told)
  flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0.", **told)
  flags.DEFINE_integer("num_processes", 0, "How many a run has.", **told)
  flags.DEFINE_integer("process", -1, "Which of them this is, from 0.", **told)
  flags.DEFINE_bool("help", False, "Explains.", short_name="h", **told)
  flags.DEFINE_alias("helpshort", "help", **told)
  for name, said in strings.items():
    flags.DEFINE_string(name, "", said, **told)
  return values


def _parse(words):
  told = _flags(config="NAME or FILE.py, then :key=value,...")
  told.set_gnu_getopt()  # fields, unknown as yet, stand anywhere
  _, *rest = told(["roli", *words], known_only=True)
  rest = [_lengthen(word, told.mode) for word in rest]
  config, swept = {}, ()
  if told.help and not told.config:
    pass
  elif told.mode == "sweep":
    fields = [word for word in rest if _FIELD.match(word)]
    _parse_all(_flags(), [word for word in rest if word not in fields])
    _check_given(told.config)
    swept = tuple(f"--{word.lstrip('-')}" for word in fields)
    swept = (f"--config={told.config}", *swept)
  else:
    config = _overridden(_base(told), rest)
  return Command(told.mode, _workdir(told), config, swept, told)


def _parse_all(values, words):
  _, *rest = values(["roli", *words])
  if rest:
    raise ValueError(f"unexpected arguments: {' '.join(rest)}")


def _check_given(config):
  if not config:
    raise ValueError("--config=NAME or --config=FILE.py is missing; see --help")


def _lengthen(word: str, mode: str) -> str:
  """`--config.attack=pgd` in full."""
  match = _SHORT.fullmatch(word)
  if not match:
    return word
  section = match[2]
  if mode == "evaluate" and section == "attack":
    section = "eval_attack"
  return f"{match[1]}{section}.name{match[3] or ''}"


def _workdir(told):
  """--workdir, or runs/<config>-<key=value>-... after the config's name."""
  if told.workdir:
    return pathlib.Path(told.workdir)
  file, _, arg = told.config.partition(":")
  name = "-".join([pathlib.Path(file).stem, *filter(None, arg.split(","))])
  if told.mode == "sweep":
    name = "sweep-" + re.sub(r"[^\w.=,-]+", "_", name)
  return pathlib.Path("runs", name)


def _base(told):
  """The config before any field is overridden: a file's, or the run's own."""
  if told.config:
    return load(told.config)
  if told.mode not in ("evaluate", "report"):
    _check_given(told.config)
  if not told.workdir:
    raise ValueError(f"--mode={told.mode} needs --workdir=RUN, or a --config")
  from roli_jax.files import workdir

  return _overridable(workdir.read_config(pathlib.Path(told.workdir)))


def _overridden(config, words):
  """The config as nested dicts, after the words that name its fields."""
  from ml_collections import config_flags

  values: Any = _flags()
  before = config.to_dict()
  config_flags.DEFINE_config_dict(
    "config", config, flag_values=values, sys_argv=["roli", *words]
  )
  _parse_all(values, words)
  given = values["config"].override_values
  return _with_own_defaults(values.config.to_dict(), before, given)


def _with_own_defaults(
  config: dict[str, Any], before: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, Any]:
  """Another attack than the config's keeps none of its settings.

  The 20 steps of PGD would make APGD another attack. Its own defaults, None,
  hold but for what is overridden.

  Args:
    config: after all overrides.
    before: the same without them.
    given: the overrides, by path.
  """
  for section in config.keys() & set(_ATTACKS):
    if config[section]["name"] != before[section]["name"]:
      for field in config[section].keys() - {"name"}:
        if f"{section}.{field}" not in given:
          config[section][field] = None
  return config


def _overridable(config: Any) -> Any:
  """As ml_collections wants it: a null is an unset number."""
  from ml_collections import ConfigDict, config_dict

  if config is None:
    return config_dict.placeholder(float)
  if isinstance(config, dict):
    counts = {
      k: config_dict.placeholder(int)
      for k, v in config.items()
      if v is None and (k.startswith("num_") or k == "eot")
    }
    counts |= {
      k: config_dict.placeholder(tuple)
      for k, v in config.items()
      if v is None and k.endswith("_transforms")
    }
    rest = {k: _overridable(v) for k, v in config.items() if k not in counts}
    return ConfigDict({**rest, **counts})
  return config


def _said(error: Exception) -> str:
  """An error's message; a field that isn't there is told as such."""
  if isinstance(error, KeyError | AttributeError):
    said = str(error.args[0]).replace("\\n", " ")
    names = re.findall(r"\w+", said.replace("Did you mean", ""))
    meant = f"; did you mean {names[1]!r}?" if len(names) > 1 else ""
    return f"the config has no field {names[0]!r}{meant}"
  return str(error).strip() or type(error).__name__
