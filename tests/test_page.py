"""`report.html`: the images that tests keep, and the page that shows them."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest

from roli_jax import attacks, data, evaluate
from roli_jax.evaluate import classifier
from roli_jax.experiment import evaluation_files
from roli_jax.results import page, record, report
from roli_jax.results.page import answers, gallery
from roli_jax.threat import ThreatModel
from tests.test_report import PGD, rows

RADII = (0.03, 0.1)
# Names that users' folders may have.
CLASSES = ("ant", "<b>bee</b>", "</script><script>alert(1)//", "$cat", "dog")
FOLDER = "full-roli-0/adapt/lr0.001-steps60"


def about(**fields):
  return rows("full", "roli", [0.0], attack={**PGD, **fields})[0]


def searched(near, far):
  """A result as of a search for distances, from those at two radii."""
  falls = near.clean & ~near.robust
  distance = np.where(falls, near.distance, far.distance)
  return dataclasses.replace(
    far,
    adv=np.where(falls.reshape(-1, 1, 1, 1), near.adv, far.adv),
    tried=None,
    # As floats of 32 bits leave them, a little beyond the radius.
    min_distance=np.minimum(distance, distance.round(6)),
    broken_by=np.where(far.broken_by == "pgd", "curve", far.broken_by),
  )


@pytest.fixture(scope="module")
def made(toy, tmp_path_factory):
  """A run's directory with images of a toy, and what its tests had found."""
  logits_fn, images, labels = toy
  path = tmp_path_factory.mktemp("runs") / "a run"
  source = data.Source(
    np.rint(255 * images).astype(np.uint8), labels,
    np.arange(len(labels), dtype=np.uint32), 5, split="test", classes=CLASSES,
  )  # fmt: skip
  function = classifier.make(logits_fn, None, source.shape, 40)

  def keep(result, attack, *radii):
    told = [about(attack=attack, eps=eps) for eps in radii]
    evaluation_files.keep_images(
      path / "evaluations", FOLDER, [{}, *told], radii if radii[1:] else (),
      source, source.some(0), result, function,
    )  # fmt: skip
    return result

  found = {}
  for eps in RADII:
    attack = attacks.build("pgd", ThreatModel("linf", eps=eps), num_steps=4)
    result = evaluate.run_on(function, source.pixels(), labels, attack)
    found[eps] = keep(result, "pgd", eps)
  found["curve"] = keep(searched(*found.values()), "curve", *RADII)
  lines = []
  for init, better in (("roli", 0.1), ("ranli", 0.0)):
    clean = {"attack": "none"}
    lines += rows("full", init, (0.9, 0.91, 0.95), attack=clean, run="a run")
    for eps in RADII:
      values = (0.61 + better, 0.6 + better, 0.6)
      lines += rows(
        "full", init, values, attack={**PGD, "eps": eps}, run="a run"
      )
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (path / "results.jsonl").write_text(text)
  logged = [
    {**line, "step": step, "metric": metric, "split": split}
    for line in lines
    for step in (0, 20)
    for metric, split in (("loss", "train"), ("accuracy", "val"))
  ]
  text = "".join(json.dumps(line) + "\n" for line in logged)
  (path / "training.jsonl").write_text(text)
  page.write(path, report.tables(lines))
  return path, function, source, found


def pixels(path, name):
  """The stored test, its clean images, and the attacked ones."""
  with np.load(path / "evaluations" / FOLDER / f"images-test-{name}.npz") as f:
    kept = dict(f)
  with np.load(path / "evaluations" / str(kept["clean"])) as f:
    images = f["images"] / np.float32(255)
  change = kept["change"].astype(np.float32) * (kept["scale"] / 127)
  return kept, images, images + change


@pytest.mark.parametrize("eps", RADII)
def test_images_that_are_kept_are_those_that_were_judged(made, eps):
  path, function, source, found = made
  kept, images, adv = pixels(path, f"pgd-20-1-linf-{eps:g}")
  result, labels = found[eps], source.labels
  np.testing.assert_array_equal(kept["fell"][0], result.clean & ~result.robust)
  assert kept["fell"].any() and (result.robust.any() or eps == RADII[1])
  # Attempts on those that stood are there too, and all lie in the ball.
  np.testing.assert_array_equal(kept["is_there"][0], result.clean)
  broken = kept["fell"][0]
  np.testing.assert_allclose(adv[broken], result.adv[broken], atol=eps / 200)
  assert np.abs(adv - images).max() <= eps * 1.01
  # Who fell is said to be of another class, who stood of its own.
  stood = result.robust
  assert (kept["said"][broken] != labels[broken]).all()
  assert (kept["said"][stood] == labels[stood]).all()
  logits = function.judge(classifier.Examples(images, labels, source.indices))
  sure = np.exp(logits[2].max(1)) / np.exp(logits[2]).sum(1)
  np.testing.assert_allclose(kept["clean_sure"], sure, rtol=1e-4)


