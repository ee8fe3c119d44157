"""What `--mode=bench` can measure, by name."""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from roli_jax.bench import against_torch, loader, passes, searches, training
from roli_jax.bench.timing import Row, row


def imports(config: Mapping[str, Any]) -> Iterator[Row]:
  """A fresh Python that imports, against one that imports JAX alone."""
  for line in ("import jax", "from roli_jax import attacks, evaluate, threat"):
    times = []
    for _ in range(5):
      started = time.perf_counter()
      subprocess.run([sys.executable, "-c", line], check=True)
      times.append(time.perf_counter() - started)
    yield row("import", line, statistics.median(times))


SUITES: dict[str, Callable[[Mapping[str, Any]], Iterator[Row]]] = {
  "import": imports,
  "compile": training.compiling,
  "step": training.steps,
  "against_torch": against_torch.against_torch,
  "memory": training.memory,
  "recipes": training.recipes,
  "seeds": training.seeds,
  "backbone": passes.backbones,
  "autoattack": searches.searches,
  "loader": loader.loader,
}
