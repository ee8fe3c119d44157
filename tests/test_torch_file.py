"""PyTorch's checkpoints without PyTorch: honest ones, broken ones, hostile."""

import argparse
import collections
import io
import pickle
import random
import struct
import tarfile
import zipfile

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from roli_jax.convert import torch_file

DTYPES = (
  "bfloat16", "bool", "complex64", "float16", "float32", "float64", "int16",
  "int32", "int64", "int8", "uint8",
)  # fmt: skip


# What torch.save writes, by hand: pickles of protocol 2 in pieces.


def value(x):
  return pickle.dumps(x, protocol=2)[2:-1]


def name(dotted):
  return "c{}\n{}\n".format(*dotted.rsplit(".", 1)).encode()


def call(dotted, *args):
  return name(dotted) + b"(" + b"".join(args) + b"tR"


def mapping(start=b"}", **items):
  pairs = b"".join(value(k) + v for k, v in items.items())
  return start + b"(" + pairs + b"u"


def storage(key="0", count=6, kind="torch.FloatStorage", view=b""):
  words = value("storage") + name(kind) + value(key) + value("cpu")
  return b"(" + words + value(count) + view + b"tQ"


def tensor(place=None, offset=0, size=(2, 3), strides=(3, 1), extra=()):
  return call(
    "torch._utils._rebuild_tensor_v2",
    place or storage(),
    *map(value, (offset, size, strides, False)),
    call("collections.OrderedDict"),
    *extra,
  )


SIX = np.arange(6, dtype=np.float32)
STORED = {"0": SIX.tobytes()}


def write_zip(path, body, stored=STORED, order=b"little", method=0):
  with zipfile.ZipFile(path, "w", method) as archive:
    archive.writestr("any/data.pkl", b"\x80\x02" + body + b".")
    archive.writestr("any/byteorder", order)
    for key, data in stored.items():
      archive.writestr(f"any/data/{key}", data)
    archive.writestr("any/version", b"3\n")


