"""What two documents say: figures, fields, files."""

import re

import pytest

from configs import convert, glyphs_roli


@pytest.mark.slow
def test_its_program_prints_its_tables(root, capsys):
  text = (root / "docs" / "scaling.md").read_text()
  (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
  exec(code, {})
  figures = re.findall(r"^\| (?:ViT-B/16|Swin-B) \|.*", text, re.M)
  assert len(figures) == 40
  assert capsys.readouterr().out.splitlines() == figures


@pytest.mark.parametrize("name", ["scaling", "troubleshooting"])
def test_fields_and_files_that_it_names_are_there(root, name):
  text = (root / "docs" / f"{name}.md").read_text()
  configs = [c.get_config().to_dict() for c in (glyphs_roli, convert)]
  for field in re.findall(r"--config\.([\w.]+\w)", text):
    assert any(has(config, field.split(".")) for config in configs), field
  for file in re.findall(r"\]\(([^)#]+)\)", text):
    assert (root / "docs" / file).is_file(), file


def has(config, path):
  for key in path:
    if not isinstance(config, dict) or key not in config:
      return False
    config = config[key]
  return True
