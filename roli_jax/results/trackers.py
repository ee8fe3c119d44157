"""Trackers of experiments: what a run writes, sent to TensorBoard or W&B.

They follow the run's files: what was appended is sent, and `tracked.json` in
the run's directory says how much each tracker has. So a run that goes on
continues its curves, and one that has finished can be sent later.
"""

import contextlib
import json
import os
import pathlib
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from absl import logging

from roli_jax import distributed, specs
from roli_jax.files import extras, workdir
from roli_jax.results import record
from roli_jax.results.grouping import Attacked
from roli_jax.results.record import Record, Row


@runtime_checkable
class Tracker(Protocol):
  """One tracker, open for one run."""

  def scalar(self, stage: str, name: str, value: float, step: int) -> None:
    """Sends a number: of which stage, what it is, after how many steps."""

  def picture(self, name: str, image: np.ndarray) -> None:
    """Sends a picture [h, w, c] in [0, 1]."""

  def flush(self) -> None:
    """Writes what was sent to disk."""

  def close(self) -> None:
    """Ends the run there."""


class _TensorBoard:
  """Event files below `tensorboard/`, with a directory for each stage."""

  def __init__(
    self, path: pathlib.Path, config: Mapping[str, Any], sent: dict[str, Any]
  ):
    from tensorboardX import event_file_writer, summary
    from tensorboardX.proto import event_pb2

    del config, sent  # its files need neither
    # SummaryWriter would write in a thread, and flush before that thread has.
    self._writers: dict[str, event_file_writer.EventsWriter] = {}
    self._open = event_file_writer.EventsWriter
    self._event = event_pb2.Event
    self._summary = summary
    self._root = path / "tensorboard"

  def scalar(self, stage: str, name: str, value: float, step: int) -> None:
    self._write(stage, step, self._summary.scalar(name, value))

  def picture(self, name: str, image: np.ndarray) -> None:
    self._write("", 0, self._summary.image(name, image, dataformats="HWC"))

  def flush(self) -> None:
    for writer in self._writers.values():
      writer.flush()

  def close(self) -> None:
    for writer in self._writers.values():
      writer.close()

  def _write(self, stage: str, step: int, summary: Any) -> None:
    if stage not in self._writers:
      folder = self._root / stage
      folder.mkdir(parents=True, exist_ok=True)
      # Files are named by the second: a later one must not overwrite it.
      number = len([*folder.glob("events*")])
      self._writers[stage] = self._open(str(folder / "events"), f".{number}")
    event = self._event(step=step, wall_time=time.time(), summary=summary)
    self._writers[stage].write_event(event)


class _Wandb:
  """A run of Weights & Biases; its own variables say where, and whether online.

  Each stage's numbers stand over that stage's steps. W&B's own step counts
  what was sent, so that a run that goes on appends.
  """

  def __init__(
    self, path: pathlib.Path, config: Mapping[str, Any], sent: dict[str, Any]
  ):
    import wandb

    self._image = wandb.Image
    self._sent = sent
    self._stages: set[str] = set()
    self._run = wandb.init(
      project=os.environ.get("WANDB_PROJECT", "roli_jax"),
      name=path.name,
      id=sent.setdefault("id", uuid.uuid4().hex[:8]),
      resume="allow",
      dir=str(path),
      config=dict(config),
      # A network or a person that doesn't answer holds up no training for long.
      settings=wandb.Settings(
        console="off", login_timeout=60, init_timeout=60, finish_timeout=60
      ),
    )

  def scalar(self, stage: str, name: str, value: float, step: int) -> None:
    axis = f"{stage}/step"
    if stage not in self._stages:
      self._stages.add(stage)
      self._run.define_metric(axis, hidden=True)
      self._run.define_metric(f"{stage}/*", step_metric=axis)
    self._log({f"{stage}/{name}": value, axis: step})

  def picture(self, name: str, image: np.ndarray) -> None:
    self._log({name: self._image(image)})

  def flush(self) -> None:
    pass  # a process of its own writes

  def close(self) -> None:
    self._run.finish()

  def _log(self, values: Mapping[str, Any]) -> None:
    self._sent["step"] = self._sent.get("step", 0) + 1
    self._run.log(dict(values), step=self._sent["step"])


# What is imported, and what opens the tracker: of the run's directory, its
# config, and what `tracked.json` has of it.
TRACKERS: dict[str, tuple[str, Callable[..., Tracker]]] = {
  "tensorboard": ("tensorboardX", _TensorBoard),
  "wandb": ("wandb", _Wandb),
}


