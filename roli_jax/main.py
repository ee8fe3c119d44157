"""roli_jax: robust fine-tuning in JAX.

  roli --config=NAME[:key=value,...]
      [--mode=MODE] [--workdir=DIR] [--config.field=value ...]

NAME is a config that ships with roli_jax, or a file such as configs/X.py or a
copy of it. python -m roli_jax.main is the same as roli.

Modes:
  train     all stages of the config's table, tests, report (the default)
  evaluate  restores a checkpoint of the run in --workdir and adds the rows
            that are missing; needs no --config. With --config=evaluate it tests
            weights as they are: --config.backbone.weights=NAME
  report    draws tables and figures from the rows of the run or sweep in
            --workdir, and report.html, a page that has it all
  prepare   fetches the data and the named weights that a run lacks, and says
            what other weights it lacks
  zoo       the table of weights that load by name, and why others don't
  plan      what a run will do and cost, without data or weights: plan.json
  convert   reads weights from elsewhere, or writes ours for elsewhere, with
            --config=convert --config.source= --config.output=
  publish   writes the trained model of the run in --workdir for others, with
            its numbers, to --config.output=; with --config.repo=OWNER/NAME also
            to Hugging Face's hub; needs no --config
  bench     measures speed, with --config=bench
  sweep     runs a grid, each cell a run in a workdir of its own below
            --workdir: a|b in an argument or a field means both, as in
            '--config=X:method=full|lora' '--config.seed=0|1|2'.
            A table's cells are one run each. Complete ones are skipped;
            --sweep_on=submitit runs each as a job of Slurm, --sweep_on=ray on a
            Ray cluster, with the accelerators of its --config.target=h100:8;
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

import contextlib
import os
import pathlib
import shlex
import sys
import traceback
from collections.abc import Sequence

from absl import logging

from roli_jax.experiment import command_line
from roli_jax.experiment.command_line import MODES, Command
from roli_jax.files import extras

__all__ = ["MODES", "main", "run"]

_MOST_LINES = 6


def main() -> None:
  """Runs the command `roli`, and exits with its status."""
  logging.use_absl_handler()
  logging.set_verbosity(logging.WARNING)
  sys.exit(run(sys.argv[1:]))


def run(argv: Sequence[str]) -> int:
  """Runs a command line in this process.

  May be called again and again. Two settings of JAX are the first run's for
  all: how many devices a CPU is split into, and where compiled programs are
  kept.

  Args:
    argv: the words after the program's name.

  Returns:
    The exit status: 0, or 2 after a message of at most 6 lines on stderr, for
    a user's mistake. Other errors are raised.
  """
  try:
    command = command_line.parse(argv)
    if command.flags.help:
      _explain(command)
    elif command.mode == "sweep":
      _sweep(command)
    elif command.mode == "prepare":
      _prepare(command)
    elif command.mode == "zoo":
      _show_zoo()
    else:
      _run_one(command)
  except (ValueError, ModuleNotFoundError) as error:
    if not _is_ours(error):
      raise
    return _refuse(str(error))
  except KeyboardInterrupt:
    return _refuse("interrupted; the same command goes on where it was")
  return 0


def _refuse(message: str) -> int:
  """Prints a message to stderr; returns the exit status."""
  lines = message.splitlines()[:_MOST_LINES]
  print("\n".join([f"roli_jax: {lines[0]}", *lines[1:]]), file=sys.stderr)
  return 2


def _explain(command: Command) -> None:
  """Prints what --help prints."""
  print(__doc__)
  if command.config:
    from ml_collections import ConfigDict

    print(ConfigDict(command.config))


def _prepare_jax(command: Command) -> None:
  """Splits the CPU, sets where compiled programs are kept, joins processes."""
  import jax

  from roli_jax import distributed

  environ, split = os.environ, "host_platform_device_count"
  if not (
    split in environ.get("XLA_FLAGS", "") or environ.get("JAX_NUM_CPU_DEVICES")
  ):
    # In a notebook JAX may have begun, and keeps the devices that it has.
    with contextlib.suppress(RuntimeError):
      jax.config.update("jax_num_cpu_devices", command.config["cpu_devices"])
  if not environ.get("JAX_COMPILATION_CACHE_DIR"):
    cache = command.workdir.absolute().parent / ".jax_cache"
    jax.config.update("jax_compilation_cache_dir", str(cache))
  if not environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
  given = command.flags
  distributed.connect(given.coordinator, given.num_processes, given.process)


def _sweep(command: Command) -> None:
  """Runs a sweep, or prints its commands."""
  from roli_jax.results import report, tables
  from roli_jax.sweep import runs

  path = command.workdir
  found = runs.swept_runs(
    command.swept, lambda words: command_line.parse(words).config
  )
  if command.flags.sweep_print:
    print("\n".join(shlex.join(cell.command(path)) for cell in found))
    return
  runs.run(found, path, command.flags.sweep_on)
  tables.show(report.write_sweep(path))
  print(f"Written to {path}: report.html, report.md, figures/.")


def _prepare(command: Command) -> None:
  """Fetches what a run lacks, and says so line by line."""
  from roli_jax.experiment import prepare_command

  for line in prepare_command.run(command.config):
    print(line, flush=True)


def _show_zoo() -> None:
  """Prints which published weights load by name."""
  from roli_jax.experiment import zoo_command
  from roli_jax.results import tables

  tables.show(zoo_command.run())


def _run_one(command: Command) -> None:
  """Does what the modes do that compute, in this process."""
  mode, path, config = command.mode, command.workdir, command.config
  _prepare_jax(command)
  from roli_jax import distributed
  from roli_jax.results import tables

  if mode == "train":
    # Not only when all is computed.
    extras.need("grain", "matplotlib", "plotly")
    from roli_jax import train
    from roli_jax.results import report

    if not train.run(config, path):
      raise ValueError(f"the run ended before it had results; see {path}")
    if distributed.leads():
      tables.show(report.write(path))
      print(f"Written to {path}: report.html, report.md, figures/.")
  elif mode == "evaluate":
    from roli_jax import train
    from roli_jax.experiment import as_is
    from roli_jax.results import comparison, report, stated

    of_a_run = "cells" in config
    rows = (train if of_a_run else as_is).evaluate(config, path)
    if distributed.leads():
      drawn = [
        report.accuracies(rows) if of_a_run else stated.table(rows),
        comparison.corruptions(rows),
        report.quick(path),
      ]
      tables.show(table for table in drawn if table.rows)
  elif mode == "report":
    from roli_jax.files import workdir
    from roli_jax.results import report

    write = report.write_sweep if workdir.swept(path) else report.write
    tables.show(write(path))
    print(f"Written to {path}: report.html, report.md, figures/.")
  elif mode == "plan":
    from roli_jax.plan import plan

    tables.show(plan.tables(plan.run(config, path)))
    print(f"Written to {path / 'plan.json'}.")
  elif mode == "publish":
    from roli_jax.experiment import publish_command

    for line in publish_command.run(config, path):
      print(line, flush=True)
  elif mode == "convert":
    from roli_jax.experiment import convert_command

    file, facts = convert_command.run(config)
    tables.show([tables.Table(str(file), ("", "how much", "which"), facts)])
  else:
    from roli_jax import bench

    bench.run(config, path)


def _is_ours(error: Exception) -> bool:
  """Whether roli_jax itself raised it: its message is meant for the user."""
  *_, last = traceback.extract_tb(error.__traceback__)
  return pathlib.Path(last.filename).parent.is_relative_to(
    pathlib.Path(__file__).parent
  )


if __name__ == "__main__":
  main()
