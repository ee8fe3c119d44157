"""A run's directory: whose it is, and where things lie in it."""

import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

import roli_jax
from roli_jax import distributed

# Fields of config.json that are not the config's; never compared.
_BESIDE = ("versions", "commit", "workdir")
# Fields that change no number, or its rounding alone: a run may go on with
# others.
_FREE = (
    "data.download", "data.num_workers", "cpu_devices", "mesh", "target",
    "track", "output", "repo",
)  # fmt: skip
# Fields that earlier runs lack, and what they ran with.
_SIZES = ("patch", "width", "depth", "heads", "channels")
_STAGE = {"ema": 0.0, "loss": {"smoothing": 0.0}}
_LATER: dict[str, Any] = {
  "data": {"layout": "", "download": False},
  "backbone": {
    "act": "",
    "norm_eps": 0.0,
    "pool": "",
    "key": "",
    "strict": False,
    **dict.fromkeys(_SIZES),
  },
  "num_val_images": 0,
  "track": "",
  "output": "",
  "repo": "",
  "pretrain": _STAGE,
  "probe": _STAGE,
  "adapt": _STAGE,
}
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def claim(path: pathlib.Path, config: Mapping[str, Any]) -> list[str]:
  """Makes the directory this config's own, or finds that it is already.

  Args:
    path: the run's directory.
    config: plain values, as JSON has them.

  Returns:
    Warnings: versions that have changed since the run began.

  Raises:
    ValueError: it can't be written to, or belongs to another config.
  """
  try:
    path.mkdir(parents=True, exist_ok=True)
    writable = os.access(path, os.W_OK | os.X_OK)
  except OSError as error:
    raise ValueError(f"workdir {path} can't be made: {error}") from error
  if not writable:
    raise ValueError(f"workdir {path} can't be written to")
  file = path / "config.json"
  ours = json.loads(json.dumps(config))
  if not file.exists():
    beside = {
      "versions": _versions(),
      "commit": _commit(),
      "workdir": str(path),
    }
    write_json(file, {**ours, **beside})
    return []
  theirs = read_config(path)
  differences = list(_differences(theirs, _filled(ours, _LATER)))
  if differences:
    shown = "\n".join(f"  {line}" for line in differences[:3])
    more = len(differences) - 3
    raise ValueError(
      f"{path} holds a run of another config (there -> here):\n{shown}"
      + (f"\n  and {more} more" if more > 0 else "")
      + "\nGive another --workdir, or the same config."
    )
  before = json.loads(file.read_text()).get("versions", {})
  return [
    f"{name} was {before[name]} when this run began, and is {version} now"
    for name, version in _versions().items()
    if before.get(name, version) != version
  ]


def finish(path: pathlib.Path, num_rows: int) -> None:
  """Notes that the run has all of its rows, and how many there are."""
  write_json(path / "finished.json", {"rows": num_rows})


def is_finished(path: pathlib.Path, config: Mapping[str, Any]) -> bool:
  """Whether this directory holds the whole run of this config."""
  note, results = path / "finished.json", path / "results.jsonl"
  if not (note.is_file() and results.is_file()):
    return False
  ours = _filled(json.loads(json.dumps(config)), _LATER)
  if list(_differences(read_config(path), ours)):
    return False
  lines = results.read_bytes().count(b"\n")
  return lines >= json.loads(note.read_text())["rows"]


def same_code(a: pathlib.Path, b: pathlib.Path) -> bool:
  """Whether two runs began with the same versions, and from the same commit."""
  first, second = (
    json.loads((path / "config.json").read_text()) for path in (a, b)
  )
  return all(first[key] == second[key] for key in ("versions", "commit"))


def read_config(path: pathlib.Path) -> dict[str, Any]:
  """Reads the config of the run in this directory, lists as tuples.

  Fields that the run's version of the project did not have yet are added with
  what it ran with.

  Raises:
    ValueError: there is none.
  """
  file = path / "config.json"
  if not file.is_file():
    raise ValueError(f"{path} holds no run: there is no config.json in it")
  config = _filled(json.loads(file.read_text()), _LATER)
  return {k: _tuples(v) for k, v in config.items() if k not in _BESIDE}


def swept(path: pathlib.Path) -> list[str]:
  """Returns the names of the runs below a sweep's directory, [] of a run's."""
  file = path / "sweep.json"
  return list(json.loads(file.read_text())) if file.is_file() else []


def _filled(
  config: Mapping[str, Any], later: Mapping[str, Any]
) -> dict[str, Any]:
  """Adds the fields that a config lacks, to sections that it has."""
  filled = dict(config)
  for key, value in later.items():
    if not isinstance(value, dict):
      filled.setdefault(key, value)
    elif key in config:
      filled[key] = _filled(config[key], value)
  return filled


def write_json(file: pathlib.Path, value: Any) -> None:
  """Writes the file whole or not at all; of several processes the first."""
  if not distributed.leads():
    return
  partial = file.with_name(file.name + ".partial")
  partial.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
  partial.replace(file)


def _tuples(value: Any) -> Any:
  """Makes the lists in a value of JSON tuples."""
  if isinstance(value, dict):
    return {k: _tuples(v) for k, v in value.items()}
  return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _differences(
  theirs: Mapping[str, Any], ours: Mapping[str, Any], prefix: str = ""
) -> Iterator[str]:
  """Yields a line for each field that differs, but for those in _FREE."""
  theirs, ours = _tuples(theirs), _tuples(ours)
  for key in sorted(theirs.keys() | ours.keys()):
    a, b = theirs.get(key, "absent"), ours.get(key, "absent")
    if prefix + key in _FREE:
      continue
    if isinstance(a, dict) and isinstance(b, dict):
      yield from _differences(a, b, f"{prefix}{key}.")
    elif a != b:
      yield f"{prefix}{key}: {_short(a)} -> {_short(b)}"


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 60 else text[:57] + "..."


def _versions() -> dict[str, str]:
  return {
    "python": platform.python_version(),
    "roli_jax": roli_jax.__version__,
    **{name: importlib.metadata.version(name) for name in _PACKAGES},
  }


def _commit() -> str | None:
  """Returns the commit of the package's checkout; None where it is none."""
  folder = pathlib.Path(roli_jax.__file__).parents[1]
  if not (folder / ".git").exists():
    return None  # a virtual environment may lie in somebody else's checkout
  command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
  try:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
  except (OSError, subprocess.CalledProcessError):
    return None
  return done.stdout.strip()
