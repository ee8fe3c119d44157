"""A file is read by what is in it; its name may say anything."""

import gzip
import io
import json
import struct
import tarfile
import zipfile

import ml_dtypes
import numpy as np
import pytest

from roli_jax import convert, keys, models
from roli_jax.convert import contents, plain, torch_file
from tests import cli
from tests import test_torch_file as by_hand


@pytest.fixture(scope="module")
def bundle():
  model = models.create("glyph_resnet", 3)
  return convert.Bundle(model, *model.init(keys.root(0)))


@pytest.fixture(scope="module")
def state(bundle):
  return convert.to_state_dict(bundle, "timm")


def legacy(path, state):
  """As torch.save before 1.6, all values float32."""
  arrays = {k: np.asarray(v, np.float32) for k, v in state.items()}
  tensors = {
    key: by_hand.tensor(
      by_hand.storage(str(i), array.size),
      size=array.shape,
      strides=tuple(s // 4 for s in np.empty(array.shape, "f4").strides),
    )
    for i, (key, array) in enumerate(arrays.items())
  }
  stored = {str(i): a.tobytes() for i, a in enumerate(arrays.values())}
  by_hand.write_legacy(path, by_hand.mapping(**tensors), stored)


def safe(path, state):
  from safetensors import numpy as safetensors

  arrays = {k: np.ascontiguousarray(v) for k, v in state.items()}
  path.write_bytes(safetensors.save(arrays))


def npz(path, state):
  with path.open("wb") as file:
    np.savez(file, **state)


WRITERS = {
  "zip": torch_file.write, "legacy": legacy, "safetensors": safe, "npz": npz,
}  # fmt: skip


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(
  "name",
  ["w.pth", "w.PTH", "w.th", "w.t7", "w.model", "w.tar", "w.pkl", "w.npz",
   "w.safetensors", "w.h5", "w.onnx", "w.v1.2", "w"],
)  # fmt: skip
def test_any_format_is_read_under_any_name(writer, name, state, tmp_path):
  path = tmp_path / name
  WRITERS[writer](path, state)
  read = convert.read(path)
  assert read.keys() == state.keys()
  for key, array in state.items():
    np.testing.assert_array_equal(read[key], array)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_model_comes_from_any_format(writer, bundle, state, tmp_path):
  path = tmp_path / "w"
  WRITERS[writer](path, state)
  loaded = convert.load(path, "glyph_resnet")
  kernel = loaded.params.backbone["stem"]["kernel"]
  np.testing.assert_array_equal(
    kernel, bundle.params.backbone["stem"]["kernel"]
  )


def test_a_bundle_is_ours_under_any_name(bundle, tmp_path):
  path = tmp_path / "mine.pth"
  convert.save(bundle, path)
  assert convert.load(path).model == bundle.model
  read = convert.read(path)
  assert "backbone/stem/kernel" in read and "head/bias" in read
  assert "stats/stem_norm/mean" in read
  np.testing.assert_array_equal(read["head/bias"], bundle.params.head["bias"])


def test_what_is_written_under_a_torch_name_is_torchs(bundle, tmp_path):
  for name in ("w.PTH", "w.th"):
    convert.save(bundle, tmp_path / name, format="timm")
    assert zipfile.is_zipfile(tmp_path / name)


def test_all_arrays_of_a_checkpoint_are_read_by_dotted_names(tmp_path):
  w = np.arange(3, dtype=np.float32)
  body = by_hand.mapping(
    model=by_hand.mapping(**{"fc.weight": by_hand.tensor()}),
    both=b"]" + b"(" + by_hand.tensor() + by_hand.tensor() + b"e",
    epoch=by_hand.value(3),
  )
  by_hand.write_zip(tmp_path / "x", body)
  read = convert.read(tmp_path / "x")
  assert read.keys() == {"model.fc.weight", "both.0", "both.1"}
  assert convert.read(str(tmp_path / "x")).keys() == read.keys()
  npz(tmp_path / "y", {"a": w, "words": np.array(["b"])})
  assert convert.read(tmp_path / "y").keys() == {"a"}


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2", "BF16"])
def test_kinds_that_numpy_lacks_are_read_from_safetensors(kind, tmp_path):
  dtype = {
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "BF16": ml_dtypes.bfloat16,
  }[kind]  # fmt: skip
  values = np.array([[0.5, 1.0], [2.0, -4.0]])
  data = values.astype(dtype).tobytes()
  about = {"dtype": kind, "shape": [2, 2], "data_offsets": [0, len(data)]}
  header = json.dumps({"a": about}).encode()
  (tmp_path / "x").write_bytes(struct.pack("<Q", len(header)) + header + data)
  a = convert.read(tmp_path / "x")["a"]
  assert a.dtype == dtype
  np.testing.assert_array_equal(a.astype(np.float64), values)


# Files that are something else.


def tar(name="weights.pth"):
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode="w") as archive:
    archive.addfile(tarfile.TarInfo(name))
  return file.getvalue()


