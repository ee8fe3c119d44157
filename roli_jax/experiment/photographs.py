"""What the shipped backbones say of photographs, before and after an attack.

  python -m roli_jax.experiment.photographs --workdir=DIR [IMAGE ...]

Photographs are those of scikit-learn and matplotlib, or files of your own. Each
is cut to a square of 32 x 32. There is no label: the attack has won where the
model says other than it said of the clean image.
"""

import argparse
import functools
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from roli_jax import attacks, convert, keys, specs
from roli_jax.data import decode, transforms
from roli_jax.files import extras
from roli_jax.results import pictures
from roli_jax.threat import ThreatModel
from roli_jax.types import Images

BACKBONE = "tiny32"
# As it was pretrained at.
EPS = "8/255"
# Of the packages' photographs, boxes that are worth a look, in pixels: left,
# upper, right, lower.
_BOXES = {
  "china.jpg": ((106, 0, 533, 427), (384, 171, 640, 427)),
  "flower.jpg": ((106, 0, 533, 427), (192, 85, 448, 341)),
  "grace_hopper.jpg": ((0, 44, 512, 556), (205, 293, 512, 600)),
}


def samples() -> list[decode.Picture]:
  """Returns six squares of three photographs that come with packages.

  A temple and a flower of scikit-learn, Grace Hopper of matplotlib.
  """
  extras.need("sklearn", "matplotlib")
  from matplotlib import cbook
  from sklearn import datasets

  files = [
    *datasets.load_sample_images().filenames,
    cbook.get_sample_data("grace_hopper.jpg", asfileobj=False),
  ]
  return [
    decode.decode(file).crop(box)
    for file in map(pathlib.Path, files)
    for box in _BOXES[file.name]
  ]


def pixels(pictures: Iterable[decode.Picture], side: int) -> np.ndarray:
  """Returns the pictures' squares in the middle, [n, side, side, 3] in [0, 1].

  Args:
    pictures: of any sizes.
    side: in pixels.
  """
  chain = transforms.build((f"resize:{side}", f"center_crop:{side}"))
  rng = np.random.default_rng(0)  # that the chain draws nothing from
  cut = [transforms.apply(chain, rng, picture) for picture in pictures]
  return np.stack(cut).astype(np.float32) / 255


def attacked(bundle: convert.Bundle, images: np.ndarray) -> dict[str, Any]:
  """Looks for images of which the model says other than of the clean ones.

  Args:
    bundle: the classifier, with the names of its classes.
    images: [n, h, w, 3] in [0, 1].

  Returns:
    What `pictures.examples` takes beside the images.
  """
  threat = ThreatModel("linf", specs.number(EPS))
  pgd = attacks.build("pgd", threat, num_steps=20, step_size="eps/4")
  logits_fn = functools.partial(
    bundle.model.logits, bundle.params, bundle.stats
  )
  image_keys = keys.per_image(
    keys.root(0), np.arange(len(images), dtype=np.uint32)
  )

  @jax.jit
  def search(images: Images) -> tuple[jax.Array, jax.Array, jax.Array]:
    said = logits_fn(images).argmax(-1)
    adv = jnp.asarray(pgd(logits_fn, images, said, image_keys))
    return adv, said, logits_fn(adv).argmax(-1)

  adv, before, after = map(np.asarray, search(images))
  names = np.array(bundle.classes)
  return {
    "adv": adv,
    "labels": names[before],
    "clean_said": names[before],
    "adv_said": names[after],
    "eps": threat.eps,
  }


def run(
  photographs: Sequence[decode.Picture], folder: pathlib.Path
) -> pathlib.Path:
  """Attacks the shipped backbones on photographs, and draws what came out.

  Args:
    photographs: at least one.
    folder: where `photographs.png` is written.

  Returns:
    The picture's file.
  """
  found = {}
  for weights in sorted(convert.shipped(BACKBONE), reverse=True):
    bundle = convert.load(convert.find(BACKBONE, weights))
    images = pixels(photographs, bundle.model.image_size)
    title = f"{BACKBONE}, {weights} pretraining: what it says (linf, {EPS})"
    found[title] = attacked(bundle, images)
  folder.mkdir(parents=True, exist_ok=True)
  file = folder / "photographs.png"
  pictures.side_by_side(images, found).savefig(file, dpi=120)
  return file


def main(argv: Sequence[str] | None = None) -> None:
  """Writes `figures/photographs.png` below the workdir.

  Args:
    argv: the words after the program's name; None: the process' own.
  """
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("image", nargs="*", type=pathlib.Path)
  given = parser.parse_args(argv)
  extras.need("PIL", "matplotlib")
  photographs = []
  for file in given.image:
    try:
      photographs.append(decode.decode(file))
    except Exception as error:  # of any type
      parser.error(f"{file} can't be read: {error}")
  written = run(photographs or samples(), given.workdir / "figures")
  print(f"Written: {written}.")


if __name__ == "__main__":
  main()
