"""What a colleague is told of a trained model: its card, and a leaderboard's.

The card is Markdown below metadata, as Hugging Face's hub reads it. The
leaderboard is RobustBench, whose issue form asks for what its files of models
hold: github.com/RobustBench/robustbench, model_info/.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from roli_jax import specs, statistics
from roli_jax.files import extras
from roli_jax.results import record, report
from roli_jax.results.grouping import Attacked, Group, by_seed
from roli_jax.results.record import Row
from roli_jax.results.tables import Table, percent

_NORMS = {"linf": "Linf", "l2": "L2"}  # RobustBench's; it has no others


@dataclasses.dataclass(frozen=True)
class About:
  """What a card says of a model beside its accuracies.

  Attributes:
    name: the model's, as `glyph_vit`.
    parameters: how many it has.
    data: the name of the data set.
    norm: of the threat that it was trained for.
    eps: its radius, as in the config, `8/255`.
    origin: what made it: the package, its version, perhaps the commit.
    files: what each published file is, by name.
    use: Python that loads it.
    checkpoint: where it was uploaded to; "" nowhere.
    pretrained: whether it began from weights that were there.
  """

  name: str
  parameters: int
  data: str
  norm: str
  eps: str
  origin: str
  files: Mapping[str, str]
  use: str
  checkpoint: str
  pretrained: bool


def accuracies(own: Sequence[Row], rows: Sequence[Row]) -> Table:
  """Returns a model's accuracies with their intervals.

  Args:
    own: the model's test rows.
    rows: all test rows of its run, with those of other seeds.
  """
  group = [row for row in rows if Group.of(row) == Group.of(own[0])]
  lines = []
  for row in own:
    kind = Attacked.of(row)
    correct = round(row["value"] * row["n"])
    each = list(by_seed(group, kind).values())
    mean, *ends = statistics.t_interval(each)
    over = f"{percent(mean)} {_interval(*ends)} of {len(each)}"
    lines.append(
      (
        kind.name,
        percent(row["value"]),
        _interval(*statistics.wilson(correct, row["n"])),
        str(row["n"]),
        over if len(each) > 1 else "",
      )
    )
  header = ("test", "accuracy", "95% Wilson interval", "images")
  seeds = "mean of seeds [95% Student interval]"
  note = "Percent of the test split's images. The weights are one seed's."
  return Table("Accuracy", (*header, seeds), lines, note)


def _interval(low: float, high: float) -> str:
  return f"[{percent(low)}, {percent(high)}]"


def text(
  about: About,
  own: Sequence[Row],
  rows: Sequence[Row],
  evaluated: Sequence[Row],
) -> str:
  """Returns the card.

  Args:
    about: the model.
    own: its test rows, at least one.
    rows: all test rows of its run.
    evaluated: summaries of the evaluations of this model, see `report.kept`.
  """
  row = own[0]
  start = f"the weights `{row['weights']}`" if about.pretrained else "nothing"
  shown = [accuracies(own, rows), *report.evaluations(evaluated)]
  files = Table("Files", ("file", "what it is"), [*about.files.items()])
  parts = [
    f"---\n{_metadata(about, own)}\n---",
    f"# {about.name}, {Group.of(row).name}, on {about.data}\n",
    f"An image classifier of {about.parameters:,} parameters, trained from"
    f" {start} to withstand changes of its images up to {about.norm}"
    f" {about.eps}, on {row['train_size']:,} images of {about.data}, seed"
    f" {row['seed']}; by {about.origin}.\n",
    *(table.markdown() for table in shown),
    f"## Use\n\n```python\n{about.use}\n```\n",
    files.markdown(),
    "## Limits\n",
    "Accuracy under attack is an upper bound: a stronger attack may find more."
    " It says nothing of other changes, radii or data than those above. No"
    " licence is stated here: that of the weights it began from, and of the"
    " data, may bind.",
  ]
  return "\n".join(parts) + "\n"


def _metadata(about: About, own: Sequence[Row]) -> str:
  """Returns what the hub reads of the card, as YAML."""
  extras.need("huggingface_hub")
  import huggingface_hub

  data = about.data.removeprefix("hf:").partition(":")[0]
  results = [
    huggingface_hub.EvalResult(
      task_type="image-classification",
      dataset_type=data,
      dataset_name=data,
      dataset_split="test",
      metric_type="accuracy",
      metric_name=f"accuracy, {Attacked.of(row).name}",
      metric_value=row["value"],
    )
    for row in own
  ]
  return huggingface_hub.ModelCardData(
    library_name="roli_jax",
    pipeline_tag="image-classification",
    tags=["adversarial-robustness", "jax", "safetensors"],
    datasets=[data],
    metrics=["accuracy"],
    model_name=about.name,
    eval_results=results,
  ).to_yaml()


def leaderboard(about: About, own: Sequence[Row]) -> dict[str, Any]:
  """Returns what RobustBench asks for; what we can't know is None.

  Accuracies are in percent, as text. The robust one is standard AutoAttack's,
  and no other's, at the radius of training.

  Args:
    about: the model.
    own: its test rows.
  """
  (clean,) = record.where(own, attack="none")
  eps = specs.number(about.eps)
  found = record.where(own, attack="autoattack", norm=about.norm, eps=eps)
  robust = how = None
  if found:
    robust = f"{100 * found[0]['value']:.2f}"
    how = f"standard AutoAttack by {about.origin}, {found[0]['n']:,} images"
  return {
    "name": None,
    "link": None,
    "authors": None,
    "venue": None,
    "dataset": about.data,
    "architecture": about.name,
    "threat_model": _NORMS.get(about.norm),
    "eps": about.eps,
    "clean_acc": f"{100 * clean['value']:.2f}",
    "reported": robust,
    "autoattack_acc": robust,
    "evaluation_method": how,
    "additional_data": about.pretrained,
    "number_forward_passes": 1,
    "checkpoint": about.checkpoint or None,
    "footnote": None,
  }
