"""`--mode=prepare`: data from the web, in one command, whatever goes wrong."""

import dataclasses
import hashlib
import io
import shutil
import socket
import tarfile
import threading
import zipfile

import jax
import numpy as np
import pytest

from roli_jax import convert, data, keys, models
from roli_jax.data import download, folder, homes
from tests import cli, made_cifar, pictures, test_cifar_formats, test_guide, web

CONTENT = np.random.default_rng(0).bytes(300_000)


@pytest.fixture
def server(monkeypatch):
  monkeypatch.setenv("no_proxy", "127.0.0.1")
  monkeypatch.setattr(download, "_WAITS", (0.0, 0.0, 0.0))
  with web.serving() as server:
    server.files["/data.bin"] = CONTENT
    yield server


def md5(content):
  return hashlib.md5(content).hexdigest()


def fetch(server, place, digest="", name="data.bin"):
  download.fetch(f"{server.url}/{name}", digest or md5(CONTENT), place)


# One file.


@pytest.mark.parametrize("digest", ["md5", "sha256"])
def test_a_file_comes_once_and_leaves_nothing_else(digest, server, tmp_path):
  for _ in range(2):
    fetch(server, tmp_path / "x", hashlib.new(digest, CONTENT).hexdigest())
    assert (tmp_path / "x").read_bytes() == CONTENT
  assert [*tmp_path.iterdir()] == [tmp_path / "x"]
  assert len(server.asked) == 1


def test_a_connection_that_breaks_is_taken_up_where_it_broke(server, tmp_path):
  server.breaks = [100_000, 50_000]
  fetch(server, tmp_path / "x")
  assert (tmp_path / "x").read_bytes() == CONTENT
  assert [start for _, start in server.asked] == [0, 100_000, 150_000]


def test_what_an_earlier_call_brought_is_not_asked_for_again(server, tmp_path):
  server.breaks = [70_000, 0, 0, 0]
  with pytest.raises(ValueError, match="broke off") as error:
    fetch(server, tmp_path / "x")
  said = str(error.value)
  assert server.url in said and "the same command goes on" in said
  assert str(tmp_path / "x") in said and not (tmp_path / "x").exists()
  fetch(server, tmp_path / "x")
  assert server.asked[-1] == ("/data.bin", 70_000)
  assert (tmp_path / "x").read_bytes() == CONTENT


def test_a_server_that_can_not_resume_sends_it_again(server, tmp_path):
  server.ranges, server.breaks = False, [200_000]
  fetch(server, tmp_path / "x")
  assert (tmp_path / "x").read_bytes() == CONTENT


@pytest.mark.parametrize("part", [CONTENT, CONTENT + b"more"])
def test_a_part_as_long_as_the_file_is_no_trouble(part, server, tmp_path):
  (tmp_path / "x.part").write_bytes(part)
  fetch(server, tmp_path / "x")
  assert (tmp_path / "x").read_bytes() == CONTENT
  assert not (tmp_path / "x.part").exists()
  assert bool(server.asked) == (part != CONTENT)


def test_a_wrong_checksum_leaves_nothing(server, tmp_path):
  (tmp_path / "x.part").write_bytes(b"other" * 100)
  with pytest.raises(ValueError, match="checksum") as error:
    fetch(server, tmp_path / "x")
  assert md5(CONTENT) in str(error.value) and not [*tmp_path.iterdir()]
  fetch(server, tmp_path / "x")
  assert (tmp_path / "x").read_bytes() == CONTENT


def test_a_file_that_is_not_there_is_told_at_once(server, tmp_path):
  with pytest.raises(ValueError, match="404") as error:
    fetch(server, tmp_path / "x", name="gone.bin")
  assert f"put it at {tmp_path / 'x'}" in str(error.value)
  assert len(server.asked) == 1


def test_no_space_is_told_before_anything_is_written(
  server, tmp_path, monkeypatch
):
  usage = shutil.disk_usage(tmp_path)._replace(free=len(CONTENT) - 1)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
  with pytest.raises(ValueError, match=f"{tmp_path} is full") as error:
    fetch(server, tmp_path / "x")
  assert "make room" in str(error.value) and not [*tmp_path.iterdir()]
  assert len(server.asked) == 1


def test_what_is_there_in_part_needs_no_space(server, tmp_path, monkeypatch):
  (tmp_path / "x.part").write_bytes(CONTENT[:-10])
  usage = shutil.disk_usage(tmp_path)._replace(free=10)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
  fetch(server, tmp_path / "x")
  assert (tmp_path / "x").read_bytes() == CONTENT