OTHERS = {
  "nothing": (b"", "is empty"),
  "a page": (b"\n <!DOCTYPE html><html>Sign in", "web page"),
  "a quota": (b"<html><head><title>Google Drive - Quota", "web page"),
  "an LFS pointer": (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n",
    "LFS pointer.*git lfs pull",
  ),
  "an annex pointer": (b"/annex/objects/MD5E-s9--4d\n", "git annex get"),
  "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(80), "HDF5.*h5py"),
  "ONNX": (b"\x08\x07\x12\x07pytorch\x1a\x032.1:\x05", "ONNX"),
  "gzip": (gzip.compress(b"x" * 99), "gzip.*unpack"),
  "bzip2": (b"BZh91AY&SY" + bytes(9), "bzip2"),
  "xz": (b"\xfd7zXZ\0\0\4" + bytes(9), "xz"),
  "tar": (tar(), "tar archive.*unpack"),
  "one array": (b"\x93NUMPY\1\0v\0{'descr'", "numpy.savez"),
  "Lua Torch": (struct.pack("<6i", 4, 1, 3, 0, 0, 0), "Lua Torch"),
  "Flax": (b"\x82\xa6params\x81\xa1a\x01", "msgpack_restore"),
  "GGUF": (b"GGUF\3\0\0\0", "GGUF"),
  "an error": (b'{"error": "Repository not found"}', "text.*Repository"),
  "a word": (b"Not Found", "text.*Not Found"),
  "noise": (bytes(range(200, 255)), "unknown or broken"),
  "short": (b"\x80", "unknown or broken"),
}


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "w"])
@pytest.mark.parametrize("kind", OTHERS)
def test_another_file_is_named_as_what_it_is(kind, name, tmp_path):
  content, said = OTHERS[kind]
  path = tmp_path / name
  path.write_bytes(content)
  for read in (convert.load, convert.read, convert.text_tower):
    with pytest.raises(ValueError, match=f"(?s)w.* can't be read: .*{said}"):
      read(path)


@pytest.mark.parametrize(
  "name, said",
  [
    ("w.onnx", "ONNX"), ("w.pb", "TensorFlow"),
    ("model.ckpt-7.data-00000-of-00001", "TensorFlow"),
    ("model.ckpt-7.index", "TensorFlow"),
  ],
)  # fmt: skip
def test_what_has_no_mark_is_named_by_its_name(name, said, tmp_path):
  (tmp_path / name).write_bytes(b"\x0a\x09\x00\xff" * 9)
  with pytest.raises(ValueError, match=said):
    convert.load(tmp_path / name)


def test_torchs_old_tar_format_is_told_from_archives(tmp_path):
  (tmp_path / "w").write_bytes(tar("sys_info"))
  with pytest.raises(ValueError, match=r"tar format of torch before 0\.1\.10"):
    convert.load(tmp_path / "w")


def test_zip_files_are_told_apart(tmp_path):
  for member, said in (
    ("photo.jpg", "0 of torch's data.pkl"),
    ("model.weights.h5", "Keras"),
    ("archive/constants.pkl", "TorchScript.*torch.jit.load"),
  ):
    with zipfile.ZipFile(tmp_path / "w", "w") as archive:
      archive.writestr(member, b"x")
    with pytest.raises(ValueError, match=said):
      convert.load(tmp_path / "w")


@pytest.mark.parametrize("writer", WRITERS)
def test_a_truncated_file_is_refused_wherever_it_ends(writer, tmp_path):
  path = tmp_path / "w"
  WRITERS[writer](path, {"fc.weight": by_hand.SIX})
  content = path.read_bytes()
  for end in range(0, len(content) - 1, 7):
    path.write_bytes(content[:end])
    with pytest.raises(ValueError, match=r"/w "):
      convert.read(path)


def test_nothing_in_an_npz_is_unpickled_or_grows(tmp_path, monkeypatch):
  monkeypatch.setattr(plain, "_SMALL", 2**20)
  path = tmp_path / "w.npz"
  np.savez(path, a=np.array([{}], object))
  with pytest.raises(ValueError, match="Object arrays"):
    convert.read(path)
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr("a.npy", bytes(2**21))
  with pytest.raises(ValueError, match="would have"):
    convert.read(path)
  header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (9999999999,)}"
  header += b" " * (117 - len(header)) + b"\n"
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("a.npy", b"\x93NUMPY\1\0\x76\0" + header + bytes(64))
  with pytest.raises(ValueError, match="truncated"):
    convert.read(path)


# Directories.

DIRECTORIES = {
  "unpacked": (("archive/data.pkl", "archive/version"), "zip -0"),
  "a SavedModel": (("saved_model.pb", "variables/x"), "TensorFlow"),
  "orbax": (("_METADATA", "manifest.ocdbt"), "orbax"),
  "orbax of an item": (("params/manifest.ocdbt",), "orbax"),
  "orbax of a manager": (("3/default/_METADATA",), "orbax"),
  "nothing": (("README",), "there is neither"),
}


@pytest.mark.parametrize("kind", DIRECTORIES)
def test_a_directory_is_named_as_what_it_is(kind, tmp_path):
  names, said = DIRECTORIES[kind]
  for name in names:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
  with pytest.raises(ValueError, match=said):
    convert.load(tmp_path)


def test_a_file_in_a_directory_is_to_be_named(state, tmp_path):
  (tmp_path / "config.json").write_text("{}")
  torch_file.write(tmp_path / "pytorch_model.bin", state)
  said = "name the file in it that is meant, of pytorch_model.bin$"
  with pytest.raises(ValueError, match=said):
    convert.load(tmp_path)


def test_a_pipe_is_no_file(tmp_path):
  import os

  os.mkfifo(tmp_path / "w")
  with pytest.raises(ValueError, match="no file"):
    contents.of(tmp_path / "w")


def test_a_saved_page_ends_the_command_in_one_line(tmp_path):
  (tmp_path / "w.pth").write_bytes(OTHERS["a quota"][0])
  done = cli.run(
    "--mode=convert", "--config=configs/convert.py",
    f"--config.source={tmp_path}/w.pth", f"--config.output={tmp_path}/out",
  )  # fmt: skip
  assert done.returncode == 2 and "web page" in done.stderr
  assert len(done.stderr.splitlines()) == 1
