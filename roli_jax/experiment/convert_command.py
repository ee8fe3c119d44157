"""`--mode=convert`: from one file of weights to another, checked on the way."""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from roli_jax import models, peft, trees
from roli_jax.convert import (
  Bundle,
  assumptions,
  contents,
  files,
  networks,
  origins,
  registry,
  state_dict,
)
from roli_jax.convert import bundle as bundles
from roli_jax.types import Images, Params, PyTree

T = TypeVar("T")
Fact = tuple[str, str, str]  # what, how much, which: a row of the printed table

_SIZES = (*models.SIZES, "channels")
# The fields of the config that `convert.load` takes.
LOAD_FIELDS = (
  "model", "format", "mean", "std", "num_classes", "image_size", "act",
  "norm_eps", "pool", "key", "strict", *_SIZES,
)  # fmt: skip


def run(config: Mapping[str, Any]) -> tuple[pathlib.Path, list[Fact]]:
  """Converts `config.source` and writes the result below `config.output`.

  Also writes `<model>.check.npz`: two images of noise with the model's features
  and logits of them, to compare with the original model. LoRA in a run's
  checkpoint is folded into the backbone; what another method has added goes to
  `<model>.<method>.safetensors`.

  Args:
    config: the fields of `configs/convert.py`; but for the source and the
      output, those that are told.

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
  given = {k: config[k] for k in LOAD_FIELDS if config.get(k)}
  if registry.is_name(config["source"]):
    source = origins.find(registry.named(config["source"]))
    whole, method = files.load(config["source"], **given), peft.linear()
  else:
    whole, method = _read(source, given)
  plain = whole
  if whole.params.peft:
    plain = peft.merge(whole, method) if method.scale else peft.without(whole)
  # The format is the foreign side's: the source's, or if that is ours (it has
  # no coverage), the output's.
  foreign = given.get("format", "") if whole.coverage is None else ""
  suffix = ".pth" if foreign else ".safetensors"
  if foreign == "google":
    suffix = ".npz"
  path = output / f"{plain.model.name}{suffix}"

  def save(new: pathlib.Path) -> tuple[Bundle, Fact]:
    files.save(plain, new, foreign or None)
    again = files.load(new, plain.model.name, **models.sizes(plain.model))
    return again, _check_same(plain, again, source, foreign)

  again, checked = _write(path, save)
  facts = [*_facts(plain), checked]
  if whole.params.peft:
    facts.append(_keep_added(whole, method, plain, path))
  check: Any = _outputs(whole if whole.params.peft else again)
  np.savez_compressed(output / f"{plain.model.name}.check.npz", **check)
  return path, facts


def _read(
  source: pathlib.Path, given: Mapping[str, Any]
) -> tuple[Bundle, peft.Method]:
  """Reads a file, or a run's checkpoint; returns its bundle and its method.

  Args:
    source: a file, or a directory with a bundle or a checkpoint.
    given: the fields of `LOAD_FIELDS` that the config sets.
  """
  if not source.is_dir() or any(source.glob("*.safetensors")):
    return files.load(source, **given), peft.linear()
  found, method = peft.restore(source)
  name = given.get("model", found.model.name)
  if name != found.model.name:
    raise ValueError(f"{source} is a {found.model.name}, not a {name}")
  told = {size: given[size] for size in _SIZES if size in given}
  models.check_sizes(found.model, told, str(source))
  # The format is the output's, and a checkpoint of ours assumes nothing.
  settled = ("model", "format", "strict", *_SIZES)
  rest = {field: given[field] for field in given if field not in settled}
  return files.adjusted(found, **rest), method


def _keep_added(
  whole: Bundle, method: peft.Method, plain: Bundle, path: pathlib.Path
) -> Fact:
  """Writes what the method has added, unless it is LoRA, folded into `plain`.

  Args:
    whole: with what the method has added.
    method: the method.
    plain: without it.
    path: the file that holds `plain`.
  """
  if method.scale:
    before, after = _outputs(whole)["logits"], _outputs(plain)["logits"]
    off = np.abs(before - after).max()
    return (method.name, "folded", f"logits differ by {off:.1e} at most")
  beside = path.with_name(f"{whole.model.name}.{method.name}.safetensors")
  tensors = peft.state_dict(whole)
  about = {"format": "pt", "method": method.name}
  _write(beside, lambda new: bundles.write_tensors(tensors, new, about))
  note = f"{len(tensors)} tensors, for peft.load; the check is with them"
  return (method.name, beside.name, note)


def _write(path: pathlib.Path, save: Callable[[pathlib.Path], T]) -> T:
  """Writes the file; raises if it is there already with other content.

  Args:
    path: the file.
    save: writes to the path that it is given.

  Returns:
    What `save` returns.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  new = path.with_stem(path.stem + ".new")
  try:
    result = save(new)
  except BaseException:
    new.unlink(missing_ok=True)
    raise
  if path.exists() and _content(path) != _content(new):
    new.unlink()
    raise ValueError(
      f"{path} holds other weights; give another --config.output"
    )
  new.replace(path)
  return result


