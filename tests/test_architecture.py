"""What docs/architecture.md prints works, and names what is there."""

import re

from roli_jax import attacks


def test_the_worked_example_adds_an_attack(root, capsys, monkeypatch):
  monkeypatch.setattr(attacks, "ATTACKS", dict(attacks.ATTACKS))
  text = (root / "docs" / "architecture.md").read_text()
  (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
  names: dict = {}
  exec(code, names)
  result = names["result"]
  assert result.clean.all() and not result.invalid.any()
  assert "noise" in set(result.broken_by)
  assert "'noise':" in capsys.readouterr().out


def test_it_names_files_that_are_there(root):
  text = (root / "docs" / "architecture.md").read_text()
  for name in re.findall(r"`([a-z0-9_]+(?:/[a-z0-9_]+)*\.py)`", text):
    assert (root / "roli_jax" / name).is_file(), name