def test_an_image_of_a_curve_is_there_from_its_own_distance_on(made):
  path, _, _, found = made
  kept, images, adv = pixels(path, f"curve-20-1-linf-{RADII[1]:g}")
  result = found["curve"]
  far = np.abs(adv - images).reshape(len(images), -1).max(1)
  for eps, fell, there in zip(
    RADII, kept["fell"], kept["is_there"], strict=True
  ):
    np.testing.assert_array_equal(fell, result.clean & ~result.robust_at(eps))
    np.testing.assert_array_equal(there, fell)
    assert (far[there] <= eps * 1.01).all()
  assert kept["fell"][0].sum() < kept["fell"][1].sum()


def test_a_page_needs_nothing_beside_it(made):
  from plotly import offline

  path, *_ = made
  text = (path / "report.html").read_text()
  assert len(text) < page.MOST_BYTES
  own = text.replace(offline.get_plotlyjs(), "")
  assert len(own) < 200_000
  assert not re.search(r'(src|href)="?(https?:)?//', own)
  assert "<link" not in text and "alert(1)//" in text
  assert "</script><script>alert" not in text and "<b>bee" not in text
  for table in report.tables(record.read(path / "results.jsonl")):
    assert table.title in text


def test_the_most_robust_stands_first_with_intervals(made):
  found = answers.answers(record.read(made[0] / "results.jsonl"))
  assert [one.name for one in found] == ["full RoLI", "full RanLI"]
  best = found[0].robust
  assert best.low < best.value < best.high and found[0].of == "3 seeds"
  (one,) = answers.answers(rows("full", "roli", [0.8]))
  assert one.of == "500 images" and one.clean is None
  assert 0.76 < one.robust.low < 0.8 < one.robust.high < 0.84


