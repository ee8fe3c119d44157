"""Tables of cases of which `make test` runs a few, `make test-all` the rest."""

import collections
from collections.abc import Hashable, Iterable
from typing import Any

import pytest


def covering(
  cases: Iterable[tuple[Hashable, ...]], among: tuple[Hashable, ...] = ()
) -> list[Any]:
  """The cases as parameters of a test, all but a covering few marked slow.

  Each word of each position stands in one of the few, chosen greedily: of 5
  families x 7 methods these are 7 cases.

  Args:
    cases: tuples of the same length, of what a test's parameters take.
    among: the first words that the few may have; empty: any.
  """
  cases = list(cases)
  words = [frozenset(enumerate(case)) for case in cases]
  may = [not among or case[0] in among for case in cases]
  uses = collections.Counter(
    {word: 0 for i, case in enumerate(words) if may[i] for word in case}
  )

  def gain(i):
    """Words that are new, then words that were used less than others."""
    counts = [uses[word] for word in words[i]]
    return may[i], counts.count(0), -sum(counts)

  few = set()
  while 0 in uses.values():
    best = max(range(len(cases)), key=gain)
    few.add(best)
    uses.update(words[best])
  return [
    pytest.param(
      *case,
      id="-".join(map(str, case)),
      marks=() if i in few else pytest.mark.slow,
    )
    for i, case in enumerate(cases)
  ]


def mostly_slow(words: Iterable[Any], *fast: Any) -> list[Any]:
  """The words as parameters of a test, all but the fast ones marked slow.

  A word is a tuple where the test takes several parameters.
  """
  words = list(words)
  assert {*fast} < {*words}
  return [
    pytest.param(
      *(word if isinstance(word, tuple) else (word,)),
      marks=() if word in fast else pytest.mark.slow,
    )
    for word in words
  ]
