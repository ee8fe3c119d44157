"""`hf:OWNER/NAME`, from a directory of that name instead of the hub."""

import numpy as np
import pytest

from roli_jax import data
from roli_jax.data import hub
from tests import cli, made_cifar, test_cifar_formats

CLASSES = ("zebra", "ant", "bee/wasp")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
  """An empty working directory, where the library keeps what it makes."""
  import datasets

  home = tmp_path / "home"
  home.mkdir()
  monkeypatch.chdir(home)
  monkeypatch.setattr(
    datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache")
  )
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "none"))
  return home


def image(split, number):
  seed = sum(map(ord, split)) * 1000 + number
  return np.random.default_rng(seed).integers(0, 256, (9, 7, 3), np.uint8)


def write(home, repo="owner/name", labels=None, **counts):
  """Parquet files as the hub has them.

  Args:
    home: the working directory.
    repo: OWNER/NAME.
    labels: a column of labels beside `label`, if any: name -> its feature.
    **counts: the number of images by split.
  """
  import datasets

  names = datasets.ClassLabel(names=[*CLASSES])
  features = {"picture": datasets.Image(), "label": names, **(labels or {})}
  for split, count in counts.items():
    rows = {
      "picture": [
        {"bytes": made_cifar.png(image(split, i)), "path": f"{i}.png"}
        for i in range(count)
      ],
      **{name: np.arange(count) % 3 for name in features.keys() - {"picture"}},
    }
    if "coarse" in features:
      rows["coarse"] = [*"ab" * count][:count]
    table = datasets.Dataset.from_dict(rows, datasets.Features(features))
    folder = home / repo / "data"
    folder.mkdir(parents=True, exist_ok=True)
    table.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))


def splits(name, **fields):
  plain = ("stretch:8",)
  spec = {"name": name, "train_transforms": plain, "eval_transforms": plain}
  spec |= fields
  return {split: data.build(spec, split) for split in data.SPLITS}


def test_it_is_fetched_once_and_read_as_a_folder(home):
  write(home, train=30, test=9)
  name = "hf:owner/name"
  with pytest.raises(data.Missing, match="--mode=prepare") as error:
    splits(name)
  assert f"data.name={name}" in str(error.value)
  lines = [*data.prepare(name)]
  assert lines == [
    "fetching owner/name from huggingface.co",
    "writing 30 images of train",
    "writing 9 images of test",
    f"{name} is there",
  ]
  assert [*data.prepare(name)] == [f"{name} is there"]
  found = splits(name)
  # The hub's order of classes, whatever their names; validation by a hash.
  assert found["test"].classes == ("0.zebra", "1.ant", "2.bee_wasp")
  assert [len(s) for s in found.values()] == [27, 3, 9]
  for file, label in zip(
    found["test"].images, found["test"].labels, strict=True
  ):
    number = int(file.rpartition("/")[2].removesuffix(".png"))
    assert number % 3 == label
    content = (home / file).read_bytes()
    assert content == made_cifar.png(image("test", number))
  assert {p.name for p in (home / "data/hf/owner").glob("[!.]*")} == {"name"}


def test_its_own_validation_is_taken(home):
  write(home, train=12, validation=6, test=9)
  [*data.prepare("hf:owner/name")]
  found = splits("hf:owner/name")
  assert [len(source) for source in found.values()] == [12, 6, 9]


def test_a_single_split_is_split_as_folders_are(home):
  write(home, train=30)
  [*data.prepare("hf:owner/name")]
  found = splits("hf:owner/name")
  assert [len(source) for source in found.values()] == [21, 3, 6]


def test_download_and_a_root_of_ones_own(home, tmp_path):
  write(home, train=30, test=9)
  root = str(tmp_path / "elsewhere")
  found = splits("hf:owner/name", root=root, download=True)
  assert all(f.startswith(root) for f in found["test"].images)
  assert not (home / "data").exists()