def test_what_has_no_room_is_left_out_and_said(made):
  path, best = {"": made[0]}, []
  whole = gallery.collect(path, best, 10**6)
  few = gallery.collect(path, best, len(json.dumps(whole.data)) // 2)
  count = len(few.data["views"][0]["labels"])
  assert 10 < count < 40 and len(json.dumps(few.data)) * 2 <= len(
    json.dumps(whole.data)
  )
  assert f"first {count} test images" in few.note and "40 were kept" in few.note
  assert "40 test images" in whole.note and "were kept" not in whole.note


def test_older_runs_say_what_they_lack(made, tmp_path):
  shutil.copy(made[0] / "results.jsonl", tmp_path)
  page.write(tmp_path, [])
  assert "kept no images" in (tmp_path / "report.html").read_text()
  (tmp_path / "figures").mkdir()
  labels, images = np.array([0, 1, 2]), np.zeros((3, 4, 4, 3), np.float32)
  np.savez(
    tmp_path / "figures" / "examples.npz", cell="a cell", eps=0.1,
    images=images, adv=images + np.float32(0.1), labels=labels,
    clean_said=labels, adv_said=labels[[1, 1, 0]],
  )  # fmt: skip
  found = gallery.collect({"": tmp_path}, [], 10**6)
  (view,) = found.data["views"]
  assert view["frames"][0]["outcome"] == ["fell", "stood", "fell"]
  assert view["sure"] is None and "not how sure" in found.note


@pytest.fixture(scope="module")
def browser():
  from playwright import sync_api

  chromium = shutil.which("chromium")
  assert chromium, "test-all needs a browser: apt-get install chromium"
  quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
  with sync_api.sync_playwright() as playwright:
    started = playwright.chromium.launch(executable_path=chromium, args=quiet)
    yield started
    started.close()


@pytest.fixture
def opened(made, browser):
  """Opens the page; at the end nothing was fetched and nothing went wrong."""
  wrong = []

  def open_page(**options):
    view = browser.new_page(**options)
    view.set_default_timeout(120_000)
    view.on("pageerror", lambda error: wrong.append(str(error)))
    view.on(
      "console",
      lambda said: (
        said.type in ("error", "warning") and wrong.append(said.text)
      ),
    )
    view.on(
      "request",
      lambda asked: (
        asked.url.startswith(("file:", "data:", "blob:"))
        or wrong.append(asked.url)
      ),
    )
    view.goto((made[0] / "report.html").as_uri())
    view.wait_for_selector("figure canvas")
    return view

  yield open_page
  assert not wrong


@pytest.mark.slow
def test_tables_sort_and_filter(opened):
  view = opened()

  def first():
    return view.locator(".bars tbody th").first.inner_text()

  assert first().startswith("full RoLI")
  header = view.locator("#answer th button", has_text="PGD-20")
  header.click()  # falling, as it is
  header.click()
  assert first().startswith("full RanLI")
  assert header.locator("..").get_attribute("aria-sort") == "ascending"
  curves = view.locator("details", has_text="Test accuracy against eps")
  curves.locator("summary").click()
  lines = curves.locator("tbody tr:visible")
  before = lines.count()
  curves.locator("input").fill("0.03")
  assert 0 < lines.count() < before


@pytest.mark.slow
def test_the_slider_moves_through_stored_images(opened, made):
  *_, found = made
  view = opened()
  slider, stand = view.locator("#slider"), view.locator("#count")
  for at, eps in enumerate(RADII, 1):
    slider.fill(str(at))
    robust = found[eps].robust
    view.wait_for_function(
      "([text, n]) => document.querySelector('#count').textContent"
      ".startsWith(text) && document.querySelectorAll('figure').length === n",
      arg=[f"{robust.sum()} of 40 images", 24],
    )
    assert f"eps {eps:g} linf" in stand.inner_text()
    # The picture is the stored one: of the first image, drawn on the page.
    drawn = view.evaluate(
      "() => [...document.querySelectorAll('figure canvas')].slice(0, 3)"
      ".map(c => [...c.getContext('2d').getImageData(0, 0, 6, 6).data]"
      ".filter((_, i) => i % 4 === 0))"
    )
    assert found[eps].clean[0]
    _, images, adv = pixels(made[0], f"pgd-20-1-linf-{eps:g}")
    clean, change, shown = np.array(drawn, float)
    np.testing.assert_allclose(clean, 255 * images[0].ravel(), atol=0.5)
    most = 255 * eps / 15 + 1  # of 31 grey values
    np.testing.assert_allclose(
      shown, (255 * adv[0]).clip(0, 255).ravel(), atol=most
    )
    assert change.min() < 100 and change.max() > 150  # amplified
  slider.fill("0")
  view.wait_for_function("document.querySelectorAll('canvas').length === 24")


@pytest.mark.slow
def test_images_are_filtered_by_outcome_class_and_attack(opened, made):
  _, _, source, found = made
  view = opened()
  result = found[RADII[1]]  # that of the first table would be the first
  view.locator("#slider").fill("2")

  def shown(count):
    view.wait_for_function(
      "n => document.querySelectorAll('figure').length === n",
      arg=min(int(count), 24),
    )
    return view.locator("figure")

  view.locator("#outcome").select_option("fell")
  fell = result.clean & ~result.robust
  cards = shown(fell.sum())
  assert "✗ fell" in cards.first.inner_text()  # not by its colour alone
  view.locator("#class").select_option(label=CLASSES[1])
  of_class = source.labels == 1
  cards = shown((fell & of_class).sum())
  assert CLASSES[1] in cards.first.inner_text()
  view.locator("#outcome").select_option("wrong")
  shown((~result.clean & of_class).sum())
  view.locator("#class").select_option("")
  view.locator("#attack").select_option("CURVE-20 linf")
  view.locator("#outcome").select_option("fell/curve")
  shown((found["curve"].clean & ~found["curve"].robust).sum())


@pytest.mark.slow
def test_it_is_readable_on_a_phone_and_in_the_dark(opened):
  phone = {"width": 390, "height": 844}
  for scheme in ("light", "dark"):
    view = opened(viewport=phone, color_scheme=scheme)
    assert view.evaluate("document.documentElement.scrollWidth") <= 390
    ink, paper = view.evaluate(
      "() => { const s = getComputedStyle(document.body);"
      " return [s.color, s.backgroundColor]"
      ".map(c => Math.max(...c.match(/[0-9]+/g).slice(0, 3).map(Number))) }"
    )
    assert (ink > paper) == (scheme == "dark") and abs(ink - paper) > 150
    title = view.locator("svg .xtitle").first
    assert title.evaluate("e => getComputedStyle(e).fill") == view.evaluate(
      "getComputedStyle(document.body).color"
    )
    view.close()


@pytest.mark.slow
def test_values_stand_under_the_pointer(opened):
  view = opened()
  point = view.locator("#radius .scatterlayer .point").first
  point.scroll_into_view_if_needed()
  box = point.bounding_box()
  view.mouse.move(box["x"] + 4, box["y"] + 4)
  shown = view.locator("#radius .hoverlayer")
  shown.locator("text").first.wait_for()
  assert "full RoLI" in shown.text_content() and "%" in shown.text_content()
