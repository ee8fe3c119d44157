"""Published weights by name: what is known of them, fetched, held to it."""

import dataclasses
import hashlib
import json
import re

import jax
import numpy as np
import pytest

from roli_jax import convert, models, specs
from roli_jax.convert import origins, registry
from roli_jax.convert.registry import Checkpoint
from roli_jax.data import download, transforms
from tests import cli, web

NAME = "robustbench:digits/Linf/Toy"
MODEL = "glyph_vit_token"


def random_bundle(name=MODEL, num_classes=10):
  """A model with random weights, which nothing has compiled."""
  model = models.create(name, num_classes)
  rng = np.random.default_rng(0)
  params, stats = jax.tree.map(
    lambda x: rng.normal(size=x.shape, scale=0.2).astype(np.float32),
    model.shapes(),
  )
  return convert.Bundle(model, params, stats)


@pytest.fixture(scope="module")
def content(tmp_path_factory):
  """The bytes of a file in PyTorch's format."""
  file = tmp_path_factory.mktemp("toy") / "toy.pth"
  convert.save(random_bundle(), file, "timm")
  return file.read_bytes()


@pytest.fixture
def home(tmp_path, monkeypatch):
  """An empty working directory."""
  monkeypatch.chdir(tmp_path)
  return tmp_path


@pytest.fixture
def known(monkeypatch):
  """Puts one checkpoint in the place of the table."""

  def put(**fields):
    about = {
      "model": MODEL, "act": "gelu", "norm_eps": 1e-6, "pool": "token",
      "mean": (0.25,), "std": (0.5,), "image_size": 8, "classes": 10,
      "origin": "gdrive:toy", "norm": "linf", "eps": "0.1", "clean": 0.5,
      "robust": 0.25, **fields,
    }  # fmt: skip
    checkpoint = Checkpoint(NAME, **about)
    monkeypatch.setattr(registry, "table", lambda: {NAME: checkpoint})
    return checkpoint

  return put


@pytest.fixture
def server(monkeypatch):
  monkeypatch.setenv("no_proxy", "127.0.0.1")
  monkeypatch.setattr(download, "_WAITS", (0.0, 0.0, 0.0))
  with web.serving() as server:
    monkeypatch.setattr(origins, "_DRIVE", f"{server.url}/drive?id=")
    yield server


def put(content):
  file = origins.ROOT / "robustbench/digits/Linf/Toy.pt"
  file.parent.mkdir(parents=True)
  file.write_bytes(content)


# The table.


def test_each_line_of_the_table_can_be_meant():
  table = registry.table()
  for name, checkpoint in table.items():
    assert registry.is_name(name) and registry.named(name) is checkpoint
    assert checkpoint.model or checkpoint.out_of_scope
    assert checkpoint.source and (checkpoint.origin or checkpoint.out_of_scope)
    assert re.match(r"hf:\S+/\S|gdrive:|(page:)?https?:|$", checkpoint.origin)
    assert checkpoint.norm in ("", "linf", "l2", "corruptions")
    assert not checkpoint.eps or specs.number(checkpoint.eps) > 0
    for rate in (checkpoint.clean, checkpoint.robust):
      assert rate is None or 0 <= rate <= 1
    for numbers in (checkpoint.mean, checkpoint.std):
      assert numbers is None or len(numbers) == 3
    transforms.build(checkpoint.preprocessing)
  starts = [name.partition(":")[0] for name in table]
  counts = {prefix: starts.count(prefix) for prefix in registry.PREFIXES}
  assert (counts["robustbench"], counts["ares"], counts["madry"]) == (
    206, 12, 67,
  )  # fmt: skip


@pytest.mark.parametrize(
  "name, model, mean, said",
  [
    ("cifar10/Linf/Wang2023Better_WRN-70-16", "dm_wrn_70_16", 0.4914, ""),
    ("cifar10/Linf/Carmon2019Unlabeled", "wrn_28_10", 0, ""),
    ("imagenet/Linf/Chen2024Data_WRN_50_2", "wide_resnet50_2", 0, ""),
    ("cifar100/Linf/Wu2020Adversarial", "wrn_34_10", 0.50707516, ""),
    ("cifar10/Linf/Chen2020Adversarial", "", None, "an ensemble of 3"),
    ("cifar100/Linf/Bai2024MixedNUTS", "", None, "a mixture of two"),
    ("cifar10/Linf/Sehwag2021Proxy_ResNest152", "resnest152", 0, "no model"),
  ],
)
def test_the_table_says_what_robustbench_does(name, model, mean, said):
  checkpoint = registry.named(f"robustbench:{name}")
  assert checkpoint.model == model
  assert checkpoint.mean is mean or np.isclose(checkpoint.mean[0], mean)
  assert said in checkpoint.why_not() and bool(said) == bool(
    checkpoint.why_not()
  )


