"""What mkdocs does beside mkdocs.yml: pages link to files outside of docs/."""

import pathlib
import re
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_ROOT = pathlib.Path(__file__).parent.parent


def on_files(files: Files, config: MkDocsConfig) -> Files:
  """Makes README.md the first page, and adds the files that pages link to."""
  others = [_ROOT / "LICENSE", *sorted(_ROOT.glob("colabs/*.ipynb"))]
  names = {path.relative_to(_ROOT).as_posix(): path for path in others}
  for name, path in {"index.md": _ROOT / "README.md", **names}.items():
    files.append(File.generated(config, name, abs_src_path=str(path)))
  return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
  """Returns the page with its links as the site has them, not the checkout."""
  if page.file.src_uri == "index.md":
    return markdown.replace("](docs/", "](")
  markdown = markdown.replace("](../README.md", "](../index.md")
  return re.sub(r"\]\(\.\./", "](", markdown)
