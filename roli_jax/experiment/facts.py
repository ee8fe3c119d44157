"""`facts.json`: sizes of methods, notes on data and weights, for reports."""

import json
import pathlib
from collections.abc import Sequence

import jax

from roli_jax import data, models, trees
from roli_jax.convert.bundle import Bundle
from roli_jax.experiment.program import build_program
from roli_jax.experiment.run import Run
from roli_jax.experiment.stages import Stage
from roli_jax.files import journal, workdir
from roli_jax.results import report, tables


def write(run: Run, stages: Sequence[Stage], path: pathlib.Path) -> None:
  """Writes `facts.json`; prints it too where the images lie in files.

  Args:
    run: the run.
    stages: its stages.
    path: the run's directory.
  """
  sizes = {}
  for stage in {stage.method: stage for stage in stages}.values():
    program = build_program(run, stage)
    params = program.abstract_state.params
    trained, _ = program.method.split(params)
    sizes[stage.method] = (trees.size(trained), trees.size(params))
  splits = {split: run.data[split] for split in data.SPLITS}
  weights = {stage.weights for stage in stages if stage.name != "pretrain"}
  facts = {
    "assumed": {name: dict(run.load(name).assumed) for name in sorted(weights)},
    "backbone": run.config["backbone"]["name"],
    "in_files": isinstance(splits["train"], data.Files),
    "parameters": sizes,
    "skipped": {split: source.skipped for split, source in splits.items()},
    # Splits of one data set share notes; each is written once.
    "notes": list(dict.fromkeys(n for s in splits.values() for n in s.notes)),
    "manifest": [line for s in splits.values() for line in s.manifest()],
  }
  workdir.write_json(path / "facts.json", facts)
  if facts["in_files"] or facts["notes"]:
    tables.show(report.facts(path))


def add_weights(weights: str, bundle: Bundle, path: pathlib.Path) -> None:
  """Adds weights that are tested to `facts.json`, which need not be there.

  Args:
    weights: their name or path.
    bundle: what it was read as.
    path: the directory of the rows.

  Raises:
    ValueError: there are rows of another network of that name: the content of
      its file, or an option, has changed.
  """
  file = path / "facts.json"
  facts = json.loads(file.read_text()) if file.is_file() else {}
  leaves = jax.tree.leaves((bundle.params, bundle.stats))
  about = models.to_spec(bundle.model) | {"arrays": journal.digest(*leaves)}
  network = json.dumps(about, sort_keys=True)
  if facts.setdefault("networks", {}).setdefault(weights, network) != network:
    raise ValueError(
      f"{path} has results of another network that {weights} was: its file or"
      " an option of config.backbone has changed; give another --workdir"
    )
  facts.setdefault("assumed", {})[weights] = dict(bundle.assumed)
  workdir.write_json(file, facts)
