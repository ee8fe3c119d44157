"""CLIP's text tower, and classifiers made of it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import glyphs_roli
from roli_jax import convert, keys, models, optim, sharding, step, trees
from roli_jax import state as training
from roli_jax.clip import zeroshot
from roli_jax.clip.tokenizer import Tokenizer
from roli_jax.experiment.build import build_model
from roli_jax.experiment.program import build_program, check_run
from roli_jax.experiment.run import build_run, expand_stages
from roli_jax.experiment.start_and_resume import initial_variables
from roli_jax.models import heads

WIDTH, CONTEXT, EMBED = 128, 12, 8
MERGES = [("d", "o"), ("do", "g</w>"), ("c", "a"), ("ca", "t</w>")]


@pytest.fixture(scope="module")
def words():
  return Tokenizer(MERGES)


@pytest.fixture(scope="module")
def state(words):
  """A toy CLIP as open_clip would save it, in float32."""
  rng = np.random.default_rng(0)
  shapes = {
    "positional_embedding": (CONTEXT, WIDTH),
    "text_projection": (WIDTH, EMBED),
    "token_embedding.weight": (words.vocab_size, WIDTH),
    "ln_final.weight": (WIDTH,),
    "ln_final.bias": (WIDTH,),
  }
  for i in range(2):
    block = f"transformer.resblocks.{i}"
    shapes |= {
      f"{block}.ln_1.weight": (WIDTH,),
      f"{block}.ln_1.bias": (WIDTH,),
      f"{block}.attn.in_proj_weight": (3 * WIDTH, WIDTH),
      f"{block}.attn.in_proj_bias": (3 * WIDTH,),
      f"{block}.attn.out_proj.weight": (WIDTH, WIDTH),
      f"{block}.attn.out_proj.bias": (WIDTH,),
      f"{block}.ln_2.weight": (WIDTH,),
      f"{block}.ln_2.bias": (WIDTH,),
      f"{block}.mlp.c_fc.weight": (4 * WIDTH, WIDTH),
      f"{block}.mlp.c_fc.bias": (4 * WIDTH,),
      f"{block}.mlp.c_proj.weight": (WIDTH, 4 * WIDTH),
      f"{block}.mlp.c_proj.bias": (WIDTH,),
    }
  state = {
    key: np.float32(rng.normal(size=shape) / np.sqrt(shape[-1]))
    for key, shape in shapes.items()
  }
  return {**state, "logit_scale": np.float32(2.5), **visual()}


def visual():
  model = models.create("glyph_clip", 2)
  model = dataclasses.replace(model, head=heads.projection(EMBED))
  bundle = convert.Bundle(model, *model.init(keys.root(1)))
  return convert.to_state_dict(bundle, "open_clip")


@pytest.fixture(scope="module")
def tower(state):
  return convert.text_tower(state)


@pytest.fixture(scope="module")
def bundle(state):
  return convert.load(state, "glyph_clip")


def images(n=3):
  return np.random.default_rng(2).uniform(size=(n, 8, 8, 1)).astype(np.float32)


def ids_of(words):
  return words(["a dog", "cat 1, not a dog", ""], CONTEXT, truncate=True)


def reference(state, ids, num_heads, gelu):
  """The text tower from PyTorch's tensors, in NumPy and float64."""
  w = {key: np.float64(tensor) for key, tensor in state.items()}

  def norm(x, name):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(
      x.var(-1, keepdims=True) + 1e-5
    )
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]

  embeddings = []
  for row in ids:
    x = w["token_embedding.weight"][row] + w["positional_embedding"][: len(row)]
    for i in range(2):
      at = f"transformer.resblocks.{i}"
      y = norm(x, f"{at}.ln_1")
      qkv = y @ w[f"{at}.attn.in_proj_weight"].T + w[f"{at}.attn.in_proj_bias"]
      mixed = np.zeros_like(x)
      size = WIDTH // num_heads
      for t in range(len(row)):
        for h in range(num_heads):
          part = slice(h * size, (h + 1) * size)
          q, k, v = (
            qkv[:, j * WIDTH : (j + 1) * WIDTH][:, part] for j in range(3)
          )
          scores = np.exp(k[: t + 1] @ q[t] / np.sqrt(size))
          mixed[t, part] = scores / scores.sum() @ v[: t + 1]
      x = x + mixed @ w[f"{at}.attn.out_proj.weight"].T
      x = x + w[f"{at}.attn.out_proj.bias"]
      y = norm(x, f"{at}.ln_2")
      y = gelu(y @ w[f"{at}.mlp.c_fc.weight"].T + w[f"{at}.mlp.c_fc.bias"])
      x = x + y @ w[f"{at}.mlp.c_proj.weight"].T + w[f"{at}.mlp.c_proj.bias"]
    end = norm(x, "ln_final")[np.argmax(row)]
    embeddings.append(end @ w["text_projection"])
  return np.stack(embeddings)


