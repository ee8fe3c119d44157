"""Many runs from one command line: each combination of a grid is a run.

`a|b` in an argument of the config or in a field means both. Each combination
is an ordinary command in a workdir of its own below the sweep's. A config that
is a table gives one run for each of its cells. The rows of all runs are merged.
`engines` runs them, here or on other machines.
"""

import dataclasses
import itertools
import json
import math
import pathlib
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from roli_jax import progress
from roli_jax.files import workdir
from roli_jax.plan import chips
from roli_jax.results import record
from roli_jax.sweep import engines


@dataclasses.dataclass(frozen=True)
class SweptRun:
  """One run of a sweep.

  Attributes:
    name: the name of its workdir.
    words: its command line without --workdir.
    config: the resolved config.
  """

  name: str
  words: tuple[str, ...]
  config: Mapping[str, Any]

  def command(self, path: pathlib.Path) -> list[str]:
    """Returns the command that runs it, in a workdir below `path`."""
    module = ["python", "-m", "roli_jax.main"]
    return [*module, *self.words, f"--workdir={path / self.name}"]


def grid(words: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
  """Returns all combinations of the alternatives in a command line.

  Examples:
    >>> grid(["--config=X.py:method=full|lora", "--config.seed=0|1"])[1]
    ('method=full-seed=1', ('--config=X.py:method=full', '--config.seed=1'))

  Args:
    words: `--config=FILE:key=value,...` and `--config.field=value`.

  Returns:
    A name made of what varies, and the words, for each combination; the last
    alternatives vary fastest.
  """
  choices = [list(_alternatives(word)) for word in words]
  found = []
  for chosen in itertools.product(*choices):
    names = [name for varied, _ in chosen for name in varied]
    found.append(("-".join(names), tuple(word for _, word in chosen)))
  return found


def _alternatives(word: str) -> Iterator[tuple[list[str], str]]:
  """Yields each word that it stands for, after the names of what varies."""
  flag, _, value = word.partition("=")
  if flag != "--config":
    yield from _choices(word)
    return
  file, colon, text = value.partition(":")
  pairs = [_choices(pair) for pair in text.split(",")]
  for chosen in itertools.product(*pairs):
    names = [name for varied, _ in chosen for name in varied]
    joined = ",".join(pair for _, pair in chosen)
    yield names, f"{flag}={file}{colon}{joined}"


def _choices(pair: str) -> Iterator[tuple[list[str], str]]:
  """Yields `key=value` for each value of `key=a|b`, after the key's name."""
  key, equals, value = pair.partition("=")
  values = value.split("|")
  for one in values:
    name = _plain(f"{key.rpartition('.')[2]}={one}")
    yield [name] if len(values) > 1 else [], f"{key}{equals}{one}"


def _plain(name: str) -> str:
  """Returns the name as part of a path."""
  return re.sub(r"[^\w.=+-]+", "_", name)


def swept_runs(
  words: Sequence[str], resolve: Callable[[Sequence[str]], Mapping[str, Any]]
) -> list[SweptRun]:
  """Returns the runs of a sweep.

  Args:
    words: as `grid` takes them.
    resolve: returns the config that the words of one run mean.

  Raises:
    ValueError: there is one run only, or two of the same name.
  """
  found = []
  for name, chosen in grid(words):
    config = resolve(chosen)
    table = config.get("cells", ())
    if len(table) < 2 or config.get("only") is not None:
      found.append(SweptRun(name, chosen, config))
      continue
    for i, cell in enumerate(table):
      parts = filter(None, [name, f"{i:02d}", _cell_name(cell)])
      words_of_one = (*chosen, f"--config.only={i}")
      found.append(
        SweptRun("-".join(parts), words_of_one, {**config, "only": i})
      )
  if len(found) < 2:
    raise ValueError(
      "there is nothing to sweep over: give alternatives, as in"
      " --config=configs/X.py:method=full|lora or --config.seed=0|1|2, or a"
      " table of several cells"
    )
  names = [cell.name for cell in found]
  twice = sorted({name for name in names if names.count(name) > 1})
  if twice:
    raise ValueError(f"two runs would be called {twice[0]}; name each once")
  return found


def _cell_name(cell: Mapping[str, Any]) -> str:
  """Returns the values that distinguish a table's cell, joined."""
  unnamed = ("seeds", "rates", "tests", "curve")
  values = [
    key if value is True else str(value)
    for key, value in cell.items()
    if key not in unnamed
  ]
  return _plain("-".join(values))


def run(
  runs: Sequence[SweptRun], path: pathlib.Path, engine: str = "here"
) -> list[dict[str, Any]]:
  """Runs each cell that isn't complete, and merges rows.

  Args:
    runs: the runs, from `swept_runs`.
    path: the sweep's directory, with each run's workdir below it.
    engine: where they run, one of `engines.ENGINES`.

  Returns:
    All rows, in the order of the runs.

  Raises:
    ValueError: a cell asks for what there can't be; or some failed, while the
      others have run, and the same command tries those again.
  """
  logs = path / "logs"
  jobs = [
    _job(cell, path)
    for cell in runs
    if not workdir.is_finished(path / cell.name, cell.config)
  ]
  logs.mkdir(parents=True, exist_ok=True)
  failed = []
  with progress.bar("cells", len(runs)) as update:
    update(len(runs) - len(jobs))
    for job, succeeded in engines.ENGINES[engine](jobs):
      if not succeeded:
        failed.append(job.name)
      update(1, job.name)
  rows = merge(runs, path)
  if failed:
    raise ValueError(
      f"{len(failed)} of {len(runs)} cells failed: {', '.join(failed[:5])}\n"
      f"what they said is in {logs}; the same command tries them again"
    )
  return rows


def _job(cell: SweptRun, path: pathlib.Path) -> engines.Job:
  """Returns the cell's command, and what its config asks for.

  That is the accelerators of `target`, and a core for each CPU device and each
  process that decodes.
  """
  config, asked = cell.config, {}
  if name := config.get("target", ""):
    target = chips.named(name)
    kind = "num_tpus" if target.chip.platform == "tpu" else "num_gpus"
    asked[kind] = math.prod(target.shape)
  decoding = config.get("data", {}).get("num_workers", 0)
  return engines.Job(
    cell.name,
    (sys.executable, *cell.command(path)[1:]),
    path / "logs" / f"{cell.name}.txt",
    pathlib.Path.cwd(),
    num_cpus=config.get("cpu_devices", 1) + decoding,
    **asked,
  )


def merge(runs: Sequence[SweptRun], path: pathlib.Path) -> list[dict[str, Any]]:
  """Writes all rows to `results.jsonl`, and the commands to `sweep.json`."""
  rows = [
    row
    for cell in runs
    for row in record.read(path / cell.name / "results.jsonl")
  ]
  partial = path / "results.jsonl.partial"
  partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
  partial.replace(path / "results.jsonl")
  about = {cell.name: shlex.join(cell.command(path)) for cell in runs}
  workdir.write_json(path / "sweep.json", about)
  return rows
