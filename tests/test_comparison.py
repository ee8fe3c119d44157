"""Runs side by side, from rows made by hand."""

import numpy as np
import pytest

from roli_jax import comparison, metrics, plots, record

BASE = {
  "cell": "c", "stage": "adapt", "init": "roli", "head_init": "large",
  "method": "full", "backbone": "glyph_vit", "weights": "robust",
  "data": "digits", "train_size": 200, "lr": 0.003, "steps": 60,
  "split": "test", "metric": "accuracy", "n": 500, "seconds": 1.0,
}  # fmt: skip
PGD = {"attack": "pgd", "attack_steps": 20, "restarts": 1, "norm": "linf",
       "eps": 0.1}  # fmt: skip
NONE = {**dict.fromkeys(PGD), "attack": "none"}


def rows():
  made = []
  for shift, run in ((0.0, "recipe=adamw"), (0.02, "recipe=ftp")):
    for seed in range(3):
      about = {**BASE, "run": run, "seed": seed}
      made += [
        {**about, "stage": "probe", **NONE, "value": 0.9},
        {**about, **NONE, "value": 0.95},
        {**about, **PGD, "value": 0.7 + 0.01 * seed + shift},
        {**about, **NONE, "split": "val", "value": 0.9},
        {**about, **PGD, "split": "val", "value": 0.8 + shift},
      ]
      for severity in (1.0, 5.0):
        corruption = {"attack": "glyph_blur", "norm": "severity"}
        made.append(
          {**about, **NONE, **corruption, "eps": severity,
           "value": 0.8 - 0.1 * severity}
        )  # fmt: skip
  for alpha in (0, 0.5, 1):
    about = {**BASE, "run": "recipe=adamw", "seed": 0}
    stage = {"stage": f"wise_ft-{alpha:g}"}
    made += [
      {**about, **stage, **NONE, "value": 0.9 + 0.05 * alpha},
      {**about, **stage, **PGD, "value": 0.6 + 0.1 * alpha},
    ]
  return [{field: row.get(field) for field in record.FIELDS} for row in made]


def test_each_run_is_a_line_and_a_shared_probe_one():
  table = comparison.accuracies(rows())
  assert [line[0] for line in table.rows] == [
    "full probe (RoLI)", "recipe=adamw", "recipe=ftp",
  ]  # fmt: skip
  assert table.header[3:] == ("clean", "PGD-20 linf 0.1", "corruptions")
  assert table.rows[2][3:] == ("95.0 ± 0.0", "73.0 ± 1.0", "50.0 ± 0.0")


def test_runs_that_differ_in_their_seed_alone_are_one_line():
  each = [
    {**row, "run": f"lr=0.1-seed={row['seed']}"}
    for row in rows()
    if row["run"] == "recipe=adamw"
  ]
  table = comparison.accuracies(each)
  assert [line[:3] for line in table.rows] == [
    ("full probe (RoLI)", "0.003", "3"), ("lr=0.1", "0.003", "3"),
  ]  # fmt: skip


def test_differences_are_paired_by_seed():
  table = comparison.differences(rows())
  robust = next(line for line in table.rows if line[1].startswith("PGD"))
  assert robust[0] == "recipe=ftp" and robust[2] == "+2.0"
  assert robust[3] == "[+2.0, +2.0]" and robust[4] == "+2.0 +2.0 +2.0"


def test_a_frontier_has_a_table_of_its_own():
  table = comparison.frontier(rows())
  of = "recipe=adamw: full, robust"
  assert [line[:3] for line in table.rows] == [
    (of, "wise_ft", "0"), (of, "wise_ft", "0.5"), (of, "wise_ft", "1"),
  ]  # fmt: skip
  assert table.rows[1][4] == "65.0"


def test_corruptions_are_means_over_severities():
  table = comparison.corruptions(rows())
  assert table.rows[0] == ("recipe=adamw", "50.0 ± 0.0", "50.0")


def test_validation_is_what_parameters_are_chosen_by():
  table = comparison.validation(rows())
  assert [line[0] for line in table.rows] == ["recipe=adamw", "recipe=ftp"]
  assert table.rows[1][-1].startswith("82.0")


def test_rates_of_one_run_are_lines_of_their_own():
  faster = [{**row, "lr": 0.01} for row in rows() if row["stage"] == "adapt"]
  table = comparison.validation([*rows(), *faster])
  assert len(table.rows) == 4 and len({line[:2] for line in table.rows}) == 4


def test_figures_are_drawn_from_the_rows(tmp_path):
  files = plots.write_sweep(rows(), tmp_path)
  assert [file.name for file in files] == ["runs.png", "frontier.png"]


def test_nothing_is_made_of_nothing():
  assert comparison.tables([]) == []


def test_a_bootstrap_interval_covers_the_mean_it_is_of():
  rng = np.random.default_rng(0)
  covered = []
  for _ in range(200):
    low, high = metrics.bootstrap(rng.normal(size=30).tolist(), draws=500)
    covered.append(low <= 0 <= high)
  assert 0.88 < np.mean(covered) < 0.99
  assert metrics.bootstrap([1.0, 3.0]) == metrics.bootstrap([1.0, 3.0])
  assert metrics.bootstrap([1.0]) == (-np.inf, np.inf)


@pytest.mark.parametrize("values", [[2.0, 2.0, 2.0]])
def test_equal_values_have_no_spread(values):
  assert metrics.bootstrap(values) == (2.0, 2.0)
