"""`--mode=convert`: a file of weights to another, and what proves it."""

import filecmp
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from roli_jax import trees
from roli_jax.convert import files, foreign
from roli_jax.convert.bundle import Bundle

Facts = list[tuple[str, str, str]]

_OF_LOAD = ("model", "format", "mean", "std", "num_classes", "image_size")


def run(config: Mapping[str, Any]) -> tuple[pathlib.Path, Facts]:
  """Converts as `configs/convert.py` says.

  Beside the weights, `<model>.check.npz` holds two images of noise with the
  features and logits that the model gives them, for whoever has the original.

  Returns:
    The file that was written, and facts about it: what, how much, which.

  Raises:
    ValueError: fields that are missing; weights that can't be read, or are not
      the model's; an output that is there and of other weights.
  """
  for field in ("source", "output"):
    if not config[field]:
      raise ValueError(f"--config.{field}= is missing; see --help")
  source = pathlib.Path(config["source"]).expanduser()
  given = {k: config[k] for k in _OF_LOAD if config[k]}
  bundle = files.load(source, **given)
  # The foreign side of a conversion is the one that the format is of.
  outward = config["format"] if bundle.coverage is None else ""
  output = pathlib.Path(config["output"]).expanduser()
  suffix = ".pth" if outward else ".safetensors"
  path = output / f"{bundle.model.name}{suffix}"
  _write(bundle, path, outward)
  again = files.load(path, bundle.model.name)
  facts = [*_facts(bundle), _same(bundle, again, source)]
  seen: Any = _seen(again)
  np.savez_compressed(output / f"{bundle.model.name}.check.npz", **seen)
  return path, facts


def _write(bundle: Bundle, path: pathlib.Path, format: str) -> None:
  """The file, unless it is there and another; then it stays."""
  path.parent.mkdir(parents=True, exist_ok=True)
  new = path.with_stem(path.stem + ".new")
  files.save(bundle, new, format or None)
  if path.exists() and not filecmp.cmp(path, new, shallow=False):
    new.unlink()
    raise ValueError(
      f"{path} holds other weights; give another --config.output"
    )
  new.replace(path)


def _facts(bundle: Bundle) -> Facts:
  model, about = bundle.model, bundle.coverage
  size = trees.size(bundle.params)
  facts = [
    ("model", model.name, f"{size:,} parameters"),
    ("classes", str(model.num_classes), ""),
    ("images", f"{model.image_size} x {model.image_size}",
     f"resized inside, {model.interpolation}"),
    ("mean", " ".join(f"{x:g}" for x in model.mean), ""),
    ("std", " ".join(f"{x:g}" for x in model.std), ""),
  ]  # fmt: skip
  if about is None:
    return facts
  wrapped = f"under {about.wrapped!r}" if about.wrapped else ""
  facts[3] = (*facts[3][:2], about.normalised_by)
  facts.insert(1, ("layout", about.layout, wrapped))
  for what, keys in (
    ("tensors used", about.used),
    ("of them resampled", about.resampled),
    ("dropped: the classifier", about.dropped),
    ("ignored by rule", about.ignored),
    ("missing, left over, misshapen", ()),
  ):
    few = ", ".join(keys[:2]) + (", ..." if len(keys) > 2 else "")
    facts.append((what, str(len(keys)), few))
  return facts


def _same(
  bundle: Bundle, again: Bundle, source: pathlib.Path
) -> tuple[str, str, str]:
  """That what was written reads back bit for bit, and as it was found."""
  before, after = trees.paths(bundle.params), trees.paths(again.params)
  same = before.keys() == after.keys() and all(
    np.array_equal(before[path], after[path]) for path in before
  )
  if not same:
    raise RuntimeError("the file that was written reads back otherwise")
  if bundle.coverage is None:
    return ("read back", "bit for bit", f"{len(before)} leaves")
  found: Any = files.read(source)
  theirs = foreign.bare(found, str(source)).tensors
  back = foreign.to_state_dict(again, foreign.format_of(again))
  kept = set(bundle.coverage.used) - set(bundle.coverage.resampled)
  wrong = [
    key for key in kept if not np.array_equal(theirs[key], back[key])
  ]  # fmt: skip
  if wrong:
    raise RuntimeError(f"these do not come back as they were: {wrong[:3]}")
  return ("back to the source's names", "bit for bit", f"{len(kept)} tensors")


def _seen(bundle: Bundle) -> dict[str, np.ndarray]:
  """Two images, and what the model makes of them in full precision."""
  side = bundle.model.image_size
  shape = (2, side, side, bundle.model.channels)
  images = np.random.default_rng(0).random(shape, np.float32)

  @jax.jit
  def see(params, stats, images):
    model = bundle.model
    return model.features(params, stats, images), model.logits(
      params, stats, images
    )

  with jax.default_matmul_precision("highest"):
    features, logits = see(bundle.params, bundle.stats, images)
  return {
    "images": images,
    "features": np.asarray(features),
    "logits": np.asarray(logits),
  }
