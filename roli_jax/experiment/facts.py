"""`facts.json`: sizes of methods and notes on data, for reports."""

import pathlib
from collections.abc import Iterable

from roli_jax import data, trees
from roli_jax.experiment.program import build_program
from roli_jax.experiment.run import Run
from roli_jax.experiment.stages import Stage
from roli_jax.files import workdir
from roli_jax.results import report, tables


def write(run: Run, stages: Iterable[Stage], path: pathlib.Path) -> None:
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
  facts = {
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
