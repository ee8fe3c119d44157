"""The small random network that reference numbers were made with."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

_FOLDER = pathlib.Path(__file__).parent / "fixtures" / "attacks"


def load(name: str) -> dict[str, np.ndarray]:
  """The arrays of a fixture, images as NHWC."""
  with np.load(_FOLDER / f"{name}.npz") as file:
    arrays = dict(file)
  return {
    key: value.transpose(0, 2, 3, 1) if _is_images(key, value) else value
    for key, value in arrays.items()
  }


def _is_images(key, value):
  return value.ndim == 4 and not key.startswith("w")


def logits_fn(weights, images):
  """Logits of images [b, 16, 16, 3]."""
  conv1, bias1, conv2, bias2, linear, bias = weights
  x = _conv(_conv(images, conv1, bias1), conv2, bias2)
  b = x.shape[0]
  quadrants = x.reshape(b, 2, 2, 2, 2, 16).mean((2, 4))
  features = quadrants.transpose(0, 3, 1, 2).reshape(b, 64)
  return features @ linear.T + bias.reshape(1, -1)


def _conv(x, kernel, bias):
  y = jax.lax.conv_general_dilated(
    x,
    kernel.transpose(2, 3, 1, 0),
    (2, 2),
    ((1, 1), (1, 1)),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )
  return jax.nn.relu(y + bias.reshape(1, 1, 1, -1))


def weights(dtype=np.float32):
  arrays = load("tiny")
  return [jnp.asarray(arrays[f"w{i}"], dtype) for i in range(6)]