def write_legacy(path, body, stored=STORED, little=True, itemsize=4):
  info = {"protocol_version": 1001, "little_endian": little, "type_sizes": {}}
  head = (0x1950A86A20F9469CFC6C, 1001, info)
  parts = [pickle.dumps(x, protocol=2) for x in head]
  parts += [b"\x80\x02" + body + b".", pickle.dumps(sorted(stored), protocol=2)]
  for _, data in sorted(stored.items()):
    parts += [struct.pack("<q", len(data) // itemsize), data]
  path.write_bytes(b"".join(parts))


both = pytest.mark.parametrize("save", [write_zip, write_legacy])


def refusal(path):
  with pytest.raises(ValueError) as error:
    torch_file.read(path)
  assert str(error.value).startswith(str(path))
  return str(error.value)


@pytest.fixture
def path(tmp_path):
  return tmp_path / "x.pth"


# Files that are as they should be.


@hypothesis.given(
  dtype=st.sampled_from(DTYPES),
  shape=hnp.array_shapes(min_dims=0, min_side=0, max_side=4),
  turned=st.booleans(),
)
def test_arrays_come_back_bit_for_bit(tmp_path_factory, dtype, shape, turned):
  path = tmp_path_factory.mktemp("x") / "x.pth"
  rng = np.random.default_rng(0)
  raw = rng.integers(0, 2 if dtype == "bool" else 256, (*shape, 16), np.uint8)
  array = raw[..., : jnp.dtype(dtype).itemsize].copy().view(dtype)[..., 0]
  array = array.T if turned else array
  torch_file.write(path, {"a.weight": array, "b": SIX})
  read = torch_file.read(path)
  assert list(read) == ["a.weight", "b"]
  assert read["a.weight"].dtype == array.dtype
  assert read["a.weight"].shape == array.shape
  assert read["a.weight"].tobytes() == array.tobytes()
  assert type(read) is collections.OrderedDict


def test_a_written_file_says_what_torch_itself_says(path):
  torch_file.write(path, {"w": SIX.reshape(2, 3)})
  with zipfile.ZipFile(path) as archive:
    pickled = archive.read("archive/data.pkl")
    assert archive.read("archive/data/0") == SIX.tobytes()
    assert archive.read("archive/version") == b"3\n"
  body = mapping(name("collections.OrderedDict") + b")R", w=tensor())
  plain = b"\x80\x02" + body.replace(b"(tR", b")R") + b"."
  assert pickled == plain


def test_the_same_arrays_make_the_same_file_and_no_other(path):
  torch_file.write(path, {"w": SIX})
  first = path.read_bytes()
  torch_file.write(path, {"w": SIX})
  assert path.read_bytes() == first
  assert list(path.parent.iterdir()) == [path]


def test_dtypes_that_torch_lacks_are_not_written(path):
  with pytest.raises(ValueError, match=r"x\.pth can't hold 'w'.*<U1"):
    torch_file.write(path, {"w": np.array(["a"])})
  assert not list(path.parent.iterdir())


@both
def test_views_share_the_memory_of_their_storage(save, path):
  views = {
    "whole": tensor(),
    "turned": tensor(size=(3, 2), strides=(1, 3)),
    "column": tensor(offset=1, size=(2,), strides=(3,)),
    "spread": tensor(offset=5, size=(4,), strides=(0,)),
    "empty": tensor(offset=6, size=(0, 3)),
    "scalar": tensor(offset=4, size=(), strides=()),
    "parameter": call(
      "torch._utils._rebuild_parameter", tensor(), b"\x88", b"N"
    ),
  }
  save(path, mapping(**views))
  read = torch_file.read(path)
  whole = SIX.reshape(2, 3)
  np.testing.assert_array_equal(read["whole"], whole)
  np.testing.assert_array_equal(read["turned"], whole.T)
  np.testing.assert_array_equal(read["column"], whole[:, 1])
  np.testing.assert_array_equal(read["spread"], [5, 5, 5, 5])
  assert read["empty"].shape == (0, 3) and read["scalar"] == 4
  assert np.shares_memory(read["turned"], read["parameter"])
  assert not read["whole"].flags.writeable


@both
def test_dtypes_without_a_class_are_read_from_bare_bytes(save, path):
  words = value((6,)), value((1,)), value(False), b")", name("torch.uint16")
  bare = storage(count=12, kind="torch.storage.UntypedStorage")
  body = call("torch._utils._rebuild_tensor_v3", bare, value(0), *words)
  data = {"0": SIX.astype(np.uint16).tobytes()}
  save(path, body, data, **({"itemsize": 1} if save is write_legacy else {}))
  np.testing.assert_array_equal(torch_file.read(path), SIX.astype(np.uint16))


def test_a_legacy_storage_may_be_a_view_of_another(path):
  view = value(("1", 2, 3))
  write_legacy(
    path, tensor(storage(view=view), offset=1, size=(2,), strides=(1,))
  )
  np.testing.assert_array_equal(torch_file.read(path), [3, 4])


@both
def test_a_training_checkpoint_is_read_as_plain_containers(save, path):
  versions = mapping(_metadata=value({"version": 1}))
  state_dict = mapping(call("collections.OrderedDict"), w=tensor())
  config = mapping(name("yacs.config.CfgNode") + b")\x81", lr=value(0.1))
  rest = {
    "epoch": 3,
    "best": np.float64(0.5),
    "seen": np.int64(7),
    "history": np.arange(4.0).reshape(2, 2).T,
    "none": np.zeros((0, 2)),
    "milestones": collections.Counter([3, 3]),
    "groups": collections.defaultdict(list, a=[1, (2, None)]),
    "flags": [True, {1, 2}, b"\xff", b"", -(2**70)],
  }
  save(
    path,
    mapping(
      model=state_dict + versions + b"b",
      args=value(argparse.Namespace(lr=1e-3, on=argparse.Namespace(gpu=0))),
      config=config + mapping(MODEL=value("swin")) + b"b",
      dtype=name("torch.float32"),
      size=call("torch.Size", value((2, 3))),
      rest=value(rest),
    ),
  )
  read = torch_file.read(path)
  np.testing.assert_array_equal(read["model"].pop("w"), SIX.reshape(2, 3))
  for key in ("history", "none"):
    expected, array = rest.pop(key), read["rest"].pop(key)
    np.testing.assert_array_equal(array, expected, strict=True)
  assert read == {
    "model": collections.OrderedDict(),
    "args": {"lr": 1e-3, "on": {"gpu": 0}},
    "config": {"lr": 0.1, "MODEL": "swin"},
    "dtype": "torch.float32",
    "size": (2, 3),
    "rest": rest,
  }
  assert isinstance(read["rest"]["best"], np.float64)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_later_pickles_are_read_too(path, protocol):
  content = {"a": [1.5, "ü", {2}], "args": argparse.Namespace(b=b"c")}
  write_zip(path, pickle.dumps(content, protocol=protocol)[2:-1])
  assert torch_file.read(path) == {"a": [1.5, "ü", {2}], "args": {"b": b"c"}}


def lambda_of_dill(source):
  """A function as dill 0.3.1 writes it: `lambda: eval(source)`."""
  code = call("dill._dill._load_type", value("CodeType"))
  code += value((0, 1, 67, source.encode(), "<lambda>")) + b"R"
  rest = (value("<lambda>"), value(None), value(()), value({}))
  module = name("robustness.train.__dict__")
  made = call("dill._dill._create_function", code, module, *rest)
  return made + value({"__kwdefaults__": None}) + b"b"


@both
def test_code_beside_weights_is_passed_over_and_never_made(save, path):
  """As in MadryLab's checkpoints, which hold their schedule, or settings."""
  canary = path.with_name("canary")
  function = lambda_of_dill(f"open({str(canary)!r}, 'w')")
  settings = name("cox.utils.Parameters") + b")\x81" + mapping(lr=value(0.1))
  save(
    path,
    mapping(
      model=mapping(w=tensor()),
      schedule=mapping(lr_lambdas=function, called=function + b")R"),
      main=name("__builtin__.__main__"),
      args=settings + b"b",
    ),
  )
  read = torch_file.read(path)
  np.testing.assert_array_equal(read["model"]["w"], SIX.reshape(2, 3))
  assert read["args"] == {"lr": 0.1} and not canary.exists()
  assert not any(map(callable, read["schedule"].values()))


# Hostile files.


def reduced(function, *args, protocol=2):
  class Bomb:
    def __reduce__(self):
      return function, args

  return pickle.dumps(Bomb(), protocol=protocol)[2:-1]


HOSTILE = {
  "posix.system": lambda shell: call("posix.system", value(shell)),
  "os.system": lambda shell: tensor() + call("os.system", value(shell)),
  "subprocess.Popen": lambda shell: mapping(
    w=call("subprocess.Popen", value(shell))
  ),
  "__builtin__.eval": lambda shell: reduced(
    eval, f"__import__('os').system({shell!r})"
  ),
  "__builtin__.exec": lambda shell: reduced(
    exec, f"import os; os.system({shell!r})", protocol=4
  ),
  "__builtin__.getattr": lambda shell: call(
    "builtins.getattr", name("torch.Size"), value("__class__")
  ),
  "torch.load": lambda shell: call("torch.load", value(shell)),
  "torch.FloatStorage.system": lambda shell: (
    b"ctorch\nFloatStorage.system\n" + value((shell,)) + b"R"
  ),
  "torch.storage._load_from_bytes": lambda shell: call(
    "torch.storage._load_from_bytes", value(reduced(eval, shell))
  ),
  "argparse.os.system": lambda shell: (
    b"cargparse\nos.system\n" + value((shell,)) + b"R"
  ),
  "torch.float32": lambda shell: call("torch.float32", value(shell)),
  "INST": lambda shell: b"(" + value(shell) + b"iposix\nsystem\n",
  "EXT1": lambda shell: b"\x82\x01" + value((shell,)) + b"R",
  "module": lambda shell: (
    b"(" + value("module") + name("torch.Tensor") + value(shell) * 2 + b"tQ"
  ),
  "'O'": lambda shell: call("numpy.dtype", value("O")),
}


@both
@pytest.mark.parametrize("named", HOSTILE)
def test_a_malicious_pickle_is_refused_by_name(save, named, path):
  canary = path.with_name("canary")
  save(path, HOSTILE[named](f"touch {canary}"))
  assert named in refusal(path)
  assert not canary.exists()


def test_the_hostile_pickles_would_have_worked(path):
  canary = path.with_name("canary")
  body = HOSTILE["__builtin__.eval"](f"touch {canary}")
  pickle.loads(b"\x80\x02" + body + b".")
  assert canary.exists()


@pytest.mark.parametrize(
  "body",
  [
    b"}" + tensor() + b"Ns",  # an array for a key
    b"}" + b")q\x00" + b"h\x00\x86q\x00" * 60 + b"Ns",  # 2^60 to hash
    tensor() + value({"shape": 1}) + b"b",  # attributes of an array,
    name("torch.Size") + value({"__call__": 1}) + b"b",  # of a name,
    value(np.dtype("f8")).replace(b"<", b">"),  # of a dtype
    value(1) + value((1,)) + b"R",
    value("x") + b"Na",
    b"\x86",
    b"",
  ],
)
def test_odd_pickles_are_refused(body, path):
  write_zip(path, body)
  refusal(path)


def test_a_pickle_can_not_take_the_memory_by_its_memo(path):
  write_zip(path, b"]r\xff\xff\xff\x7f")  # Python's own would take 32 GB
  assert torch_file.read(path) == []


# Broken files.


@both
@pytest.mark.parametrize(
  "said, body",
  [
    ("reaches outside", tensor(offset=1)),
    ("reaches outside", tensor(offset=6, size=(), strides=())),
    ("reaches outside", tensor(size=(2, 4))),
    ("reaches outside", tensor(strides=(4, 1))),
    ("reaches outside", tensor(size=(2**62,) * 2, strides=(2**62,) * 2)),
    ("negative", tensor(offset=-1)),
    ("negative", tensor(offset=5, strides=(-3, -1))),
    ("negative", tensor(size=(-2, -3))),
    ("a float in the place", tensor(size=(2.0, 3))),
    ("a str in the place", tensor(storage(count="6"))),
    ("a bytes in the place", tensor(value(b"abc" * 9))),
    ("conjugate", tensor(extra=[value({"conj": True})])),
    ("torch.QInt8Storage", tensor(storage(kind="torch.QInt8Storage"))),
    ("", tensor(strides=(1,))),
    ("", tensor(size=(2**70, 0))),
    ("", tensor(storage(count=7), size=(7,), strides=(1,))),
    ("", tensor(storage(count=-6))),
    ("", tensor(storage("1"))),
    ("", tensor(storage("../any/data.pkl"))),
  ],
)
def test_a_tensor_lies_within_its_storage(save, said, body, path):
  save(path, body)
  assert said in refusal(path)


@both
@pytest.mark.parametrize("data", [b"", SIX[:5].tobytes(), bytes(28)])
def test_storages_of_other_sizes_are_refused(save, data, path):
  save(path, tensor(), {"0": data})
  assert "storage '0'" in refusal(path)


@both
def test_a_storage_that_is_missing_is_refused(save, path):
  save(path, tensor(), {})
  refusal(path)


def test_a_view_within_a_legacy_storage_stays_there(path):
  for view in (("1", 2, 5), ("1", -2, 1), ("1", 0)):
    write_legacy(path, tensor(storage(view=value(view))))
    refusal(path)


@both
def test_big_endian_files_are_refused(save, path):
  save(path, tensor(), **(
    {"order": b"big"} if save is write_zip else {"little": False}
  ))  # fmt: skip
  assert "big-endian" in refusal(path)


@both
def test_a_truncated_file_is_refused_wherever_it_ends(save, path):
  save(path, mapping(a=tensor(), args=value(argparse.Namespace(b=[1]))))
  content = path.read_bytes()
  for end in range(0, len(content), 5):
    path.write_bytes(content[:end])
    refusal(path)


@both
def test_flipped_bytes_are_refused_or_harmless(save, path):
  save(path, mapping(a=tensor(), best=value([np.float64(1), {"b": (1, 2)}])))
  content, rng = path.read_bytes(), random.Random(0)
  for _ in range(400):
    broken = bytearray(content)
    for _ in range(rng.choice([1, 2, 9])):
      broken[rng.randrange(len(broken))] = rng.randrange(256)
    path.write_bytes(broken)
    try:
      torch_file.read(path)
    except ValueError as error:
      assert str(error).startswith(str(path))


def test_a_storage_whose_bits_rotted_is_refused(path):
  write_zip(path, tensor())
  content = path.read_bytes()
  path.write_bytes(content.replace(STORED["0"], bytes(24)))
  assert "CRC" in refusal(path)


# Other files.


def tar():
  with io.BytesIO() as file:
    with tarfile.open(fileobj=file, mode="w") as archive:
      archive.addfile(tarfile.TarInfo("sys_info"))
    return file.getvalue()


def zipped(**members):
  with io.BytesIO() as file:
    with zipfile.ZipFile(file, "w") as archive:
      for member, data in members.items():
        archive.writestr(member, data)
    return file.getvalue()


def safe():
  from safetensors import numpy as safetensors

  return safetensors.save({"w": np.ones(2)})


@pytest.mark.parametrize(
  "content, said",
  [
    (b"", "truncated"),
    (b"<html>not found</html>", "b'<html>no'"),
    (b"version https://git-lfs", "begins with"),
    (safe(), "safetensors"),
    (tar(), "tar format"),
    (pickle.dumps({"w": SIX.tobytes()}), "not of torch.save"),
    (pickle.dumps(SIX), "not of torch.save"),
    (zipped(photo=b"jpeg"), "holds 0"),
    (b"PK\x03\x04 but no more", "not a zip file"),
  ],
)
def test_other_files_are_told_apart(content, said, path):
  path.write_bytes(content)
  assert said in refusal(path)


def test_no_small_file_grows_into_a_large_one(path):
  zeros = {"0": bytes(10**7)}
  body = tensor(storage(count=2500000), size=(2500000,), strides=(1,))
  write_zip(path, body, zeros, method=zipfile.ZIP_DEFLATED)
  assert path.stat().st_size < 20000
  assert "compressed" in refusal(path)
  write_legacy(path, tensor(storage(count=10**12)))
  assert "larger than the file" in refusal(path)


def test_folders_and_missing_files_are_refused(path):
  for other in (path, path.parent):
    assert "is no file" in refusal(other)
