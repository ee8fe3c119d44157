"""Packages that an extra of roli_jax brings: imported where they are used."""

import importlib

_EXTRA = {
  "PIL": "data",
  "grain": "data",
  "matplotlib": "plots",
  "sklearn": "data",
  "tensorflow_datasets": "data",
}


def need(*packages: str) -> None:
  """Stands before the import of packages that an extra brings.

  Args:
    *packages: names of `PIL`, `grain`, `matplotlib`, `sklearn` and
      `tensorflow_datasets`, as they are imported.

  Raises:
    ModuleNotFoundError: one is not installed; it says which extra has it.
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
