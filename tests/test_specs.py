"""Names and numbers as configs write them."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roli_jax import specs


@dataclasses.dataclass
class Thing:
  size: int = 1
  given: str = ""


THINGS = {"thing": Thing}


@pytest.mark.parametrize(
  "text, value",
  [
    ("8/255", 8 / 255),
    ("0.1", 0.1),
    (" 2e-2 ", 0.02),
    (".5", 0.5),
    ("eps/4", 0.025),
    ("eps", 0.1),
    ("eps*1.25", 0.125),
    ("eps * 2", 0.2),
    (0.3, 0.3),
  ],
)
def test_numbers_mean_what_they_say(text, value):
  assert specs.number(text, eps=0.1) == pytest.approx(value)


@pytest.mark.parametrize(
  "text", ["", "a", "1/0", "1//2", "__import__('os')", "nan", "inf", "8/255/2"]
)
def test_what_is_no_number_is_refused(text):
  with pytest.raises(ValueError):
    specs.number(text, eps=0.1)


def test_eps_means_nothing_where_there_is_none():
  with pytest.raises(ValueError, match="8/255"):
    specs.number("eps/4")


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_survives_its_text(value):
  assert specs.number(repr(value)) == value


def test_a_spec_becomes_an_object():
  thing = specs.build(THINGS, {"name": "thing", "size": 3}, "toy", given="x")
  assert thing == Thing(3, "x")


def test_an_unknown_name_or_field_gets_the_nearest():
  with pytest.raises(ValueError, match="did you mean 'thing'"):
    specs.build(THINGS, {"name": "thin"}, "toy")
  with pytest.raises(ValueError, match="did you mean 'size'"):
    specs.build(THINGS, {"name": "thing", "sise": 3}, "toy")


def test_fields_of_other_names_must_be_blank_where_blank_is_unsaid():
  fields = {"momentum": None, "nesterov": "", "decay": 0.0}
  spec = {"name": "thing", "size": 0}
  for blank in (False, True):
    own = specs.accepted_fields(THINGS, spec | fields, "toy", blank)
    assert own == spec
  with pytest.raises(ValueError, match=r"toy 'thing' takes no 'decay': 0\.1"):
    specs.accepted_fields(THINGS, spec | {"decay": 0.1}, "toy", blank=True)


def test_fields_of_other_names_wait():
  spec = {"name": "thing", "size": 3, "momentum": 0.9}
  assert specs.accepted_fields(THINGS, spec, "toy") == {
    "name": "thing",
    "size": 3,
  }
