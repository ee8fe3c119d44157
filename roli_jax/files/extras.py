"""Packages that an extra of roli_jax brings: imported where they are used."""

import importlib

_EXTRA = {  # package -> extra
  "PIL": "data",
  "datasets": "hub",
  "grain": "data",
  "huggingface_hub": "hub",
  "matplotlib": "plots",
  "pyarrow": "data",
  "sklearn": "data",
  "tensorflow_datasets": "data",
}


def need(*packages: str) -> None:
  """Imports packages that an extra brings, to be called before their import.

  Args:
    *packages: `PIL`, `datasets`, `grain`, `huggingface_hub`, `matplotlib`,
      `pyarrow`, `sklearn` or `tensorflow_datasets`, as they are imported.

  Raises:
    ModuleNotFoundError: one is not installed; the message has the extra.
  """
  for package in packages:
    try:
      importlib.import_module(package)
    except ModuleNotFoundError as error:
      raise ModuleNotFoundError(
        f"{error.name} is not installed; it comes with"
        f' pip install "roli_jax[{_EXTRA[package]}]"',
        name=error.name,
      ) from error
