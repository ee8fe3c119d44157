"""`--mode=publish`: a trained model, in a directory for others, or on a hub."""

import csv
import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from roli_jax import convert, trees
from roli_jax.convert import state_dict
from roli_jax.experiment import best_checkpoint, convert_command
from roli_jax.experiment.run import Run, build_run
from roli_jax.experiment.stages import Stage
from roli_jax.files import extras, upload, workdir
from roli_jax.results import card, record, report

THEIRS = "model.safetensors"

_FILES = {
  "config.json": "the model's sizes, mean and std; the run's config",
  "robustbench.json": "what RobustBench's form for new models asks for",
}
# What `peft.load` has to be told of a method that adds to a backbone.
_SIZES = ("reduction", "tokens", "deep")
_FLAGS = ("clean", "robust", "broken_by", "distance", "margin")


def run(config: Mapping[str, Any], path: pathlib.Path) -> Iterator[str]:
  """Writes what others need of a model to `config.output`, and uploads it.

  Args:
    config: the run's, with `output`, a directory; `repo`, OWNER/NAME on the
      hub, or ""; and `checkpoint`, which names the model as in mode evaluate.
    path: the run's directory.

  Yields:
    What it is about to do, or has done, a line each.

  Raises:
    ValueError: fields that are missing; no such checkpoint, or no tests of it;
      an output that holds other weights; a hub that refuses.
  """
  if not config["output"]:
    raise ValueError("--config.output= is missing; see --help")
  extras.need("huggingface_hub")
  made = build_run(config)
  stage, checkpoint, meta = best_checkpoint.find(made, path)
  tests = record.read(path / "results.jsonl")
  tests = record.where(tests, split="test", metric="accuracy")
  own = record.where(tests, **stage.row)
  if not record.where(own, attack="none"):
    raise ValueError(f"{stage.cell} has not been tested: --mode=evaluate does")
  # Before anything is computed: a token that may not, a hub that isn't there.
  address = upload.make(config["repo"]) if config["repo"] else ""
  output = pathlib.Path(config["output"]).expanduser()

  weights, bundle = _write_weights(stage, checkpoint, output)
  theirs, note = _write_theirs(made, stage, bundle, output)
  yield from note
  folder = path / "evaluations" / stage.directory
  about = card.About(
    name=bundle.model.name,
    parameters=trees.size(bundle.params),
    data=config["data"]["name"],
    norm=config["threat"]["norm"],
    eps=config["threat"]["eps"],
    origin=_origin(path),
    files={**weights, **theirs, **_write_flags(folder, output), **_FILES},
    use=_use(meta, weights),
    checkpoint=address,
    pretrained=stage.name != "pretrain",
  )
  claim = card.leaderboard(about, own)
  if not claim["autoattack_acc"]:
    yield (
      "robustbench.json has no robust accuracy: it takes --mode=evaluate"
      " --config.attack=autoattack"
    )
  workdir.write_json(output / "robustbench.json", claim)
  config_file = {"model": meta["model"], "run": _config(path)}
  workdir.write_json(output / "config.json", config_file)
  kept = report.kept(path)
  kept = [x for x in kept if record.directory(x["row"]) == stage.directory]
  (output / "README.md").write_text(card.text(about, own, tests, kept))
  names = ["README.md", *about.files]
  yield f"written to {output}: {', '.join(names)}"
  if address:
    yield f"uploaded: {upload.send(config['repo'], output, names)}"


def _write_weights(
  stage: Stage, checkpoint: pathlib.Path, output: pathlib.Path
) -> tuple[dict[str, str], convert.Bundle]:
  """Writes the weights in our format, as --mode=convert does.

  Returns:
    What each file is, by name; the bundle in the first of them.
  """
  file, _ = convert_command.run(
    {"source": str(checkpoint), "output": str(output)}
  )
  check = file.with_suffix(".check.npz")
  files = {
    file.name: "the weights, for roli_jax",
    check.name: "two images of noise, and what the model makes of them",
  }
  added = file.with_suffix(f".{stage.method}.safetensors")
  if added.exists():
    files[added.name] = f"what {stage.method} adds to them, and the classifier"
  return files, convert.load(file)


def _write_theirs(
  run: Run, stage: Stage, bundle: convert.Bundle, output: pathlib.Path
) -> tuple[dict[str, str], list[str]]:
  """Writes the weights under the names that they had where they began.

  Returns:
    What the file is, by its name; else why there is none.
  """
  try:
    layout = run.load(stage.weights, keeps_head=True).layout
  except ValueError:  # they lay elsewhere, or are what this run has made
    layout = ""
  bundle = dataclasses.replace(bundle, layout=layout)
  try:
    format = state_dict.format_of(bundle)
    convert.save(bundle, output / THEIRS, format)
  except ValueError as error:
    return {}, [f"there is no {THEIRS}: {error}"]
  return {THEIRS: f"the weights under the names that {format} gives them"}, []


def _write_flags(folder: pathlib.Path, output: pathlib.Path) -> dict[str, str]:
  """Writes what became of each image in the evaluations, as tables.

  Args:
    folder: that of the stage's evaluations.
    output: the directory to write to.

  Returns:
    What each file is, by name.
  """
  files = {}
  for result in sorted(folder.glob("*/result.npz")):
    name = f"flags-{result.parent.name}.csv"
    with np.load(result) as arrays:
      columns = [arrays[flag].tolist() for flag in _FLAGS]
    with (output / name).open("w", newline="") as file:
      lines = csv.writer(file)
      lines.writerow(("image", *_FLAGS))
      lines.writerows(
        (i, *line) for i, line in enumerate(zip(*columns, strict=True))
      )
    files[name] = f"what became of each image under {result.parent.name}"
  return files


def _use(meta: Mapping[str, Any], weights: Mapping[str, str]) -> str:
  """Returns the Python that loads the weights, from this directory."""
  file, *others = (name for name in weights if name.endswith(".safetensors"))
  lines = [f"from roli_jax import convert{', peft' * bool(others)}", ""]
  lines.append(f'bundle = convert.load("{file}")')
  for added in others:
    method = meta["method"]
    sizes = (f", {k}={method[k]!r}" for k in _SIZES if k in method)
    call = f'peft.load(bundle, tensors, "{method["name"]}"{"".join(sizes)})'
    lines += [f'tensors = convert.read("{added}")', f"bundle = {call}"]
  lines.append("# images [b, h, w, c] in [0, 1], of any size")
  lines.append(
    "logits = bundle.model.logits(bundle.params, bundle.stats, images)"
  )
  return "\n".join(lines)


def _config(path: pathlib.Path) -> dict[str, Any]:
  """Returns the run's config.json, without where it lay."""
  config = json.loads((path / "config.json").read_text())
  return {k: v for k, v in config.items() if k != "workdir"}


def _origin(path: pathlib.Path) -> str:
  """Returns the version, and the commit if it is known, that made the run."""
  config = _config(path)
  commit = f" ({config['commit'][:10]})" if config["commit"] else ""
  return f"roli_jax {config['versions']['roli_jax']}{commit}"