def check(config: Mapping[str, Any]) -> list[str]:
  """Returns the names in `config.track`, `tensorboard,wandb` say.

  Raises:
    ValueError: there is no tracker of that name.
    ModuleNotFoundError: its package is not installed.
  """
  names = [name for name in config.get("track", "").split(",") if name]
  for name in names:
    package, _ = specs.lookup(TRACKERS, name, "tracker")
    extras.need(package)
  return names


@contextlib.contextmanager
def following(
  path: pathlib.Path, config: Mapping[str, Any], records: Sequence[Record]
) -> Iterator[None]:
  """Sends the rows of a run as they are added, and at the end its examples.

  A tracker that fails is left out from then on, with a warning; what it lacks
  is sent when the run's command is given again.

  Args:
    path: the run's directory.
    config: the run's; `track` has the names of the trackers.
    records: the rows, of training and of tests.
  """
  names = check(config) if distributed.leads() else []
  followers = [_Follower(name, path, config) for name in names]

  def send() -> None:
    for follower in followers:
      follower.send(records)

  send()  # what was added while none followed
  for rows in records:
    rows.watch = send
  try:
    yield
  finally:
    for follower in followers:
      follower.close()


class _Follower:
  """A tracker, and how much of a run it has."""

  def __init__(self, name: str, path: pathlib.Path, config: Mapping[str, Any]):
    self._name = name
    self._path = path
    self._file = path / "tracked.json"
    # The number of rows of each file, and what the tracker itself remembers.
    self._sent: dict[str, Any] = self._known().get(name, {})
    self._tracker: Tracker | None = None
    with self._guarded():
      _, start = TRACKERS[name]
      self._tracker = start(path, config, self._sent)

  def send(self, records: Sequence[Record]) -> None:
    """Sends the rows that the tracker lacks."""
    if not self._tracker:
      return
    with self._guarded():
      for rows in records:
        first = self._sent.get(rows.path.name, 0)
        for row in rows.rows[first:]:
          _send_row(self._tracker, row)
        self._sent[rows.path.name] = len(rows.rows)
      self._note(self._tracker)

  def close(self) -> None:
    """Sends the run's examples if the tracker lacks them, and closes it."""
    if not self._tracker:
      return
    with self._guarded():
      file = self._path / "figures" / "examples.npz"
      if file.exists() and file.name not in self._sent:
        _send_examples(self._tracker, file)
        self._sent[file.name] = 1
        self._note(self._tracker)
      self._tracker.close()

  def _note(self, tracker: Tracker) -> None:
    """Writes how much the tracker has, once it has that on disk."""
    if self._known().get(self._name) != self._sent:
      tracker.flush()
      workdir.write_json(self._file, {**self._known(), self._name: self._sent})

  def _known(self) -> dict[str, Any]:
    return json.loads(self._file.read_text()) if self._file.exists() else {}

  @contextlib.contextmanager
  def _guarded(self) -> Iterator[None]:
    """Whatever a tracker raises ends that tracker, and not the training."""
    try:
      yield
    except Exception as error:  # of many types: the packages', the network's
      self._tracker = None
      first = (str(error).strip() or type(error).__name__).splitlines()[0]
      logging.warning(
        "%s gets no more of this run, which goes on; the same command, given"
        " again, sends the rest: %.300s",
        self._name,
        first,
      )


def _send_row(tracker: Tracker, row: Row) -> None:
  """Sends `train/pgd_loss` of a row of training, `test/PGD-20_linf_0.1`."""
  if row["value"] is None:  # was not finite
    return
  if "step" in row:
    attack = "clean" if row["attack"] == "none" else row["attack"]
    name, step = f"{attack}_{row['metric']}", row["step"]
  else:
    name, step = Attacked.of(row).name.replace(" ", "_"), row["steps"]
  stage = record.directory(row)
  tracker.scalar(stage, f"{row['split']}/{name}", row["value"], step)


def _send_examples(tracker: Tracker, file: pathlib.Path) -> None:
  """Sends each example as a strip: clean, the change, adversarial.

  Grey is no change, black and white are eps. Names have what an image is, and
  what the model says of it before and after.
  """
  with np.load(file) as kept:
    change = 0.5 + (kept["adv"] - kept["images"]) / (2 * kept["eps"])
    strips = np.concatenate([kept["images"], change, kept["adv"]], axis=2)
    said = zip(
      kept["labels"], kept["clean_said"], kept["adv_said"], strict=True
    )
    for strip, (label, clean, adv) in zip(strips, said, strict=True):
      name = f"examples/is_{label}_said_{clean}_then_{adv}"
      tracker.picture(name, strip.clip(0, 1))