def test_robust_resnets_of_ares_have_their_activations():
  acts = {n: registry.named(f"ares:{n}").act for n in ("ResNet50", "ResNet152")}
  assert acts == {"ResNet50": "relu", "ResNet152": "gelu"}


def test_names_outside_of_the_table():
  bare = registry.named("hf:owner/repo/sub/x.bin@v1")
  assert (bare.origin, bare.model) == ("hf:owner/repo/sub/x.bin@v1", "")
  assert origins._repository(bare.origin) == (
    "owner/repo", ("sub/x.bin",), "v1",
  )  # fmt: skip
  assert registry.named("timm:vit_x.y").origin == "hf:timm/vit_x.y"
  pinned = registry.named("hf:chs20/fare2-clip@abc")
  assert pinned.model == "clip_vit_l14" and pinned.origin.endswith(".bin@abc")
  for wrong in ("hf:owner", "hf:a/b/../../c", "ares:ResNet5"):
    with pytest.raises(ValueError, match=r"expected hf:|did you mean"):
      registry.named(wrong)
  assert not any(map(registry.is_name, ("a/b.pth", "robust", "ares", "x:y")))


def test_the_zoo_is_printed_with_all_names_and_reasons():
  done = cli.run("--mode=zoo")
  assert done.returncode == 0, done.stderr
  assert "no: an ensemble of 3 networks" in done.stdout
  assert "vit_base_patch16_224.augreg_in21k" in done.stdout
  assert cli.run("--mode=zoo", "--nonsense").returncode == 2


# Files.


def test_what_is_not_here_says_how_to_get_it(home, known):
  known()
  with pytest.raises(ValueError, match="--mode=prepare") as error:
    convert.load(NAME)
  said = str(error.value)
  assert f"weights={NAME}" in said and "gdrive:toy" in said
  assert "weights/robustbench/digits/Linf/Toy.pt" in said


def test_a_file_of_google_drive_comes_once(home, known, server, content):
  checkpoint = known(digest=hashlib.sha256(content).hexdigest()[:8])
  server.files["/drive?id=toy"] = content
  first, there = origins.fetch(checkpoint)
  assert first == "fetching gdrive:toy" and "is there" in there
  assert [*origins.fetch(checkpoint)] == [there] and len(server.asked) == 1
  assert convert.load(NAME).model.name == MODEL


@pytest.mark.parametrize(
  "fields, page, said",
  [
    ({}, b"<!doctype html><p>quota</p>", "web page"),
    ({"size": 5}, b"123456", "6 bytes, not 5"),
    ({"digest": "00000000"}, b"123456", "the checksum"),
    ({"origin": "page:https://x.y/z"}, b"", "https://x.y/z can't be had"),
    ({"out_of_scope": "an ensemble"}, b"", "can't be loaded: an ensemble"),
  ],
)
def test_what_is_no_such_file_leaves_nothing(
  fields, page, said, home, known, server
):
  server.files["/drive?id=toy"] = page
  with pytest.raises(ValueError, match=said):
    list(origins.fetch(known(**fields)))
  assert not [f for f in home.rglob("*") if f.is_file() and f.name != ".lock"]


