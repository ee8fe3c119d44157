"""A run in several processes: how they meet, who writes, when to wait."""

import jax
from jax.experimental import multihost_utils

_SILENCE = 30  # seconds after which a process is taken for dead, and all end


def connect(
  address: str = "", num_processes: int = 0, process: int = -1
) -> None:
  """Joins the other processes of this run, if there are any.

  Where a TPU pod or Slurm says who they are, nothing has to be given. Nothing
  may have been computed before; a process that has computed stays alone. If one
  of them dies the others end as well, with an error, within a minute.

  Args:
    address: `host:port` of process 0, which all processes can reach.
    num_processes: how many there are.
    process: which of them this is, from 0.

  Raises:
    ValueError: only some of the three are given.
  """
  given = (bool(address), num_processes > 0, process >= 0)
  if any(given) and not (all(given) and process < num_processes):
    raise ValueError(
      "--coordinator=HOST:PORT, --num_processes=N and --process=K, with K from"
      f" 0 to N - 1, go together; got {address!r}, {num_processes}, {process}"
    )
  if jax.distributed.is_initialized():
    return  # by an earlier run of this process
  if all(given):
    jax.distributed.initialize(
      address, num_processes, process, heartbeat_timeout_seconds=_SILENCE
    )
    return
  try:
    jax.distributed.initialize(heartbeat_timeout_seconds=_SILENCE)
  except (ValueError, RuntimeError) as error:
    # Nobody says that there are others, or JAX has begun without them.
    alone = ("coordinator_address", "must be called before")
    if not any(words in str(error) for words in alone):
      raise


def leads() -> bool:
  """Whether this process is the one that writes files."""
  # Asks for no devices: who starts other processes leaves them free.
  return not jax.distributed.is_initialized() or jax.process_index() == 0


def wait(name: str) -> None:
  """Waits until all processes are here, so that all can read what one wrote.

  Args:
    name: the same in all processes.
  """
  if jax.distributed.is_initialized():
    multihost_utils.sync_global_devices(name)
