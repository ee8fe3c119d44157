"""Accelerators by name, and described to their compilers.

XLA's compilers for TPUs and NVIDIA's GPUs run without the chip: they are told
which devices there would be.
"""

import dataclasses
import importlib.util
import math
import os
from typing import Any

from roli_jax import specs


@dataclasses.dataclass(frozen=True)
class Chip:
  """What one device is, as JAX counts devices: of a TPU v4, half a chip.

  Attributes:
    platform: `tpu` or `cuda`.
    peak: its peak in dense products of bfloat16, FLOP/s.
    bandwidth: of its main memory, bytes/s.
    memory: bytes of it that programs may use. Of a TPU, what its compiler
      gives out; of a GPU all that it has, of which JAX takes three quarters
      unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
    described: of a GPU, the fields of XLA's `GpuTargetConfigProto` that differ
      between GPUs.
  """

  platform: str
  peak: float
  bandwidth: float
  memory: int
  described: str = ""


_GIB = 2**30


def _gpu(
  name: str,
  cores: int,
  fpus: int,
  shared: int,
  optin: int,
  l2: int,
  clock: float,
  major: int,
  chip: Chip,
) -> Chip:
  """The GPU, described; sizes in bytes, the clock in GHz."""
  fields = {
    "shared_memory_per_core": shared,
    "shared_memory_per_block_optin": optin,
    "core_count": cores,
    "fpus_per_core": fpus,
    "l2_cache_size": l2,
    "clock_rate_ghz": clock,
    "memory_bandwidth": int(chip.bandwidth),
    "device_memory_size": chip.memory,
    "cuda_compute_capability": f"{{ major: {major} minor: 0 }}",
    # The same for all of them.
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "threads_per_core_limit": 2048,
    "shared_memory_per_block": 49152,
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
    "block_dim_limit_x": 2147483647,
    "block_dim_limit_y": 65535,
    "block_dim_limit_z": 65535,
  }
  # "name: value" of a number, "name { ... }" of a message.
  lines = [
    f"{k} {v}" if str(v).startswith("{") else f"{k}: {v}"
    for k, v in fields.items()
  ]
  return dataclasses.replace(
    chip,
    described="\n".join(
      (
        "gpu_device_info {",
        *lines,
        "}",
        'platform_name: "CUDA"',
        "dnn_version_info { major: 9 minor: 8 patch: 0 }",
        "runtime_version { major: 12 minor: 8 patch: 0 }",
        f'device_description_str: "{name}"',
      )
    ),
  )


# TPUs, peak and bandwidth: Google, docs.cloud.google.com/tpu/docs/{v4,v5e,
# v5p,v6e}; memory: what libtpu 0.0.42 gives out ("exceeds available HBM").
# GPUs, peak: NVIDIA's data sheets of the SXM boards, whose figures "with
# sparsity" are twice the dense ones (nvidia.com/en-us/data-center/h100, /h200,
# /a100); all else: openxla/xla, xla/backends/gpu/target_config/specs.
CHIPS = {
  "v4": Chip("tpu", 275e12 / 2, 1200e9 / 2, int(15.25 * _GIB)),
  "v5e": Chip("tpu", 197e12, 819e9, int(15.75 * _GIB)),
  "v5p": Chip("tpu", 459e12, 2765e9, int(95.74 * _GIB)),
  "v6e": Chip("tpu", 918e12, 1638e9, int(31.25 * _GIB)),
  "a100": _gpu(
    "NVIDIA A100-SXM4-80GB", 108, 64, 167936, 166912, 41943040, 1.41, 8,
    Chip("cuda", 312e12, 2039e9, 85_100_068_864),
  ),
  "h100": _gpu(
    "NVIDIA H100 80GB HBM3", 132, 128, 233472, 232448, 52428800, 1.98, 9,
    Chip("cuda", 989e12, 3352e9, 84_942_979_072),
  ),
  "h200": _gpu(
    "NVIDIA H200 141GB HBM3e", 132, 128, 233472, 232448, 52428800, 1.98, 9,
    Chip("cuda", 989e12, 4800e9, 151_397_597_184),
  ),
}  # fmt: skip