def test_the_hub_is_asked_by_its_library(home, server, content, monkeypatch):
  """Whose settings HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE are."""
  from huggingface_hub import constants

  monkeypatch.setattr(constants, "ENDPOINT", server.url)
  # Made of the other where the library is imported.
  _, _, template = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{")
  url = f"{server.url}/{{{template}"
  monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
  commit, name = "a" * 40, "hf:owner/repo/x.bin"
  server.files["/owner/repo/resolve/main/x.bin"] = content
  server.files["/owner/repo/resolve/main/config.json"] = json.dumps(
    {
      "architecture": "vit_tiny",
      "global_pool": "token",
      "pretrained_cfg": {"mean": [0.5], "std": [0.5], "input_size": [1, 8, 8]},
    }
  ).encode()
  server.headers = {"X-Repo-Commit": commit}
  first, there = origins.fetch(registry.named(name))
  assert first == f"fetching {name}"
  place = there.rpartition(" ")[2]
  assert place.startswith(str(home / "hub")) and commit in place
  asked = len(server.asked)
  bundle = convert.load(name, MODEL)
  assert bundle.model.mean == (0.5,)  # as its repository says
  assert bundle.assumed == {"act": "gelu", "norm_eps": "1e-06"}
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  assert [*origins.fetch(registry.named(name))] == [there]
  with pytest.raises(ValueError, match="can't be had") as error:
    list(origins.fetch(registry.named("hf:owner/other")))
  assert "put it at weights/hf/owner/other.pt" in str(error.value)
  assert len(server.asked) == asked


# Loading.


def test_a_name_tells_all_that_a_file_can_not(home, known, content, caplog):
  known()
  put(content)
  bundle = convert.load(NAME, strict=True)
  assert (bundle.model.mean, bundle.model.std) == ((0.25,), (0.5,))
  assert not bundle.assumed and not caplog.records
  other = convert.load(NAME, mean=(0.0,), num_classes=3)
  assert other.model.mean == (0.0,) and other.model.num_classes == 3


@pytest.mark.parametrize(
  "fields, told, said",
  [
    ({"model": "glyph_vit"}, {}, "glyph_vit"),
    ({"classes": 7}, {}, "classes 10, and not 7"),
    ({"image_size": 16}, {}, "for another image_size"),
    ({"key": "last"}, {}, "no network 'last'"),
    ({}, {"model": "glyph_swin"}, "has model=glyph_vit_token"),
  ],
)
def test_a_file_that_contradicts_its_name_is_an_error(
  fields, told, said, home, known, content
):
  known(**fields)
  put(content)
  with pytest.raises(ValueError, match=said):
    convert.load(NAME, **told)


def test_a_normalisation_in_the_file_must_be_the_names(home, known):
  state = convert.to_state_dict(random_bundle(), "timm")
  state = {f"model.{k}": v for k, v in state.items()}
  beside = {"mean": np.float32([0.25]), "std": np.float32([0.5])}
  np.savez(home / "x.npz", **state, **beside)
  known()
  put((home / "x.npz").read_bytes())
  assert convert.load(NAME).model.mean == (0.25,)
  known(mean=(0.5,))
  with pytest.raises(ValueError, match="its file has mean"):
    convert.load(NAME)


# Assumptions.

WORDS = {
  "model": MODEL, "act": "gelu", "norm_eps": 1e-6, "pool": "token",
  "mean": (0.35,), "std": (0.39,),
}  # fmt: skip


def test_a_bare_file_says_what_it_can_not_tell(tmp_path, content, caplog):
  file = tmp_path / "toy.pth"
  file.write_bytes(content)
  bundle = convert.load(file)
  assert bundle.assumed.keys() == WORDS.keys()
  (record,) = caplog.records
  assert (
    f"model={MODEL}, act=gelu, norm_eps=1e-06, pool=token" in record.message
  )
  with pytest.raises(
    ValueError, match=r"strict.* can't tell model=glyph_vit_token, act=gelu"
  ) as error:
    convert.load(file, strict=True)
  assert "--mode=zoo" in str(error.value)
  assert not convert.load(file, strict=True, **WORDS).assumed


def test_a_mean_alone_leaves_the_deviation_assumed(tmp_path, content):
  file = tmp_path / "toy.pth"
  file.write_bytes(content)
  assert convert.load(file, mean=(0.35,)).assumed["std"] == "0.39"


def test_a_normalisation_of_pixels_up_to_255_is_refused(tmp_path):
  state = convert.to_state_dict(random_bundle("glyph_convnext"), "timm")
  state = {f"model.{k}": v for k, v in state.items()}
  beside = {"mean": np.float32([123.7]), "std": np.float32([58.4])}
  with pytest.raises(ValueError, match=r"pixels in \[0, 255\]"):
    convert.load({**state, **beside})


def test_no_format_of_ours_forgets_its_model(tmp_path):
  with pytest.raises(ValueError, match="can't say of which model"):
    convert.save(random_bundle(), tmp_path / "x.npz")
  bundle = random_bundle()
  tiny = jax.tree.map(lambda x: 1e-9 * np.tanh(x), bundle.params)
  small = dataclasses.replace(bundle, params=tiny)
  with pytest.raises(ValueError, match="is all 0 in float16"):
    convert.save(small, tmp_path / "x.safetensors", half=True)


def test_assumptions_stay_with_the_weights(tmp_path, content):
  file, ours = tmp_path / "toy.pth", tmp_path / "ours.safetensors"
  file.write_bytes(content)
  convert.save(convert.load(file, act="gelu"), ours)
  again = convert.load(ours, pool="token")
  assert again.assumed.keys() == {"model", "norm_eps", "mean", "std"}
  with pytest.raises(ValueError, match=f"can't tell model={MODEL}, norm_eps"):
    convert.load(ours, strict=True)
  words = {k: v for k, v in WORDS.items() if k != "act"}
  assert not convert.load(ours, strict=True, **words).assumed


def test_converting_can_be_strict(tmp_path, content):
  file = tmp_path / "toy.pth"
  file.write_bytes(content)
  strict = cli.run(
    "--mode=convert", "--config=convert", f"--config.source={file}",
    f"--config.output={tmp_path}", "--config.strict=True",
  )  # fmt: skip
  assert strict.returncode == 2 and f"can't tell model={MODEL}" in strict.stderr
