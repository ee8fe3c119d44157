"""`--mode=evaluate --config=evaluate`: weights as they are, without a run."""

import pytest

from roli_jax import convert
from roli_jax.convert.registry import Checkpoint
from roli_jax.results import record, report, stated
from tests import cli
from tests.test_names import (
  MODEL,
  NAME,
  content,
  home,
  known,
  random_bundle,
  server,
)

__all__ = ["content", "home", "known", "server"]

WORDS = (
  "--config=evaluate", f"--config.backbone.weights={NAME}",
  "--config.data.name=digits", "--config.num_images=8",
)  # fmt: skip
FEW = ("--config.attack=pgd", "--config.eval_attack.num_steps=2")


def test_from_a_name_to_a_row_beside_what_is_stated(
  home, known, server, content
):
  known()
  lacking = cli.run("--mode=evaluate", *WORDS, *FEW, cwd=home)
  assert lacking.returncode == 2 and "--mode=prepare" in lacking.stderr
  server.files["/drive?id=toy"] = content
  fetched = cli.run("--mode=prepare", *WORDS, cwd=home)
  assert fetched.returncode == 0, fetched.stderr
  assert f"{NAME} is there: weights/" in fetched.stdout
  for _ in range(2):
    done = cli.run("--mode=evaluate", *WORDS, *FEW, cwd=home)
    assert done.returncode == 0, done.stderr
    rows = record.read(home / "runs/evaluate/results.jsonl")
    clean, robust = rows
  assert (clean["stated"], robust["stated"]) == (0.5, None)
  assert (robust["attack"], robust["norm"], robust["eps"]) == (
    "pgd", "linf", 0.1,
  )  # fmt: skip
  assert {k: clean[k] for k in ("stage", "backbone", "n", "lr", "init")} == {
    "stage": "as_is", "backbone": MODEL, "n": 8, "lr": None, "init": None,
  }  # fmt: skip
  assert "50.00" in done.stdout and "Weights as they are" in done.stdout
  shown = report.write(home / "runs/evaluate")
  assert shown[0].title == "Weights as they are"


@pytest.mark.parametrize(
  "words, said",
  [
    (("--config.backbone.weights=",), "weights= is missing"),
    (("--config.threat.norm=l3",), "l3"),
    (("--config.attack=corruptions:none",), "set of corruptions"),
  ],
)
def test_what_can_not_be_meant_is_told(words, said, home, known, content):
  known()
  place = home / "weights/robustbench/digits/Linf/Toy.pt"
  place.parent.mkdir(parents=True)
  place.write_bytes(content)
  done = cli.run("--mode=evaluate", *WORDS, *words, cwd=home)
  assert done.returncode == 2 and said in done.stderr
  assert len(done.stderr.splitlines()) <= 6


def test_weights_of_other_classes_are_refused(home, known):
  known(classes=None)
  file = home / "weights/robustbench/digits/Linf/Toy.pt"
  file.parent.mkdir(parents=True)
  convert.save(random_bundle(num_classes=7), file)
  done = cli.run("--mode=evaluate", *WORDS, cwd=home)
  assert done.returncode == 2 and "of 7 classes, digits has 10" in done.stderr


def test_weights_without_a_threat_model_want_one(home, known):
  known(norm="corruptions", eps="")
  done = cli.run("--mode=evaluate", *WORDS, cwd=home)
  assert done.returncode == 2 and "attack=corruptions:standard" in done.stderr


def test_another_network_of_the_same_name_has_no_rows_of_the_first(
  home, content
):
  (home / "toy.pth").write_bytes(content)
  words = (
    "--mode=evaluate", *WORDS, *FEW, "--config.threat.norm=linf",
    "--config.threat.eps=0.1", "--config.num_images=1",
    "--config.backbone.weights=toy.pth",
  )  # fmt: skip
  assert cli.run(*words, cwd=home).returncode == 0
  changed = cli.run(*words, "--config.backbone.pool=mean", cwd=home)
  assert changed.returncode == 2 and "another --workdir" in changed.stderr
  told = (
    f"--config.backbone.name={MODEL}", "--config.backbone.act=gelu",
    "--config.backbone.norm_eps=1e-6", "--config.backbone.pool=token",
    "--config.backbone.mean=(0.35,)", "--config.backbone.std=(0.39,)",
    "--config.backbone.strict=True",
  )  # fmt: skip
  strict = cli.run(*words, *told, cwd=home)
  assert strict.returncode == 0, strict.stderr


def test_a_bare_file_says_in_the_report_what_was_assumed(home, content):
  (home / "toy.pth").write_bytes(content)
  told = ("--config.threat.norm=linf", "--config.threat.eps=0.1")
  done = cli.run(
    "--mode=evaluate", *WORDS, *FEW, *told, "--config.num_images=1",
    "--config.backbone.weights=toy.pth", cwd=home,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert "act=gelu" in done.stderr
  tables = {t.title: t.rows for t in report.write(home / "runs/evaluate")}
  (assumed,) = (rows for title, rows in tables.items() if "Assumed" in title)
  assert ("toy.pth", "pool", "token") in assumed


def test_what_is_stated_is_of_the_same_attack_alone():
  checkpoint = Checkpoint(
    NAME, "", data="cifar10", norm="linf", eps="8/255", clean=0.9, robust=0.5
  )
  attacked = {
    "data": "cifar10", "attack": "autoattack", "norm": "linf", "eps": 8 / 255,
  }  # fmt: skip
  assert checkpoint.stated({"data": "cifar10", "attack": "none"}) == 0.9
  assert checkpoint.stated({"data": "folder", "attack": "none"}) is None
  assert checkpoint.stated(attacked) == 0.5
  for other in ({"eps": 4 / 255}, {"norm": "l2"}, {"attack": "apgd_ce"}):
    assert checkpoint.stated({**attacked, **other}) is None
  row = dict.fromkeys(stated.FIELDS) | attacked
  row |= {"stage": "as_is", "weights": "w", "backbone": "m", "data": "d"}
  row |= {"value": 0.51, "n": 100, "stated": 0.5}
  (line,) = stated.table([row]).rows
  assert line[-3:] == ("51.0 [41.3, 60.6]", "50.00", "+1.00")
