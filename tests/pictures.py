"""Small images, written by the tests that read them."""

import json
import pathlib

import numpy as np
from PIL import Image


def smooth(seed: int, width: int = 40, height: int = 30) -> Image.Image:
  """An RGB image that no other seed has: blurred noise."""
  rng = np.random.default_rng(seed)
  small = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
  resample = Image.Resampling.BICUBIC
  return Image.fromarray(small).resize((width, height), resample)


def write(path: pathlib.Path, seed: int = 0, **size: int) -> pathlib.Path:
  """An image at a path, whose directories are made."""
  path.parent.mkdir(parents=True, exist_ok=True)
  smooth(seed, **size).save(path)
  return path


def tree(root: pathlib.Path, **counts: int) -> pathlib.Path:
  """root/{split}/{a,b}/{i}.jpg: so many images of both classes per split."""
  seed = 0
  for split, count in counts.items():
    for name in ("a", "b"):
      for i in range(count):
        write(root / split / name / f"{i}.jpg", seed)
        seed += 1
  return root


def splits(root: pathlib.Path, images: str, **split: dict) -> pathlib.Path:
  """root/{split}.json of names and classes, and the images under a folder."""
  for seed, (name, labels) in enumerate(split.items()):
    root.mkdir(parents=True, exist_ok=True)
    (root / f"{name}.json").write_text(json.dumps(labels))
    for i, file in enumerate(labels):
      write(root / images / file, 100 * seed + i)
  return root
