"""Tables of cases of which `make test` runs a few, `make test-all` the rest."""

import collections
import itertools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
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


def pairwise(
  factors: Mapping[str, Sequence[str]],
  allowed: Callable[[dict], bool],
  apart: Iterable[set[str]] = (),
) -> list[dict[str, str]]:
  """Few cases, in which all that can stand beside each other once does.

  Greedy: each case begins with a pair that no case has yet, and takes of each
  further factor the value that brings most new pairs.

  Args:
    factors: the values of each.
    allowed: whether a case, or the part of one, may be.
    apart: pairs of factors that have nothing to do with each other: their
      values need not meet.
  """
  apart = list(apart)
  wanted = {
    frozenset([(a, x), (b, y)])
    for a, b in itertools.combinations(factors, 2)
    if {a, b} not in apart
    for x, y in itertools.product(factors[a], factors[b])
  }
  cases: list[dict[str, str]] = []
  while wanted:
    left = collections.Counter(itertools.chain.from_iterable(wanted))

    def urgency(pair, left=left):
      return sum(left[value] for value in pair), sorted(pair)

    first = max(wanted, key=urgency)
    uses = collections.Counter(x for case in cases for x in case.items())
    case = _completed(dict(first), factors, wanted, uses, allowed)
    if case is None:
      wanted.discard(first)  # the two exclude each other
      continue
    cases.append(case)
    pairs = itertools.combinations(case.items(), 2)
    wanted.difference_update(frozenset(pair) for pair in pairs)
  return cases


def _completed(case, factors, wanted, uses, allowed):
  """The case with a value of each factor, or None if there is none allowed.

  Of values that bring as many new pairs, the one that was used least.
  """
  missing = [name for name in factors if name not in case]
  if not missing:
    return {name: case[name] for name in factors} if allowed(case) else None

  def gain(value):
    here = (missing[0], value)
    pairs = (frozenset([here, other]) for other in case.items())
    return sum(pair in wanted for pair in pairs), -uses[here]

  for value in sorted(factors[missing[0]], key=gain, reverse=True):
    trial = {**case, missing[0]: value}
    found = _completed(trial, factors, wanted, uses, allowed)
    if found:
      return found
  return None
