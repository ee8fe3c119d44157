"""Whether batches, order and devices change a bit, by programs as users have.

In a process of its own, since the tests' programs are compiled otherwise:
python -m tests.bits few|small|shipped COUNT-BATCH_SIZE ...
"""

import functools
import sys

import jax
import numpy as np

from roli_jax import attacks, convert, data, evaluate, sharding, step
from roli_jax.threat import ThreatModel

FIELDS = (
  "clean", "robust", "broken_by", "distance", "min_distance", "margin", "adv",
)  # fmt: skip
AUTO = attacks.AutoAttack(
  ThreatModel("linf", eps=0.06), num_steps=15, num_queries=60
)
MESH = sharding.mesh
PGD = attacks.build("pgd", ThreatModel("linf", eps=0.1), num_steps=10)


def shipped():
  """A network of shipped weights, under PGD."""
  bundle = convert.load(convert.find("glyph_vit", "robust"))
  letters = data.build("letters", "val").take(np.arange(150))
  predict = step.make_predict(bundle.model)
  variables = (bundle.params, bundle.stats)
  return predict, variables, letters.pixels(), letters.labels, PGD


def small():
  """A random network of two layers, under all of AutoAttack."""
  rng = np.random.default_rng(0)
  images = rng.uniform(size=(40, 6, 6, 1)).astype(np.float32)
  w1, w2 = rng.normal(size=(36, 32)) / 2, rng.normal(size=(32, 5))
  weights = w1.astype(np.float32), w2.astype(np.float32)

  def logits_fn(w, x):
    return jax.numpy.tanh((x.reshape(len(x), -1) - 0.5) @ w[0]) @ w[1]

  labels = np.asarray(logits_fn(weights, images).argmax(-1))
  return logits_fn, weights, images, labels, AUTO


def few():
  """The same network, under APGD towards targets."""
  *task, auto = small()
  return *task, auto.parts[1]


def run(task, rows, count, batch_size):
  """The result on the first `count` devices."""
  logits_fn, params, images, labels, attack = task
  mesh = functools.partial(MESH, devices=jax.devices()[:count])
  sharding.mesh = mesh
  return evaluate.run(
    logits_fn, images[rows], labels[rows], attack, params=params,
    indices=rows, batch_size=batch_size,
  )  # fmt: skip


def check(task, spreads):
  """Raises an AssertionError where a bit differs.

  Args:
    task: what is evaluated.
    spreads: pairs: how many devices, and how many images a batch has.
  """
  rows = np.arange(len(task[2]))
  order = np.random.default_rng(0).permutation(rows)
  one = run(task, rows, 1, 64)
  for count, size in spreads:
    other = run(task, order, count, size)
    for name in FIELDS:
      np.testing.assert_array_equal(
        getattr(one, name)[order],
        getattr(other, name),
        f"{name} {count} {size}",
      )


if __name__ == "__main__":
  given = [tuple(map(int, word.split("-"))) for word in sys.argv[2:]]
  tasks = {"few": few, "small": small, "shipped": shipped}
  check(tasks[sys.argv[1]](), given)
