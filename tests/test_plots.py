"""What figures show of what they are given."""

import numpy as np
import PIL.Image
import pytest

from roli_jax import evaluate
from roli_jax.evaluate import batching
from roli_jax.experiment import photographs
from roli_jax.results import figures, pictures
from roli_jax.results.tables import Table


def summary(broken_by):
  """Of a result that says nothing else."""
  n = len(broken_by)
  broken_by = np.array(broken_by)
  result = evaluate.Result(
    clean=broken_by != "clean", robust=broken_by == "", broken_by=broken_by,
    distance=np.zeros(n), min_distance=np.zeros(n), margin=np.zeros(n),
    adv=np.zeros((n, 2, 2, 1)), invalid=np.zeros(n, bool),
    work={"none": batching.Work()}, notes=[], checks=[], seconds=0.0,
  )  # fmt: skip
  return result.summary()


def test_a_bar_is_all_images_in_the_order_of_attacks():
  given = [
    summary(["", "", "clean", "apgd_ce"]),
    summary(["apgd_ce", "square", "square", ""]),
  ]
  figure = figures.broken(given, ["mine", "yours"])
  (axis,) = figure.axes
  widths = [bar.get_width() for bar in axis.patches]
  assert widths == [50, 25, 0, 25, 25, 25, 50, 0]
  names = [text.get_text() for text in figure.legends[0].get_texts()]
  assert names == [
    "robust", "broken by apgd_ce", "broken by square", "misclassified before",
  ]  # fmt: skip
  assert [t.get_text() for t in axis.get_yticklabels()] == ["mine", "yours"]
  assert "95% Wilson interval" in axis.get_xlabel()


def test_accuracy_by_radius_is_in_percent_and_sorted():
  lines = {"curve": {0.2: 0.0, 0.0: 0.9, 0.1: 0.5}, "autoattack": {0.1: 0.4}}
  (axis,) = figures.by_radius(lines, "linf", 0.1).axes
  curve, point, radius = axis.lines
  np.testing.assert_allclose(curve.get_xydata(), [[0, 90], [0.1, 50], [0.2, 0]])
  np.testing.assert_allclose(point.get_xydata(), [[0.1, 40]])
  assert point.get_marker() == "o"  # or it would not be seen
  assert set(radius.get_xdata()) == {0.1} and "linf" in axis.get_xlabel()


@pytest.mark.parametrize("channels", [1, 3])
def test_examples_say_what_the_model_says(channels):
  clean = np.full((2, 4, 4, channels), 0.5, np.float32)
  adv = clean + np.array([0.1, 0.0], np.float32).reshape(2, 1, 1, 1)
  labels, names = np.array([0, 1]), np.array(["cat", "automobile"])
  figure = figures.examples(
    clean, adv, names[labels], names[[0, 0]], names[[1, 1]], eps=0.1
  )
  axes = np.array(figure.axes).reshape(3, 2)
  titles = [axis.get_title() for axis in axes.flat]
  wrong = "cat\n(is automobile)"
  assert titles == ["cat", wrong, "", "", "automobile", "automobile"]
  added = [axis.images[0].get_array() for axis in axes[1]]
  np.testing.assert_allclose(added[0], 1)  # all of eps: white
  np.testing.assert_allclose(added[1], 0.5)  # nothing: grey


def test_a_notebook_shows_a_table_as_markdown():
  table = Table("Title", ("a", "b"), [("1", "2")])
  assert table._repr_markdown_() == table.markdown()
  assert "| 1 | 2 |" in table.markdown()


@pytest.mark.slow
def test_photographs_are_attacked_and_drawn(tmp_path, monkeypatch):
  """Those of the requirements, and of a user's own; on what ships."""
  drawn = []
  draw = pictures.side_by_side
  monkeypatch.setattr(
    pictures, "side_by_side", lambda *given: drawn.append(given) or draw(*given)
  )
  own = tmp_path / "own.png"
  PIL.Image.new("RGB", (50, 40), "green").save(own)
  for files, n in (((), 6), ((own,), 1)):
    photographs.main([f"--workdir={tmp_path}", *map(str, files)])
    assert (tmp_path / "figures/photographs.png").stat().st_size > 10_000
    images, found = drawn.pop()
    assert images.shape == (n, 32, 32, 3) and images.max() <= 1
    assert next(iter(found)).startswith("tiny32, standard") and len(found) == 2
    for one in found.values():
      change = np.abs(one["adv"] - images)
      assert 0 < change.max() <= one["eps"] + 1e-6
      assert (one["labels"] == one["clean_said"]).all()
      assert len(one["adv_said"]) == n
  (tmp_path / "text.png").write_text("no image")
  with pytest.raises(SystemExit, match="2"):
    photographs.main([f"--workdir={tmp_path}", str(tmp_path / "text.png")])
