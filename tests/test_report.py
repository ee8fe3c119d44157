"""What tables say about rows."""

import math

import pytest

from roli_jax.results import comparison, figures, record, report
from roli_jax.results.page.answers import named

ABOUT = {
  "backbone": "glyph_vit", "data": "digits", "train_size": 200, "steps": 60,
  "metric": "accuracy", "n": 500, "head_init": "kaiming_fan_out",
  "weights": "robust", "lr": 1e-3,
}  # fmt: skip
PGD = {
  "attack": "pgd", "attack_steps": 20, "restarts": 1, "norm": "linf",
  "eps": 0.1,
}  # fmt: skip


def rows(method, init, values, split="test", attack=PGD, **about):
  stage = "probe" if method == "linear" else "adapt"
  return [
    {
      **dict.fromkeys(record.FIELDS),
      **ABOUT,
      **attack,
      "cell": f"{method}-{init}-{seed}",
      "stage": stage,
      "method": method,
      "init": init,
      "split": split,
      "seed": seed,
      "value": value,
      **about,
    }
    for seed, value in enumerate(values)
  ]


ROLI = rows("full", "roli", (0.80, 0.81, 0.82))
RANLI = rows("full", "ranli", (0.70, 0.72, 0.71))
PROBE = rows("linear", "roli", (0.60, 0.90, 0.81))
CLEAN = rows("full", "roli", (0.9, 0.9, 0.9), attack={"attack": "none"})


def cell(table, row, column):
  return dict(zip(table.header, table.rows[row], strict=True))[column]


def test_accuracies_are_means_over_seeds_in_percent():
  table = report.accuracies([*RANLI, *ROLI, *CLEAN])
  assert [row[1] for row in table.rows] == ["full RanLI", "full RoLI"]
  assert cell(table, 0, "PGD-20 linf 0.1") == "71.0 ± 1.0"
  assert (
    cell(table, 1, "clean") == "90.0 ± 0.0" and cell(table, 0, "clean") == ""
  )


def test_differences_are_paired_by_seed():
  table = report.differences([*RANLI, *ROLI, *PROBE])
  by_pair = {row[0]: i for i, row in enumerate(table.rows)}
  ranli = by_pair["full RoLI − full RanLI, robust"]
  assert cell(table, ranli, "mean") == "+10.0"
  assert cell(table, ranli, "each seed") == "+10.0 +9.0 +11.0"
  assert cell(table, ranli, "95% Student interval") == "[+7.5, +12.5]"
  # t = 10 sqrt(3) of two degrees of freedom, and three comparisons.
  p_holm = 3 * (1 - math.sqrt(300 / 302))
  assert float(cell(table, ranli, "p_holm")) == pytest.approx(p_holm, rel=5e-3)
  assert cell(table, ranli, "verdict") == "higher (p_holm)"
  assert "for the 3 comparisons of this table" in table.note
  probe = by_pair["full RoLI − linear probe (RoLI), robust"]
  assert cell(table, probe, "verdict") == "not separated"
  assert "linear probe (RoLI) − full RanLI, robust" in by_pair


def test_bars_say_what_roli_gains_at_each_number_of_images():
  few = rows("full", "ranli", (0.70, 0.76, 0.73), train_size=50)
  more = rows("full", "roli", (0.71, 0.75, 0.74), train_size=50, lr=0.1)
  figure = figures.bars([*few, *more, *PROBE, *RANLI, *ROLI])
  left, right = figure.axes
  assert left.get_title() == "robust backbone, 50 images"
  compared = "full RoLI − full RanLI: PGD-20 linf 0.1"
  student = "95% Student interval"
  assert left.get_xlabel() == f"{compared}\n+0.3, {student} [-2.5, +3.2]"
  assert right.get_xlabel() == f"{compared}\n+10.0, {student} [+7.5, +12.5]"


def test_the_small_head_is_compared_with_its_own():
  small = [{**row, "head_init": "small"} for row in (*ROLI, *RANLI)]
  pairs = [row[0] for row in report.differences([*ROLI, *RANLI, *small]).rows]
  assert pairs == [
    "full RoLI − full RanLI, robust",
    "full RoLI − full RoLI small head, robust",
    "full RoLI − full RanLI small head, robust",
    "full RoLI small head − full RanLI small head, robust",
  ]


