"""Architectures that are not ours: what is said, and that it leads on."""

import re

import numpy as np
import pytest

from roli_jax import convert, models
from roli_jax.convert import torch_file
from tests import cli
from tests.test_networks import state_of, under


def zeros(*shape):
  return np.zeros(shape, np.float32)


@pytest.fixture(scope="module")
def state():
  return state_of("glyph_resnet", 0)


@pytest.fixture(autouse=True)
def toys(monkeypatch):
  """Few models, so that a test doesn't compute the shapes of all."""
  names = [k for k in models.MODELS if k.startswith("glyph") or k == "resnet18"]
  few = {name: models.MODELS[name] for name in names}
  monkeypatch.setattr(models, "MODELS", few)


def refusal(*args, **told):
  with pytest.raises(ValueError) as error:
    convert.load(*args, **told)
  assert "\n" not in str(error.value)
  return str(error.value)


READ = (
  "convert.read(path) gives the arrays, and any JAX function of them can be"
)
FOREIGN = {
  "VGG": {
    "features.0.weight": zeros(8, 3, 3, 3),
    "classifier.6.weight": zeros(2, 8),
  },
  "Haiku's": {"net/~/linear/w": zeros(8, 8), "net/~/linear/b": zeros(8)},
  "Hugging Face's": {"vit.encoder.layer.0.attention.query.weight": zeros(8, 8)},
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("told", [{}, {"model": "resnet18"}])
def test_an_architecture_of_other_names_is_not_supported(kind, told):
  source = FOREIGN[kind]
  said = refusal({"state_dict": source}, **told)
  for words in ("isn't supported", "nearest is none", f"{len(source)} tensors",
                READ):  # fmt: skip
    assert words in said


def others(state):
  """Relatives of a ResNet: what differs, and in how many tensors."""
  stem = {k for k in state if k.startswith("bn1")}
  preact = {k: v for k, v in state.items() if k not in stem}
  excited = {
    f"layer{i}.{j}.se.fc.weight": zeros(4, 4) for i in (1, 2) for j in (0, 1)
  }
  wide = {k: np.concatenate([v, v]) if "layer2.0.conv2" in k else v
          for k, v in state.items()}  # fmt: skip
  return {
    "PreAct": ({**preact, "norm.weight": zeros(16)}, 5, "bn1.bias"),
    "SE": ({**state, **excited}, 4, "layer1.0.se.fc.weight"),
    "wider": (wide, 1, "layer2.0.conv2.weight"),
    "a detector": (
      {**under("backbone.body.", state), "rpn.weight": zeros(2, 2)}, 1, "rpn",
    ),
  }  # fmt: skip


@pytest.mark.parametrize("kind", ["PreAct", "SE", "wider", "a detector"])
@pytest.mark.parametrize("told", [{}, {"model": "glyph_resnet"}])
def test_a_relative_is_not_supported_and_the_nearest_is_named(
  kind, told, state
):
  source, number, one = others(state)[kind]
  said = refusal({"model": source}, **told)
  assert one in said and READ in said
  differ = "1 tensor differs" if number == 1 else f"{number} tensors differ"
  assert (
    f"isn't supported; nearest is glyph_resnet, from which {differ}" in said
  )


@pytest.mark.parametrize("model", ["resnet18", "glyph_swin", "glyph_wrn"])
def test_no_hint_leads_back(model, state):
  """What the message says that it is, it is."""
  said = refusal(state, model=model)
  found = re.search(r"; it is a (\w+) of the format (\w+)$", said)
  assert "model=" not in said
  again = convert.load(state, found[1], found[2])
  assert again.model.name == "glyph_resnet"


def test_a_wrong_format_is_told_too(state):
  said = refusal(state, format="meta")
  assert said.endswith("it is a glyph_resnet of the format timm")


def test_an_unsupported_one_without_classifier_is_not_asked_for_classes(state):
  source = {k: v for k, v in state.items() if not k.startswith(("fc", "bn1"))}
  for told in ({}, {"model": "glyph_resnet"}):
    said = refusal(source, **told)
    assert "num_classes" not in said and "isn't supported" in said


def test_the_command_line_says_it_in_a_line(state, tmp_path):
  torch_file.write(tmp_path / "w", {**state, "se.weight": zeros(2, 2)})
  done = cli.run(
    "--mode=convert", "--config=configs/convert.py",
    f"--config.source={tmp_path}/w", f"--config.output={tmp_path}/out",
    "--config.model=glyph_resnet",
  )  # fmt: skip
  assert done.returncode == 2 and READ in done.stderr
  assert len(done.stderr.splitlines()) == 1


def test_any_function_of_the_arrays_can_be_attacked(tmp_path):
  """As the message says, of a network that we don't have."""
  from roli_jax import attacks, evaluate
  from roli_jax.threat import ThreatModel

  rng = np.random.default_rng(0)
  torch_file.write(
    tmp_path / "w", {"fc.weight": rng.normal(size=(3, 16)).astype(np.float32)}
  )
  weights = convert.read(tmp_path / "w")

  def logits_fn(params, images):
    return images.reshape(images.shape[0], -1) @ params["fc.weight"].T

  images = rng.random((8, 4, 4, 1), np.float32)
  labels = np.asarray(logits_fn(weights, images)).argmax(-1).astype(np.int32)
  result = evaluate.run(
    logits_fn, images, labels,
    attacks.build("fgsm", ThreatModel("linf", 0.2)), params=weights,
  )  # fmt: skip
  assert result.clean.all() and not result.robust.all()