def test_of_two_columns_the_name_says_which(home):
  import datasets

  fine = datasets.ClassLabel(names=["x", "y", "z"])
  write(home, labels={"fine": fine}, train=30, test=9)
  with pytest.raises(ValueError, match="2 columns of ClassLabel") as error:
    [*data.prepare("hf:owner/name")]
  assert "data.name=hf:owner/name:label=COLUMN" in str(error.value)
  assert not (home / "data/hf/owner/name").exists()
  name = "hf:owner/name:label=fine,image=picture"
  [*data.prepare(name)]
  assert splits(name)["train"].classes == ("x", "y", "z")


def test_a_column_of_text_is_one_of_classes(home):
  import datasets

  write(home, labels={"coarse": datasets.Value("string")}, train=30, test=8)
  [*data.prepare("hf:owner/name:label=coarse")]
  source = splits("hf:owner/name:label=coarse")["test"]
  assert source.classes == ("a", "b") and np.bincount(source.labels)[0] == 4


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_the_hubs_cifar_is_cifar(name, home):
  made_cifar.parquet(home / "uoft-cs" / name, name)
  with pytest.raises(data.Missing, match="--mode=prepare"):
    data.build(f"hf:uoft-cs/{name}", "train")
  [*data.prepare(f"hf:uoft-cs/{name}")]
  source = data.build(f"hf:uoft-cs/{name}", "val")
  assert source.shape == (32, 32, 3)
  test_cifar_formats.check(home / "data/hf/uoft-cs" / name, name)


def test_the_command_fetches_it(home):
  write(home, train=30, test=9)
  words = (
    f"--config={cli.ROOT}/configs/glyphs_roli.py",
    "--config.data.name=hf:owner/name",
    "--mode=prepare",
  )
  done = cli.run(*words, cwd=home)
  assert done.returncode == 0, done.stderr
  assert "hf:owner/name is there" in done.stdout


@pytest.mark.parametrize(
  "name, message",
  [
    ("hf:", "expected hf:OWNER/NAME"),
    ("hf:owner", "expected hf:OWNER/NAME"),
    ("hf:../name", "expected hf:OWNER/NAME"),
    ("hf:owner/name:lable=x", "did you mean 'label'"),
  ],
)
def test_other_names_are_refused(name, message):
  with pytest.raises(ValueError, match=message):
    data.build(name, "train")


def test_a_column_that_is_not_there_is_told(home):
  write(home, train=30, test=9)
  with pytest.raises(ValueError, match="did you mean 'label'"):
    [*data.prepare("hf:owner/name:label=lable")]


def test_what_can_not_be_had_is_told(home, monkeypatch):
  import datasets

  def refuse(*_, **__):
    raise ConnectionError("Couldn't reach 'owner/name' on the Hub\nmore")

  monkeypatch.setattr(datasets, "load_dataset", refuse)
  with pytest.raises(ValueError, match=r"huggingface\.co: Couldn't"):
    [*data.prepare("hf:owner/name")]


def test_names_of_classes_keep_their_order():
  assert hub._folders(["ant", "bee"]) == ["ant", "bee"]
  assert hub._folders(["bee", "ant"]) == ["0.bee", "1.ant"]
  assert hub._folders(["a/b", "a\\b"]) == ["0.a_b", "1.a_b"]
  assert hub._folders(["test", "train"]) == ["0.test", "1.train"]


def test_unlabelled_images_are_left_out(home):
  import datasets

  features = datasets.Features(
    {"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])}
  )
  cells = [{"bytes": made_cifar.png(image("a", i))} for i in range(30)]
  cells = [{**cell, "path": None} for cell in cells]
  labels = [i % 2 for i in range(26)] + [-1] * 4
  table = datasets.Dataset.from_dict(
    {"image": cells, "label": labels}, features
  )
  (home / "owner/name").mkdir(parents=True)
  table.to_parquet(str(home / "owner/name/train.parquet"))
  lines = [*data.prepare("hf:owner/name")]
  assert "leaving out 4 images without a label" in lines
  assert sum(len(s) for s in splits("hf:owner/name").values()) == 26
