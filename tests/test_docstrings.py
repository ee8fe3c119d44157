"""The examples in docstrings work as printed."""

import doctest
import importlib
import pkgutil

import pytest

import roli_jax

MODULES = [
  module.name
  for module in pkgutil.walk_packages(roli_jax.__path__, "roli_jax.")
  if "configs" not in module.name
]


def _examples():
  finder = doctest.DocTestFinder(exclude_empty=True)
  for name in MODULES:
    module = importlib.import_module(name)
    for test in finder.find(module, name):
      if test.examples:
        yield test


@pytest.mark.parametrize("test", list(_examples()), ids=lambda test: test.name)
def test_an_example_prints_what_it_says(test):
  runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
  report: list[str] = []
  runner.run(test, out=report.append)
  assert runner.tries and not runner.failures, "".join(report)
