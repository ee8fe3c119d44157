"""Packages that an extra of roli_jax brings: imported where they are used."""

import importlib

_EXTRA = {  # package -> extra
  "PIL": "data",
  "datasets": "hub",
  "grain": "data",
  "huggingface_hub": "hub",
  "matplotlib": "plots",
  "plotly": "plots",
  "pyarrow": "data",
  "ray": "ray",
  "sklearn": "data",
  "submitit": "slurm",
  "tensorboardX": "track",
  "tensorflow_datasets": "data",
  "wandb": "track",
}


def need(*packages: str) -> None:
  """Imports packages that an extra brings, to be called before their import.

  Args:
    *packages: by the names that they are imported by.

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
