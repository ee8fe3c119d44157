"""The Guide: its six data sets, its configs, its columns and its scores."""

import hashlib
import itertools
import json
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from configs import guide as configs
from roli_jax import data, models, trees
from roli_jax.data import archives, transforms, verify
from roli_jax.experiment import stage_tests as score
from roli_jax.experiment.build import build_attack
from roli_jax.experiment.run import build_run
from roli_jax.experiment.stages import expand
from roli_jax.results import guide, record
from tests import pictures

CHAINS = {
  "train_transforms": ("stretch:8", "flip", "color_jitter:0.25", "rotate:2"),
  "eval_transforms": ("stretch:8",),
}
BACKBONE = "convnext_base.fb_in22k"


@pytest.fixture(autouse=True)
def _nothing_is_remembered(tmp_path_factory, monkeypatch):
  cache = tmp_path_factory.mktemp("cache")
  monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
  monkeypatch.setattr(verify, "_seen", set())


# Look-alikes of the archives, two classes of ten images a part and more.


def write(root, names):
  for seed, name in enumerate(names):
    pictures.write(root / name, seed, width=9, height=6)


def mat(file, **variables):
  from scipy import io

  file.parent.mkdir(parents=True, exist_ok=True)
  io.savemat(str(file), variables)


def structs(*rows):
  """A struct array of MATLAB's, one element a row."""
  made = np.empty(len(rows), [(field, object) for field in rows[0]])
  for place, row in zip(made, rows, strict=True):
    for field, value in row.items():
      place[field] = value
  return made


def cells(*texts):
  return np.array(texts, object)


def aircraft(root):
  data_dir = root / "fgvc-aircraft-2013b" / "data"
  images = {split: [f"{1000000 * k + i}" for i in range(10)]
            for k, split in enumerate(data.SPLITS, 1)}  # fmt: skip
  for split, names in images.items():
    write(data_dir / "images", [f"{name}.jpg" for name in names])
    lines = [
      f"{n} {('DH-82', 'Boeing 717')[i % 2]}" for i, n in enumerate(names)
    ]
    file = data_dir / f"images_variant_{split}.txt"
    file.write_text("\n".join(lines) + "\n")
  (data_dir / "variants.txt").write_text("DH-82\nBoeing 717\n")
  return (10, 10, 10), ("Boeing 717", "DH-82")


def flowers(root):
  base = root / "flowers-102"
  write(base, [f"jpg/image_{i:05d}.jpg" for i in range(1, 13)])
  mat(base / "imagelabels.mat", labels=np.array([[1, 2] * 6], np.uint8))
  ids = {"trnid": [1, 2, 3, 12], "valid": [4, 5], "tstid": range(6, 12)}
  mat(
    base / "setid.mat",
    **{name: np.array([list(own)], np.uint16) for name, own in ids.items()},
  )
  return (4, 2, 6), ("1", "2")


def pets(root):
  base = root / "oxford-iiit-pet"
  classes = ("Abyssinian", "american_bulldog")
  for part, first in (("trainval", 1), ("test", 11)):
    lines = [
      f"{label}_{i} {k + 1} {k + 1} 1"
      for k, label in enumerate(classes)
      for i in range(first, first + 10)
    ]
    write(base / "images", [f"{line.split()[0]}.jpg" for line in lines])
    file = base / "annotations" / f"{part}.txt"
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n".join(["# Image CLASS-ID SPECIES BREED", *lines]))
  return (17, 3, 20), classes


def cars(root):
  base = root / "stanford_cars"
  names = [f"{i:05d}.jpg" for i in range(1, 21)]
  annotations = structs(
    *(
      {"bbox_x1": 1, "class": 1 + i % 2, "fname": n}
      for i, n in enumerate(names)
    )
  )
  for folder in ("cars_train", "cars_test"):
    write(base / folder, names)
  mat(
    base / "devkit/cars_meta.mat", class_names=cells("Ford 2012", "Audi 2011")
  )
  mat(base / "devkit/cars_train_annos.mat", annotations=annotations)
  mat(base / "cars_test_annos_withlabels.mat", annotations=annotations)
  return (17, 3, 20), ("Audi 2011", "Ford 2012")


def caltech101(root):
  base = root / "caltech101" / "101_ObjectCategories"
  for label in ("BACKGROUND_Google", "Faces", "ant"):
    write(base / label, [f"image_{i:04d}.jpg" for i in range(1, 21)])
  return (27, 5, 8), ("Faces", "ant")


