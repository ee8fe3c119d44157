"""`--mode=convert`: a file of weights to another, and what proves it."""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from roli_jax import peft, trees
from roli_jax.convert import Bundle, files, networks, state_dict
from roli_jax.convert import bundle as bundles

Facts = list[tuple[str, str, str]]

_OF_LOAD = (
  "model", "format", "mean", "std", "num_classes", "image_size", "pool", "key",
)  # fmt: skip


def run(config: Mapping[str, Any]) -> tuple[pathlib.Path, Facts]:
  """Converts as `configs/convert.py` says.

  Beside the weights, `<model>.check.npz` holds two images of noise with the
  features and logits that the model gives them, for whoever has the original.
  What a method has added to a run's checkpoint is folded into the backbone, if
  it is LoRA; otherwise it goes to `<model>.<method>.safetensors`.

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
  output = pathlib.Path(config["output"]).expanduser()
  given = {k: config[k] for k in _OF_LOAD if config[k]}
  whole, method = _read(source, given)
  plain = whole
  if whole.params.peft:
    plain = peft.merge(whole, method) if method.scale else peft.without(whole)
  # The foreign side of a conversion is the one that the format is of.
  outward = config["format"] if whole.coverage is None else ""
  suffix = ".pth" if outward else ".safetensors"
  path = output / f"{plain.model.name}{suffix}"
  _write(path, lambda new: files.save(plain, new, outward or None))
  again = files.load(path, plain.model.name)
  facts = [*_facts(plain), _same(plain, again, source)]
  if whole.params.peft:
    facts.append(_added(whole, method, plain, path))
  seen: Any = _seen(whole if whole.params.peft else again)
  np.savez_compressed(output / f"{plain.model.name}.check.npz", **seen)
  return path, facts


def _read(source: pathlib.Path, given: dict[str, Any]):
  """The bundle of a file, or of a run's checkpoint with its method."""
  if not source.is_dir() or any(source.glob("*.safetensors")):
    return files.load(source, **given), peft.linear()
  found, method = peft.restore(source)
  name = given.pop("model", found.model.name)
  if name != found.model.name:
    raise ValueError(f"{source} is a {found.model.name}, not a {name}")
  given.pop("format", None)
  return files.adjusted(found, **given), method


def _added(
  whole: Bundle, method: peft.Method, plain: Bundle, path: pathlib.Path
) -> tuple[str, str, str]:
  """Says that LoRA is in the kernels, or writes what the method has added."""
  if method.scale:
    off = np.abs(_seen(whole)["logits"] - _seen(plain)["logits"]).max()
    return (method.name, "folded", f"logits differ by {off:.1e} at most")
  beside = path.with_name(f"{whole.model.name}.{method.name}.safetensors")
  tensors = peft.state_dict(whole)
  about = {"format": "pt", "method": method.name}
  _write(beside, lambda new: bundles.write_tensors(tensors, new, about))
  said = f"{len(tensors)} tensors, for peft.load; the check is with them"
  return (method.name, beside.name, said)


def _write(path: pathlib.Path, save: Callable[[pathlib.Path], None]) -> None:
  """The file, unless it is there and another; then it stays."""
  path.parent.mkdir(parents=True, exist_ok=True)
  new = path.with_stem(path.stem + ".new")
  save(new)
  if path.exists() and _content(path) != _content(new):
    new.unlink()
    raise ValueError(
      f"{path} holds other weights; give another --config.output"
    )
  new.replace(path)


def _content(path: pathlib.Path) -> tuple[Any, bytes]:
  """Of a file; safetensors writes its header in another order each time."""
  raw = path.read_bytes()
  if path.suffix != ".safetensors":
    return None, raw
  end = 8 + int.from_bytes(raw[:8], "little")
  return json.loads(raw[8:end]), raw[end:]


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
  facts += [("note", "", note) for note in about.notes()]
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
  found = networks.find(files.opened(source), str(source))
  name = bundle.coverage.wrapped
  theirs = next(x for x in found if x.name == name).tensors
  back = state_dict.to_state_dict(again, state_dict.format_of(again))
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