def nowhere():
  """A URL whose port nobody listens at."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return f"http://127.0.0.1:{free.getsockname()[1]}"


def test_no_net_says_what_to_put_where(server, tmp_path):
  with pytest.raises(ValueError, match="can't be had") as error:
    download.fetch(f"{nowhere()}/x", md5(CONTENT), tmp_path / "x")
  said = str(error.value)
  assert f"put it at {tmp_path / 'x'}" in said and "refused" in said


def test_two_at_once_bring_it_once(server, tmp_path, monkeypatch):
  item = homes.Item("data.bin", f"{server.url}/data.bin", md5(CONTENT))
  monkeypatch.setitem(homes.HOMES, "two", (item,))
  calls = [
    threading.Thread(target=lambda: [*homes.fetch("two", str(tmp_path))])
    for _ in range(3)
  ]
  for call in calls:
    call.start()
  for call in calls:
    call.join()
  assert (tmp_path / "data.bin").read_bytes() == CONTENT
  assert len(server.asked) == 1


# Archives.


def zipped(files):
  out = io.BytesIO()
  with zipfile.ZipFile(out, "w") as archive:
    for name, content in files.items():
      archive.writestr(name, content)
  return out.getvalue()


def tarred(files):
  out = io.BytesIO()
  with tarfile.open(fileobj=out, mode="w:gz") as archive:
    for name, content in files.items():
      info = tarfile.TarInfo(name)
      info.size = len(content)
      archive.addfile(info, io.BytesIO(content))
  return out.getvalue()


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_nothing_is_unpacked_outside(pack, tmp_path):
  inner = tmp_path / "root"
  inner.mkdir()
  (inner / "x").write_bytes(pack({"a/b.txt": b"1", "../../evil.txt": b"2"}))
  try:
    download.unpack(inner / "x", "a", inner / "a")
  except ValueError as error:
    assert "can't be unpacked" in str(error)
  assert not list(tmp_path.parent.glob("evil.txt"))
  assert not (tmp_path / "evil.txt").exists()
  assert {path.name for path in inner.iterdir()} <= {"x", "a"}


def test_a_truncated_archive_leaves_nothing(tmp_path):
  content = tarred({f"a/{i}": CONTENT for i in range(3)})
  (tmp_path / "x").write_bytes(content[: len(content) // 2])
  with pytest.raises(ValueError, match="can't be unpacked"):
    download.unpack(tmp_path / "x", "a", tmp_path / "a")
  assert [*tmp_path.iterdir()] == [tmp_path / "x"]


# Data sets.


def serve(server, monkeypatch, name, contents):
  """Makes the server the home of a data set; contents by the items' URLs."""
  items = []
  for item in homes.HOMES[name]:
    if item.url:
      path = "/" + item.url.partition("://")[2]
      content = contents[item.file]
      server.files[path] = content
      item = dataclasses.replace(
        item, url=server.url + path, digest=md5(content)
      )
    items.append(item)
  monkeypatch.setitem(homes.HOMES, name, tuple(items))


@pytest.fixture
def home(tmp_path, monkeypatch):
  """An empty working directory, without data anywhere."""
  home = tmp_path / "home"
  home.mkdir()
  monkeypatch.chdir(home)
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "none"))
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  return home


def cifar_archive(tmp_path, name="cifar10"):
  file = made_cifar.archive(tmp_path / "made", name, made_cifar.python)
  return file.read_bytes()


def toy(tmp_path):
  """Fields of a config for a toy that takes colours."""
  grey = models.create("glyph_vit_token", 5)
  model = dataclasses.replace(grey, mean=(0.5,) * 3, std=(0.5,) * 3)
  variables = jax.jit(model.init)(keys.root(0))
  file = tmp_path / "toy.safetensors"
  convert.save(convert.Bundle(model, *variables), file)
  return (
    f"--config={cli.ROOT}/configs/cifar_roli.py:method=linear",
    "--config.backbone.name=glyph_vit_token",
    f"--config.backbone.weights={file}",
  )


TRAIN = (*cli.TINY, "--config.curve=()", "--config.test=False")


def test_prepare_and_train_from_an_empty_home(
  server, home, tmp_path, monkeypatch
):
  archive = {"cifar-10-python.tar.gz": cifar_archive(tmp_path)}
  serve(server, monkeypatch, "cifar10", archive)
  words = toy(tmp_path)
  refused = cli.run(*words, *TRAIN, "--workdir=run", cwd=home)
  assert refused.returncode == 2 and "--mode=prepare" in refused.stderr

  done = cli.run(*words, "--mode=prepare", cwd=home)
  assert done.returncode == 0, done.stderr
  fetching, there, weights = done.stdout.splitlines()
  assert fetching.endswith("to data/cifar10/cifar-10-python.tar.gz")
  assert there == "cifar10 is there" and "weights are there" in weights
  (place,) = (home / "data/cifar10").glob("[!.]*")
  assert place.name == "cifar-10-python.tar.gz"
  test_cifar_formats.check("", "cifar10")

  again = cli.run(*words, "--mode=prepare", cwd=home)
  assert again.returncode == 0 and len(server.asked) == 1
  assert again.stdout.splitlines() == [there, weights]
  trained = cli.run(*words, *TRAIN, "--workdir=run", cwd=home)
  assert trained.returncode == 0, trained.stderr
  assert (home / "run/report.md").is_file()