def uc_merced(root):
  base = root / "UCMerced_LandUse" / "Images"
  for label in ("agricultural", "airplane"):
    write(base / label, [f"{label}{i:02d}.tif" for i in range(20)])
  return (27, 5, 8), ("agricultural", "airplane")


LIKE = {
  "aircraft": aircraft,
  "caltech101": caltech101,
  "cars": cars,
  "flowers": flowers,
  "pets": pets,
  "uc_merced": uc_merced,
}


def build(name, root, split="train", **fields):
  spec = {"name": name, "root": str(root), **CHAINS, **fields}
  return data.build(spec, split)


def files(source):
  return [path.rpartition("/")[2] for path in source.images]


@pytest.mark.parametrize("name", LIKE)
def test_an_archive_is_read_as_it_lies(name, tmp_path):
  sizes, classes = LIKE[name](tmp_path)
  splits = [build(name, tmp_path, split) for split in data.SPLITS]
  assert tuple(len(source) for source in splits) == sizes
  for source in splits:
    assert source.classes == classes and source.num_classes == 2
    assert set(source.labels) == {0, 1} and source.shape == (8, 8, 3)
  indices = np.concatenate([source.indices for source in splits])
  assert sorted(indices) == list(range(sum(sizes)))
  paths = np.concatenate([source.images for source in splits])
  assert len(set(paths)) == sum(sizes)
  assert splits[2].pixels(slice(0, 2)).shape == (2, 8, 8, 3)


@pytest.mark.parametrize("name", LIKE)
def test_the_root_may_be_what_the_archive_unpacks_to(name, tmp_path):
  LIKE[name](tmp_path)
  (inner,) = tmp_path.iterdir()
  outer, own = build(name, tmp_path, "test"), build(name, inner, "test")
  assert files(own) == files(outer) and own.classes == outer.classes


