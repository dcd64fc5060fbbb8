"""Networks of other libraries as denoisers D(x; sigma), each with the formula that makes it one.

A variance-preserving diffusion in T discrete steps (Ho et al. 2020) sees x_t = sqrt(a_t) y + sqrt(1 - a_t) n with
a_t = `alphas_cumprod[t]`. Divided by sqrt(a_t) that is y + sigma_t n, sigma_t = sqrt((1 - a_t) / a_t): the noise levels
that such a network knows. With x = y + sigma_t n, and the network's input x_t = sqrt(a_t) x,

    epsilon-prediction   D(x; sigma_t) = x - sigma_t eps(x_t, t)                            (Ho et al. 2020, Eq. 11)
    v-prediction         D(x; sigma_t) = sqrt(a_t) x_t - sqrt(1 - a_t) v(x_t, t)            (Salimans & Ho 2022, App. D)
    x0-prediction        D(x; sigma_t) = x0(x_t, t)
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffmem.denoiser import Denoiser
from memorization.measure.samples import to_images

PREDICTIONS = ("epsilon", "v_prediction", "sample")  # diffusers' names


def betas_to_alphas_cumprod(name: str = "linear", steps: int = 1000) -> np.ndarray:
    """alphas_cumprod [steps] of the schedules of improved- and guided-diffusion.

    linear: betas from 1e-4 to 0.02, scaled by 1000 / steps (Ho et al. 2020); cosine: cos^2((t / T + 0.008) / 1.008
    pi / 2), betas at most 0.999 (Nichol & Dhariwal 2021, Eq. 17).

    Raises
    ------
    ValueError
        If the name is unknown.
    """
    if name == "linear":
        factor = 1000 / steps
        return np.cumprod(1 - np.linspace(factor * 1e-4, factor * 0.02, steps, dtype=np.float64))
    if name == "cosine":
        bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
        return np.cumprod(1 - np.minimum(1 - bar[1:] / bar[:-1], 0.999))
    raise ValueError(f'The noise schedule "{name}" is unknown; use linear or cosine, or give alphas_cumprod.')


def from_discrete(
    predict: Callable[..., Any],  # (x_t [b, C, H, W], t int64 [b], class_labels or None) -> prediction
    shape: Sequence[int],  # (C, H, W)
    alphas_cumprod: Any,  # float [T], descending
    prediction: str = "epsilon",  # epsilon, v_prediction or sample (x0)
    *,
    label_dim: int = 0,
    device: torch.device | str | None = None,
) -> Denoiser:
    """A network that predicts epsilon, v or x0 at discrete steps t = 0..T-1 as a `Denoiser`.

    Outputs with more than C channels (a learned variance) are cut to the first C.

    Raises
    ------
    ValueError
        If the prediction is unknown, or `alphas_cumprod` is not descending within (0, 1].
    """
    if prediction not in PREDICTIONS:
        raise ValueError(f'The prediction "{prediction}" is unknown; use {", ".join(PREDICTIONS)}.')
    a = torch.as_tensor(np.asarray(alphas_cumprod), dtype=torch.float64).cpu()
    if a.ndim != 1 or len(a) < 2 or not bool((a > 0).all() and (a <= 1).all() and (a.diff() < 0).all()):
        raise ValueError("alphas_cumprod must be at least 2 numbers in (0, 1], each smaller than the one before.")
    sigmas = ((1 - a) / a).sqrt()  # ascending
    channels = int(shape[0])

    class Predict(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = predict

        def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None) -> Tensor:
            known = sigmas.to(x.device)
            t = (sigma.to(torch.float64)[:, None] - known).abs().argmin(1)  # the sampler rounds to these: exact
            a_t = a.to(x.device)[t].to(x.dtype).reshape(-1, 1, 1, 1)
            x_t = a_t.sqrt() * x
            out = self.network(x_t, t, class_labels)
            out = getattr(out, "sample", out)[:, :channels]
            if prediction == "epsilon":
                return x - sigma.reshape(-1, 1, 1, 1) * out
            return a_t.sqrt() * x_t - (1 - a_t).sqrt() * out if prediction == "v_prediction" else out

    device = device if device is not None else _device(predict)
    return Denoiser(Predict(), shape, sigmas=sigmas, label_dim=label_dim, device=device)


def from_diffusers(
    source: Any,  # folder or id of a pipeline, or a pipeline, or a pair (unet, scheduler)
    *,
    device: torch.device | str = "cpu",
    trust: bool = False,  # also weights in pickles, whose code runs
    download: bool = False,  # an id may be looked up on the hub; else only what is on disk
) -> Denoiser:
    """A diffusers `UNet2DModel` with a DDPM or DDIM scheduler as a `Denoiser`.

    Raises
    ------
    ValueError
        If diffusers is not installed, or this is no such pipeline.
    """
    unet, scheduler = (source if isinstance(source, tuple) else _parts(source, trust, download)) if not hasattr(
        source, "unet"
    ) else (source.unet, source.scheduler)  # fmt: skip
    size = unet.config.sample_size
    size = (size, size) if isinstance(size, int) else tuple(size or ())
    if len(size) != 2 or size[0] != size[1]:
        raise ValueError(f"The network's config says sample_size = {unet.config.sample_size}; one number is needed.")
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None:
        raise ValueError(f"The scheduler {type(scheduler).__name__} has no alphas_cumprod; DDPM and DDIM ones have.")
    classes = getattr(unet.config, "num_class_embeds", None) or 0
    unet = unet.to(device).eval().requires_grad_(False)

    class Call(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unet = unet

        def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
            return self.unet(x, t, **({"class_labels": class_labels} if classes else {})).sample

    prediction = getattr(scheduler.config, "prediction_type", "epsilon")
    shape = (unet.config.in_channels, *size)
    return from_discrete(Call(), shape, alphas, prediction, label_dim=classes, device=device)


def load_pipeline(source: str | os.PathLike, *, trust: bool = False, download: bool = False) -> Any:
    """A diffusers pipeline from a folder (or, with `download`, from the hub).

    Weights are read from safetensors only unless `trust`; no code that comes with them is run.

    Raises
    ------
    ValueError
        If diffusers is not installed, or there is no pipeline.
    """
    try:
        from diffusers import DiffusionPipeline
    except ImportError as err:
        raise ValueError(
            f"Networks of diffusers need it: pip install 'diffusion-memorization[diffusers]' ({err})."
        ) from err
    if not download and not Path(source).is_dir():
        raise ValueError(f'"{source}" is not a folder; save the pipeline there with pipeline.save_pretrained(FOLDER).')
    try:
        return DiffusionPipeline.from_pretrained(
            os.fspath(source), use_safetensors=None if trust else True, local_files_only=not download,
            trust_remote_code=False, low_cpu_mem_usage=False,
        )  # fmt: skip
    except Exception as err:  # its errors are of many kinds
        reason = " ".join(str(err).split())[:300]
        advice = "" if trust else "; weights must be safetensors (save_pretrained writes them) unless --trust is given"
        raise ValueError(f'"{source}" cannot be read as a diffusers pipeline{advice}: {reason}') from err


def _parts(source: str | os.PathLike, trust: bool, download: bool) -> tuple[Any, Any]:
    pipeline = load_pipeline(source, trust=trust, download=download)
    unet, scheduler = getattr(pipeline, "unet", None), getattr(pipeline, "scheduler", None)
    if unet is None or scheduler is None or not hasattr(unet.config, "sample_size"):
        raise ValueError(f'"{source}" is a {type(pipeline).__name__} without a U-Net on pixels.')
    return unet, scheduler


def _device(predict: Any) -> torch.device | str:
    first = next(iter(predict.parameters()), None) if isinstance(predict, torch.nn.Module) else None
    return first.device if first is not None else "cpu"


class PipelineSamples(torch.nn.Module):
    """What a diffusers pipeline itself makes, an image per seed, for `measure_network`.

    Parameters
    ----------
    pipeline : unconditional, on pixels
    steps : num_inference_steps; None: the pipeline's default
    """

    label_dim = 0

    def __init__(self, pipeline: Any, steps: int | None = None, device: torch.device | str = "cpu"):
        super().__init__()
        size = pipeline.unet.config.sample_size
        self.img_channels, self.img_resolution = pipeline.unet.config.out_channels, size
        self.pipeline, self._how = pipeline.to(device), {} if steps is None else {"num_inference_steps": steps}
        self.pipeline.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def made(self, seeds: Sequence[int], batch: int, ends: Sequence[int] = ()) -> Iterator[tuple[list[int], Tensor]]:
        """As `training.generation.generate_images`: (seeds, images), images uint8 [b, C, H, W]."""
        for start, end in zip([0, *ends], [*ends, len(seeds)]):
            for first in range(start, end, batch):
                some = [int(seed) for seed in seeds[first : min(first + batch, end)]]
                generators = [torch.Generator().manual_seed(seed) for seed in some]
                made = self.pipeline(batch_size=len(some), generator=generators, output_type="np", **self._how).images
                yield some, torch.from_numpy(np.ascontiguousarray(to_images(made, value_range=(0, 1))))