def test_download_at_the_start_does_the_same(
  server, home, tmp_path, monkeypatch
):
  archive = {"cifar-100-python.tar.gz": cifar_archive(tmp_path, "cifar100")}
  serve(server, monkeypatch, "cifar100", archive)
  spec = {"name": "cifar100", "download": True}
  assert len(data.build(spec, "train")) == 54
  assert len(data.build(spec, "test")) == 20 and len(server.asked) == 1
  test_cifar_formats.check("", "cifar100")


def test_prepare_refuses_what_it_can_not_fetch(home, tmp_path):
  cars = cli.run(
    "--config=roli", "--config.data.name=cars", "--mode=prepare", cwd=home
  )
  assert cars.returncode == 2 and "kaggle.com" in cars.stderr
  made_cifar.folders(home / "data/cifar10", "cifar10")
  weights = cli.run(
    "--config=cifar_roli", "--config.backbone.weights=ares", "--mode=prepare",
    cwd=home,
  )  # fmt: skip
  assert weights.stdout == "cifar10 is there\n"
  assert weights.returncode == 2 and "swin_b at 'ares'" in weights.stderr
  typo = cli.run(
    "--config=cifar_roli", "--config.backbone.weights=madry:resnet50_linf_eps4",
    "--mode=prepare", cwd=home,
  )  # fmt: skip
  assert typo.returncode == 2 and not typo.stdout
  bench = cli.run("--config=bench", "--mode=prepare", cwd=home)
  assert bench.returncode == 2 and "nothing to fetch" in bench.stderr
  for done in (cars, weights, typo, bench):
    assert len(done.stderr.splitlines()) <= 6


def test_what_is_embedded_is_there():
  done = cli.run("--config=glyphs_roli", "--mode=prepare")
  assert done.returncode == 0 and not done.stderr
  assert done.stdout.startswith("digits is there\n")
  assert len(done.stdout.splitlines()) == 3  # and two files of weights


def files_of(root, below=""):
  return {
    f"{below}{path.relative_to(root)}": path.read_bytes()
    for path in root.rglob("*")
    if path.is_file()
  }


@pytest.mark.parametrize("name", sorted(folder.NAMED))
def test_named_sets_come_with_their_splits(
  name, server, home, tmp_path, monkeypatch
):
  images = folder.NAMED[name]
  pictures.splits(
    tmp_path / "made", images, train={"x/1.jpg": 0, "y/1.jpg": 1},
    val={"x/2.jpg": 0}, test={"y/3.jpg": 1},
  )  # fmt: skip
  (first, *splits) = homes.HOMES[name]
  inner = files_of(tmp_path / "made" / images, f"{first.inside}/")
  contents = {first.file: tarred({"README": b"", **inner})}
  for item in splits:
    contents[item.file] = (tmp_path / "made" / item.makes).read_bytes()
  serve(server, monkeypatch, name, contents)
  lines = [*data.prepare(name)]
  assert len(lines) == 6 and lines[-1] == f"{name} is there"
  assert len(data.build(name, "train")) == 2
  asked = len(server.asked)
  assert [*data.prepare(name)] == [f"{name} is there"]
  assert len(server.asked) == asked


GUIDE = sorted(homes.HOMES.keys() & test_guide.LIKE.keys())


@pytest.mark.parametrize("name", GUIDE)
def test_sets_of_the_guide_come_as_they_are_handed_out(
  name, server, home, tmp_path, monkeypatch
):
  made = tmp_path / "made"
  test_guide.LIKE[name](made)
  (outer,) = made.iterdir()
  contents = {}
  for item in homes.HOMES[name]:
    if item.makes == outer.name:  # the archive makes the directory itself
      contents[item.file] = tarred(files_of(outer, f"{item.inside}/"))
    elif item.inside and item.url and not item.inside.endswith(".tar.gz"):
      inner = files_of(outer / item.makes, f"{item.inside}/")
      pack = zipped if item.file.endswith(".zip") else tarred
      contents[item.file] = pack(inner)
    elif item.inside.endswith(".tar.gz"):  # an archive in an archive
      tree = "101_ObjectCategories"
      inner = tarred(files_of(outer / tree, f"{tree}/"))
      contents[item.file] = zipped({item.inside: inner})
    elif item.url:
      contents[item.file] = (outer / item.makes).read_bytes()
  serve(server, monkeypatch, name, contents)
  [*data.prepare(name)]
  here, there = (
    data.build({"name": name, "root": root}, "test") for root in ("", str(made))
  )
  np.testing.assert_array_equal(here.labels, there.labels)
  assert here.classes == there.classes
  assert [*data.prepare(name)] == [f"{name} is there"]


def test_the_table_is_whole():
  for name, items in homes.HOMES.items():
    assert name in data.FACTS and items
    for item in items:
      assert len(item.digest) in (32, 64) or not item.url
      assert item.url.startswith("http") or item.archive in {
        other.makes for other in items
      }


def test_messages_have_the_command(home):
  for name in homes.HOMES:
    with pytest.raises(data.Missing) as error:
      data.build(name, "train")
    said = str(error.value)
    assert "--mode=prepare" in said and f"data.name={name}" in said
    assert len(said.splitlines()) <= 6