def gelu(x):
  from scipy import special

  return x * (1 + special.erf(x / np.sqrt(2))) / 2


def quick_gelu(x):
  return x / (1 + np.exp(-1.702 * x))


def test_the_text_tower_is_named_as_the_vision_transformer_is(tower, words):
  module, params = tower
  got = {k: np.shape(v) for k, v in trees.paths(params).items()}
  vit = models.Vit(patch=2, width=WIDTH, depth=2, num_heads=2, hidden=4 * WIDTH)
  like = jax.eval_shape(vit.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
  same = {
    k: v.shape
    for k, v in trees.paths(like["params"]).items()
    if not k.startswith(("embed", "cls", "positions"))
  }
  own = {
    "embed/embedding": (words.vocab_size, WIDTH),
    "positions": (1, CONTEXT, WIDTH),
    "projection/kernel": (WIDTH, EMBED),
    "logit_scale": (),
  }
  assert got == same | own
  assert module.num_heads == 2 and params["logit_scale"] == 2.5


@pytest.mark.parametrize(
  "num_heads, act, fn",
  [(2, "gelu", gelu), (4, "gelu", gelu), (2, "quick_gelu", quick_gelu)],
)
def test_the_text_tower_is_clips(num_heads, act, fn, state, words):
  """In float64, to 1e-12, and in float32."""
  module, params = convert.text_tower(state, num_heads, act)
  ids = ids_of(words)
  expected = reference(state, ids, num_heads, fn)
  got = jax.jit(module.apply)({"params": params}, ids)
  np.testing.assert_allclose(got, expected, atol=5e-6)
  with jax.enable_x64(True):
    double = jax.tree.map(np.float64, params)
    got = jax.jit(module.apply)({"params": double}, ids)
    np.testing.assert_allclose(got, expected, atol=1e-12)


def test_a_token_sees_none_that_follows(tower):
  module, params = tower
  ids = np.arange(1, CONTEXT + 1, dtype=np.int32)[None]

  @jax.jit
  def tokens(ids):
    _, seen = module.apply(
      {"params": params}, ids, mutable=["intermediates"],
      capture_intermediates=True,
    )  # fmt: skip
    return seen["intermediates"]["norm"]["__call__"][0][0]

  before = tokens(ids)
  for t in (1, 6, CONTEXT - 1):
    other = ids.copy()
    other[0, t] = 99
    same = np.asarray(before == tokens(other)).all(-1)
    assert same[:t].all() and not same[t:].any()


def test_what_follows_the_end_changes_nothing(tower, words):
  module, params = tower
  ids = words(["a dog"], CONTEXT)
  short = ids[:, : np.argmax(ids) + 1]
  assert short.shape == (1, 4)
  np.testing.assert_allclose(
    module.apply({"params": params}, ids),
    module.apply({"params": params}, short),
    atol=1e-5,
  )


def test_a_tower_is_read_from_files_and_wrappers(state, tower, tmp_path):
  from safetensors import numpy as safetensors

  from roli_jax.convert import torch_file

  arrays = {key: np.array(value) for key, value in state.items()}
  safetensors.save_file(arrays, tmp_path / "x.safetensors")
  torch_file.write(tmp_path / "x.pt", arrays)
  wrapped = {"state_dict": {f"module.{k}": v for k, v in state.items()}}
  for source in (tmp_path / "x.safetensors", str(tmp_path / "x.pt"), wrapped):
    module, params = convert.text_tower(source)
    assert module == tower[0]
    for path, leaf in trees.paths(tower[1]).items():
      np.testing.assert_array_equal(trees.paths(params)[path], leaf)


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


CLASSES = ("dog", "cat", "cat dog", "1")
TEMPLATES = ("a {}.", "{} {}", "no {}")


def classifier(bundle, tower, words, templates=TEMPLATES, **more):
  return zeroshot.classifier(bundle, *tower, words, CLASSES, templates, **more)


@pytest.fixture(scope="module")
def made(bundle, tower, words):
  return classifier(bundle, tower, words)


def test_a_zero_shot_head_is_as_by_hand(made, bundle, words, state):
  columns = []
  for name in CLASSES:
    prompts = [f"a {name}.", f"{name} {name}", f"no {name}"]
    vectors = unit(reference(state, words(prompts, CONTEXT), 2, gelu))
    columns.append(unit(vectors.mean(0)))
  kernel = np.stack(columns, 1)
  np.testing.assert_allclose(made.params.head["kernel"], kernel, atol=1e-6)
  features = np.float64(bundle.model.features(bundle.params, {}, images()))
  embedded = unit(features @ np.float64(state["visual.proj"]))
  expected = np.exp(2.5) * embedded @ kernel
  got = made.model.logits(made.params, {}, images())
  np.testing.assert_allclose(got, expected, atol=1e-4)
  assert made.model.num_classes == 4
  assert made.params.backbone is bundle.params.backbone


def test_texts_are_embedded_in_batches(tower, words, monkeypatch):
  whole = zeroshot.class_vectors(*tower, words, CLASSES, TEMPLATES)
  monkeypatch.setattr(zeroshot, "_BATCH", 5)  # of 12
  pieces = zeroshot.class_vectors(*tower, words, CLASSES, TEMPLATES)
  np.testing.assert_allclose(pieces, whole, atol=1e-6)


def test_the_scale_can_be_told(made, bundle, tower, words):
  warm = classifier(bundle, tower, words, logit_scale=0)
  np.testing.assert_allclose(
    made.model.logits(made.params, {}, images()),
    np.exp(2.5) * warm.model.logits(warm.params, {}, images()),
    rtol=1e-5,
  )


def test_a_zero_shot_bundle_comes_back(made, tmp_path):
  convert.save(made, tmp_path / "x.safetensors")
  again = convert.load(tmp_path / "x.safetensors")
  assert again.model == made.model and hash(again.model) == hash(made.model)
  assert step.make_predict(again.model) == step.make_predict(made.model)
  for path, leaf in trees.paths(made.params).items():
    np.testing.assert_array_equal(trees.paths(again.params)[path], leaf)


def test_descriptions_from_before_cosine_heads_are_read():
  for head in (heads.linear(3), heads.projection(3), heads.cosine(3, 8)):
    model = dataclasses.replace(models.create("glyph_clip", 3), head=head)
    about = json.loads(json.dumps(models.to_spec(model)))
    assert models.from_spec(about) == model
  about = models.to_spec(models.create("glyph_clip", 3))
  assert about.pop("head_bias")
  assert models.from_spec(about) == models.create("glyph_clip", 3)


def test_a_cosine_head_has_finite_gradients_at_zero_features():
  head = heads.cosine(3, 8)
  params = head.init(jax.random.key(0), jnp.ones((1, 4)))["params"]

  def loss(params, x):
    return (head.apply({"params": params}, x) ** 2).sum()

  gradient = jax.jit(jax.grad(loss, (0, 1)))
  for x in (jnp.zeros((2, 4)), jnp.full((2, 4), 1e-30), jnp.ones((2, 4))):
    grads = gradient(params, x)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_a_zero_shot_head_can_be_fine_tuned(made):
  labels = np.array([0, 1, 2])

  def loss(head):
    params = dataclasses.replace(made.params, head=head)
    logits = made.model.logits(params, {}, images())
    return -jax.nn.log_softmax(logits)[np.arange(3), labels].mean()

  head = jax.tree.map(jnp.asarray, made.params.head)
  value, grads = jax.value_and_grad(loss)(head)
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))
  norm2 = sum((g**2).sum() for g in jax.tree.leaves(grads))
  moved = jax.tree.map(lambda x, g: x - 1e-3 * g, head, grads)
  assert value - loss(moved) == pytest.approx(1e-3 * float(norm2), rel=0.3)


