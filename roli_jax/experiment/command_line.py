"""From the words of a command line to a mode, a workdir and a config.

`parse` changes no global state: it reads flags with absl and ml_collections,
but into values of its own, and leaves `sys.argv` and `sys.path` alone.
"""

import dataclasses
import importlib.util
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

if TYPE_CHECKING:
  from ml_collections import ConfigDict
else:
  ConfigDict = Any  # ml_collections is loaded where a config is read

MODES = (
  "train", "evaluate", "report", "plan", "prepare", "convert", "publish", "zoo",
  "bench", "sweep",
)  # fmt: skip

# Keys of `sweep.engines.ENGINES`.
_ENGINES = ("here", "submitit", "ray")
_ATTACKS = ("attack", "val_attack", "eval_attack")
_SHORT = re.compile(rf"(--?config\.)({'|'.join(_ATTACKS)})(=.*)?", re.DOTALL)
_FIELD = re.compile(r"--?(no)?config\.")


@dataclasses.dataclass(frozen=True)
class Command:
  """A parsed command line.

  Attributes:
    mode: one of `MODES`.
    workdir: the run's directory, given or named after the config.
    config: the resolved config, as nested dicts; {} in a sweep, and for --help
      and in the mode zoo without a config.
    swept: in a sweep, the words that its cells' configs come from, `--config=`
      first; otherwise ().
    flags: the other flags: `help`, `sweep_print`, `sweep_on`, `coordinator`,
      `num_processes`, `process`.
  """

  mode: str
  workdir: pathlib.Path
  config: dict[str, Any]
  swept: tuple[str, ...]
  flags: flags.FlagValues


def parse(words: Sequence[str]) -> Command:
  """Parses the words that follow the program's name.

  Raises:
    ValueError: a user's mistake, with a message for them: an unknown flag,
      field or config, a value of another type, whatever a config file raises.
  """
  try:
    return _parse(words)
  except Exception as error:  # absl and ml_collections have kinds of their own
    raise ValueError(_message(error)) from error


def load(source: str) -> ConfigDict:
  """Returns the config that a config file makes.

  Runs the file; `from . import x` in it imports a file beside it.

  Args:
    source: `NAME` of a config that ships with the package, or `FILE.py`; after
      a colon, the argument of its `get_config`, `key=value,...`.

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
  """Returns the files of the configs that ship with the package, by name."""
  from roli_jax import configs

  folder = pathlib.Path(next(iter(configs.__path__)))
  return {
    file.stem: file
    for file in sorted(folder.glob("*.py"))
    if "\ndef get_config(" in file.read_text()
  }


def _find(name: str) -> pathlib.Path:
  """Returns the file of a shipped config, or of a path, which must exist."""
  from roli_jax import specs

  if "/" not in name and os.sep not in name and not name.endswith(".py"):
    return specs.lookup(shipped(), name, "config")
  file = pathlib.Path(name)
  if not file.is_file():
    ours = file.stem in shipped()
    hint = f"; --config={file.stem} ships with roli_jax" if ours else ""
    raise ValueError(f"there is no config at {file}{hint}")
  return file


def _get_config(file: pathlib.Path, *arg: str) -> Any:
  """Runs the file as a package, so that it may import its neighbours.

  Returns whatever its `get_config` returns.
  """
  name = "roli_jax_config"
  spec: Any = importlib.util.spec_from_file_location(
    name, file, submodule_search_locations=[str(file.parent)]
  )
  module = importlib.util.module_from_spec(spec)
  sys.modules[name] = module
  try:
    spec.loader.exec_module(module)
    return module.get_config(*arg)
  finally:  # or the next file's imports would find this one's neighbours
    for key in [k for k in sys.modules if k.split(".")[0] == name]:
      del sys.modules[key]


def _flags() -> flags.FlagValues:
  """Defines all flags but `config` and a config's fields."""
  values = flags.FlagValues()
  into: dict[str, Any] = {"flag_values": values}
  flags.DEFINE_enum("mode", "train", MODES, "What to do.", **into)
  flags.DEFINE_string("workdir", "", "The run's directory.", **into)
  flags.DEFINE_bool("sweep_print", False, "Prints a sweep's commands.", **into)
  flags.DEFINE_enum(
    "sweep_on", "here", _ENGINES, "Where a sweep's cells run.", **into
  )
  flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0.", **into)
  flags.DEFINE_integer("num_processes", 0, "How many a run has.", **into)
  flags.DEFINE_integer("process", -1, "Which of them this is, from 0.", **into)
  flags.DEFINE_bool("help", False, "Explains.", short_name="h", **into)
  flags.DEFINE_alias("helpshort", "help", **into)
  return values


