"""Where the files of named checkpoints come from, and where they lie."""

import contextlib
import pathlib
import re
from collections.abc import Iterator

from roli_jax.convert import kinds
from roli_jax.convert.registry import Checkpoint
from roli_jax.data import download
from roli_jax.files import extras

ROOT = pathlib.Path("weights")  # in the working directory, as data is
_DRIVE = (
  "https://drive.usercontent.google.com/download?export=download&confirm=t&id="
)
_PAGE = "page:"  # and an address that only a person can fetch from
CONFIG = "config.json"  # what many repositories say of their weights
# What a repository's file of weights is called, if the name doesn't say.
_FILES = (
  "model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors",
  "open_clip_pytorch_model.bin",
)  # fmt: skip


def place(checkpoint: Checkpoint) -> pathlib.Path:
  """Returns where a file lies that has not come from Hugging Face's hub.

  One that is put there by hand goes before the hub's. Its content tells its
  format, whatever its name.
  """
  prefix, _, rest = checkpoint.name.partition(":")
  return ROOT / prefix / f"{rest}.pt"


def find(checkpoint: Checkpoint) -> pathlib.Path:
  """Returns the file of a checkpoint: at its place, or in the hub's cache.

  Raises:
    ValueError: it is in neither; the message says how to get it.
  """
  if found := _found(checkpoint):
    return found
  raise ValueError(
    f"{checkpoint.name} is not at {place(checkpoint)}. To fetch it:\n"
    "  python -m roli_jax.main --mode=prepare --config=evaluate"
    f" --config.backbone.weights={checkpoint.name}\n"
    f"or put the file there; it is that of {checkpoint.origin}"
  )


def _found(checkpoint: Checkpoint) -> pathlib.Path | None:
  """Returns the file of a checkpoint, None if it is nowhere here."""
  at = place(checkpoint)
  if at.exists():
    return at
  if not checkpoint.origin.startswith("hf:"):
    return None
  repo, files, revision = _repository(checkpoint.origin)
  extras.need("huggingface_hub")
  import huggingface_hub

  for file in files:
    cached = huggingface_hub.try_to_load_from_cache(
      repo, file, revision=revision
    )
    if isinstance(cached, str):
      return pathlib.Path(cached)
  return None


def fetch(checkpoint: Checkpoint) -> Iterator[str]:
  """Downloads the file of a checkpoint, if it isn't here.

  From Hugging Face by its own library, which heeds HF_ENDPOINT, HF_HOME,
  HF_TOKEN and HF_HUB_OFFLINE, into its cache; else to `place`.

  Yields:
    What it is about to do, or has found, a line each.

  Raises:
    ValueError: the checkpoint doesn't load, or its file can't be had; the
      message says why, and where to put one that is got otherwise.
  """
  if reason := checkpoint.why_not():
    raise ValueError(f"{checkpoint.name} can't be loaded: {reason}")
  if not _found(checkpoint):
    if checkpoint.origin.startswith(_PAGE):
      raise _unavailable(checkpoint, "it is behind a page for browsers")
    yield f"fetching {checkpoint.origin}"
    if checkpoint.origin.startswith("hf:"):
      _from_hub(checkpoint)
    else:
      _from_web(checkpoint)
  yield f"{checkpoint.name} is there: {find(checkpoint)}"


def _from_web(checkpoint: Checkpoint) -> None:
  """Downloads from an address, or from Google Drive.

  A page about a quota in the file's place is no file of weights, and is
  removed.
  """
  at = place(checkpoint)
  url = re.sub("^gdrive:", _DRIVE, checkpoint.origin)
  with download.alone(at.parent):
    download.fetch(url, checkpoint.digest, at, checkpoint.size)
    try:
      kinds.of(at)
    except ValueError as error:
      at.unlink()
      raise ValueError(
        f"{url} is no file of weights: {error}. Get it otherwise, and put it at"
        f" {at}"
      ) from error


def _from_hub(checkpoint: Checkpoint) -> None:
  """Downloads from Hugging Face, into the cache of its library."""
  extras.need("huggingface_hub")
  import huggingface_hub
  from huggingface_hub import errors

  repo, files, revision = _repository(checkpoint.origin)
  if not checkpoint.model:
    with contextlib.suppress(errors.EntryNotFoundError):
      huggingface_hub.hf_hub_download(repo, CONFIG, revision=revision)
  for file in files:
    try:
      huggingface_hub.hf_hub_download(repo, file, revision=revision)
      return
    except errors.LocalEntryNotFoundError as error:
      raise _unavailable(checkpoint, str(error)) from error
    except errors.EntryNotFoundError:
      continue
    except Exception as error:  # of many types, by what goes wrong where
      raise _unavailable(checkpoint, str(error) or repr(error)) from error
  raise ValueError(
    f"{repo} has no {' or '.join(files)}; name the file, hf:{repo}/FILE"
  )


def _unavailable(checkpoint: Checkpoint, reason: str) -> ValueError:
  """Returns the error that says where to get a file and where to put it."""
  first = reason.strip().partition("\n")[0]
  return ValueError(
    f"{checkpoint.origin.removeprefix(_PAGE)} can't be had: {first:.300}\n"
    f"Get it otherwise, and put it at {place(checkpoint)}"
  )


def _repository(origin: str) -> tuple[str, tuple[str, ...], str | None]:
  """Returns OWNER/REPO, the files that are tried in turn, and the revision."""
  bare, _, revision = origin.removeprefix("hf:").partition("@")
  owner, repo, *file = bare.split("/", 2)
  return f"{owner}/{repo}", tuple(file) or _FILES, revision or None
