"""The documentation as a site: all pages are in it, and every link arrives."""

import pkgutil
import re
import subprocess
import sys

import pytest


def _listed(root):
  nav = (root / "mkdocs.yml").read_text().split("\nnav:")[1]
  return re.findall(r"(\S+\.md)$", nav, re.MULTILINE)


def test_each_page_stands_once_in_the_order_to_read_them(root):
  docs = root / "docs"
  there = {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")}
  listed = _listed(root)
  assert listed[0] == "index.md" and len(listed) == len({*listed})
  assert {*listed} == there | {"index.md"}


def test_the_reference_names_what_is_there(root):
  for page in (root / "docs" / "api").glob("*.md"):
    for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE):
      assert pkgutil.resolve_name(name)


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_fetches_nothing(root, tmp_path):
  command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
  done = subprocess.run(
    [*command, f"--site-dir={tmp_path}"],
    cwd=root,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  pages = {
    path.relative_to(tmp_path).with_suffix(".md").as_posix(): path.read_text()
    for path in tmp_path.rglob("*.html")
  }
  assert {*_listed(root)} <= pages.keys()
  for name, text in pages.items():
    parts = re.findall(r"<(?:link|script|img|iframe)\b[^>]*>", text)
    fetched = [
      tag for tag in parts if re.search(r'(href|src)="(https?:)?//', tag)
    ]
    assert not fetched, name
  for name in ("attacks.build", "evaluate.run", "models.create", "train.run"):
    where = [n for n, text in pages.items() if f'id="roli_jax.{name}"' in text]
    assert len(where) == 1, name
