"""The corruption error (Hendrycks and Dietterich 2019, section 4)."""

from collections.abc import Mapping, Sequence

import numpy as np

# Top-1 error of AlexNet on ImageNet-C by severity, the baseline of the paper.
# The means are the authors' published ones (.886 for Gaussian noise to .607
# for JPEG); by severity as they stand in timm (rwightman/
# pytorch-image-models, branch bits_and_tpu, timm/utils).
ALEXNET: dict[str, tuple[float, ...]] = {
  "gaussian_noise": (0.69528, 0.82542, 0.93554, 0.98138, 0.99452),
  "shot_noise": (0.71224, 0.85108, 0.93574, 0.98182, 0.99146),
  "impulse_noise": (0.78374, 0.89808, 0.94870, 0.98720, 0.99548),
  "defocus_blur": (0.65624, 0.73202, 0.85036, 0.91364, 0.94714),
  "glass_blur": (0.64308, 0.75054, 0.88806, 0.91622, 0.93344),
  "motion_blur": (0.58430, 0.70048, 0.82108, 0.89750, 0.92638),
  "zoom_blur": (0.70008, 0.76992, 0.80784, 0.84198, 0.87198),
  "snow": (0.71726, 0.88392, 0.86468, 0.91870, 0.94952),
  "frost": (0.61390, 0.79734, 0.88790, 0.89942, 0.93430),
  "fog": (0.67474, 0.76050, 0.84378, 0.87260, 0.94500),
  "brightness": (0.45140, 0.48502, 0.54048, 0.62166, 0.72440),
  "contrast": (0.64548, 0.76150, 0.88874, 0.97760, 0.99270),
  "elastic_transform": (0.52596, 0.70116, 0.55686, 0.64076, 0.80554),
  "pixelate": (0.52218, 0.54620, 0.73728, 0.87092, 0.91262),
  "jpeg_compression": (0.51002, 0.54718, 0.57294, 0.65458, 0.74778),
}


def mean_corruption_error(
  errors: Mapping[str, Sequence[float | int]],
  baseline: Mapping[str, Sequence[float | int]] | None = None,
) -> float:
  """The mean over types of a model's errors over the baseline's.

  mCE = mean over types c of (sum over severities s of E[s, c]) / (the same
  sum of the baseline). With `ALEXNET`, 1 is as bad as AlexNet.

  Args:
    errors: the error at each severity by type, shares in [0, 1].
    baseline: the errors of another model, as `errors`; more types do no harm.
      None: the plain mean of all errors, types weighing the same.

  Raises:
    ValueError: no errors at all, or a type that the baseline lacks, has at
      another number of severities, or has without an error.
  """
  if not errors or not all(len(of_type) for of_type in errors.values()):
    raise ValueError(f"expected errors of one type or more, got {dict(errors)}")
  if baseline is None:
    return float(np.mean([np.mean(of_type) for of_type in errors.values()]))
  ratios = []
  for name, of_type in errors.items():
    if name not in baseline:
      raise ValueError(
        f"the baseline has no errors for {name!r}; it has"
        f" {', '.join(sorted(baseline))}"
      )
    if len(of_type) != len(baseline[name]):
      raise ValueError(
        f"{name} has errors at {len(of_type)} severities, the baseline at"
        f" {len(baseline[name])}; give both at the same ones"
      )
    if not sum(baseline[name]) > 0:
      raise ValueError(f"the baseline makes no errors on {name}: no ratio")
    ratios.append(sum(of_type) / sum(baseline[name]))
  return float(np.mean(ratios))
