"""Classifiers from the names of classes (Radford et al. 2021, section 3.1)."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from roli_jax import models
from roli_jax.clip.tokenizer import Tokenizer
from roli_jax.convert import Bundle
from roli_jax.types import Array, Float, Int, PyTree

# The authors' default; on ImageNet they take 80 templates.
TEMPLATES = ("a photo of a {}.",)
_BATCH = 256  # texts at a time


def class_vectors(
  text: models.Text,
  params: PyTree,
  tokenizer: Tokenizer,
  classes: Sequence[str],
  templates: Sequence[str] = TEMPLATES,
) -> Float[Array, "embed k"]:
  """Returns a column of length 1 for each class: its prompts' mean direction.

  Prompts are embedded, brought to length 1, averaged and brought to length 1
  again.

  Args:
    text: the text tower, see `convert.text_tower`.
    params: the tower's parameters.
    tokenizer: makes tokens of the tower's vocabulary.
    classes: the names of the classes, in the order of labels.
    templates: prompts with `{}` in place of a name, each for every class.

  Raises:
    ValueError: no classes or templates, one without a place for the name,
      another vocabulary than the tower's, a prompt that is too long.
  """
  for words, what in ((classes, "classes"), (templates, "templates")):
    if isinstance(words, str) or not len(words):
      raise ValueError(f"expected {what} as a list of texts, got {words!r}")
  for template in templates:
    if "{}" not in template:
      raise ValueError(
        f"template {template!r} has no {{}} in the place of a class's name"
      )
  if tokenizer.vocab_size != text.vocab:
    raise ValueError(
      f"the tokenizer has {tokenizer.vocab_size} tokens, the text tower embeds"
      f" {text.vocab}: it was trained with another vocabulary"
    )
  prompts = [t.replace("{}", name) for name in classes for t in templates]
  ids = tokenizer(prompts, text.context)
  # No token sees what follows it, so that padding is only work.
  ids = ids[:, : ids.argmax(-1).max() + 1]
  size = min(_BATCH, len(ids))
  padded = np.pad(ids, ((0, -len(ids) % size), (0, 0)))  # one shape for all
  starts = range(0, len(padded), size)
  rows = [_embed(text, params, padded[i : i + size]) for i in starts]
  vectors = jnp.concatenate(rows)[: len(ids)]
  means = vectors.reshape(len(classes), len(templates), -1).mean(1)
  return models.heads.unit(means).T


@functools.partial(jax.jit, static_argnums=0)
def _embed(
  text: models.Text, params: PyTree, ids: Int[Array | np.ndarray, "n context"]
) -> Float[Array, "n embed"]:
  embeddings: Any = text.apply({"params": params}, ids)
  return models.heads.unit(embeddings)


def head(
  text: models.Text,
  params: PyTree,
  tokenizer: Tokenizer,
  classes: Sequence[str],
  templates: Sequence[str] = TEMPLATES,
  *,
  projection: Float[Array | np.ndarray, "d embed"],
  logit_scale: float | int | None = None,
) -> PyTree:
  """Makes the parameters of a `models.heads.Cosine` for these classes.

  Args:
    text: the text tower, see `convert.text_tower`.
    params: the tower's parameters.
    tokenizer: makes tokens of the tower's vocabulary.
    classes: the names of the classes, in the order of labels.
    templates: prompts with `{}` in place of a name, each for every class.
    projection: the image tower's, from features to embeddings.
    logit_scale: the logarithm of the factor on cosines; None: the one that CLIP
      was trained to, among the tower's parameters.

  Raises:
    ValueError: the towers' embeddings differ in width; see `class_vectors`.
  """
  if projection.shape[1] != text.embed:
    raise ValueError(
      f"images are projected to width {projection.shape[1]}, texts to"
      f" {text.embed}: these are towers of two CLIPs"
    )
  scale = params["logit_scale"] if logit_scale is None else logit_scale
  vectors = class_vectors(text, params, tokenizer, classes, templates)
  return {
    "projection": {"kernel": projection},
    "kernel": np.asarray(vectors),
    "logit_scale": np.asarray(scale, vectors.dtype),
  }


def classifier(
  bundle: Bundle,
  text: models.Text,
  params: PyTree,
  tokenizer: Tokenizer,
  classes: Sequence[str],
  templates: Sequence[str] = TEMPLATES,
  *,
  logit_scale: float | int | None = None,
) -> Bundle:
  """Makes a CLIP's image tower a classifier of these classes.

  It can be evaluated as it is, saved, or fine-tuned: its head, three leaves, is
  where training starts.

  Args:
    bundle: an open_clip file, loaded without `num_classes`.
    text: the text tower, see `convert.text_tower`.
    params: the tower's parameters.
    tokenizer: makes tokens of the tower's vocabulary.
    classes: the names of at least 2 classes, in the order of labels.
    templates: prompts with `{}` in place of a name, each for every class.
    logit_scale: the logarithm of the factor on cosines; None: the one that CLIP
      was trained to.

  Raises:
    ValueError: the bundle's head is no projection; its GELU is not the text
      tower's; see `head`.
  """
  model, kernels = bundle.model, bundle.params.head
  if kernels.keys() != {"kernel"}:
    raise ValueError(
      f"expected a {model.name} whose head is CLIP's projection alone, got one"
      f" of {sorted(kernels)}; load the open_clip file without num_classes"
    )
  if getattr(model.backbone, "act", text.act) != text.act:
    raise ValueError(
      f"the {model.name} has {model.backbone.act.__name__}, the text tower"
      f" {text.act.__name__}; a CLIP's two towers have the same"
    )
  zeroshot = head(
    text,
    params,
    tokenizer,
    classes,
    templates,
    projection=kernels["kernel"],
    logit_scale=logit_scale,
  )
  module = models.heads.cosine(len(classes), text.embed)
  return dataclasses.replace(
    bundle,
    model=dataclasses.replace(model, head=module, num_classes=len(classes)),
    params=dataclasses.replace(bundle.params, head=zeroshot),
  )
