"""Rows on disk."""

import json

import numpy as np
import pytest

from roli_jax.results import record


@pytest.fixture
def path(tmp_path):
  return tmp_path / "results.jsonl"


def test_a_row_has_every_field(path):
  record.Record(path).add({"cell": "a", "value": np.float32(0.5), "n": 3})
  row = json.loads(path.read_text())
  assert tuple(row) == record.FIELDS
  assert row["value"] == 0.5 and row["eps"] is None


def test_no_row_stands_twice_though_it_says_something_else(path):
  rows = record.Record(path)
  rows.add({"cell": "a", "eps": 0.1, "value": 0.5})
  rows.add({"cell": "a", "eps": 0.1, "value": 0.6, "seconds": 1.0, "run": "b"})
  rows.add({"cell": "a", "eps": 0.2, "value": 0.5})
  assert [row["eps"] for row in record.read(path)] == [0.1, 0.2]
  assert {"cell": "a", "eps": 0.2} in record.Record(path)


def test_a_row_of_more_images_takes_the_place_of_one_of_fewer(path):
  rows = record.Record(path)
  rows.add({"cell": "a", "value": 0.5, "n": 20})
  rows.add({"cell": "b", "value": 0.5, "n": 20})
  assert {"cell": "a"} in rows and {"cell": "a", "n": 20} in rows
  assert {"cell": "a", "n": 21} not in rows
  rows.add({"cell": "a", "value": 0.4, "n": 30})
  rows.add({"cell": "b", "value": 0.3, "n": 10})
  wanted = [("a", 0.4, 30), ("b", 0.5, 20)]
  assert [(r["cell"], r["value"], r["n"]) for r in rows.rows] == wanted
  assert record.read(path) == rows.rows == record.Record(path).rows


def test_a_torn_line_is_dropped_and_written_again(path):
  record.Record(path).add({"cell": "a"})
  whole = path.read_bytes()
  path.write_bytes(whole + whole[:20])
  assert len(record.read(path)) == 1
  rows = record.Record(path)
  rows.add({"cell": "b"})
  assert [row["cell"] for row in record.read(path)] == ["a", "b"]


def test_what_is_not_finite_is_null(path):
  record.Record(path).add({"cell": "a", "value": float("nan")})
  assert record.read(path)[0]["value"] is None


def test_rows_are_found_by_their_fields(path):
  rows = record.Record(path)
  for cell in "aab":
    rows.add({"cell": cell, "seed": len(rows.rows)})
  assert len(record.where(rows.rows, cell="a")) == 2
  assert record.read(path.with_name("none")) == []
