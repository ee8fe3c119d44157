"""What a stage carries: where it starts, and its checkpoints on disk."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp

from roli_jax import convert, keys, models, optim, sharding, state
from roli_jax.experiment import build
from roli_jax.experiment.program import Program, build_program
from roli_jax.experiment.run import (
  Run,
  fingerprint,
  load_whole,
  load_zeroshot,
)
from roli_jax.experiment.stages import ZEROSHOT, Stage
from roli_jax.files import checkpoint
from roli_jax.types import Array, Key, Params, Variables

Meta = dict[str, Any]  # of a checkpoint: plain JSON
# Returns the variables of a stage's best checkpoint.
Best = Callable[[Stage], Variables]


def initial_variables(run: Run, stage: Stage) -> Variables:
  """Returns the pretrained backbone under a random head, or all of it random.

  With `head_init=zeroshot`, and where a pretraining goes on from weights, the
  head is the weights' own.
  """
  model = build.build_model(run, stage)
  key = keys.root(stage.seed)
  if stage.head_init == ZEROSHOT:
    bundle = load_zeroshot(run, stage.weights)
    added = _init_but_backbone(model, key).peft
    return dataclasses.replace(bundle.params, peft=added), bundle.stats
  model = convert.with_classes(
    model, model.num_classes, head_init=stage.head_init
  )
  if stage.name == "pretrain":
    if weights := run.config["backbone"]["weights"]:
      bundle = load_whole(run, weights)
      return bundle.params, bundle.stats
    return jax.jit(model.init)(key)
  bundle = run.load(stage.weights)
  params = dataclasses.replace(
    _init_but_backbone(model, key), backbone=bundle.params.backbone
  )
  return params, bundle.stats


@functools.partial(jax.jit, static_argnums=0)
def _init_but_backbone(model: models.Model, key: Key[Array, ""]) -> Params:
  """Draws the head and what the method adds, without a backbone beside them."""
  params, _ = model.init(key)
  return dataclasses.replace(params, backbone={})


def start_variables(run: Run, stage: Stage, best: Best) -> Variables:
  """Returns what the stage starts from: weights, or its probe's best.

  Args:
    run: the run.
    stage: the stage.
    best: returns the variables of an earlier stage's best checkpoint. Leaves
      that this stage's method adds to them are drawn.
  """
  if not stage.start:
    return initial_variables(run, stage)
  params, stats = best(stage.start)
  if adds_leaves(run, stage):
    added = initial_variables(run, stage)[0].peft
    params = dataclasses.replace(params, peft=added)
  return params, stats


def adds_leaves(run: Run, stage: Stage) -> bool:
  """Whether the stage's method adds parameters to the backbone."""
  abstract = build_program(run, stage).abstract_state
  return bool(jax.tree.leaves(abstract.params.peft))


def describe(run: Run, stage: Stage) -> Meta:
  """Returns what each checkpoint of the stage records of its model and origin.

  Plain JSON. `made_of` is a digest of a probe's weights and images, else "";
  `adds` says whether the method has added parameters to the backbone.
  """
  return {
    "stage": dataclasses.asdict(stage),
    "config": run.config,
    "model": models.to_spec(build.build_model(run, stage)),
    "method": build.method_fields(run, stage),
    "made_of": fingerprint(run, stage) if stage.name == "probe" else "",
    "adds": adds_leaves(run, stage),
  }


def restore_or_start(
  run: Run,
  stage: Stage,
  checkpoints: ocp.CheckpointManager,
  best: Best,
) -> tuple[state.TrainState, Key[Array, ""], Meta]:
  """Restores the stage's latest checkpoint, or starts the stage.

  Args:
    run: the run.
    stage: the stage.
    checkpoints: the manager of the stage's checkpoints.
    best: as `start_variables` takes it.

  Returns:
    The state, placed on the mesh; the stage's key; the checkpoint's meta data,
    of a fresh stage `{"step": None, "history": [], "seconds": 0.0}`.
  """
  program = build_program(run, stage)
  abstract = program.abstract_state
  key = keys.stream(keys.root(stage.seed), stage.name)
  last = checkpoints.latest_step()
  if last is not None:
    items = checkpoint.restore(
      checkpoints,
      last,
      model=(abstract.params, abstract.stats),
      rest=_rest(program, abstract, key),
    )
    params, stats = items["model"]
    done, opt_state, key, memory, *raw = items["rest"]
    restored = state.TrainState(
      step=done,
      params=params,
      stats=stats,
      opt_state=opt_state,
      memory=memory,
    )
    if raw:
      average, _ = program.method.split(params)
      restored = restored.training_on(raw[0], average)
    return restored, key, checkpoint.restore_meta(checkpoints, last)
  fresh = program.create(*start_variables(run, stage, best))
  # The rate is data in the state, so that stages of all rates share a program.
  opt_state = optim.at_rate(fresh.opt_state, stage.lr)
  fresh = dataclasses.replace(fresh, opt_state=opt_state)
  fresh = sharding.place(fresh, abstract)
  key = sharding.replicate(key, run.mesh)
  return fresh, key, {"step": None, "history": [], "seconds": 0.0}


def _rest(
  program: Program, now: state.TrainState, key: Key[Array, ""]
) -> tuple[Any, ...]:
  """Returns what a checkpoint holds beside the variables that are tested.

  Where those are averages, the trained leaves themselves are the last item.
  """
  raw = (program.method.split(now.params)[0],) if now.average else ()
  return now.step, now.opt_state, key, now.memory, *raw


def save(
  run: Run,
  stage: Stage,
  checkpoints: ocp.CheckpointManager,
  now: state.TrainState,
  key: Key[Array, ""],
  meta: Meta,
) -> None:
  """Saves a checkpoint of the step that `meta["step"]` names.

  Args:
    run: the run.
    stage: the stage.
    checkpoints: the manager of the stage's checkpoints.
    now: the state after that step.
    key: the stage's key.
    meta: `describe`, with the step, the history of validations, whose last
      entry scores the checkpoint, and the seconds of training so far.
  """
  batch_size = run.config[stage.name]["batch_size"]
  checkpoint.save(
    checkpoints,
    meta["step"],
    model=now.variables,
    rest=_rest(build_program(run, stage), now, key),
    meta={**meta, "images_seen": meta["step"] * batch_size},
    score=meta["history"][-1][stage.selected_by],
  )