@pytest.mark.parametrize("format", ["open_clip", "timm"])
def test_a_cosine_head_has_no_name_elsewhere(made, format):
  with pytest.raises(ValueError, match="no names for a zero-shot head"):
    convert.to_state_dict(made, format)


@pytest.mark.parametrize(
  "given, message",
  [
    ({"classes": ()}, r"classes as a list of texts, got \(\)"),
    ({"classes": "dog"}, "classes as a list of texts, got 'dog'"),
    ({"classes": ("dog",)}, "at least 2 classes, got 1"),
    ({"templates": ()}, "templates as a list"),
    ({"templates": "a {}"}, "templates as a list"),
    ({"templates": ("a {}", "a dog")}, "'a dog' has no {}"),
    ({"templates": ("a {} " + 9 * "dog ",)}, "has 11 tokens"),
    ({"words": Tokenizer(MERGES[:2])}, "516 tokens, the text tower embeds 518"),
  ],
)
def test_words_that_make_no_classifier_are_refused(
  given, message, bundle, tower, words
):
  told = {"words": words, "classes": CLASSES, "templates": TEMPLATES, **given}
  with pytest.raises(ValueError, match=message):
    zeroshot.classifier(bundle, *tower, *told.values())


def test_towers_that_are_no_pair_are_refused(made, bundle, tower, words, state):
  narrow = {**state, "text_projection": state["text_projection"][:, :5]}
  with pytest.raises(ValueError, match="to width 8, texts to 5"):
    classifier(bundle, convert.text_tower(narrow), words)
  quick = convert.text_tower(state, act="quick_gelu")
  with pytest.raises(ValueError, match="has gelu, the text tower quick_gelu"):
    classifier(bundle, quick, words)
  with pytest.raises(ValueError, match=r"one of \['kernel', 'logit_scale'"):
    classifier(made, tower, words)


