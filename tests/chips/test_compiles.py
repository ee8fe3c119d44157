"""Toys of everything, compiled by the compilers of chips that aren't there.

`make test-chips` runs them. A compiler that aborts takes its worker along,
which pytest-xdist reports as that test's failure.
"""

import dataclasses
import functools
import os
import zlib

import jax
import jaxtyping
import pytest

from roli_jax import attacks, convert, keys, models, optim, peft
from roli_jax.experiment import command_line
from roli_jax.experiment.run import expand_stages
from roli_jax.plan import chips, compiler, programs, shapes
from tests.covering import pairwise

pytestmark = pytest.mark.chips

TARGETS = ("v5e:2x2", "h100:4")
FSDP = ((".*", "data"),)
FACTORS = {
  "target": TARGETS,
  "backbone": (
    "glyph_vit_token", "glyph_clip", "glyph_swin", "glyph_convnext",
    "glyph_resnet", "glyph_wrn", "glyph_preact",
  ),
  "method": tuple(peft.METHODS),
  "loss": (
    "at", "clean", "half_at", "trades", "mart", "twins", "awp", "autolora",
  ),
  "penalty": ("none", "function_space"),
  "optim": (*optim.OPTIMIZERS, *(a for a in optim.ANCHORS if a != "none")),
  "dtype": ("float32", "bfloat16"),
  "norm": ("linf", "l2", "l1"),
  "attack": ("pgd", "fgsm", "apgd_ce", "apgd_dlr"),
  "rules": ("copies", "fsdp", "zero1", "megatron"),
}  # fmt: skip
# Relatives of these, and what no option treats otherwise: one step of each.
OTHERS = (
  "glyph_deit", "glyph_vit_stem", "glyph_convnext_stem", "glyph_xcit",
  "glyph_mobile", "glyph_regnet", "glyph_eva", "glyph_coatnet",
)  # fmt: skip
RULES = {
  "copies": (1, ()),
  "fsdp": (1, FSDP),
  "zero1": (1, (("(mu|nu)/.*", "data"),)),
  "megatron": (
    2,
    (
      ("(fc1|q|k|v)/kernel", (None, "model")),
      ("(fc2|out)/kernel", ("model", None)),
    ),
  ),
}


def can_be(case):
  """Whether the config's rules allow it."""
  has_tokens = case["backbone"] in ("glyph_vit_token", "glyph_clip",
                                    "glyph_swin")  # fmt: skip
  has_statistics = case["backbone"] in ("glyph_resnet", "glyph_wrn",
                                        "glyph_preact")  # fmt: skip
  return (
    (case["method"] != "vpt" or has_tokens)
    and (case["loss"] != "twins" or has_statistics)
    and (case["method"] == "autolora") == (case["loss"] == "autolora")
    and (case["rules"] != "megatron" or "_vit" in case["backbone"])
    # It compares with the probe, under attack.
    and (
      case["penalty"] == "none"
      or (case["method"] != "linear" and case["loss"] != "clean")
    )
  )


PLAIN = {factor: levels[0] for factor, levels in FACTORS.items()}
# A loss sees logits, an optimizer leaf by leaf a gradient, wherever it is from.
APART = (
  {"backbone", "loss"}, {"backbone", "optim"}, {"method", "optim"},
  {"loss", "optim"},
)  # fmt: skip
CASES = pairwise(FACTORS, can_be, APART) + [
  {**PLAIN, "target": name, "backbone": backbone}
  for name in TARGETS
  for backbone in OTHERS
]


def parsed(*words, init="ranli"):
  return command_line.parse(
    [f"--config=configs/glyphs_roli.py:method=full,init={init}", *words]
  ).config


def config(case):
  """The config of a case: four images a device, two steps of the attack."""
  loss, decay = case["loss"], case["optim"]
  made = parsed(
    f"--config.backbone.name={case['backbone']}",
    f"--config.backbone.dtype={case['dtype']}",
    f"--config.threat.norm={case['norm']}",
    "--config.threat.eps=0.5",
    f"--config.attack.name={case['attack']}",
    "--config.adapt.batch_size=16",
    init="ranli" if case["penalty"] == "none" else "roli",
  )
  made["cells"][0]["method"] = case["method"]
  section = made["adapt"]
  section["penalty"]["name"] = case["penalty"]
  if loss == "awp":
    section["awp"]["gamma"] = 0.01
  else:
    section["loss"]["name"] = loss
  if decay in optim.OPTIMIZERS:
    section["optim"]["name"] = decay
  else:
    section["optim"]["anchor"]["name"] = decay
  made["mesh"] = dict(
    zip(("model", "rules"), RULES[case["rules"]], strict=True)
  )
  return made


