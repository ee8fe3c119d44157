"""`--mode=zoo`: which published weights load by name, and why others don't."""

from collections.abc import Mapping

from roli_jax.convert import registry
from roli_jax.results.grouping import collect
from roli_jax.results.tables import Table

_HEADER = (
  "name", "loads", "model", "clean", "robust", "at", "pixels", "license",
)  # fmt: skip


def run() -> list[Table]:
  """Returns tables of all named checkpoints, and one of their numbers."""
  checkpoints = list(registry.table().values())
  why = {checkpoint.name: checkpoint.why_not() for checkpoint in checkpoints}
  tables = [
    Table(f"{start}...", _HEADER, [_line(c, start, why[c.name]) for c in same])
    for start, same in collect(checkpoints, _start).items()
  ]
  note = (
    "Accuracies in percent, as stated: robust under AutoAttack, or the mean"
    " over corruptions. Any other hf:OWNER/REPO[/FILE][@REV] or timm:ID is read"
    " as a file of which only its repository's config.json tells."
  )
  header = ("names that begin with", "of", "load")
  return [*tables, Table("How many load", header, _counts(why), note)]


def _start(checkpoint: registry.Checkpoint) -> str:
  """Returns what a name shares with its neighbours: data set and threat."""
  if checkpoint.name.startswith("robustbench:"):
    return checkpoint.name.rpartition("/")[0] + "/"
  return checkpoint.name.partition(":")[0] + ":"


def _line(
  checkpoint: registry.Checkpoint, start: str, reason: str
) -> tuple[str, ...]:
  clean, robust = (
    "" if rate is None else f"{100 * rate:.2f}"
    for rate in (checkpoint.clean, checkpoint.robust)
  )
  pixels = ""
  if checkpoint.mean is not None:
    pixels = "normalised" if any(checkpoint.mean) else "raw"
  return (
    checkpoint.name.removeprefix(start),
    f"no: {reason}" if reason else "yes",
    " ".join(filter(None, (checkpoint.model, checkpoint.act))),
    clean,
    robust,
    " ".join(filter(None, (checkpoint.norm, checkpoint.eps))),
    pixels,
    checkpoint.license,
  )


def _counts(why: Mapping[str, str]) -> list[tuple[str, ...]]:
  """Returns for each prefix how many names it has, and how many load."""
  lines: list[tuple[str, ...]] = []
  for prefix in registry.PREFIXES:
    reasons = [why[name] for name in why if name.startswith(f"{prefix}:")]
    lines.append((f"{prefix}:", str(len(reasons)), str(reasons.count(""))))
  return lines
