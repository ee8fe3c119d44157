"""Directories to Hugging Face's hub, by the library huggingface_hub.

That library's own settings hold: `HF_ENDPOINT`, the token in `HF_TOKEN` or of
`hf auth login`, `HF_HUB_OFFLINE`, proxies.
"""

import contextlib
import pathlib
from collections.abc import Iterable, Iterator

from roli_jax.files import extras


def make(repo: str) -> str:
  """Makes a repository of a model, public, unless it is there already.

  Args:
    repo: `OWNER/NAME`.

  Returns:
    Its address.

  Raises:
    ValueError: the hub can't be reached, or doesn't let us; the name can't be.
  """
  extras.need("huggingface_hub")
  import huggingface_hub

  with _told(repo):
    return str(huggingface_hub.HfApi().create_repo(repo, exist_ok=True))


def send(repo: str, folder: pathlib.Path, names: Iterable[str]) -> str:
  """Uploads files to a repository, in one commit.

  Args:
    repo: `OWNER/NAME`, which is there.
    folder: the directory of the files.
    names: their paths in it, and in the repository.

  Returns:
    The commit's address.

  Raises:
    ValueError: as of `make`.
  """
  import huggingface_hub

  operations = [
    huggingface_hub.CommitOperationAdd(name, str(folder / name))
    for name in names
  ]
  with _told(repo):
    return (
      huggingface_hub.HfApi()
      .create_commit(
        repo, operations, commit_message="By roli_jax --mode=publish"
      )
      .commit_url
    )


@contextlib.contextmanager
def _told(repo: str) -> Iterator[None]:
  """Raises a ValueError in place of whatever the library does."""
  try:
    yield
  except Exception as error:  # of many types, by what goes wrong where
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    status = getattr(getattr(error, "response", None), "status_code", 0)
    hint = (
      "\nLog in by `hf auth login`, or set HF_TOKEN to a token that writes."
    )
    raise ValueError(
      f"{repo} can't be uploaded: {first:.300}"
      + (hint if status in (401, 403) else "")
    ) from error
