"""Robust fine-tuning in JAX.

Submodules load when they are first named (PEP 562), so `import roli_jax` is
light and `roli_jax.attacks` brings in the attacks and nothing else.
"""

import importlib
import pkgutil
from types import ModuleType

__version__ = "0.1.0"

# Of the configs a wheel has the files alone, which pkgutil takes for no module.
_SUBMODULES = {m.name for m in pkgutil.iter_modules(__path__)} | {"configs"}

# Names that documents and notebooks printed before these modules had rooms.
_MOVED = {
  "cost": "plan.cost",
  "diagnosis": "evaluate.diagnosis",
  "exchange": "experiment.convert_command",
  "guide": "results.guide",
  "plots": "results.figures",
  "report": "results.report",
  "tabular": "results.tables",
  "tokenizer": "clip.tokenizer",
  "zeroshot": "clip.zeroshot",
}


def __getattr__(name: str) -> ModuleType:
  if name in _SUBMODULES or name in _MOVED:
    return importlib.import_module(f"{__name__}.{_MOVED.get(name, name)}")
  raise AttributeError(
    f"roli_jax has no {name!r}; it has {', '.join(sorted(_SUBMODULES))}"
  )


def __dir__() -> list[str]:
  return sorted([*globals(), *_SUBMODULES])
