"""Robust accuracy of any function, image by image.

An attack never judges itself: what it claims is classified by a fresh forward
pass at highest precision, and its distance is measured in float64 on the host.
Each image's result depends on that image, the attack and the seed, not on
which images it shares a batch with, nor on interruptions.

`run` is the way in. Behind it, in the order of an evaluation: `inputs` refuses
arguments that can't be meant, `tracing` and `classifier` put the function on
the devices, `engine` decides who attacks whom and judges what was found,
`batching` packs searches into batches, `ledger` keeps what an attack's jobs
have found, `result` is what comes out. `checks` tests in each evaluation
whether its number can be trusted; `diagnosis` does so by attacks of its own.
`host` makes functions of those that JAX can't trace; `convolutions` have fast
gradients on CPUs.
"""

import dataclasses
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from roli_jax import attacks
from roli_jax.evaluate import classifier, inputs
from roli_jax.evaluate.classifier import Examples
from roli_jax.evaluate.engine import Evaluation
from roli_jax.evaluate.host import foreign
from roli_jax.evaluate.result import Result
from roli_jax.types import PyTree


def run(
  logits_fn: Callable[..., Any],
  images: np.ndarray,
  labels: np.ndarray,
  attack: attacks.Attack | None,
  *,
  params: PyTree = None,
  seed: int = 0,
  batch_size: int = 128,
  indices: np.ndarray | None = None,
  stochastic: bool = False,
  save: str | os.PathLike[str] | None = None,
  dtype: str | None = None,
) -> Result:
  """Attacks each image that is classified as labelled, and judges the result.

  Of a targeted attack each image that is not at its target yet; see `Result`.

  Of an ensemble such as AutoAttack each attack sees what those before it left.
  Jobs (an image, with a target or a restart) are packed into few fixed sizes
  of batches; who falls leaves at once.

  Args:
    logits_fn: `(images) -> logits`, or `(params, images) -> logits` if params
      are given; then other params of the same shapes compile nothing. With
      `stochastic` it takes a key last. It may read what it likes outside its
      arguments: each call sees that as it is then. -inf masks a class.
    images: [n, h, w, c], floats in the box of the threat model; attacked and
      judged in float32.
    labels: [n], integers within the logits' width; the targets, of a targeted
      attack.
    attack: None measures clean accuracy alone.
    params: the first argument of `logits_fn`, a tree of arrays.
    seed: decides the attacks' noise, an int >= 0.
    batch_size: images attacked at once.
    indices: who each image is, 0..n-1 by default; keys are folded from (seed,
      index, attack, job) and from nothing else.
    stochastic: whether the function draws from a key. Each image is then seen
      alone, with a key of its own, and judged by the majority of 20 draws.
    save: a directory that progress goes to after each bucket of work. The same
      call with the same directory goes on where it stopped. It knows the model
      by its params and its clean logits; what was broken is judged again.
    dtype: `bfloat16` for the attacks' passes, to which images and params are
      cast; claims are still judged as they are. None casts nothing.

  Raises:
    ValueError: images, labels or indices that can't be meant; a function that
      can't be traced, whose outputs are no logits, or which has no derivative
      where the attack needs one; progress of another evaluation.
  """
  images = np.asarray(images)
  function = classifier.make(
    logits_fn,
    params,
    inputs.image_shape(images),
    batch_size,
    stochastic=stochastic,
    dtype=dtype,
    seed=seed,
  )
  return run_on(function, images, labels, attack, indices=indices, save=save)


def run_on(
  function: classifier.Classifier,
  images: np.ndarray,
  labels: np.ndarray,
  attack: attacks.Attack | None,
  *,
  indices: np.ndarray | None = None,
  save: str | os.PathLike[str] | None = None,
  checked: bool = True,
) -> Result:
  """`run`, of a function that is a classifier on the devices already.

  Not `checked`, the result lacks the checks that take passes of their own, as
  for a validation, whose accuracies alone are read.
  """
  started = time.perf_counter()
  images, labels = np.asarray(images), np.asarray(labels)
  indices = np.arange(len(images)) if indices is None else np.asarray(indices)
  inputs.check_inputs(images, labels, indices, attack)
  if attack is not None:
    function = dataclasses.replace(function, targeted=attack.targeted)
  inputs.check_function(function, labels, attack)
  examples = Examples(
    images.astype(np.float32, copy=False),  # nobody writes to it
    labels.astype(np.int32),  # 8 bits don't count 300 classes
    indices.astype(np.int64),
  )
  now = Evaluation(function, examples, attack, save, checked)
  if attack is not None:
    attack.run_in(now)
  return now.result(time.perf_counter() - started)


__all__ = ["Result", "foreign", "run", "run_on"]
