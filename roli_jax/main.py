"""roli_jax: robust fine-tuning in JAX.

  python -m roli_jax.main --config=configs/X.py[:key=value,...]
      [--mode=MODE] [--workdir=DIR] [--config.field=value ...]

Modes:
  train     all stages of the config's table, tests, report (the default)
  evaluate  restores a checkpoint of the run in --workdir and adds the rows
            that are missing; needs no --config
  report    draws tables and figures from the rows of the run in --workdir
  plan      what a run will do and cost, without data or weights: plan.json
  convert   reads weights from elsewhere, or writes ours for elsewhere, with
            --config=configs/convert.py --config.source= --config.output=
  bench     measures speed, with --config=configs/bench.py
  sweep     runs a grid, each cell a run in a workdir of its own below
            --workdir: a|b in an argument or a field means both, as in
            '--config=configs/X.py:method=full|lora' '--config.seed=0|1|2'.
            A table's cells are one run each. Complete ones are skipped;
            --sweep_print prints the commands, one a line, and runs none

Any field of the config can be overridden: --config.adapt.num_steps=120.
--config.attack=NAME is short for --config.attack.name=NAME, in evaluate for
--config.eval_attack.name=NAME. Radii and step sizes are text: 8/255, 0.1.
--help with a --config prints the config's fields.

Corruptions: --mode=evaluate --config.attack=corruptions:standard, or extra,
glyphs, guide.
Attacks: fgsm, pgd, apgd_ce, apgd_dlr, apgd_t, fab, fab_t, square, autoattack,
autoattack_plus, autoattack_rand, autoattack_fast (not standard), curve.

A run that was killed goes on when the same command is given again.

On several hosts each gets the same command. TPU pods and Slurm tell them who
they are; otherwise add --coordinator=HOST:PORT --num_processes=N --process=K.
"""

import os
import pathlib
import re
import shlex
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from absl import app, flags, logging

MODES = (
  "train", "evaluate", "report", "plan", "convert", "bench", "sweep",
)  # fmt: skip

_MOST_LINES = 6
_SHORT = re.compile(r"(--?config\.)(attack|val_attack|eval_attack)=(.*)")


def _given(argv: list[str], name: str) -> str:
  """The value that a flag has on the command line, "" without it."""
  for i, word in enumerate(argv):
    match = re.fullmatch(rf"--?{name}(=(.*))?", word, re.DOTALL)
    if match:
      following = argv[i + 1] if i + 1 < len(argv) else ""
      return match[2] if match[1] else following
  return ""


def _lengthen(word: str, mode: str) -> str:
  """`--config.attack=pgd` in full."""
  match = _SHORT.fullmatch(word)
  if not match:
    return word
  section = match[2]
  if mode == "evaluate" and section == "attack":
    section = "eval_attack"
  return f"{match[1]}{section}.name={match[3]}"


def _define_file(source: str, values: flags.FlagValues) -> None:
  """Defines the flags of the config `FILE:key=value,...`."""
  from ml_collections import config_flags

  file = pathlib.Path(source.split(":")[0])
  if not file.is_file():
    raise ValueError(f"there is no config at {file}")
  # A config imports its neighbours as `configs.common`, from anywhere.
  sys.path.append(str(file.resolve().parent.parent))
  config_flags.DEFINE_config_file(
    "config", lock_config=True, flag_values=values
  )


def _define(argv: list[str], mode: str) -> None:
  """Defines the flags; where the config comes from depends on the mode."""
  flags.DEFINE_enum("mode", "train", MODES, "What to do.")
  flags.DEFINE_string("workdir", "", "The run's directory.")
  flags.DEFINE_bool("sweep_print", False, "Prints the commands of a sweep.")
  flags.DEFINE_string("coordinator", "", "HOST:PORT of a run's process 0.")
  flags.DEFINE_integer("num_processes", 0, "How many processes a run has.")
  flags.DEFINE_integer("process", -1, "Which of them this is, from 0.")
  if mode == "sweep":
    return  # its cells have configs
  source = _given(argv, "config")
  if source or mode not in ("evaluate", "report"):
    if not source:
      raise ValueError("--config=configs/X.py is missing; see --help")
    _define_file(source, flags.FLAGS)
    return
  from ml_collections import config_flags

  from roli_jax import workdir

  if not _given(argv, "workdir"):
    raise ValueError(f"--mode={mode} needs --workdir=RUN, or a --config")
  config = workdir.read_config(pathlib.Path(_given(argv, "workdir")))
  config_flags.DEFINE_config_dict(
    "config", _overridable(config), lock_config=True
  )


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


def _parse(argv: list[str]) -> list[str]:
  """Parses the flags; a user's mistake ends in a short message and status 2."""
  mode = _given(argv, "mode") or "train"
  asked = {"--help", "-help", "-h", "--helpshort"} & set(argv)
  if asked:
    print(__doc__)
    argv = [word for word in argv if word not in asked]
    if not _given(argv, "config"):
      sys.exit(0)
  try:
    # ml_collections wants the file before its fields.
    argv.sort(key=lambda word: bool(re.match(r"--?config\.[^=]+=", word)))
    argv = [_lengthen(word, mode) for word in argv]
    sys.argv[:] = argv  # config_flags looks for a config's fields there
    _define(argv, mode)
    if mode == "sweep":
      swept = [word for word in argv if re.match(r"--?config[.=]", word)]
      rest = flags.FLAGS([word for word in argv if word not in swept])
    else:
      rest = flags.FLAGS(argv)
    if len(rest) > 1:
      raise ValueError(f"unexpected arguments: {' '.join(rest[1:])}")
    if mode == "sweep":
      return [rest[0], *(f"--{word.lstrip('-')}" for word in swept)]
    config = flags.FLAGS.config
  except Exception as error:  # whatever a config file raises is its user's
    _exit(_said(error))
  if asked:
    print(config)
    sys.exit(0)
  return rest


