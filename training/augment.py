"""Non-leaking augmentation: random geometric transformations that are told to the network.

The pipeline of Karras et al., "Training Generative Adversarial Networks with Limited Data" (2020),
Appendix B, with the settings of EDM, Appendix F.2: each transformation is drawn with probability p,
and its parameters become augmentation labels, zero where an image was left alone, so that sampling
with zero labels gives unaugmented images.
"""

import functools
import math

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, conv2d, conv_transpose2d, grid_sample, pad

# Low-pass decomposition filter of the symlet with 6 vanishing moments (Daubechies, "Ten Lectures on
# Wavelets", 1992): the orthogonal filter that resamples images around the transformation.
SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
    0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
    -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip


class AugmentPipe:
    """Random flips, scaling, rotation, anisotropic scaling and translation.

    Each of the multipliers `xflip`, `yflip`, `scale`, `rotate_frac`, `aniso`, `translate_frac` times `p` is
    the probability of that transformation; 0 leaves it out, together with its labels. (A multiplier of 1e8
    makes a flip certain to be considered: one image in two is then mirrored, whatever p.)

    Parameters
    ----------
    p : overall probability
    scale_std : standard deviation of log2 of the isotropic scale
    rotate_frac_max : range of rotations, 1 = the full circle
    aniso_std : standard deviation of log2 of the anisotropic scale
    aniso_rotate_prob : probability that anisotropic scaling has a random axis
    translate_frac_std : standard deviation of translations, relative to the image size
    """

    def __init__(
        self,
        p: float = 1,
        xflip: float = 0,
        yflip: float = 0,
        scale: float = 0,
        rotate_frac: float = 0,
        aniso: float = 0,
        translate_frac: float = 0,
        scale_std: float = 0.2,
        rotate_frac_max: float = 1,
        aniso_std: float = 0.2,
        aniso_rotate_prob: float = 0.5,
        translate_frac_std: float = 0.125,
    ):
        self.p = p
        self.xflip, self.yflip = xflip, yflip
        self.scale, self.rotate_frac, self.aniso, self.translate_frac = scale, rotate_frac, aniso, translate_frac
        self.scale_std, self.rotate_frac_max = scale_std, rotate_frac_max
        self.aniso_std, self.aniso_rotate_prob = aniso_std, aniso_rotate_prob
        self.translate_frac_std = translate_frac_std

    @property
    def label_dim(self) -> int:
        """Number of augmentation labels per image."""
        widths = [(self.xflip, 1), (self.yflip, 1), (self.scale, 1)]
        widths += [(self.rotate_frac, 2), (self.aniso, 2), (self.translate_frac, 2)]
        return sum(width for multiplier, width in widths if multiplier > 0)

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images float [batch, channels, h, w] -> (augmented images of that shape, labels [batch, label_dim])."""
        batch, _, height, width = images.shape
        device = images.device
        labels = []

        def draw(values: Tensor, probability: float) -> Tensor:
            """`values` [..., batch] where the dice say so, else 0."""
            dice = torch.rand(values.shape[-1:], device=device)
            return torch.where(dice < probability, values, torch.zeros_like(values))

        # Flips.
        for multiplier, axis in [(self.xflip, 3), (self.yflip, 2)]:
            if multiplier > 0:
                w = draw(torch.randint(2, [batch], device=device), multiplier * self.p)
                images = torch.where(w.reshape(-1, 1, 1, 1) == 1, images.flip(axis), images)
                labels += [w]

        # The inverse transformation: where in the source each target pixel comes from, in pixels from the centre.
        inverse = None
        if self.scale > 0:
            w = draw(torch.randn([batch], device=device), self.scale * self.p)
            s = 2 ** (-w * self.scale_std)
            inverse = _compose(inverse, _scale(s, s))
            labels += [w]
        if self.rotate_frac > 0:
            angle = (torch.rand([batch], device=device) * 2 - 1) * (math.pi * self.rotate_frac_max)
            w = draw(angle, self.rotate_frac * self.p)
            inverse = _compose(inverse, _rotate(w))
            labels += [w.cos() - 1, w.sin()]
        if self.aniso > 0:
            w = torch.randn([batch], device=device)
            angle = (torch.rand([batch], device=device) * 2 - 1) * math.pi
            w = draw(w, self.aniso * self.p)
            angle = draw(angle, self.aniso_rotate_prob)
            s = 2 ** (w * self.aniso_std)
            inverse = _compose(inverse, _rotate(-angle) @ _scale(1 / s, s) @ _rotate(angle))
            labels += [w * angle.cos(), w * angle.sin()]
        if self.translate_frac > 0:
            w = draw(torch.randn([2, batch], device=device), self.translate_frac * self.p)
            shift = w * self.translate_frac_std
            inverse = _compose(inverse, _translate(-shift[0] * width, -shift[1] * height))
            labels += [w[0], w[1]]

        if inverse is not None:
            images = _warp(images, inverse)
        labels = [w.to(torch.float32) for w in labels]
        return images, torch.stack(labels, dim=1) if labels else torch.zeros([batch, 0], device=device)


def edm_augment_pipe(p: float) -> AugmentPipe:
    """The pipeline that EDM trains with (EDM Table 6): nine augmentation labels."""
    return AugmentPipe(p=p, xflip=1e8, yflip=1, scale=1, rotate_frac=1, aniso=1, translate_frac=1)


# ----------------------------------------------------------------------------
# 3x3 matrices of homogeneous coordinates (x, y, 1), one per image: [batch, 3, 3].


def _matrix(rows: list[list[Tensor | float]]) -> Tensor:
    like = next(x for row in rows for x in row if isinstance(x, Tensor))
    entries = [x if isinstance(x, Tensor) else torch.full_like(like, x) for row in rows for x in row]
    return torch.stack(entries, dim=-1).reshape(-1, 3, 3)


def _scale(sx: Tensor, sy: Tensor) -> Tensor:
    return _matrix([[sx, 0, 0], [0, sy, 0], [0, 0, 1]])


def _rotate(angle: Tensor) -> Tensor:
    c, s = angle.cos(), angle.sin()
    return _matrix([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def _translate(tx: Tensor, ty: Tensor) -> Tensor:
    return _matrix([[1, 0, tx], [0, 1, ty], [0, 0, 1]])


def _compose(first: Tensor | None, second: Tensor) -> Tensor:
    return second if first is None else first @ second


def _may_look(images: Tensor) -> bool:
    """Whether numbers that were computed on the images' device can be looked at without waiting for it."""
    return images.device.type == "cpu" and not torch.compiler.is_compiling()


