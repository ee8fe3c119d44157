"""The command line: mistakes end in a short message and status 2."""

import pytest

from roli_jax import main
from tests import cli

GLYPHS = cli.GLYPHS

MISTAKES = {
  "no config": ([], "--config"),
  "no such config": (["--config=configs/glyph.py"], "configs/glyph.py"),
  "unknown flag": ([GLYPHS, "--wrkdir=x"], "workdir"),
  "unknown mode": ([GLYPHS, "--mode=trian"], "train"),
  "a word too many": ([GLYPHS, "train"], "train"),
  "unknown field": ([GLYPHS, "--config.adpt.lr=1"], "did you mean 'adapt'"),
  "unknown nested field": ([GLYPHS, "--config.adapt.l=1"], "'l'"),
  "wrong type": ([GLYPHS, "--config.seed=1.5"], "config.seed"),
  "unknown argument": ([f"{GLYPHS}:tabel=grid"], "table"),
  "unknown table": ([f"{GLYPHS}:table=gird"], "grid"),
  "unknown method": ([f"{GLYPHS}:method=lra"], "linear"),
  "unknown init": ([f"{GLYPHS}:init=rolly"], "roli"),
  "eps in 255ths": ([GLYPHS, "--config.threat.eps=8"], "8.0/255"),
  "eps below zero": ([GLYPHS, "--config.threat.eps=-0.1"], "eps"),
  "eps no number": ([GLYPHS, "--config.threat.eps=tenth"], "8/255"),
  "step size": ([GLYPHS, "--config.attack.step_size=2"], "step_size"),
  "attack": ([GLYPHS, "--config.attack=pdg"], "did you mean 'pgd'"),
  "loss": ([GLYPHS, "--config.adapt.loss.name=trade"], "trades"),
  "anchor": (
    [GLYPHS, "--config.adapt.optim.anchor.name=fpt"], "did you mean 'ftp'"
  ),
  "lambda": (
    [GLYPHS, "--config.adapt.optim.anchor.name=spd",
     "--config.adapt.optim.anchor.lam=-1.0"], "lam must be within",
  ),
  "k": (
    [GLYPHS, "--config.adapt.optim.anchor.name=ftp",
     "--config.adapt.optim.anchor.k=1.5"], "k must be within [0, 1]",
  ),
  "recipe": ([f"{GLYPHS}:recipe=fpt"], "ftp"),
  "ensemble": ([GLYPHS, '--config.ensembles=("wse",)'], "wise_ft"),
  "no such cell": ([GLYPHS, "--config.only=9"], "below the 9 cells"),
  "nothing to sweep": (
    ["--mode=sweep", f"{GLYPHS}:method=full"], "nothing to sweep"
  ),
  "a sweep over nonsense": (
    ["--mode=sweep", f"{GLYPHS}:metod=full|lora"], "a key of dataset"
  ),
  "data": ([GLYPHS, "--config.data.name=digit"], "digits"),
  "layout": (
    [GLYPHS, "--config.data.layout=clases"], "did you mean 'classes'"
  ),
  "too few images": ([GLYPHS, "--config.data.train_size=7"], "train_size"),
  "weights": ([GLYPHS, "--config.backbone.weights=x.pth"], "robust, standard"),
  "precision": ([GLYPHS, "--config.backbone.dtype=bf16"], "'bfloat16'"),
  "attention": ([GLYPHS, "--config.backbone.attention=flash"], "looped, plain"),
  "unwritable": ([GLYPHS, "--workdir=/proc/nothing/run"], "workdir"),
  "evaluate what": (["--mode=evaluate"], "--workdir"),
  "no run": (["--mode=report", "--workdir=/tmp"], "config.json"),
  "unknown suite": (
    ["--mode=bench", "--config=configs/bench.py", '--config.suites=("x",)'],
    "import",
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_in_a_few_words(name, tmp_path):
  words, message = MISTAKES[name]
  if GLYPHS in words and not any("workdir" in word for word in words):
    words = [*words, f"--workdir={tmp_path}/run"]
  done = cli.run(*words)
  assert done.returncode == 2, (done.stdout, done.stderr)
  assert message in done.stderr
  assert len(done.stderr.splitlines()) <= 6 and "Traceback" not in done.stderr
  assert not (tmp_path / "run").exists()


def test_the_promised_recipe_says_how_to_get_what_is_missing():
  done = cli.run("--config=configs/cifar_roli.py")
  assert done.returncode == 2 and len(done.stderr.splitlines()) <= 6
  assert "--mode=prepare --config=cifar_roli" in done.stderr


def test_help_explains_and_shows_the_config():
  done = cli.run("--help")
  assert done.returncode == 0 and "--mode" in done.stdout
  shown = cli.run("--help", GLYPHS)
  assert shown.returncode == 0 and "train_size: 200" in shown.stdout


def test_only_our_own_value_errors_are_the_users():
  from roli_jax import specs

  def theirs():
    raise ValueError("deep inside")

  for make, ours in ((lambda: specs.number("x"), True), (theirs, False)):
    with pytest.raises(ValueError) as error:
      make()
    assert main._is_ours(error.value) == ours
