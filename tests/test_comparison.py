"""Runs side by side, from rows made by hand."""

import itertools
import math

import pytest

from roli_jax.results import comparison, figures, record

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


def by_column(table):
  return [dict(zip(table.header, row, strict=True)) for row in table.rows]


def test_differences_are_paired_by_seed():
  table = comparison.differences(rows())
  robust = next(
    line for line in by_column(table) if line["accuracy"].startswith("PGD")
  )
  assert robust["run"] == "recipe=ftp" and robust["mean"] == "+2.0"
  assert robust["each seed"] == "+2.0 +2.0 +2.0"
  assert robust["95% Student interval"] == "[+2.0, +2.0]"
  assert "paired" in table.note and "Student" in table.note


def differences(*points):
  """The table's lines, of pairs that differ by so many points in each seed."""
  pairs = [
    ((f"{i}",), {s: 0.5 + x / 100 for s, x in enumerate(of)},
     dict.fromkeys(range(len(of)), 0.5))
    for i, of in enumerate(points)
  ]  # fmt: skip
  return by_column(comparison.paired("", ("pair",), pairs))


# Each seed's difference from AdamW, of docs/results.md; the intervals and p
# values were computed apart from this code.
@pytest.mark.parametrize(
  "points, interval, p",
  [
    ((6.6, -0.6, 4.8, 5.2, -0.4), "[-1.1, +7.3]", 0.107),  # awp
    ((5.4, 0.8, 1.4, 1.4, -0.4), "[-1.0, +4.4]", 0.153),  # wise_ft
    ((0.8, 2.0, 0.2, 0.0, 1.4), "[-0.2, +1.9]", 0.0772),  # digrap
    ((1.4, -0.2, 3.4, 0.4, 0.2), "[-0.8, +2.8]", 0.183),  # trades
    ((-1.6, -5.8, -0.8, -4.4, -5.2), "[-6.3, -0.8]", 0.0234),  # ftp
    ((3.0, 0.8, 2.2, 1.4, 0.4), "[+0.3, +2.9]", 0.0296),  # output
  ],
)
def test_the_interval_is_students(points, interval, p):
  (line,) = differences(points)
  assert line["95% Student interval"] == interval
  assert float(line["p_holm"]) == pytest.approx(p, rel=5e-3)
  separated = "not separated" if p > 0.05 else "(p_holm)"
  assert separated in line["verdict"]


def test_a_verdict_says_what_it_rests_on():
  near = (3.0, 0.8, 2.2, 1.4, 0.4)  # p = 0.0296 alone
  far = (-9.8, -10.8, -10.2, -10.2, -9.8)
  lines = differences(near, far, (1.0, -1.0, 0.5, 0.0, -0.2))
  assert [line["verdict"] for line in lines] == [
    "higher (interval only)", "lower (p_holm)", "not separated",
  ]  # fmt: skip
  assert float(lines[0]["p_holm"]) == pytest.approx(2 * 0.02955, rel=5e-3)
  assert lines[2]["p_holm"] == "0.867"


def test_a_row_that_cannot_be_tested_says_why():
  near = (3.0, 0.8, 2.2, 1.4, 0.4)
  nan, one, equal, none = differences(
    (1.0, math.nan), (1.0,), (0.2, 0.2), (0.0, 0.0, 0.0)
  )
  assert nan["verdict"] == "not finite" and one["verdict"] == "one seed"
  for line in (nan, one):
    assert line["95% Student interval"] == line["p_holm"] == ""
  assert equal["verdict"] == "no spread, not tested"
  assert equal["p_holm"] == "1" and none["verdict"] == "not separated"
  (alone,) = differences(near)
  assert alone["p_holm"] == differences(near, (1.0,))[0]["p_holm"]
  assert alone["p_holm"] != differences(near, (0.2, 0.2))[0]["p_holm"]


def test_only_seeds_that_both_have_are_paired():
  ours = {0: 0.6, 1: 0.8, 2: 0.7, 7: 0.1}
  pairs = [
    (("some",), ours, {2: 0.5, 1: 0.5, 9: 0.9}),
    (("none",), ours, {8: 0.5}),
    (("not measured",), ours, {}),
  ]
  some, none = by_column(comparison.paired("", ("pair",), pairs))
  assert some["each seed"] == "+30.0 +20.0" and some["mean"] == "+25.0"
  # One degree of freedom: the quantile is tan(0.475 pi) = 12.706.
  assert some["95% Student interval"] == "[-38.5, +88.5]"
  assert none["verdict"] == "no seed in common" and none["p_holm"] == ""


def test_the_docs_conclude_what_their_seeds_say(root):
  lines = (root / "docs" / "results.md").read_text().splitlines()
  cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
  starts = [i for i, names in enumerate(cells) if "each seed" in names]
  assert len(starts) == 3
  for start in starts:
    body = itertools.takewhile(lambda row: len(row) > 1, cells[start + 2 :])
    shown = [dict(zip(cells[start], row, strict=True)) for row in body]
    seeds = [[float(x) for x in row["each seed"].split()] for row in shown]
    for said, again in zip(shown, differences(*seeds), strict=True):
      for name in ("95% Student interval", "p_holm", "verdict"):
        assert said[name] == again[name], said


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
  files = figures.write_sweep(rows(), tmp_path)
  assert [file.name for file in files] == ["runs.png", "frontier.png"]


def test_nothing_is_made_of_nothing():
  assert comparison.tables([]) == []