def test_a_method_is_compared_with_its_own_the_probe_and_full_roli():
  lora = [rows("lora", init, (0.7, 0.8)) for init in ("ranli", "roli")]
  table = report.differences([*lora[0], *lora[1], *ROLI, *RANLI, *PROBE])
  assert {row[0].removesuffix(", robust") for row in table.rows} == {
    "lora RoLI − lora RanLI",
    "lora RoLI − linear probe (RoLI)",
    "full RoLI − lora RoLI",
    "full RoLI − full RanLI",
    "full RoLI − linear probe (RoLI)",
    "linear probe (RoLI) − full RanLI",
    "linear probe (RoLI) − lora RanLI",
  }


def test_one_seed_concludes_nothing():
  table = report.differences([*RANLI[:1], *ROLI[:1]])
  assert cell(table, 0, "verdict") == "one seed"
  assert cell(table, 0, "95% Student interval") == ""


def test_a_run_and_a_sweep_judge_alike():
  clean = rows("full", "ranli", (0.8, 0.85, 0.9), attack={"attack": "none"})
  cells = [*RANLI, *clean, *ROLI, *CLEAN]
  named = [{**row, "run": f"init={row['init']}"} for row in cells]
  ours, theirs = report.differences(named), comparison.differences(named)
  assert len(ours.rows) == 2 and ours.header[-5:] == theirs.header[-5:]
  assert [r[-5:] for r in ours.rows] == [r[-5:] for r in theirs.rows]


def test_the_twins_are_compared_method_by_method():
  twin = rows("full", "roli", (0.4, 0.4), weights="standard", lr=3e-3)
  table = report.differences([*ROLI, *twin])
  assert table.rows[0][0] == "full RoLI: robust − standard"
  assert cell(table, 0, "mean") == "+40.5"


def test_controls_are_told_apart():
  longer = rows("full", "ranli", (0.7, 0.7, 0.7), steps=120)
  small = rows("full", "ranli", (0.7, 0.7, 0.7), head_init="small")
  pairs = [row[0] for row in report.differences([*ROLI, *longer, *small]).rows]
  assert pairs == [
    "full RoLI − full RanLI of 120 steps, robust",
    "full RoLI − full RanLI small head, robust",
  ]


def test_groups_of_one_name_are_told_apart_alike():
  """Each by all that it takes: not one alone by what it happens to lack."""
  few = rows("full", "roli", (0.7, 0.7), train_size=50, lr=0.1)
  twin = rows("full", "roli", (0.6, 0.6), weights="standard", lr=0.1)
  names = list(comparison.by_name(named([*few, *ROLI, *twin, *RANLI, *PROBE])))
  assert names == [
    "full RoLI, weights robust, 50 training images",
    "full RoLI, weights robust, 200 training images",
    "full RoLI, weights standard, 200 training images",
    "full RanLI",
    "linear probe (RoLI)",
  ]
  slow = rows("full", "roli", (0.6, 0.6), lr=1e-4)
  names = list(comparison.by_name(named([*ROLI, *slow])))
  assert names == ["full RoLI, lr 0.001", "full RoLI, lr 0.0001"]
  lecun = rows("full", "roli", (0.6, 0.6), head_init="lecun")
  names = list(comparison.by_name(named([*ROLI, *lecun])))
  assert names == ["full RoLI, head kaiming_fan_out", "full RoLI, head lecun"]


def test_a_curve_is_one_seeds():
  far = rows("full", "roli", (0.3,), attack={**PGD, "eps": 0.2})
  table = report.curves([*CLEAN, *ROLI, *far, *RANLI])
  assert table.header == (
    "eps",
    "full RoLI, robust, 200 images, seed 0, PGD-20",
  )
  assert table.rows == [
    ("0", "90.0"), ("0.1", "80.0"), ("0.2", "30.0"), ("mean", "70.0"),
  ]  # fmt: skip


def test_a_grid_marks_the_rate_of_the_best_validation():
  made = []
  for lr, values in (
    (1e-3, (0.5, 0.6)),
    (1e-2, (0.7, 0.7)),
    (1e-1, (0.7, 0.7)),
  ):
    made += rows("full", "roli", values, split="val", lr=lr)
  table = report.grid(made)
  assert cell(table, 0, "rate: accuracy") == (
    "0.001: 55.0; 0.01: 70.0 (chosen); 0.1: 70.0"
  )


def test_markdown_is_a_table():
  text = report.accuracies(ROLI).markdown()
  assert "| robust | full RoLI | 0.001 | 3 |  | 81.0 ± 1.0 |" in text
  assert "(200 images, 60 steps)" in text


def test_no_rows_no_report(tmp_path):
  with pytest.raises(ValueError, match="no rows"):
    report.write(tmp_path)
  assert report.tables([]) == []
  assert figures.write([], [], tmp_path / "figures") == []