def _said(error: Exception) -> str:
  """An error's message; of a traceback within, what was raised."""
  if isinstance(error, KeyError | AttributeError):  # a field that isn't there
    said = str(error.args[0]).replace("\\n", " ")
    names = re.findall(r"\w+", said.replace("Did you mean", ""))
    meant = f"; did you mean {names[1]!r}?" if len(names) > 1 else ""
    return f"the config has no field {names[0]!r}{meant}"
  text = str(error).strip() or type(error).__name__
  if "Traceback" in text:
    text = text.splitlines()[-1].partition(": ")[2]
  return text


def _exit(message: str) -> None:
  lines = message.splitlines()[:_MOST_LINES]
  print("\n".join([f"roli_jax: {lines[0]}", *lines[1:]]), file=sys.stderr)
  sys.exit(2)


def _use_own_defaults(config: dict[str, Any]) -> None:
  """An attack named on the command line keeps nothing of the config's PGD.

  The 20 steps of PGD would make APGD another attack. Its own defaults hold,
  but for what the command line says.
  """
  for section in config.keys() & {"attack", "val_attack", "eval_attack"}:
    if _given(sys.argv, f"config.{section}.name") not in ("", "pgd"):
      for field in config[section].keys() - {"name"}:
        if not _given(sys.argv, f"config.{section}.{field}"):
          config[section][field] = None


def _workdir() -> pathlib.Path:
  """--workdir, or runs/<config>-<key=value>-... after the config's name."""
  if flags.FLAGS.workdir:
    return pathlib.Path(flags.FLAGS.workdir)
  file, _, arg = _given(sys.argv, "config").partition(":")
  name = "-".join([pathlib.Path(file).stem, *filter(None, arg.split(","))])
  if _given(sys.argv, "mode") == "sweep":
    name = "sweep-" + re.sub(r"[^\w.=,-]+", "_", name)
  return pathlib.Path("runs", name)


def _prepare_jax(config: dict[str, Any], path: pathlib.Path) -> None:
  """Compiled programs beside the run, a CPU split, other processes joined."""
  import jax

  from roli_jax import processes

  given = "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
  if not (given or os.environ.get("JAX_NUM_CPU_DEVICES")):
    jax.config.update("jax_num_cpu_devices", config["cpu_devices"])
  if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    cache = path.absolute().parent / ".jax_cache"
    jax.config.update("jax_compilation_cache_dir", str(cache))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
  told = flags.FLAGS
  processes.connect(told.coordinator, told.num_processes, told.process)


def _resolve(words: Sequence[str]) -> dict[str, Any]:
  """The config that the words of one run stand for."""
  values = flags.FlagValues()
  # config_flags looks for a config's fields there.
  before, sys.argv = sys.argv, [sys.argv[0], *words]
  try:
    _define_file(_given(sys.argv, "config"), values)
    values(sys.argv)
    config = values.config.to_dict()
    _use_own_defaults(config)
    return config
  except Exception as error:  # whatever a config file raises is its user's
    raise ValueError(_said(error)) from error
  finally:
    sys.argv = before


def _sweep(words: list[str]) -> None:
  from roli_jax import report, sweep, tabular

  path = _workdir()
  found = sweep.cells(words, _resolve)
  if flags.FLAGS.sweep_print:
    print("\n".join(shlex.join(cell.command(path)) for cell in found))
    return
  sweep.run(found, path)
  tabular.show(report.write_sweep(path))
  print(f"Written to {path}: report.md, figures/, results.jsonl.")


def _run(argv: list[str]) -> None:
  logging.set_verbosity(logging.WARNING)
  try:
    if flags.FLAGS.mode == "sweep":
      _sweep(argv[1:])
    else:
      _run_one(flags.FLAGS.mode)
  except ValueError as error:
    if not _is_ours(error):
      raise
    _exit(str(error))
  except KeyboardInterrupt:
    _exit("interrupted; the same command goes on where it was")


def _run_one(mode: str) -> None:
  path = _workdir()
  config = flags.FLAGS.config.to_dict()
  _use_own_defaults(config)
  _prepare_jax(config, path)
  if mode == "train":
    from roli_jax import processes, report, tabular, train

    if not train.run(config, path):
      raise ValueError(f"the run ended before it had results; see {path}")
    if processes.leads():
      tabular.show(report.write(path))
      print(f"Written to {path}: report.md, figures/, results.jsonl.")
  elif mode == "evaluate":
    from roli_jax import comparison, processes, report, tabular, train

    rows = train.evaluate(config, path)
    if not processes.leads():
      return
    made = [report.accuracies(rows), comparison.corruptions(rows)]
    tabular.show(table for table in made if table.rows)
  elif mode == "report":
    from roli_jax import report, tabular

    tabular.show(report.write(path))
  elif mode == "plan":
    from roli_jax import plan, tabular

    tabular.show(plan.tables(plan.run(config, path)))
    print(f"Written to {path / 'plan.json'}.")
  elif mode == "convert":
    from roli_jax import exchange, tabular

    file, facts = exchange.run(config)
    tabular.show([tabular.Table(str(file), ("", "how much", "which"), facts)])
  else:
    from roli_jax import bench

    bench.run(config, path)


def _is_ours(error: Exception) -> bool:
  """Whether roli_jax itself raised it: then it is meant for the user."""
  *_, last = traceback.extract_tb(error.__traceback__)
  return pathlib.Path(last.filename).parent.is_relative_to(
    pathlib.Path(__file__).parent
  )


if __name__ == "__main__":
  app.run(_run, flags_parser=_parse)
