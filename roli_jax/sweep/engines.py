"""Where a sweep's cells run: here one by one, by Slurm, on a Ray cluster.

A cell is a command in a workdir of its own, and `run` runs one. An engine is a
loop over cells: it yields each with whether it succeeded, in the order in which
they end. A job that is lost, with its machine or to a signal, is given again,
and its run goes on from what is on disk.
"""

import dataclasses
import logging
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from roli_jax.files import extras

TRIES = 3  # how often a job is given that is lost each time

# Slurm's limit where SBATCH_TIMELIMIT sets none; what is cut off goes on.
_MINUTES = 24 * 60

# An engine gives the cells of a worker that has died to another one; nobody may
# be left in their workdirs. 1 is PR_SET_PDEATHSIG: Linux kills the process when
# its parent dies.
_TIED = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
os.execv(sys.argv[1], sys.argv[1:])
"""


@dataclasses.dataclass(frozen=True)
class Job:
  """A cell's command, and what it asks for.

  Attributes:
    name: the cell's.
    command: the command, to be run in `folder`.
    log: the file that has what it says, in a directory that is there.
    folder: an absolute path, the same on all machines.
    num_cpus: cores.
    num_gpus: GPUs of one machine.
    num_tpus: TPU chips of one machine.
  """

  name: str
  command: tuple[str, ...]
  log: pathlib.Path
  folder: pathlib.Path
  num_cpus: int = 1
  num_gpus: int = 0
  num_tpus: int = 0


Engine = Callable[[Sequence[Job]], Iterator[tuple[Job, bool]]]


def run(job: Job) -> bool:
  """Runs a cell, and returns whether it succeeded.

  Raises:
    ChildProcessError: a signal ended it: it has neither failed nor succeeded.
  """
  with (job.folder / job.log).open("w") as log:
    status = subprocess.run(
      _tied(job.command), cwd=job.folder, stdout=log, stderr=log
    ).returncode
  if status < 0:
    raise ChildProcessError(f"{job.name} was ended by signal {-status}")
  return status == 0


def _tied(command: Sequence[str]) -> list[str]:
  """Returns the command of a process that ends with its parent, on Linux."""
  if sys.platform != "linux":
    return [*command]
  return [sys.executable, "-SE", "-c", _TIED, *command]


def _here(jobs: Sequence[Job]) -> Iterator[tuple[Job, bool]]:
  """One job after the other, on this machine."""
  for job in jobs:
    try:
      yield job, run(job)
    except ChildProcessError:
      yield job, False


def _on_submitit(jobs: Sequence[Job]) -> Iterator[tuple[Job, bool]]:
  """A job of Slurm each; without Slurm, all at once on this machine."""
  # What it does to logging when it is imported closes the handlers of others.
  os.environ.setdefault("SUBMITIT_LOG_LEVEL", "NOCONFIG")
  extras.need("submitit")
  for job in jobs:
    if job.num_tpus:
      raise ValueError(
        f"{job.name} asks for TPU chips, and Slurm hands out GPUs; take"
        " --sweep_on=ray"
      )
  running = {_submitted(job): (job, 1) for job in jobs}
  try:
    while running:
      for there in [there for there in running if there.done()]:
        job, tries = running.pop(there)
        is_lost = there.exception() is not None
        if is_lost and tries < TRIES:
          running[_submitted(job)] = job, tries + 1
        else:
          yield job, not is_lost and there.result()
      time.sleep(0.5)
  finally:
    for there in running:
      there.cancel()


def _submitted(job: Job) -> Any:
  """Submits a job; returns submitit's handle of it."""
  import submitit

  executor = submitit.AutoExecutor(job.folder / job.log.parent / "submitit")
  executor.update_parameters(
    name="roli",
    timeout_min=_MINUTES,
    cpus_per_task=job.num_cpus,
    gpus_per_node=job.num_gpus or None,
  )
  return executor.submit(run, job)


def _on_ray(jobs: Sequence[Job]) -> Iterator[tuple[Job, bool]]:
  """A task of a Ray cluster each: RAY_ADDRESS's, or one on this machine."""
  extras.need("ray")
  import ray

  is_ours = not ray.is_initialized()
  if is_ours:
    ray.init(log_to_driver=False, logging_level=logging.WARNING)
  task = ray.remote(run)
  running = {
    task.options(
      num_cpus=job.num_cpus,
      num_gpus=job.num_gpus,
      resources={"TPU": job.num_tpus} if job.num_tpus else None,
      max_retries=TRIES - 1,
      retry_exceptions=[ChildProcessError],
    ).remote(job): job
    for job in jobs
  }
  try:
    while running:
      (there,), _ = ray.wait(list(running))
      job = running.pop(there)
      try:
        yield job, ray.get(there)
      except (ray.exceptions.RayError, ChildProcessError):
        yield job, False
  finally:
    if is_ours:
      ray.shutdown()


ENGINES: dict[str, Engine] = {
  "here": _here,
  "submitit": _on_submitit,
  "ray": _on_ray,
}
