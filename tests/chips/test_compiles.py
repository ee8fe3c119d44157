"""Toys of everything, compiled by the compilers of chips that aren't there.

`make test-chips` runs them. A compiler that aborts takes its worker along,
which pytest-xdist reports as that test's failure.
"""

import functools
import os

import jax
import jaxtyping
import pytest

from roli_jax import attacks, optim, peft
from roli_jax.experiment import command_line
from roli_jax.plan import chips, compiler, programs
from tests.covering import pairwise

pytestmark = pytest.mark.chips

TARGETS = ("v5e:2x2", "h100:4")
FSDP = ((".*", "data"),)
FACTORS = {
  "target": TARGETS,
  "backbone": (
    "glyph_vit_token", "glyph_clip", "glyph_swin", "glyph_convnext",
    "glyph_resnet", "glyph_wrn",
  ),
  "method": tuple(peft.METHODS),
  "loss": (
    "at", "clean", "half_at", "trades", "mart", "twins", "awp", "autolora",
  ),
  "optim": (*optim.OPTIMIZERS, *(a for a in optim.ANCHORS if a != "none")),
  "dtype": ("float32", "bfloat16"),
  "norm": ("linf", "l2", "l1"),
  "attack": ("pgd", "fgsm", "apgd_ce", "apgd_dlr"),
  "rules": ("copies", "fsdp", "zero1", "megatron"),
}  # fmt: skip
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
  has_statistics = case["backbone"] in ("glyph_resnet", "glyph_wrn")
  return (
    (case["method"] != "vpt" or has_tokens)
    and (case["loss"] != "twins" or has_statistics)
    and (case["method"] == "autolora") == (case["loss"] == "autolora")
    and (case["rules"] != "megatron" or "_vit" in case["backbone"])
  )


CASES = pairwise(FACTORS, can_be)


def parsed(*words):
  return command_line.parse(
    ["--config=configs/glyphs_roli.py:method=full,init=ranli", *words]
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
  )
  made["cells"][0]["method"] = case["method"]
  section = made["adapt"]
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


def on(name, what, label):
  """A test's parameters; each target has a worker of its own."""
  group = pytest.mark.xdist_group(name)
  return pytest.param(name, what, id=f"{name}-{label}", marks=group)


@pytest.mark.parametrize(
  "name, case", [on(c["target"], c, "-".join(c.values())) for c in CASES]
)
def test_a_step_compiles(name, case):
  at = target(name)
  compiled = programs.lower(config(case), 0, at).compile()
  found = compiler.describe(compiled, at)
  sent = found["collectives"]
  assert found["flops"] > 0 and found["peak_bytes"] > 0
  assert sent["outside"] > 0
  # Each image is attacked by itself: only split weights have to be gathered.
  if case["rules"] in ("copies", "zero1"):
    assert sent["in_loop"] == 0


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
