"""The configs that ship with the package, `roli_jax.configs.NAME`.

In a checkout they lie beside the package. A wheel has them in this file's place
(package-dir in pyproject.toml).
"""

import pathlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from configs import common as common
  from configs import pretrain as pretrain
  from configs import roli as roli

__path__ = [str(pathlib.Path(__file__).parents[2] / "configs")]