def _content(path: pathlib.Path) -> tuple[Any, bytes]:
  """Returns the header and the rest; two files are equal if both are.

  The header of safetensors is parsed: its order differs each time. Of other
  files it is None.
  """
  raw = path.read_bytes()
  if path.suffix != ".safetensors":
    return None, raw
  end = 8 + int.from_bytes(raw[:8], "little")
  return json.loads(raw[8:end]), raw[end:]


def _facts(bundle: Bundle) -> list[Fact]:
  """Returns what the weights are, and what became of the file's tensors."""
  model, about = bundle.model, bundle.coverage
  size, side = trees.size(bundle.params), model.image_size
  normalised_by = about.normalised_by if about else ""
  facts = [
    ("model", model.name, f"{size:,} parameters"),
    ("classes", str(model.num_classes), ""),
    ("images", f"{side} x {side}", f"resized inside, {model.interpolation}"),
    ("mean", " ".join(f"{x:g}" for x in model.mean), normalised_by),
    ("std", " ".join(f"{x:g}" for x in model.std), ""),
  ]
  if bundle.assumed:
    facts.append(("assumed", "", assumptions.said(bundle.assumed)))
  if about is None:
    return facts
  wrapped = f"under {about.wrapped!r}" if about.wrapped else ""
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


def _check_same(
  bundle: Bundle, again: Bundle, source: pathlib.Path, foreign: str
) -> Fact:
  """Raises a RuntimeError unless what was written reads back bit for bit.

  Weights from elsewhere are also turned back into the source's own tensors.

  Args:
    bundle: what was to be written.
    again: what was read back.
    source: what `bundle` was read from.
    foreign: the format that was written, whose head may be another than ours;
      "": ours.
  """
  before, after = (
    state_dict.to_state_dict(x, foreign) if foreign else trees.paths(x.params)
    for x in (bundle, again)
  )
  same = before.keys() == after.keys() and all(
    np.array_equal(before[path], after[path]) for path in before
  )
  if not same:
    raise RuntimeError("the file that was written reads back otherwise")
  if bundle.coverage is None:
    return ("read back", "bit for bit", f"{len(before)} leaves")
  found = networks.find(contents.of(source), str(source))
  name = bundle.coverage.wrapped
  theirs = next(x for x in found if x.name == name).tensors
  back = state_dict.to_state_dict(again, state_dict.format_of(again))
  kept = set(bundle.coverage.used) - set(bundle.coverage.resampled)
  wrong = [k for k in kept if not np.array_equal(theirs[k], back[k])]
  if wrong:
    raise RuntimeError(f"these do not come back as they were: {wrong[:3]}")
  return ("back to the source's names", "bit for bit", f"{len(kept)} tensors")


def _outputs(bundle: Bundle) -> dict[str, np.ndarray]:
  """Returns two images of noise, and features and logits in full precision."""
  side = bundle.model.image_size
  shape = (2, side, side, bundle.model.channels)
  images = np.random.default_rng(0).random(shape, np.float32)

  @jax.jit
  def outputs(
    params: Params, stats: PyTree, images: Images
  ) -> dict[str, jax.Array | np.ndarray]:
    return {
      "features": bundle.model.features(params, stats, images),
      "logits": bundle.model.logits(params, stats, images),
    }

  with jax.default_matmul_precision("highest"):
    found = outputs(bundle.params, bundle.stats, images)
  return {"images": images, **jax.tree.map(np.asarray, found)}