@pytest.mark.parametrize("name", LIKE)
def test_what_is_not_there_is_said_in_six_lines(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(
    ValueError, match=f"{name} is not at data/{name}"
  ) as error:
    data.build(name, "train")
  said = str(error.value)
  assert archives.ARCHIVES[name].home in said and "docs/data.md" in said
  assert len(said.splitlines()) <= 6


@pytest.mark.parametrize("name", ["aircraft", "cars", "flowers", "pets"])
def test_the_annotation_that_lacks_is_named(name, tmp_path):
  LIKE[name](tmp_path)
  last = archives.ARCHIVES[name].layouts[0].needs[-1]
  (inner,) = tmp_path.iterdir()
  missing = inner / last
  missing.rename(missing.with_name("elsewhere"))
  with pytest.raises(ValueError, match=f"{last} is missing"):
    build(name, tmp_path)


@pytest.mark.parametrize("name", ["caltech101", "uc_merced"])
def test_directories_of_classes_are_enough_where_nobody_split(name, tmp_path):
  LIKE[name](tmp_path)
  (inner,) = tmp_path.iterdir()
  (base,) = inner.iterdir()
  whole, bare = build(name, tmp_path, "test"), build(name, base, "test")
  assert files(bare) == files(whole)
  assert bare.labels.tolist() == whole.labels.tolist()


@pytest.mark.parametrize("name", LIKE)
def test_a_split_of_ones_own_is_taken_as_it_is(name, tmp_path):
  pictures.tree(tmp_path, train=3, val=1, test=2)
  sizes = [len(build(name, tmp_path, split)) for split in data.SPLITS]
  assert sizes == [6, 2, 4]


def test_cars_in_one_directory_are_read_too(tmp_path):
  names = [f"car_ims/{i:06d}.jpg" for i in range(1, 41)]
  rows = [
    {"relative_im_path": n, "class": 1 + i % 2, "test": int(i >= 20)}
    for i, n in enumerate(names)
  ]
  write(tmp_path, names)
  mat(
    tmp_path / "cars_annos.mat",
    annotations=structs(*rows),
    class_names=cells("Ford 2012", "Audi 2011"),
  )
  train, test = build("cars", tmp_path), build("cars", tmp_path, "test")
  assert (len(train), len(test)) == (17, 20)
  assert sorted(files(test)) == [n.rpartition("/")[2] for n in names[20:]]
  odd = [int(file[:6]) % 2 for file in files(test)]  # the first is a Ford
  assert test.labels.tolist() == odd and test.classes[1] == "Ford 2012"


def test_a_name_in_two_splits_is_bad(tmp_path):
  flowers(tmp_path)
  ids = {"trnid": [1, 2], "valid": [3, 4], "tstid": [2, 5]}
  mat(
    tmp_path / "flowers-102/setid.mat",
    **{name: np.array([own], np.uint16) for name, own in ids.items()},
  )
  with pytest.raises(ValueError, match="named 2 times, in train and test"):
    build("flowers", tmp_path)


def test_an_image_that_is_not_there_is_bad(tmp_path):
  pets(tmp_path)
  (tmp_path / "oxford-iiit-pet/images/Abyssinian_12.jpg").unlink()
  with pytest.raises(ValueError, match=r"Abyssinian_12\.jpg: there is no such"):
    build("pets", tmp_path)
  assert len(build("pets", tmp_path, "test", policy="skip")) == 19


SPOILT = {
  "pets": ("annotations/test.txt", "cat_1 1 1", "three numbers"),
  "aircraft": ("data/images_variant_val.txt", "123 Spitfire", "variants.txt"),
  "flowers": ("setid.mat", "no matrix", "no MATLAB file"),
  "cars": ("devkit/cars_meta.mat", "no matrix", "no MATLAB file"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_annotations_that_can_not_be_are_named(name, tmp_path):
  LIKE[name](tmp_path)
  file, text, said = SPOILT[name]
  (inner,) = tmp_path.iterdir()
  (inner / file).write_text(text)
  with pytest.raises(ValueError, match=said) as error:
    build(name, tmp_path)
  assert file in str(error.value)


def test_numbers_beyond_the_annotations_are_named(tmp_path):
  flowers(tmp_path / "a")
  mat(tmp_path / "a/flowers-102/imagelabels.mat", labels=np.array([[1, 2]]))
  with pytest.raises(ValueError, match="trnid has image 3, of 2"):
    build("flowers", tmp_path / "a")
  cars(tmp_path / "b")
  meta = tmp_path / "b/stanford_cars/devkit/cars_meta.mat"
  mat(meta, class_names=cells("Ford 2012"))
  with pytest.raises(ValueError, match=r"00002\.jpg has class 2, of 1"):
    build("cars", tmp_path / "b")


def test_variables_and_fields_that_lack_are_named(tmp_path):
  flowers(tmp_path / "a")
  mat(tmp_path / "a/flowers-102/setid.mat", trnid=[1], tstid=[2])
  with pytest.raises(ValueError, match="no variable 'valid'; it has trnid"):
    build("flowers", tmp_path / "a")
  cars(tmp_path / "b")
  file = tmp_path / "b/stanford_cars/cars_test_annos_withlabels.mat"
  mat(file, annotations=structs({"fname": "00001.jpg"}, {"fname": "2.jpg"}))
  with pytest.raises(ValueError, match="annotations have no field 'class'"):
    build("cars", tmp_path / "b")


def test_too_few_images_for_a_split_are_an_error(tmp_path):
  write(tmp_path, ["a/1.tif", "a/2.tif", "b/1.tif"])
  with pytest.raises(ValueError, match="can't be split by class"):
    build("uc_merced", tmp_path)


# Splits.


def images(count, classes):
  return [archives.Image(f"{i:05d}", i % classes, "") for i in range(count)]


def of_size(name):
  """The parts of an original, as large as it is."""
  classes = data.FACTS[name].num_classes
  sizes = {
    "aircraft": {"train": 3334, "val": 3333, "test": 3333},
    "caltech101": {"all": 8677},
    "cars": {"trainval": 8144, "test": 8041},
    "flowers": {"train": 1020, "val": 1020, "test": 6149},
    "pets": {"trainval": 3680, "test": 3669},
    "uc_merced": {"all": 2100},
  }[name]
  return {part: images(count, classes) for part, count in sizes.items()}


@pytest.mark.parametrize("name", LIKE)
def test_the_facts_follow_from_the_originals_sizes(name):
  splits = archives._split(of_size(name))
  facts = data.FACTS[name]
  assert [len(splits[s]) for s in data.SPLITS] == [
    facts.train, facts.val, facts.test,
  ]  # fmt: skip
  shares = np.bincount([image.number for image in splits["test"]])
  assert shares.max() - shares.min() <= 1  # these have equal classes
  assert facts.shape == (224, 224, 3)


def test_the_splits_do_not_move():
  # Of train_test_split with seeds 42, 42 and 0, as in the Guide's repository.
  splits = archives._split(of_size("caltech101"))
  said = {
    split: hashlib.md5(" ".join(i.name for i in own).encode()).hexdigest()[:8]
    for split, own in splits.items()
  }
  assert said == {
    "train": "e7ce6617",
    "val": "fd3599e3",
    "test": "fda81432",
  }


def test_tests_are_not_in_the_order_of_classes():
  # The Guide corrupts by place: a type would be a class's.
  test = archives._split(of_size("uc_merced"))["test"]
  first = [image.number for image in test[:38]]  # of one type
  assert len(set(first)) > 10


# Transforms.


def chain(text, image, seed=0):
  rng = np.random.default_rng(seed)
  return transforms.apply(transforms.build((text,)), rng, image)


def test_the_six_are_stretched_and_nothing_of_them_is_cut(tmp_path):
  pets(tmp_path)
  source = data.build({"name": "pets", "root": str(tmp_path)}, "test")
  assert source.shape == data.FACTS["pets"].shape
  with Image.open(source.images[0]) as image:
    wide = image.convert("RGB").resize((224, 224), Image.Resampling.BILINEAR)
  expected = np.asarray(wide, np.float32) / 255
  np.testing.assert_array_equal(source.pixels(slice(1))[0], expected)
  assert len(source.train_transforms) == 4


def test_a_rotation_is_small_and_either_way():
  image = np.zeros((101, 101, 3), np.uint8)
  image[50, 50:] = 255  # a line from the middle to the right
  ends = set()
  for seed in range(60):
    made = chain("rotate:2", Image.fromarray(image), seed)[..., 0]
    ends.add(int(made[:, 98].argmax()) - 50)
  assert ends == {-2, -1, 0, 1, 2}  # 48 tan 2 degrees is 1.7


# Configs.

ALL = list(
  itertools.product(configs.DATASETS, configs.LOSSES, configs.PROTOCOLS)
)


def config_of(dataset="pets", loss="at", protocol="fft50", **more):
  given = {"dataset": dataset, "loss": loss, "protocol": protocol, **more}
  text = ",".join(f"{key}={value}" for key, value in given.items())
  return configs.get_config(text).to_dict()


@pytest.mark.parametrize("dataset, loss, protocol", ALL)
def test_every_config_has_its_stages(dataset, loss, protocol):
  config = config_of(dataset, loss, protocol)
  stages = expand(config, data.FACTS[dataset].train)
  said = [(s.name, s.method, s.init) for s in stages]
  probe = ("probe", "linear", "roli")
  assert (
    said
    == {
      "fft5": [("adapt", "full", "ranli")],
      "fft50": [("adapt", "full", "ranli")],
      "lp50": [probe],
      "roli": [probe, ("adapt", "full", "roli")],
      "roli_peft": [probe, ("adapt", "lora", "roli")],
    }[protocol]
  )
  for stage in stages:
    epochs = 5 if protocol == "fft5" else 50
    assert stage.num_steps == epochs * stage.epoch_steps
    assert stage.loss == loss
  assert config["data"]["name"] == dataset
  (cell,) = config["cells"]
  assert cell["tests"] == configs.TESTS


@pytest.mark.parametrize("loss", configs.LOSSES)
def test_training_is_attacked_as_in_the_guide(loss):
  config = config_of(loss=loss)
  made = build_run(config)
  for attack in (
    build_attack(made, "attack"),
    build_attack(made, "val_attack"),
  ):
    assert (attack.name, attack.num_steps) == ("apgd_ce", 10)
    assert not attack.random_start and attack.loss == "ce"
    assert attack.threat.norm == "linf"
    np.testing.assert_allclose(attack.threat.eps, 4 / 255)
  own = config["adapt"]["loss"]
  assert own["name"] == loss
  assert loss != "trades" or own["beta"] == 1.0


def test_the_tests_fill_the_columns():
  made = build_run(config_of())
  (stage,) = expand(config_of(), 9)
  about = [one for test in score.tests(made, stage) for one in test.about()]
  blank = {"norm": None, "eps": None}
  measures = {guide._measure({**blank, **one}) for one in about}
  assert measures == set(guide.MEASURES)
  assert build_attack(made, "eval_attack").name == "autoattack"


@pytest.mark.parametrize(
  "name", ["glyph_vit_token", "glyph_swin", "glyph_convnext", "glyph_resnet"]
)
def test_biases_and_norms_are_exempt_from_decay(name):
  params, _ = models.create(name, 3).shapes()
  exempt = config_of()["adapt"]["optim"]["no_decay"]
  rules = [*((pattern, False) for pattern in exempt), (".*", True)]
  decays = trees.paths(trees.label(params, rules))
  assert {path.rpartition("/")[2] for path, on in decays.items() if on} <= {
    "kernel", "cls", "positions", "gamma",
  }  # fmt: skip
  assert decays["head/kernel"] and not decays["head/bias"]


def test_backbone_and_head_have_rates_of_their_own():
  section = config_of(protocol="fft5")["adapt"]
  (group, factor) = section["optim"]["multipliers"][0]
  assert (group, section["lr"] * factor) == ("head", configs.HEAD_LR)
  assert (section["optim"]["b1"], section["optim"]["b2"]) == (0.9, 0.95)
  assert section["batch_size"] == 1024


@pytest.mark.parametrize(
  "backbone, name",
  [
    (BACKBONE, "convnext_b"),
    ("robust_deit_small_patch16_224", "deit_s16"),
    ("robust_resnet50", "resnet50"),
    ("vit_base_patch16_224.mae", "vit_b16"),
    ("eva02_tiny_patch14_224.mim_in22k", "eva02_ti14"),
    ("coatnet_0_rw_224.sw_in1k", "coatnet_0_rw"),
    ("swin_t", "swin_t"),
  ],
)
def test_the_guides_backbones_are_known_by_its_ids(backbone, name):
  config = config_of(backbone=backbone)["backbone"]
  assert config["name"] == name and name in models.MODELS
  assert config["weights"] == f"weights/{backbone}"
  moves = name in ("resnet50", "coatnet_0_rw")
  assert config["updates_stats"] == moves


@pytest.mark.parametrize(
  "text, said",
  [
    ("dataset=cub", "there are caltech101"),
    ("loss=mart", "there are at, trades"),
    ("protocol=lp5", "there are fft5"),
    ("protocol=fft5,method=lora", "belongs to protocol=roli_peft"),
    ("protocol=roli_peft,method=full", "there are lora"),
  ],
)
def test_a_config_that_can_not_be_says_what_can(text, said):
  with pytest.raises(ValueError, match=said):
    configs.get_config(text)


# Rows, lines and scores.


def row(attack="none", norm=None, eps=None, value=0.9, **fields):
  return {
    "cell": "c", "stage": "adapt", "init": "ranli", "head_init": "small",
    "method": "full", "backbone": "convnext_b", "weights": f"w/{BACKBONE}",
    "data": "pets", "train_size": 3128, "lr": 1e-4, "steps": 200,
    "split": "test", "attack": attack, "norm": norm, "eps": eps,
    "metric": "accuracy", "value": value, "n": 1000, "seed": 0, **fields,
  }  # fmt: skip


# Those of the first line of the published file.
FIVE = (0.95556, 0.19365, 0.52063, 0.51905, 0.78333)


def rows(values=FIVE, **fields):
  return [
    row(attack, norm or None, eps or None, value, **fields)
    for (attack, norm, eps), value in zip(
      guide.MEASURES.values(), values, strict=True
    )
  ]


def run(path, measured, text="dataset=pets,protocol=fft50"):
  path.mkdir()
  config = configs.get_config(text).to_dict()
  (path / "config.json").write_text(json.dumps(config))
  results = record.Record(path / "results.jsonl")
  for one in measured:
    results.add(one)
  return path


def lines(*tables, dataset="flowers-102"):
  """Lines of configs that differ in their backbones' names."""
  blank = dict.fromkeys(guide.COLUMNS, "")
  return [
    {
      **blank, **dict(zip(guide.MEASURES, values, strict=True)),
      "sum": sum(values), "geom": float(np.prod(values)),
      "backbone": f"b{i}", "dataset": dataset, "loss_function": "TRADES",
      "ft_strategy": "FFT (5 epochs)",
    }
    for i, values in enumerate(tables)
  ]  # fmt: skip


def test_a_run_becomes_a_line_of_the_published_file(tmp_path):
  extra = [
    row("autoattack", "linf", 8 / 255),
    row("pgd", "linf", 4 / 255),
    row(split="val"),
  ]
  found = guide.read(run(tmp_path / "run", [*rows(), *extra]))
  (line,) = guide.table(found)
  assert tuple(line) == guide.COLUMNS
  assert line["backbone"] == BACKBONE and line["dataset"] == "oxford-iiit-pet"
  assert line["loss_function"] == "TRADES"
  assert line["ft_strategy"] == "FFT (50 epochs)"
  assert [line[name] for name in guide.MEASURES] == list(FIVE)
  np.testing.assert_allclose(line["sum"], 2.97222)
  np.testing.assert_allclose(line["geom"], 0.0391708, rtol=1e-5)


@pytest.mark.parametrize(
  "text, fields, strategy",
  [
    ("protocol=fft5,loss=at", {}, "FFT (5 epochs)"),
    (
      "protocol=lp50",
      {"stage": "probe", "method": "linear", "init": "roli"},
      "LP (50 epochs)",
    ),
    ("protocol=roli", {"init": "roli"}, "RoLI FFT (50 epochs)"),
    (
      "protocol=roli_peft,method=bias",
      {"init": "roli", "method": "bias"},
      "RoLI bias (50 epochs)",
    ),
  ],
)
def test_a_strategy_is_named_as_in_the_guide(text, fields, strategy, tmp_path):
  found = guide.read(run(tmp_path / "run", rows(**fields), text))
  assert {one["ft_strategy"] for one in found} == {strategy}
  assert {one["loss"] for one in found} == {"at" if "=at" in text else "trades"}


def test_the_probe_on_the_way_is_no_line(tmp_path):
  probe = rows((0.1,) * 5, stage="probe", method="linear", init="roli")
  path = run(
    tmp_path / "run", [*probe[:2], *rows(init="roli")], "protocol=roli"
  )
  (line,) = guide.table(guide.read(path))
  assert line["ft_strategy"] == "RoLI FFT (50 epochs)"


def test_a_stage_of_so_many_steps_says_so(tmp_path):
  path = run(tmp_path / "run", rows())
  config = json.loads((path / "config.json").read_text())
  config["adapt"]["num_steps"] = 200
  (path / "config.json").write_text(json.dumps(config))
  assert guide.read(path)[0]["ft_strategy"] == "FFT (200 steps)"


def marked(*measured, loss="trades", ft_strategy="FFT (50 epochs)"):
  return [{**one, "loss": loss, "ft_strategy": ft_strategy} for one in measured]


def test_a_line_is_the_mean_of_seeds_that_have_all_five():
  other = rows((0.5, 0.1, 0.2, 0.3, 0.4), seed=1)
  partial = rows((0.0,) * 5, seed=2)[:2]
  (line,) = guide.table(marked(*rows(), *other, *partial))
  np.testing.assert_allclose(line["clean_acc"], (0.95556 + 0.5) / 2)


@pytest.mark.parametrize(
  "measured, said",
  [
    (rows(), "no 'loss'"),
    (marked(*rows(data="cub")), "the Guide has no data 'cub'"),
    (marked(*rows(), loss="mart"), "the Guide has no loss 'mart'"),
    (marked(*rows()[:3]), "no row for L1_acc, common_acc"),
    (marked(*rows(), *rows(lr=1e-3)), "trained in 2 ways"),
    (marked(*rows()[:4], row("guide", "severity", 3, n=9)), "9, 1000"),
    (marked(*rows(), row(value=0.1)), r"clean_acc of seed 0 is both 0\.95556"),
  ],
)
def test_rows_that_make_no_line_say_why(measured, said):
  with pytest.raises(ValueError, match=said):
    guide.table(measured)


def test_lines_come_back_as_they_were_written(tmp_path):
  ours = marked(*rows(), *rows((1 / 3, 0.1, 0.2, 0.0, 1.0), data="cars"))
  guide.to_csv(ours, tmp_path / "ours.csv")
  header = (tmp_path / "ours.csv").read_text().splitlines()[0]
  assert header.split(",") == list(guide.COLUMNS)
  back = guide.read_csv(tmp_path / "ours.csv")
  expected = guide.table(ours)
  assert back == [{**line, "": str(line[""])} for line in expected]


@pytest.mark.parametrize(
  "change, said",
  [
    (lambda text: text.replace("geom", "product"), "has no column 'geom'"),
    (lambda text: text.replace("0.95556", "n/a"), r"a\.csv:2: clean_acc.*n/a"),
    (lambda text: "", "has no column ''"),
  ],
)
def test_a_file_that_is_no_such_table_is_refused(change, said, tmp_path):
  file = tmp_path / "a.csv"
  guide.to_csv(marked(*rows()), file)
  file.write_text(change(file.read_text()))
  with pytest.raises(ValueError, match=said):
    guide.read_csv(file)


def test_a_file_that_is_not_there_says_where_it_is(tmp_path):
  with pytest.raises(ValueError, match="MaxHeuillet/robust_training"):
    guide.read_csv(tmp_path / "results_dataset.csv")


def test_joined_lines_know_of_their_backbones_what_the_guide_says(tmp_path):
  theirs = lines(FIVE, (0.1,) * 5)
  for line, name in zip(theirs, (BACKBONE, "another"), strict=True):
    line |= {"backbone": name, "model_size": "large", "backbone_name": "c,b"}
  ours = guide.table(marked(*rows(), *rows(weights="w/own.safetensors")))
  joined = guide.join(ours, theirs)
  assert [line["source"] for line in joined] == ["guide"] * 2 + ["roli_jax"] * 2
  assert [line[""] for line in joined] == [0, 1, 2, 3]
  assert [line["model_size"] for line in joined] == ["large"] * 3 + [""]
  assert joined[3]["backbone"] == "own"
  guide.write_csv(joined, tmp_path / "both.csv")
  back = guide.read_csv(tmp_path / "both.csv")
  sources = [[line["source"] for line in each] for each in (back, joined)]
  assert sources[0] == sources[1]
  assert [line["backbone_name"] for line in back[:3]] == ["c,b"] * 3


def test_lines_without_a_column_are_not_joined():
  (line,) = lines(FIVE)
  del line["model_type"]
  with pytest.raises(ValueError, match="no column 'model_type'"):
    guide.join([], [line])


def test_opposite_orders_have_equal_points():
  pairs = [(0.1, 0.9), (0.2, 0.8), (0.3, 0.7)]
  given = [{"Linf_acc": a, "clean_acc": b} for a, b in pairs]
  assert guide.borda(given) == [4, 4, 4]


def test_equal_values_share_the_lowest_rank():
  given = [{"a": value} for value in (0.5, 0.0, 0.5, 0.0, 0.9)]
  assert guide.borda(given) == [3, 1, 3, 1, 5]


def test_scores_add_up_over_data_sets():
  some = lines((0.9, 0.2, 0.2, 0.2, 0.5), (0.8, 0.3, 0.1, 0.2, 0.4))
  more = lines((0.5,) * 5, (0.6,) * 5, dataset="caltech101")
  first, second = guide.scores([*some, *more])
  # Over ranks of two: flowers 2 1 2 1 2 and 1 2 1 1 1, Caltech 1s and 2s.
  assert (first["backbone"], first["borda"], first["rank"]) == ("b1", 16, 1)
  assert (second["backbone"], second["borda"], second["rank"]) == ("b0", 13, 2)
  np.testing.assert_allclose(second["sum"], 2.0 + 2.5)
  np.testing.assert_allclose(second["geom"], 0.9 * 0.2**3 * 0.5 + 0.5**5)


def test_ours_and_theirs_of_one_config_are_two():
  theirs, ours = lines(FIVE), lines((0.5,) * 5)
  found = guide.scores(guide.join(ours, theirs))
  assert {each["source"] for each in found} == {"guide", "roli_jax"}


def test_scores_of_what_can_not_be_compared_are_refused():
  with pytest.raises(ValueError, match="twice on flowers-102: b0"):
    guide.scores([*lines(FIVE), *lines(FIVE)])
  lonely = lines(FIVE, FIVE, dataset="caltech101")[1:]
  with pytest.raises(ValueError, match="the same measurements"):
    guide.scores([*lines(FIVE), *lonely])


def test_the_example_of_the_docs_runs(root, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  text = "dataset=flowers,loss=trades,protocol=fft50"
  path = pathlib.Path("runs", f"guide-{text.replace(',', '-')}")
  path.parent.mkdir()
  run(path, rows(data="flowers"), text)
  guide.write_csv(lines(FIVE, (0.1,) * 5), pathlib.Path("results_dataset.csv"))
  (code,) = re.findall(
    r"```python\n(.*?)```", (root / "docs" / "guide.md").read_text(), re.DOTALL
  )
  exec(code, {})
  assert f"{BACKBONE} roli_jax" in capsys.readouterr().out
  assert len(guide.read_csv(pathlib.Path("joined.csv"))) == 3