BROKEN = {
  "missing": (lambda s: s.pop("ln_final.bias"), {}, "missing: ln_final.bias"),
  "a block astray": (
    lambda s: s.update({"transformer.resblocks.7.x": np.ones(2)}),
    {},
    r"missing: transformer.resblocks.2.*unexpected: .*resblocks.7.x",
  ),
  "left over": (lambda s: s.update(logit_bias=np.ones(1)), {}, "logit_bias"),
  "misshapen": (
    lambda s: s.update({"ln_final.bias": np.ones(3)}),
    {},
    r"ln_final.bias \(3,\) \(expected \(128,\)\)",
  ),
  "not finite": (
    lambda s: s.update({"ln_final.bias": np.full(WIDTH, np.nan)}),
    {},
    "ln_final.bias holds values that are not finite",
  ),
  "no text": (lambda s: s.pop("text_projection"), {}, "no text tower"),
  "heads": (lambda s: None, {"num_heads": 3}, "3 heads do not divide"),
  "act": (lambda s: None, {"act": "gleu"}, "did you mean 'gelu'"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_without_a_whole_tower_is_refused(kind, state):
  harm, told, message = BROKEN[kind]
  broken = dict(state)
  harm(broken)
  with pytest.raises(ValueError, match=message):
    convert.text_tower(broken, **told)


def test_a_narrow_tower_must_say_its_heads(state):
  narrow = {k: v[..., :32] for k, v in state.items() if v.ndim}
  with pytest.raises(ValueError, match="say num_heads"):
    convert.text_tower(narrow)


def test_a_bundle_of_ours_has_no_text_tower(bundle, tmp_path):
  convert.save(bundle, tmp_path / "x.safetensors")
  with pytest.raises(ValueError, match="has no text tower"):
    convert.text_tower(tmp_path / "x.safetensors")


@pytest.fixture(scope="module")
def prompted(tmp_path_factory):
  """A toy CLIP of ten classes as a file, and its bundle."""
  model = models.create("glyph_clip", 10)
  model = dataclasses.replace(model, head=models.heads.cosine(10, 8))
  bundle = convert.Bundle(model, *model.init(keys.root(0)))
  file = tmp_path_factory.mktemp("prompted") / "clip.safetensors"
  convert.save(bundle, file)
  return file, bundle


def run_of(file, **changes):
  config = glyphs_roli.get_config("backbone=glyph_clip,init=ranli")
  config.backbone.weights = str(file)
  config.head_init = "zeroshot"
  config.adapt.batch_size = 16
  config.adapt.update(changes)
  made = build_run(config.to_dict())
  (stage,) = expand_stages(made)
  return made, stage


@pytest.mark.slow
def test_a_run_can_start_at_a_zero_shot_head_with_m2_mix(prompted):
  file, bundle = prompted
  made, stage = run_of(file, penalty={"name": "m2_mix", "weight": 0.05})
  check_run(made, [stage])
  params, stats = initial_variables(made, stage)
  source = made.data["test"]
  expected = bundle.model.logits(bundle.params, {}, source.pixels(slice(4)))
  logits = build_model(made, stage).logits(
    params, stats, source.pixels(slice(4))
  )
  np.testing.assert_allclose(logits, expected, atol=1e-6)
  program = build_program(made, stage)
  now = state_of(made, stage, program)
  batch = {
    "image": source.images[:16],
    "label": source.labels[:16],
    "index": source.indices[:16],
  }
  now, key = sharding.replicate((now, keys.root(0)), made.mesh)
  now, counts = program.step(now, sharding.put(batch, made.mesh), key)
  assert np.isfinite(counts.loss) and int(now.memory["penalty"]["steps"]) == 1


def state_of(made, stage, program):
  params, stats = initial_variables(made, stage)
  now = training.create(
    params, stats, program.method.trains(params), program.tx,
    program.criterion.init_memory,
  )  # fmt: skip
  return dataclasses.replace(now, opt_state=optim.at_rate(now.opt_state, 1e-3))


def test_weights_without_a_zero_shot_head_are_refused(prompted, tmp_path):
  _, bundle = prompted
  plain = convert.with_classes(bundle.model, 10)
  file = tmp_path / "plain.safetensors"
  convert.save(convert.Bundle(plain, *plain.init(keys.root(0))), file)
  made, stage = run_of(file)
  with pytest.raises(ValueError, match="has no zero-shot head"):
    check_run(made, [stage])
