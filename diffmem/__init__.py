"""Measure memorization in diffusion models: any images, any training set, any denoiser.

    import diffmem

    result = diffmem.measure(images, training_images)  # uint8 arrays or tensors, or paths
    print(result.ratio, result.interval)
    result.grid("grid.png")

The names below are the public interface; everything else may change. `diffmem.adapters` turns networks of other
libraries into denoisers that `sample`, `gap` and `measure` understand.
"""

from diffmem import _checkout  # noqa: F401, I001  first: it makes the packages of a checkout importable
from diffmem.api import Emm, Measurement, Optimum, Run, emm, gap, load_run, measure, records, sample
from diffmem.denoiser import Denoiser

__all__ = [
    "Denoiser", "Emm", "Measurement", "Optimum", "Run", "emm", "gap", "load_run", "measure", "records", "sample",
]  # fmt: skip