def _constant(values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of these numbers, which is copied to the device only once."""
    make = torch.tensor if torch.compiler.is_compiling() else _copied_once
    return make(values, dtype=dtype, device=device)


_copied_once = functools.lru_cache(maxsize=64)(torch.tensor)


def _warp(images: Tensor, inverse: Tensor) -> Tensor:
    """Resample `images` by `inverse` [batch, 3, 3]: reflect at the border, upsample 2x, warp, downsample 2x."""
    batch, channels, height, width = images.shape
    constant = functools.partial(_constant, dtype=images.dtype, device=images.device)
    taps = constant(SYM6)
    reach = len(SYM6) // 4  # what the filter needs beyond a pixel, in pixels of the original
    size = constant((width, height))

    # Padding: as far as any image's corners reach outside, all around the batch. A GPU would have to be waited for
    # to know how far; there it is as far as a reflection goes. What lies farther out is not looked at.
    left, right, top, bottom = width - 1, width - 1, height - 1, height - 1
    if _may_look(images):
        half = (size - 1) / 2
        signs = constant(((-1, -1), (1, -1), (1, 1), (-1, 1)))
        corners = torch.cat([signs * half, signs.new_ones(4, 1)], dim=1)  # [4, (x, y, 1)]
        moved = (inverse @ corners.t())[:, :2]  # [batch, (x, y), 4]
        low, high = -moved.amin(dim=(0, 2)), moved.amax(dim=(0, 2))
        margins = torch.stack([low, high]) + 2 * reach - half  # [(low, high), (x, y)]
        margins = margins.clamp(min=0).minimum(size - 1).ceil().to(torch.int64)
        (left, top), (right, bottom) = margins.tolist()
    images = pad(images, [left, right, top, bottom], mode="reflect")

    # Upsample: zeros between the pixels, then the filter.
    up = taps.expand(channels, 1, 1, -1)
    crop = (len(SYM6) - 1) // 2  # from full to centred convolution
    for kernel, stride in [(up, (1, 2)), (up.transpose(2, 3), (2, 1))]:
        padding = (0, crop) if stride == (1, 2) else (crop, 0)
        images = conv_transpose2d(images, kernel, groups=channels, stride=stride, padding=padding)

    # Express the transformation in the coordinates of affine_grid, -1..1 over each image's extent. The
    # upsampled pixels lie at half integers of the original, hence the shift by half an upsampled pixel.
    ones = images.new_ones(1)
    inverse = _translate((left - right) / 2 * ones, (top - bottom) / 2 * ones) @ inverse
    inverse = _scale(2 * ones, 2 * ones) @ inverse @ _scale(ones / 2, ones / 2)
    inverse = _translate(-ones / 2, -ones / 2) @ inverse @ _translate(ones / 2, ones / 2)
    target = [batch, channels, (height + 2 * reach) * 2, (width + 2 * reach) * 2]
    source_scale = _scale(2 / images.shape[3] * ones, 2 / images.shape[2] * ones)
    inverse = source_scale @ inverse @ _scale(target[3] / 2 * ones, target[2] / 2 * ones)
    grid = affine_grid(inverse[:, :2], target, align_corners=False)
    images = grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    # Downsample: the filter, mirrored, then every other pixel; cut what was added for the filter.
    for kernel, stride in [(up, (1, 2)), (up.transpose(2, 3), (2, 1))]:
        padding = (0, crop) if stride == (1, 2) else (crop, 0)
        images = conv2d(images, kernel, groups=channels, stride=stride, padding=padding)
    return images[:, :, reach:-reach, reach:-reach]
