"""One device of eight simulated ones, strict broadcasting, programs kept."""

import functools
import gc
import os
import pathlib
from importlib import metadata

_ROOT = pathlib.Path(__file__).resolve().parent.parent

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
# Most programs are small and run a few times: what LLVM would gain is lost.
if "OPTIMIZED" not in os.environ:
  os.environ["XLA_FLAGS"] += (
    " --xla_backend_optimization_level=0"
    " --xla_llvm_disable_expensive_passes=true"
  )
if metadata.version("jaxlib").startswith("0.10."):
  # The older emitters compile in half the time; jaxlib 0.11 has none but new.
  os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# Of GPUs that aren't there no kernel can be timed.
os.environ["XLA_FLAGS"] += " --xla_gpu_autotune_level=0"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(_ROOT / ".jax_cache")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
# Where an operation was written takes 6% of the time, and no test reads it.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
# Traces are many small objects: looked for less often, garbage costs little.
gc.set_threshold(100_000, 50, 100)
hypothesis.settings.register_profile("fast", max_examples=30, deadline=None)
hypothesis.settings.load_profile("fast")


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
  """Each compiled program holds memory maps, of which a process has 65,530."""
  yield
  jax.clear_caches()


@pytest.fixture(scope="session")
def root() -> pathlib.Path:
  """The checkout."""
  return _ROOT


@pytest.fixture(scope="session", autouse=True)
def _on_devices():
  """`use(k)` makes everything run on the first k devices; here on one.

  With more a batch has eight rows for each, most of them idle.
  """
  from roli_jax import sharding

  mesh = sharding.mesh

  def use(k: int) -> None:
    sharding.mesh = functools.partial(mesh, devices=jax.devices()[:k])

  use(1)
  return use


@pytest.fixture
def devices(_on_devices):
  """`devices(k)` makes the rest of the test run on the first k devices."""
  yield _on_devices
  _on_devices(1)


@pytest.fixture(scope="module")
def eight_devices(_on_devices):
  """All devices, for modules whose subject they are."""
  _on_devices(8)
  yield
  _on_devices(1)


@pytest.fixture(scope="session")
def toy():
  """A random two-layer network on 6 x 6 images, its images and its labels.

  The labels are its own predictions, so that clean accuracy is 1.
  """
  rng = np.random.default_rng(0)
  images = rng.uniform(size=(40, 6, 6, 1)).astype(np.float32)
  w1 = jnp.asarray(rng.normal(size=(36, 32)) / 2, jnp.float32)
  w2 = jnp.asarray(rng.normal(size=(32, 5)), jnp.float32)

  def logits_fn(x):
    return jnp.tanh((x.reshape(x.shape[0], -1) - 0.5) @ w1) @ w2

  labels = np.asarray(logits_fn(jnp.asarray(images)).argmax(-1), np.int32)
  return logits_fn, images, labels