# What must be installed to compile for a platform, beside the package.
_COMPILERS = {
  "tpu": ("libtpu", 'pip install "jax[tpu]=={jax}"'),
  "cuda": (
    "jax_cuda12_plugin",
    "pip install --no-deps jax-cuda12-plugin=={jax} jax-cuda12-pjrt=={jax}"
    " nvidia-cuda-nvcc-cu12",
  ),
}


@dataclasses.dataclass(frozen=True)
class Target:
  """Devices to compile for.

  Attributes:
    name: as the user wrote it, `v5e:2x4` or `h100:8`.
    kind: a key of `CHIPS`.
    shape: of TPUs the topology, (2, 4); of GPUs (8,).
  """

  name: str
  kind: str
  shape: tuple[int, ...]

  @property
  def chip(self) -> Chip:
    """What each device is."""
    return CHIPS[self.kind]

  @property
  def num_devices(self) -> int:
    """How many devices JAX sees: of a v4, two a chip."""
    return math.prod(self.shape) * (2 if self.kind == "v4" else 1)

  def devices(self) -> list[Any]:
    """The devices, described and not there.

    To be asked for in a process with the variables of `environment`.

    Raises:
      ValueError: the compiler knows no such topology.
    """
    from jax.experimental import topologies

    chip = self.chip
    options: dict[str, Any] = {}
    shape = "x".join(map(str, self.shape))
    name = f"{self.kind}:{shape}"
    if chip.platform == "cuda":
      name = self.kind
      options = {"topology": f"1x1x{shape}", "target_config": chip.described}
    elif math.prod(self.shape) == 1:
      options = {"chips_per_host_bounds": (1, 1, 1)}
    try:
      described = topologies.get_topology_desc(
        platform=chip.platform, topology_name=name, **options
      )
    except Exception as error:  # each compiler has a kind of its own
      line = str(error).strip().splitlines()[0]
      raise ValueError(f"target={self.name}: {line}") from error
    return list(described.devices)

  def environment(self) -> dict[str, str]:
    """The variables that a process needs, from before it imports JAX."""
    # JAX can't read back what it has kept for a chip that isn't there.
    ours = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    if self.chip.platform == "tpu":
      # No metadata server is asked, and several processes may compile at once.
      return ours | {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_LOG_DIR": "disabled",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
      }
    # Nothing can be timed here, so no kernel is chosen by its time.
    flags = os.environ.get("XLA_FLAGS", "")
    return ours | {"XLA_FLAGS": f"{flags} --xla_gpu_autotune_level=0".strip()}


def named(text: str) -> Target:
  """The target that `KIND:SHAPE` names.

  Raises:
    ValueError: an unknown kind, or a shape that is none.
  """
  kind, _, shape = text.partition(":")
  chip = specs.lookup(CHIPS, kind, "target")
  sides = shape.split("x")
  wanted = (
    "a number of GPUs, as h100:8"
    if chip.platform == "cuda"
    else (
      f"a topology, as {kind}:" + ("2x2x1" if kind in ("v4", "v5p") else "2x4")
    )
  )
  if not all(side.isdigit() and int(side) for side in sides) or (
    chip.platform == "cuda" and len(sides) != 1
  ):
    raise ValueError(f"target={text}: after the colon stands {wanted}")
  return Target(text, kind, tuple(map(int, sides)))


def parse(text: str) -> Target:
  """`named`, of a target to compile for.

  Raises:
    ValueError: there is no such target, or no compiler for it.
  """
  target = named(text)
  module, command = _COMPILERS[target.chip.platform]
  if importlib.util.find_spec(module) is None:
    import jax

    raise ValueError(
      f"target={text} needs XLA's compiler for it, which needs no such chip:\n"
      + command.format(jax=jax.__version__)
    )
  return target
