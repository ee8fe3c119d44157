"""Where data sets come from, and how they get to where they are read."""

import dataclasses
import pathlib
import urllib.parse
from collections.abc import Iterator

from roli_jax.data import download


@dataclasses.dataclass(frozen=True)
class Item:
  """A part of a data set.

  Attributes:
    makes: its path under the data set's root.
    url: the file to download; "" if an item before it makes `archive`.
    digest: that file's MD5 or SHA-256, in hex.
    inside: in that file, an archive, what `makes` is; "": it is the file.
    archive: the file's path under the root; "": `makes`, or the URL's name.
  """

  makes: str
  url: str
  digest: str
  inside: str = ""
  archive: str = ""

  @property
  def file(self) -> str:
    """The path of the downloaded file under the root."""
    name = urllib.parse.urlsplit(self.url).path.rpartition("/")[2]
    return self.archive or (name if self.inside else self.makes)


def prepare_command(name: str, root: str) -> str:
  """Returns the command that fetches a data set, for messages.

  Args:
    name: the data set's name.
    root: `data.root`, "" for the default.
  """
  where = f" --config.data.root={root}" if root else ""
  return (
    "python -m roli_jax.main --mode=prepare --config=cifar_roli"
    f" --config.data.name={name}{where}"
  )


def fetch(name: str, root: str) -> Iterator[str]:
  """Downloads and unpacks what a data set lacks.

  What is there stays as it is, and archives are kept.

  Args:
    name: a name in HOMES.
    root: the data set's directory, which is made; "" for data/<name>.

  Yields:
    What it is about to do, or has found, a line each.

  Raises:
    ValueError: as `download.fetch` and `download.unpack`.
  """
  base = pathlib.Path(root or f"data/{name}").expanduser()
  with download.alone(base):
    for item in HOMES[name]:
      place, file = base / item.makes, base / item.file
      if place.exists():
        yield f"{place} is there"
        continue
      if item.url and not file.exists():
        yield f"fetching {item.url} to {file}"
        download.fetch(item.url, item.digest, file)
      if item.inside:
        yield f"unpacking {file} to {place}"
        download.unpack(file, item.inside, place)


_CALTECH = "https://data.caltech.edu/records"
_OXFORD = "https://www.robots.ox.ac.uk/~vgg/data"
_TORONTO = "https://www.cs.toronto.edu/~kriz"
_ROLI = (
  "https://raw.githubusercontent.com/DongXzz/RoLI/"
  "5f34b8fb4ae48afe26de6e627022bb0db058e8c5/data_splits"
)


def _splits(name: str, **digests: str) -> tuple[Item, ...]:
  """Makes the items of the reference's splits."""
  return tuple(
    Item(f"{split}.json", f"{_ROLI}/{name}/{split}.json", digest)
    for split, digest in digests.items()
  )


# MD5s are torchvision's, or of the sets' own pages; SHA-256s TFDS's, and of the
# splits of the RoLI reference ours.
HOMES: dict[str, tuple[Item, ...]] = {
  "cifar10": (
    Item(
      "cifar-10-python.tar.gz",
      f"{_TORONTO}/cifar-10-python.tar.gz",
      "c58f30108f718f92721af3b95e74349a",
    ),
  ),
  "cifar100": (
    Item(
      "cifar-100-python.tar.gz",
      f"{_TORONTO}/cifar-100-python.tar.gz",
      "eb9058c3a382ffc7106e4002c42a8d85",
    ),
  ),
  "caltech256": (
    Item(
      "256_ObjectCategories",
      f"{_CALTECH}/nyy15-4j048/files/256_ObjectCategories.tar",
      "67b4f42ca05d46448c6bb8ecd2220f6d",
      inside="256_ObjectCategories",
    ),
    *_splits(
      "caltech256",
      train="75bc9e9b9d9ca9fc074f1b99b670171f62614a511b7f941846cac192aa2d6cf4",
      val="22b52c2fac6820743af3e14ab0361b1de3e77d38c50348f9f7f1159986f51c1e",
      test="dc247dbb4603e7dc3f227825bcf95831e7902984025c60daeb91e01c922a4caa",
    ),
  ),
  "cub": (
    Item(
      "images",
      f"{_CALTECH}/65de6-vp158/files/CUB_200_2011.tgz?download=1",
      "0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081",
      inside="CUB_200_2011/images",
    ),
    *_splits(
      "cub",
      train="2c8e8a0e70795ab5a992b51d3ab09aa2621b75bb7b34bb46fef0f910b3261f2d",
      val="d2bdc9030fe8682bb8a44fca9d44b7255f641195ac1a77d5f7431ed14d343f81",
      test="1fcf560553e94b5e56681a3981d90462de91ab4ba2dd6a2a99e1e3ff71993b6e",
    ),
  ),
  "stanforddogs": (
    Item(
      "Images",
      "http://vision.stanford.edu/aditya86/ImageNetDogs/images.tar",
      "a443fc2f9a851aa1a7b8e4fa4af94b8459fce2c9f5a2f4dd4669cf9673a4ec58",
      inside="Images",
    ),
    *_splits(
      "stanforddogs",
      train="d9bfb65dc50f8e164d2b0d5195baf495c2f2fb184e42d9d774dbf90f4f76e836",
      val="d9a1ebbbc6299bc80d2570c9171ba1d9ab7c8ff869f6dc54232288a6b49b97c1",
      test="aed81b99b13be6ef9196bdb100c66eec0f277bc715bc9f015a2648e3fd9eb42d",
    ),
  ),
  "aircraft": (
    Item(
      "fgvc-aircraft-2013b",
      f"{_OXFORD}/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz",
      "d4acdd33327262359767eeaa97a4f732",
      inside="fgvc-aircraft-2013b",
    ),
  ),
  "caltech101": (
    Item(
      "101_ObjectCategories.tar.gz",
      f"{_CALTECH}/mzrjq-6wc02/files/caltech-101.zip?download=1",
      "331234750fc7f77520e50d9565e8b6907b03565e30320da1401130db08c61f91",
      inside="caltech-101/101_ObjectCategories.tar.gz",
    ),
    Item(
      "101_ObjectCategories",
      "",
      "",
      inside="101_ObjectCategories",
      archive="101_ObjectCategories.tar.gz",
    ),
  ),
  "flowers": (
    Item(
      "jpg",
      f"{_OXFORD}/flowers/102/102flowers.tgz",
      "52808999861908f626f3c1f4e79d11fa",
      inside="jpg",
    ),
    Item(
      "imagelabels.mat",
      f"{_OXFORD}/flowers/102/imagelabels.mat",
      "e0620be6f572b9609742df49c70aed4d",
    ),
    Item(
      "setid.mat",
      f"{_OXFORD}/flowers/102/setid.mat",
      "a5357ecc9cb78c4bef273ce3793fc85c",
    ),
  ),
  "pets": tuple(
    Item(part, f"{_OXFORD}/pets/data/{part}.tar.gz", digest, inside=part)
    for part, digest in (
      ("images", "5c4f3ee8e5d25df40f4fd59a7f44e54c"),
      ("annotations", "95a8c909bbe2e81eed6a22bccdf3f68f"),
    )
  ),
  "uc_merced": (
    Item(
      "Images",
      "http://weegee.vision.ucmerced.edu/datasets/UCMerced_LandUse.zip",
      "06c539ef28703a58fb07bd2837991ac7c48b813b00bb12ac197efd813a18daeb",
      inside="UCMerced_LandUse/Images",
    ),
  ),
}
