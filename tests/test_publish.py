"""A trained model for others: in a directory, and on a hub."""

import contextlib
import csv
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import yaml
from safetensors import numpy as safetensors

from roli_jax import convert, trees
from roli_jax.experiment import publish_command
from roli_jax.results import card, record
from tests import cli, hub_server, web

SEND = """
import sys, pathlib
from roli_jax.files import upload
folder = pathlib.Path(sys.argv[1])
try:
  print(upload.make("me/mine"))
  print(upload.send("me/mine", folder, ["README.md", "a/x.safetensors"]))
except ValueError as error:
  sys.exit(str(error))
"""


@pytest.fixture
def hub():
  with web.serving(hub_server.Hub) as server:
    yield server


def settings(hub, tmp_path, **others):
  """The environment of a process that would upload to the hub."""
  kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
  ours = {
    "HF_ENDPOINT": hub.url,
    "HF_HOME": str(tmp_path / "home"),
    "HF_TOKEN": hub_server.TOKEN,
    "HF_HUB_DISABLE_XET": "1",  # which has a protocol of its own
  }
  return {**kept, **ours, **others}


def send(hub, tmp_path, **others):
  folder = tmp_path / "out"
  (folder / "a").mkdir(parents=True)
  (folder / "README.md").write_text("# mine\n")
  (folder / "a" / "x.safetensors").write_bytes(bytes(range(256)))
  (folder / "private.txt").write_text("not to be uploaded")
  return subprocess.run(
    [sys.executable, "-c", SEND, str(folder)], cwd=cli.ROOT, text=True,
    env=settings(hub, tmp_path, **others), capture_output=True,
  )  # fmt: skip


def test_files_go_where_the_librarys_settings_say_and_no_others(hub, tmp_path):
  done = send(hub, tmp_path)
  assert done.returncode == 0, done.stderr
  assert done.stdout.split() == [
    f"{hub.url}/me/mine", f"{hub.url}/me/mine/commit/abc",
  ]  # fmt: skip
  assert hub.files == {
    "me/mine/README.md": b"# mine\n",
    "me/mine/a/x.safetensors": bytes(range(256)),
  }
  assert hub.tokens == {hub_server.TOKEN}


@pytest.mark.parametrize(
  "others, message",
  [
    ({"HF_TOKEN": "hf_reads"}, "401.*\n.*hf auth login"),
    ({"HF_HUB_OFFLINE": "1"}, "(?i)offline"),
    ({"HF_ENDPOINT": "http://127.0.0.1:1"}, "(?i)refused|connect"),
  ],
)
def test_what_the_hub_refuses_is_told(hub, tmp_path, others, message):
  done = send(hub, tmp_path, **others)
  assert done.returncode == 1 and not hub.files
  assert done.stderr.startswith("me/mine can't be uploaded: ")
  assert re.search(message, done.stderr) and "Traceback" not in done.stderr


def row(value, attack="none", seed=0, **others):
  about = {
    "stage": "adapt", "init": "roli", "head_init": "kaiming_fan_out",
    "method": "full", "weights": "robust", "train_size": 200, "lr": 0.01,
    "steps": 60, "split": "test", "attack": attack, "metric": "accuracy",
    "value": value, "n": 500, "seed": seed, "cell": f"full-seed{seed}",
  }  # fmt: skip
  if attack != "none":
    about |= {"norm": "linf", "eps": 8 / 255, "attack_steps": 20}
  return {**dict.fromkeys(record.FIELDS), **about, **others}


OWN = [row(0.95), row(0.5, "pgd")]
ABOUT = card.About(
  name="vit_b16", parameters=1234, data="hf:me/data:label=fine", norm="linf",
  eps="8/255", origin="roli_jax 1.0", files={"config.json": "the config"},
  use="pass", checkpoint="", pretrained=True,
)  # fmt: skip


def test_a_card_has_numbers_with_their_intervals():
  others = [row(0.93, seed=1), row(0.4, "pgd", seed=1)]
  text = card.text(ABOUT, OWN, [*OWN, *others], [])
  # Wilson of 475 and 250 of 500; Student of two seeds, one degree of freedom.
  assert "| clean | 95.0 | [92.7, 96.6] | 500 | 94.0 [81.3, 106.7] of 2 |" in (
    text
  )
  assert "| PGD-20 linf 0.0313725 | 50.0 | [45.6, 54.4] | 500 |" in text
  assert "1,234 parameters" in text and "| config.json |" in text
  head = yaml.safe_load(text.split("---")[1])
  assert head["datasets"] == ["me/data"] and head["library_name"] == "roli_jax"
  (index,) = head["model-index"]
  metrics = index["results"][0]["metrics"]
  assert [metric["value"] for metric in metrics] == [0.95, 0.5]


def test_the_leaderboard_gets_standard_autoattack_alone():
  fast = row(0.41, "autoattack_fast")
  claim = card.leaderboard(ABOUT, [*OWN, fast])
  assert claim["clean_acc"] == "95.00" and claim["autoattack_acc"] is None
  elsewhere = row(0.3, "autoattack", eps=16 / 255)
  claim = card.leaderboard(
    ABOUT, [*OWN, elsewhere, row(0.4123, "autoattack", n=10_000)]
  )
  assert claim["autoattack_acc"] == claim["reported"] == "41.23"
  assert claim["threat_model"] == "Linf" and claim["eps"] == "8/255"
  assert "10,000 images" in claim["evaluation_method"]
  # The keys of its model_info, but for those that its maintainers fill.
  assert {
    "link", "name", "authors", "additional_data", "number_forward_passes",
    "dataset", "venue", "architecture", "eps", "clean_acc", "reported",
    "autoattack_acc", "footnote",
  } <= claim.keys()  # fmt: skip