@functools.cache
def target(name):
  made = chips.parse(name)
  os.environ.update(
    {k: v for k, v in made.environment().items() if k != "XLA_FLAGS"}
  )
  made.devices()
  return made


@pytest.fixture(autouse=True)
def _unchecked():
  """What is lowered describes its arguments: placeholders in an attack."""
  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", False)


def lower_step(made, at):
  """The step of a run's last stage, and not of the probe before it."""
  run = shapes.planned(made, at.devices())
  names = [one.name for one in programs.listed(run, expand_stages(run))]
  return programs.lower(made, len(names) - 1 - names[::-1].index("step"), at)


def on(name, what, label):
  """A test's parameters; one worker alone may hold the TPU's compiler."""
  part = zlib.crc32(label.encode()) % 4
  group = pytest.mark.xdist_group("tpu" if name == "v5e:2x2" else f"gpu{part}")
  return pytest.param(name, what, id=f"{name}-{label}", marks=group)


@pytest.mark.parametrize(
  "name, case", [on(c["target"], c, "-".join(c.values())) for c in CASES]
)
def test_a_step_compiles(name, case):
  at = target(name)
  found = compiler.describe(lower_step(config(case), at).compile(), at)
  sent = found["collectives"]
  assert found["flops"] > 0 and found["peak_bytes"] > 0
  assert sent["outside"] > 0
  # Each image is attacked by itself: only split weights have to be gathered.
  # But XLA splits a grouped convolution's gradient by groups on GPUs.
  by_groups = (name, case["backbone"]) == ("h100:4", "glyph_regnet")
  if case["rules"] in ("copies", "zero1"):
    assert bool(sent["in_loop"]) == by_groups


@pytest.mark.parametrize("name, _", [on(n, None, "m2_mix") for n in TARGETS])
def test_a_step_with_texts_compiles(name, _, tmp_path):
  """From a head of texts, which only a file brings."""
  at = target(name)
  model = models.create("glyph_clip", 10)
  model = dataclasses.replace(model, head=models.heads.cosine(10, 8))
  file = tmp_path / "clip.safetensors"
  convert.save(convert.Bundle(model, *model.init(keys.root(0))), file)
  made = parsed(
    "--config.backbone.name=glyph_clip",
    f"--config.backbone.weights={file}",
    "--config.head_init=zeroshot",
    "--config.adapt.penalty.name=m2_mix",
    "--config.adapt.penalty.weight=0.05",
    "--config.adapt.batch_size=16",
  )
  found = compiler.describe(lower_step(made, at).compile(), at)
  # Its pairs are made of the whole batch, outside of the attack.
  assert found["collectives"]["outside"] > 0
  assert found["collectives"]["in_loop"] == 0


@pytest.mark.parametrize(
  "name, by_head",
  [on(name, name == TARGETS[0], "attention") for name in TARGETS],
)
def test_tpus_with_room_attend_by_head(name, by_head):
  """A loop for each block's attention, and one for its gradient."""

  def loops(*words):
    made = parsed("--config.backbone.name=glyph_vit_token", *words)
    return programs.lower(made, 0, target(name)).as_text().count(".while")

  plain = loops("--config.backbone.attention=plain")
  assert loops() > plain if by_head else loops() == plain


SEARCHES = ("pgd", "apgd_ce", "apgd_dlr", "apgd_t", "fab", "fab_t", "square")


@pytest.mark.parametrize(
  "name, attack", [on(name, a, a) for name in TARGETS for a in SEARCHES]
)
def test_an_evaluation_compiles(name, attack):
  at = target(name)
  assert attack in attacks.ATTACKS
  made = parsed(
    "--config.backbone.name=glyph_vit_token",
    f"--config.eval_attack.name={attack}",
    "--config.eval_batch_size=32",
  )
  found = compiler.describe(programs.lower(made, 2, at).compile(), at)
  assert found["flops"] > 0
  assert found["collectives"] == dict.fromkeys(found["collectives"], 0)
  assert jax.default_backend() == "cpu"
