"""What is known of the data sets before any of it is read."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Facts:
  """A data set's size.

  Attributes:
    num_classes: the number of classes.
    train: the number of training images.
    val: the number of validation images.
    test: the number of test images.
    shape: (h, w, c) of an image as it is attacked, with the transforms that
      the data set has by default.
  """

  num_classes: int
  train: int
  val: int
  test: int
  shape: tuple[int, int, int]


# The six of the Guide benchmark have the sizes that docs/data.md derives.
FACTS = {
  "aircraft": Facts(100, 3_334, 3_333, 1_000, (224, 224, 3)),
  "caltech101": Facts(101, 5_899, 1_042, 1_000, (224, 224, 3)),
  "caltech256": Facts(257, 14_649, 771, 15_187, (224, 224, 3)),
  "cars": Facts(196, 6_922, 1_222, 1_000, (224, 224, 3)),
  "cifar10": Facts(10, 45_000, 5_000, 10_000, (32, 32, 3)),
  "cifar100": Facts(100, 45_000, 5_000, 10_000, (32, 32, 3)),
  "cub": Facts(200, 5_394, 600, 5_794, (224, 224, 3)),
  "digits": Facts(10, 1_000, 297, 500, (8, 8, 1)),
  "flowers": Facts(102, 1_020, 1_020, 1_000, (224, 224, 3)),
  "letters": Facts(37, 74_000, 1_110, 3_700, (8, 8, 1)),
  "pets": Facts(37, 3_128, 552, 1_000, (224, 224, 3)),
  "stanforddogs": Facts(120, 10_800, 1_200, 8_580, (224, 224, 3)),
  "uc_merced": Facts(21, 1_428, 252, 420, (224, 224, 3)),
}
