"""Intervals in HTML: numbers, and a bar that shows them."""

import html
from collections.abc import Sequence

from roli_jax.results import comparison
from roli_jax.results.page.answers import Answer, Estimate
from roli_jax.results.tables import Table


def answers(found: Sequence[Answer]) -> str:
  """Returns a sentence that names the best model, and a table of all."""
  if not found:
    return "<p>There are no tests yet, and so no accuracies.</p>"
  best = found[0]
  attack = best.attack.name if best.attack else "no attack"
  said = [
    f"<b>{100 * value.value:.1f} %</b> {what}"
    for what, value in (
      ("of clean test images", best.clean),
      (f"under attack ({html.escape(attack)})", best.robust),
    )
    if value
  ]
  by = "Most robust: " if len(found) > 1 else ""
  lines = [
    f"<tr><th scope=row>{html.escape(one.name)}"
    f" <small>{html.escape(one.of)}</small></th>"
    f"{_accuracy(one.clean, 'clean')}{_accuracy(one.robust, 'robust')}</tr>"
    for one in found
  ]
  return (
    f"<p class=lead>{by}<b>{html.escape(best.name)}</b> is right on"
    f" {' and '.join(said)}.</p>"
    f"{_table(('model', 'clean, %', f'{attack}, %'), lines)}"
    "<p class=note>Test images classified as labelled, the most robust model"
    " first. In brackets, and as whiskers: intervals of 95%, Student's over"
    " seeds, or Wilson's over images where there is one seed.</p>"
  )


def differences(tables: Sequence[Table]) -> str:
  """Returns the tables of paired differences that have intervals."""
  every = [found for t in tables if (found := comparison.intervals(t))]
  if not every:
    return (
      "<p>There are no pairs of models with two seeds or more in common.</p>"
    )
  return "".join(map(_differences, every)) + (
    "<p class=note>Points of accuracy, of each line alone: 95% Student"
    " intervals. One that does not cross the line at 0 is filled. A verdict"
    " says whether it holds for all lines at once (p_holm); the tables below"
    " have each seed.</p>"
  )


def _differences(found: Sequence[comparison.Interval]) -> str:
  ends = [abs(end) for one in found for end in (one.low, one.high)]
  most = max(*ends, 1.0)
  lines = []
  for one in found:
    crosses = one.low <= 0 <= one.high
    kind = "difference open" if crosses else "difference"
    lines.append(
      f"<tr><th scope=row>{html.escape(one.name)}</th>"
      f"<td data-key={one.mean}><b>{one.mean:+.1f}</b> <span class=interval>"
      f"[{one.low:+.1f}, {one.high:+.1f}] {html.escape(one.verdict)}</span>"
      f"{_bar(one.mean, one.low, one.high, -most, most, kind)}</td></tr>"
    )
  return _table(("compared", "difference"), lines)


def _table(header: Sequence[str], lines: Sequence[str]) -> str:
  names = "".join(f"<th scope=col>{html.escape(name)}</th>" for name in header)
  return (
    f'<table class="data bars"><thead><tr>{names}</tr></thead>'
    f"<tbody>{''.join(lines)}</tbody></table>"
  )


def _accuracy(found: Estimate | None, kind: str) -> str:
  """Returns a cell: the number, its interval, and both as a bar."""
  if found is None:
    return "<td>not measured</td>"
  value, low, high = (100 * x for x in (found.value, found.low, found.high))
  return (
    f"<td data-key={value:.4f}><b>{value:.1f}</b>"
    f" <span class=interval>[{low:.1f}, {high:.1f}]</span>"
    f"{_bar(value, low, high, 0.0, 100.0, kind)}</td>"
  )


def _bar(
  value: float, low: float, high: float, start: float, end: float, kind: str
) -> str:
  """Returns a bar from 0 to the value, with the interval across its end.

  Args:
    value: the value, from `start` to `end`.
    low: where its interval begins.
    high: where it ends.
    start: the value at the left edge, at most 0.
    end: the value at the right edge.
    kind: the classes that say how it is drawn.
  """

  def span(tag: str, left: float, right: float) -> str:
    at, width = left - start, right - left
    style = f"left:{share(at):.2f}%;width:{share(width):.2f}%"
    return f'<{tag} style="{style}"></{tag}>'

  def share(length: float) -> float:
    return 100 * length / (end - start)

  drawn = span("i", min(0.0, value), max(0.0, value)) + span("s", low, high)
  zero = span("u", 0.0, 0.0) if start < 0 else ""
  return f'<span class="bar {kind}" aria-hidden=true>{drawn}{zero}</span>'
