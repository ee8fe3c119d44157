"""Robust fine-tuning in JAX.

Submodules load when they are first named (PEP 562), so `import roli_jax` is
light and `roli_jax.attacks` brings in the attacks and nothing else.
"""

import importlib
import pkgutil

__version__ = "0.1.0"

# Of the configs a wheel has the files alone, which pkgutil takes for no module.
_SUBMODULES = {m.name for m in pkgutil.iter_modules(__path__)} | {"configs"}


def __getattr__(name: str):
  if name in _SUBMODULES:
    return importlib.import_module(f"{__name__}.{name}")
  raise AttributeError(
    f"roli_jax has no {name!r}; it has {', '.join(sorted(_SUBMODULES))}"
  )


def __dir__():
  return sorted([*globals(), *_SUBMODULES])
