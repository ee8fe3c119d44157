"""Many runs from one command line: a grid of arguments, each cell a run.

`a|b` in an argument of the config or in a field means both. Each combination
is an ordinary command in a workdir of its own below the sweep's, and so is each
cell of a table; their rows are merged.
"""

import dataclasses
import itertools
import json
import pathlib
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from roli_jax import progress
from roli_jax.files import workdir
from roli_jax.results import record


@dataclasses.dataclass(frozen=True)
class Cell:
  """One run of a sweep.

  Attributes:
    name: the name of its workdir.
    words: its command line without --workdir.
    config: that they resolve to.
  """

  name: str
  words: tuple[str, ...]
  config: Mapping[str, Any]

  def command(self, path: pathlib.Path) -> list[str]:
    """What runs it, for a shell in the same directory."""
    module = ["python", "-m", "roli_jax.main"]
    return [*module, *self.words, f"--workdir={path / self.name}"]


def grid(words: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
  """All combinations of the alternatives in a command line.

  Example:
    >>> grid(["--config=X.py:method=full|lora", "--config.seed=0|1"])[1]
    ('method=full-seed=1', ('--config=X.py:method=full', '--config.seed=1'))

  Args:
    words: `--config=FILE:key=value,...` and `--config.field=value`.

  Returns:
    A name of what varies, and the words, of each; the last varies fastest.
  """
  choices = [list(_alternatives(word)) for word in words]
  found = []
  for chosen in itertools.product(*choices):
    names = [name for said, _ in chosen for name in said]
    found.append(("-".join(names), tuple(word for _, word in chosen)))
  return found


def _alternatives(word: str) -> Iterator[tuple[list[str], str]]:
  """Each word that it stands for, with names of what was chosen."""
  flag, _, value = word.partition("=")
  if flag == "--config":
    file, colon, text = value.partition(":")
    pairs = [pair.partition("=") for pair in text.split(",")]
    lists = [pair[2].split("|") for pair in pairs]
    for chosen in itertools.product(*lists):
      said = [
        _plain(f"{pair[0]}={one}")
        for pair, one, each in zip(pairs, chosen, lists, strict=True)
        if len(each) > 1
      ]
      joined = ",".join(
        f"{pair[0]}{pair[1]}{one}"
        for pair, one in zip(pairs, chosen, strict=True)
      )
      yield said, f"{flag}={file}{colon}{joined}"
    return
  each = value.split("|")
  field = flag.rpartition(".")[2]
  for one in each:
    said = [_plain(f"{field}={one}")] if len(each) > 1 else []
    yield said, f"{flag}={one}" if value else word


def _plain(name: str) -> str:
  return re.sub(r"[^\w.=+-]+", "_", name)


def cells(
  words: Sequence[str], resolve: Callable[[Sequence[str]], Mapping[str, Any]]
) -> list[Cell]:
  """The runs of a sweep.

  Args:
    words: as `grid` takes them.
    resolve: from the words of one run to its config.

  Raises:
    ValueError: there is one run only, or two of the same name.
  """
  found = []
  for name, chosen in grid(words):
    config = resolve(chosen)
    of_table = config.get("cells", ())
    if len(of_table) < 2 or config.get("only") is not None:
      found.append(Cell(name, chosen, config))
      continue
    for i, cell in enumerate(of_table):
      named = "-".join(filter(None, [name, f"{i:02d}", _called(cell)]))
      alone = (*chosen, f"--config.only={i}")
      found.append(Cell(named, alone, {**config, "only": i}))
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


def _called(cell: Mapping[str, Any]) -> str:
  """What tells a table's cell from others, in words."""
  beside = ("seeds", "rates", "tests", "curve")
  said = [
    key if value is True else str(value)
    for key, value in cell.items()
    if key not in beside
  ]
  return _plain("-".join(said))


def run(found: Sequence[Cell], path: pathlib.Path) -> list[dict[str, Any]]:
  """Runs each cell that isn't complete, one after the other, and merges rows.

  Returns:
    All rows.

  Raises:
    ValueError: some failed; the others have run, and the same command tries
      those again.
  """
  path.mkdir(parents=True, exist_ok=True)
  logs = path / "logs"
  logs.mkdir(exist_ok=True)
  failed = []
  with progress.bar("cells", len(found)) as update:
    for cell in found:
      if not workdir.is_finished(path / cell.name, cell.config):
        command = [sys.executable, *cell.command(path)[1:]]
        with (logs / f"{cell.name}.txt").open("w") as log:
          done = subprocess.run(command, stdout=log, stderr=log, check=False)
        if done.returncode:
          failed.append(cell.name)
      update(1, cell.name)
  rows = merge(found, path)
  if failed:
    raise ValueError(
      f"{len(failed)} of {len(found)} cells failed: {', '.join(failed[:5])}\n"
      f"what they said is in {logs}; the same command tries them again"
    )
  return rows


def merge(found: Sequence[Cell], path: pathlib.Path) -> list[dict[str, Any]]:
  """Writes all cells' rows to `results.jsonl`, and what each cell is."""
  rows = [
    row
    for cell in found
    for row in record.read(path / cell.name / "results.jsonl")
  ]
  partial = path / "results.jsonl.partial"
  partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
  partial.replace(path / "results.jsonl")
  about = {cell.name: shlex.join(cell.command(path)) for cell in found}
  workdir.write_json(path / "sweep.json", about)
  return rows
