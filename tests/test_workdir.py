"""Whose a directory is."""

import json

import pytest

from roli_jax.files import workdir

CONFIG = {"a": {"b": 1, "c": (1, 2)}, "lr": None, "cells": ({"x": 1},)}


def test_a_claimed_directory_says_whose_it_is(tmp_path):
  path = tmp_path / "new" / "run"
  assert workdir.claim(path, CONFIG) == []
  said = json.loads((path / "config.json").read_text())
  assert said["a"] == {"b": 1, "c": [1, 2]} and "jax" in said["versions"]
  assert {"commit", "workdir"} <= said.keys()
  assert CONFIG.items() <= workdir.read_config(path).items()


def test_a_package_in_somebody_elses_checkout_has_no_commit(
  root, tmp_path, monkeypatch
):
  installed = root / "tests" / "contracts" / "__init__.py"
  monkeypatch.setattr(workdir.roli_jax, "__file__", str(installed))
  workdir.claim(tmp_path, CONFIG)
  said = json.loads((tmp_path / "config.json").read_text())
  assert said["commit"] is None


def test_the_same_config_may_come_again(tmp_path):
  workdir.claim(tmp_path, CONFIG)
  assert workdir.claim(tmp_path, CONFIG) == []


def test_another_config_is_refused_with_the_difference(tmp_path):
  workdir.claim(tmp_path, CONFIG)
  other = {**CONFIG, "a": {"b": 2, "c": (1, 2)}, "new": 1}
  with pytest.raises(ValueError) as error:
    workdir.claim(tmp_path, other)
  assert "a.b: 1 -> 2" in str(error.value)
  assert "new: 'absent' -> 1" in str(error.value)
  assert len(str(error.value).splitlines()) <= 6


def test_a_run_of_before_a_field_goes_on_without_it(tmp_path):
  workdir.claim(tmp_path, {"data": {"root": "x"}})
  data = {"root": "x", "layout": "", "download": False}
  assert workdir.read_config(tmp_path)["data"] == data
  assert workdir.claim(tmp_path, {"data": data}) == []
  assert workdir.claim(tmp_path, {"data": {**data, "download": True}}) == []
  assert workdir.claim(tmp_path, {"data": data, "track": "wandb"}) == []
  with pytest.raises(ValueError, match=r"data\.layout: '' -> 'classes'"):
    workdir.claim(tmp_path, {"data": {**data, "layout": "classes"}})


def test_a_backbone_of_before_has_the_pool_and_key_of_its_file(tmp_path):
  workdir.claim(tmp_path, {"backbone": {"name": "vit_b16"}})
  now = {"backbone": {"name": "vit_b16", "pool": "", "key": ""}}
  assert workdir.claim(tmp_path, now) == []


def test_a_run_of_before_averages_goes_on_without_one(tmp_path):
  before = {"adapt": {"loss": {"name": "at"}}, "num_images": 0}
  workdir.claim(tmp_path, before)
  stage = {"loss": {"name": "at", "smoothing": 0.0}, "ema": 0.0}
  now = {**before, "adapt": stage, "num_val_images": 0}
  assert workdir.claim(tmp_path, now) == []
  with pytest.raises(ValueError, match=r"adapt\.ema: 0\.0 -> 0\.9"):
    workdir.claim(tmp_path, {**now, "adapt": {**stage, "ema": 0.9}})


def test_other_versions_warn(tmp_path):
  workdir.claim(tmp_path, CONFIG)
  file = tmp_path / "config.json"
  said = json.loads(file.read_text())
  said["versions"]["jax"] = "0.1"
  file.write_text(json.dumps(said))
  (warning,) = workdir.claim(tmp_path, CONFIG)
  assert warning.startswith("jax was 0.1")


def test_what_can_not_be_a_directory_is_refused(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match="can't be made"):
    workdir.claim(tmp_path / "file" / "run", CONFIG)


def test_an_empty_directory_holds_no_run(tmp_path):
  with pytest.raises(ValueError, match=r"config\.json"):
    workdir.read_config(tmp_path)