def test_the_card_says_how_to_load_what_a_method_adds():
  meta = {"method": {"name": "vpt", "tokens": 10, "deep": True, "dropout": 0.1}}
  code = publish_command._use(meta, {"m.safetensors": "", "m.check.npz": "",
                                     "m.vpt.safetensors": ""})  # fmt: skip
  assert 'tensors = convert.read("m.vpt.safetensors")' in code
  assert 'peft.load(bundle, tensors, "vpt", tokens=10, deep=True)' in code


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A finished run, a search among its tests, that two trackers follow."""
  path = tmp_path_factory.mktemp("publish") / "run"
  tests = (
    '--config.cells=({"method": "linear", "init": "roli", "tests":'
    ' (("apgd_ce", "linf", "0.1", 24),)},)'
  )
  words = (f"{cli.GLYPHS}:method=linear", *cli.TINY, tests)
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("WANDB_MODE", "offline")
    patch.setenv("WANDB_SILENT", "true")
    done = cli.run(
      *words, f"--workdir={path}", "--config.track=tensorboard,wandb"
    )
  assert done.returncode == 0, done.stderr
  return path


@pytest.mark.slow  # needs a run
def test_both_trackers_have_all_of_a_run(run):
  sent = json.loads((run / "tracked.json").read_text())
  counts = {
    name: len((run / name).read_text().splitlines())
    for name in ("training.jsonl", "results.jsonl")
  }
  assert sent.keys() == {"tensorboard", "wandb"}
  for each in sent.values():
    assert counts.items() <= each.items() and each["examples.npz"]
  assert list((run / "tensorboard").rglob("events*"))
  assert list((run / "wandb").rglob("is_0_said*.png"))


@pytest.fixture(scope="module")
def published(run, tmp_path_factory):
  """The directory that was written, what was said, and the hub that has it."""
  from huggingface_hub import constants

  out = tmp_path_factory.mktemp("published") / "out"
  with (
    web.serving(hub_server.Hub) as hub,
    pytest.MonkeyPatch.context() as patch,
  ):
    # The library has read its variables by now.
    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setenv("HF_TOKEN", hub_server.TOKEN)
    done = cli.run(
      "--mode=publish", f"--workdir={run}", f"--config.output={out}",
      "--config.repo=me/mine",
    )  # fmt: skip
  assert done.returncode == 0, done.stderr
  return out, done.stdout, hub


@pytest.mark.slow
def test_a_directory_says_all(run, published):
  out, said, _ = published
  assert "robustbench.json has no robust accuracy" in said
  names = {file.name for file in out.iterdir()}
  assert names == {
    "README.md", "config.json", "glyph_vit.safetensors", "model.safetensors",
    "glyph_vit.check.npz", "robustbench.json", "flags-apgd_ce-linf-0.1.csv",
  }  # fmt: skip
  text = (out / "README.md").read_text()
  for name in names - {"README.md"}:
    assert f"| {name} |" in text, name
  rows = record.read(run / "results.jsonl")
  clean = record.where(rows, split="test", attack="none")[0]["value"]
  assert f"| clean | {100 * clean:.1f} |" in text and "APGD_CE" in text
  with (out / "flags-apgd_ce-linf-0.1.csv").open() as file:
    lines = list(csv.DictReader(file))
  robust = record.where(rows, attack="apgd_ce")[0]["value"]
  assert np.mean([line["robust"] == "True" for line in lines]) == robust
  config = json.loads((out / "config.json").read_text())
  assert config["model"]["name"] == "glyph_vit"
  assert config["run"]["threat"]["eps"] == "0.1"
  assert str(run) not in (out / "config.json").read_text()


@pytest.mark.slow
def test_its_weights_load_as_the_card_says_and_under_other_names(published):
  out, _, _ = published
  text = (out / "README.md").read_text()
  (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
  seen = np.load(out / "glyph_vit.check.npz")
  names = {"images": seen["images"]}
  with contextlib.chdir(out):
    exec(code, names)
  np.testing.assert_allclose(names["logits"], seen["logits"], atol=1e-4)
  ours = trees.paths(names["bundle"].params)
  theirs = convert.load(
    safetensors.load_file(out / "model.safetensors"), "glyph_vit"
  )
  for path, leaf in trees.paths(theirs.params).items():
    np.testing.assert_array_equal(leaf, ours[path])


@pytest.mark.slow
def test_a_hub_has_what_the_directory_has(published):
  out, said, hub = published
  assert f"uploaded: {hub.url}/me/mine/commit/abc" in said
  kept = {f"me/mine/{file.name}": file.read_bytes() for file in out.iterdir()}
  assert hub.files == kept
  claim = json.loads((out / "robustbench.json").read_text())
  assert claim["checkpoint"] == f"{hub.url}/me/mine"


@pytest.mark.slow
@pytest.mark.parametrize(
  "words, message",
  [
    ([], "--config.output= is missing"),
    (["--config.output=x", "--config.checkpoint=y"], "no checkpoint at"),
    (["--config.output=x", "--config.repo=a/b/c"], "a/b/c can't be uploaded"),
  ],
)
def test_a_mistake_is_told_before_anything_is_written(run, words, message):
  done = cli.run("--mode=publish", f"--workdir={run}", *words)
  assert done.returncode == 2 and message in done.stderr
  assert not (cli.ROOT / "x").exists()