def _parse(words: Sequence[str]) -> Command:
  given = _flags()
  flags.DEFINE_string(
    "config", "", "NAME or FILE.py:key=value,...", flag_values=given
  )
  given.set_gnu_getopt()  # fields, unknown as yet, stand anywhere
  _, *rest = given(["roli", *words], known_only=True)
  rest = [_lengthen(word, given.mode) for word in rest]
  config: dict[str, Any] = {}
  swept: tuple[str, ...] = ()
  if (given.help or given.mode == "zoo") and not given.config:
    _parse_all(_flags(), rest)
  elif given.mode == "sweep":
    fields = [word for word in rest if _FIELD.match(word)]
    _parse_all(_flags(), [word for word in rest if word not in fields])
    _check_given(given.config)
    named = (f"--{word.lstrip('-')}" for word in fields)
    swept = (f"--config={given.config}", *named)
  else:
    config = _overridden(_base(given), rest)
  return Command(given.mode, _workdir(given), config, swept, given)


def _parse_all(values: flags.FlagValues, words: Sequence[str]) -> None:
  """Parses the words into the values; raises if any is no flag."""
  _, *rest = values(["roli", *words])
  if rest:
    raise ValueError(f"unexpected arguments: {' '.join(rest)}")


def _check_given(config: str) -> None:
  if not config:
    raise ValueError("--config=NAME or --config=FILE.py is missing; see --help")


def _lengthen(word: str, mode: str) -> str:
  """Returns `--config.attack.name=pgd` for `--config.attack=pgd`."""
  match = _SHORT.fullmatch(word)
  if not match:
    return word
  section = match[2]
  if mode == "evaluate" and section == "attack":
    section = "eval_attack"
  return f"{match[1]}{section}.name{match[3] or ''}"


def _workdir(values: flags.FlagValues) -> pathlib.Path:
  """Returns --workdir, or runs/<config>-<key=value>-... by the config."""
  if values.workdir:
    return pathlib.Path(values.workdir)
  file, _, arg = values.config.partition(":")
  name = "-".join([pathlib.Path(file).stem, *filter(None, arg.split(","))])
  if values.mode == "sweep":
    name = "sweep-" + re.sub(r"[^\w.=,-]+", "_", name)
  return pathlib.Path("runs", name)


def _base(values: flags.FlagValues) -> ConfigDict:
  """Returns the config before any override: a file's, or the run's own."""
  if values.config:
    return load(values.config)
  if values.mode not in ("evaluate", "report", "publish"):
    _check_given(values.config)
  if not values.workdir:
    raise ValueError(f"--mode={values.mode} needs --workdir=RUN, or a --config")
  from roli_jax.files import workdir

  path = pathlib.Path(values.workdir)
  if values.mode == "report":
    path = path.joinpath(*workdir.swept(path)[:1])  # a sweep has its runs' own
  return _overridable(workdir.read_config(path))


def _overridden(config: ConfigDict, words: Sequence[str]) -> dict[str, Any]:
  """Returns the config as nested dicts, overridden by `--config.field=`.

  An attack whose name is overridden keeps only fields that are overridden too.
  """
  from ml_collections import config_flags

  values: Any = _flags()
  before = config.to_dict()
  config_flags.DEFINE_config_dict(
    "config", config, flag_values=values, sys_argv=["roli", *words]
  )
  _parse_all(values, words)
  overrides, chosen = values["config"].override_values, values.config.to_dict()
  # The config's 20 steps are meant for PGD, not for an attack that is named
  # instead: None stands for that attack's own default.
  for section in chosen.keys() & set(_ATTACKS):
    if chosen[section]["name"] != before[section]["name"]:
      for field in chosen[section].keys() - {"name"}:
        if f"{section}.{field}" not in overrides:
          chosen[section][field] = None
  return chosen


def _overridable(config: Mapping[str, Any]) -> ConfigDict:
  """Returns a `ConfigDict` in which each null is a placeholder of a type.

  JSON keeps no types of fields that are unset, which their names tell.
  """
  from ml_collections import ConfigDict, config_dict

  def field(name: str, value: Any) -> Any:
    if isinstance(value, dict):
      return _overridable(value)
    if value is not None:
      return value
    kind: type = float
    if name.startswith("num_") or name in ("eot", "patch", "channels"):
      kind = int
    elif name in ("width", "depth", "heads"):  # a tuple has one for each stage
      kind = object
    elif name.endswith("_transforms"):
      kind = tuple
    return config_dict.placeholder(kind)

  return ConfigDict({k: field(k, v) for k, v in config.items()})


def _message(error: Exception) -> str:
  """Returns an error's message; of an unknown field, that it is unknown."""
  if isinstance(error, KeyError | AttributeError):
    message = str(error.args[0]).replace("\\n", " ")
    names = re.findall(r"\w+", message.replace("Did you mean", ""))
    meant = f"; did you mean {names[1]!r}?" if len(names) > 1 else ""
    return f"the config has no field {names[0]!r}{meant}"
  return str(error).strip() or type(error).__name__
