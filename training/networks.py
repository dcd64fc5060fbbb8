"""Denoisers D(x; sigma): U-Nets and their preconditioning.

SongUNet is DDPM++ and NCSN++ of Song et al., "Score-Based Generative Modeling through SDEs" (2021);
DhariwalUNet is ADM of Dhariwal & Nichol, "Diffusion Models Beat GANs" (2021). The preconditioners
follow Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models" (EDM, 2022),
Table 1; the switches for single skip connections follow Gu et al., "On Memorization in Diffusion
Models" (2023), Section 4.2. Parameter names are those of the published networks, so that published
weights load.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import (
    avg_pool2d,
    conv2d,
    conv_transpose2d,
    dropout,
    group_norm,
    interpolate,
    linear,
    scaled_dot_product_attention,
    silu,
)

# ----------------------------------------------------------------------------
# Layers. Parameters are float32; each layer computes in the type of its input.


def _initial(shape: Sequence[int], mode: str, fan_in: int, fan_out: int, scale: float) -> Tensor:
    """Random weights of `shape`, times `scale`; xavier has variance 2 / (fan_in + fan_out), kaiming 1 / fan_in.

    On the meta device without values: drawing there would first load large parts of torch, for seconds.
    """
    variances = dict(xavier=2 / (fan_in + fan_out), kaiming=1 / fan_in)
    family, _, distribution = mode.partition("_")
    if family not in variances or distribution not in ("uniform", "normal"):
        raise ValueError(f'Unknown init mode "{mode}".')
    std = math.sqrt(variances[family])
    x = torch.empty(*shape)
    if x.is_meta:
        return x
    if distribution == "normal":
        return x.normal_() * std * scale
    return (x.uniform_() * 2 - 1) * (math.sqrt(3) * std) * scale


class Linear(torch.nn.Module):
    """y = x W^T + b."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        init_mode: str = "kaiming_normal",
        init_weight: float = 1,
        init_bias: float = 0,
    ):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        fan = dict(mode=init_mode, fan_in=in_features, fan_out=out_features)
        self.weight = torch.nn.Parameter(_initial([out_features, in_features], **fan, scale=init_weight))
        self.bias = torch.nn.Parameter(_initial([out_features], **fan, scale=init_bias)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        return linear(x, self.weight.to(x.dtype), bias)

    def select(self, indices: Tensor, scale: float = 1) -> Tensor:
        """What `forward` gives for one-hot rows times `scale`, from indices [batch] and without the rows."""
        y = self.weight.index_select(1, indices).t() * scale  # [batch, out_features]
        return y + self.bias if self.bias is not None else y


class Conv2d(torch.nn.Module):
    """Convolution (kernel 3 or 1; 0 = none) after 2x upsampling or 2x downsampling by a separable filter.

    `fused_resample` exchanges the order of downsampling and convolution, as NCSN++ does.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        bias: bool = True,
        up: bool = False,
        down: bool = False,
        resample_filter: Sequence[float] = (1, 1),
        fused_resample: bool = False,
        init_mode: str = "kaiming_normal",
        init_weight: float = 1,
        init_bias: float = 0,
    ):
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.up, self.down, self.fused_resample = up, down, fused_resample
        self.box_filter = list(resample_filter) == [1, 1]
        fan = dict(mode=init_mode, fan_in=in_channels * kernel**2, fan_out=out_channels * kernel**2)
        self.weight = self.bias = None
        if kernel:
            shape = [out_channels, in_channels, kernel, kernel]
            self.weight = torch.nn.Parameter(_initial(shape, **fan, scale=init_weight))
            if bias:
                self.bias = torch.nn.Parameter(_initial([out_channels], **fan, scale=init_bias))
        f = torch.as_tensor(resample_filter, dtype=torch.float32, device="cpu")
        f = torch.outer(f, f)[None, None] / f.sum().square()  # [1, 1, taps, taps], sums to one
        self.register_buffer("resample_filter", f if up or down else None)

    def _resample(self, x: Tensor, pad: int) -> Tensor:
        if self.box_filter and pad == 0:  # the same numbers, without a depthwise convolution
            return interpolate(x, scale_factor=2, mode="nearest") if self.up else avg_pool2d(x, 2)
        channels = x.shape[1]
        f = self.resample_filter.to(x.dtype).tile([channels, 1, 1, 1])
        if self.up:
            return conv_transpose2d(x, f * 4, groups=channels, stride=2, padding=pad)
        return conv2d(x, f, groups=channels, stride=2, padding=pad)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype) if self.weight is not None else None
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        w_pad = weight.shape[-1] // 2 if weight is not None else 0
        f_pad = (self.resample_filter.shape[-1] - 1) // 2 if self.resample_filter is not None else 0
        if weight is None:
            return self._resample(x, f_pad)
        if self.fused_resample and self.down:
            # The convolution pads for both filters; bias commutes with a filter that sums to one.
            return self._resample(conv2d(x, weight, bias, padding=w_pad + f_pad), 0)
        if self.fused_resample and self.up:
            x = self._resample(x, max(f_pad - w_pad, 0))
            return conv2d(x, weight, bias, padding=max(w_pad - f_pad, 0))
        if self.up or self.down:
            x = self._resample(x, f_pad)
        return conv2d(x, weight, bias, padding=w_pad)


class GroupNorm(torch.nn.Module):
    """Group normalization with at most 32 groups of at least 4 channels (one group below 4 channels)."""

    def __init__(self, num_channels: int, num_groups: int = 32, min_channels_per_group: int = 4, eps: float = 1e-5):
        super().__init__()
        self.num_groups = max(min(num_groups, num_channels // min_channels_per_group), 1)
        if num_channels % self.num_groups:
            raise ValueError(
                f"{num_channels} channels cannot be normalized in {self.num_groups} equal groups; "
                "take channels (--num-channels times --cres) that are a multiple of 4, above 128 of 32."
            )
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(num_channels))
        self.bias = torch.nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        return group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class UNetBlock(torch.nn.Module):
    """Residual block with optional resampling and self-attention, conditioned on an embedding.

    Input x [batch, in_channels, h, w], emb [batch, emb_channels]; output [batch, out_channels, h', w'].
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        up: bool = False,
        down: bool = False,
        attention: bool = False,
        num_heads: int | None = None,
        channels_per_head: int = 64,
        dropout: float = 0,
        skip_scale: float = 1,
        eps: float = 1e-5,
        resample_filter: Sequence[float] = (1, 1),
        resample_proj: bool = False,
        adaptive_scale: bool = True,
        init: dict | None = None,
        init_zero: dict | None = None,
        init_attn: dict | None = None,
    ):
        super().__init__()
        init = init or {}
        init_zero = init_zero if init_zero is not None else dict(init_weight=0)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.num_heads = 0
        if attention:
            self.num_heads = num_heads if num_heads is not None else max(out_channels // channels_per_head, 1)
            if out_channels % self.num_heads:
                raise ValueError(f"{out_channels} channels cannot be shared by {self.num_heads} attention heads.")
        self.dropout = dropout
        self.skip_scale = skip_scale
        self.adaptive_scale = adaptive_scale
        resample = dict(up=up, down=down, resample_filter=resample_filter)

        self.norm0 = GroupNorm(in_channels, eps=eps)
        self.conv0 = Conv2d(in_channels, out_channels, kernel=3, **resample, **init)
        self.affine = Linear(emb_channels, out_channels * (2 if adaptive_scale else 1), **init)
        self.norm1 = GroupNorm(out_channels, eps=eps)
        self.conv1 = Conv2d(out_channels, out_channels, kernel=3, **init_zero)
        self.skip = None
        if out_channels != in_channels or up or down:
            kernel = 1 if resample_proj or out_channels != in_channels else 0
            self.skip = Conv2d(in_channels, out_channels, kernel=kernel, **resample, **init)
        if self.num_heads:
            self.norm2 = GroupNorm(out_channels, eps=eps)
            self.qkv = Conv2d(out_channels, out_channels * 3, kernel=1, **(init_attn or init))
            self.proj = Conv2d(out_channels, out_channels, kernel=1, **init_zero)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(silu(self.norm0(x)))
        affine = self.affine(emb)[:, :, None, None].to(h.dtype)
        if self.adaptive_scale:
            scale, shift = affine.chunk(2, dim=1)
            h = silu(torch.addcmul(shift, self.norm1(h), scale + 1))
        else:
            h = silu(self.norm1(h + affine))
        h = self.conv1(dropout(h, p=self.dropout, training=self.training) if self.dropout else h)
        x = (h + (self.skip(x) if self.skip is not None else x)) * self.skip_scale
        if self.num_heads:
            x = (x + self.proj(self._attend(self.qkv(self.norm2(x))))) * self.skip_scale
        return x

    def _attend(self, qkv: Tensor) -> Tensor:
        batch, channels, height, width = qkv.shape  # channels run over (head, feature, q/k/v)
        qkv = qkv.reshape(batch, self.num_heads, channels // 3 // self.num_heads, 3, height * width)
        q, k, v = qkv.transpose(2, 4).unbind(3)  # each [batch, head, pixel, feature]
        out = scaled_dot_product_attention(q, k, v)
        return out.transpose(2, 3).reshape(batch, channels // 3, height, width)


# ----------------------------------------------------------------------------
# Embeddings of the noise level.


class PositionalEmbedding(torch.nn.Module):
    """Cosines and sines of x at geometrically spaced frequencies (DDPM++, ADM): [batch] -> [batch, num_channels]."""

    def __init__(self, num_channels: int, max_positions: int = 10000, endpoint: bool = False):
        super().__init__()
        self.num_channels = num_channels
        self.max_positions = max_positions
        self.endpoint = endpoint

    def forward(self, x: Tensor) -> Tensor:
        half = self.num_channels // 2
        exponents = torch.arange(half, dtype=torch.float32, device=x.device) / (half - int(self.endpoint))
        phase = torch.outer(x, ((1 / self.max_positions) ** exponents).to(x.dtype))
        return torch.cat([phase.cos(), phase.sin()], dim=1)


class FourierEmbedding(torch.nn.Module):
    """Cosines and sines of x at random, fixed frequencies (NCSN++): [batch] -> [batch, num_channels]."""

    def __init__(self, num_channels: int, scale: float = 16):
        super().__init__()
        freqs = torch.empty(num_channels // 2)
        self.register_buffer("freqs", freqs if freqs.is_meta else freqs.normal_() * scale)

    def forward(self, x: Tensor) -> Tensor:
        phase = torch.outer(x, (2 * math.pi * self.freqs).to(x.dtype))
        return torch.cat([phase.cos(), phase.sin()], dim=1)


def _embed_labels(layer: Linear, class_labels: Tensor, scale: float, keep: Tensor | None) -> Tensor:
    """`layer` applied to scaled class labels: indices [batch] or rows [batch, label_dim].

    `keep` [batch, 1] of zeros and ones drops labels; a dropped label is a row of zeros.
    """
    if class_labels.ndim == 1:
        y = layer.select(class_labels, scale)
        if keep is None:
            return y
        return torch.where(keep > 0, y, layer.bias if layer.bias is not None else torch.zeros_like(y))
    return layer(class_labels * scale if keep is None else class_labels * scale * keep)


def _label_keep(class_labels: Tensor, p: float) -> Tensor | None:
    if not p:
        return None
    return (torch.rand([class_labels.shape[0], 1], device=class_labels.device) >= p).to(torch.float32)


# ----------------------------------------------------------------------------
# U-Nets.


class SongUNet(torch.nn.Module):
    """DDPM++ and NCSN++ (Song et al. 2021).

    Parameters
    ----------
    img_resolution, in_channels, out_channels : image size in pixels, channels in and out
    label_dim : number of classes, 0 = unconditional
    augment_dim : width of the augmentation labels, 0 = none
    model_channels, channel_mult : channels are model_channels * channel_mult[level]
    channel_mult_emb : width of the embedding in units of model_channels
    num_blocks : residual blocks per resolution
    attn_resolutions : resolutions with self-attention
    dropout : probability of dropping an activation
    label_dropout : probability of dropping a label in training
    embedding_type : "positional" (DDPM++) or "fourier" (NCSN++)
    channel_mult_noise : width of the noise embedding in units of model_channels; 1 (DDPM++) or 2 (NCSN++)
    encoder_type : "standard" (DDPM++), "residual" (NCSN++) or "skip"
    decoder_type : "standard" or "skip"
    resample_filter : [1, 1] (DDPM++) or [1, 3, 3, 1] (NCSN++)
    skip_connections : a 0 or 1 per encoder output, high resolution first, (num_blocks + 1) per level;
        a removed one hands zeros of the same shape to the decoder. None or empty = all ones.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.10,
        label_dropout: float = 0,
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: Sequence[float] = (1, 1),
        skip_connections: Sequence[int] | None = None,
    ):
        for what, value, known in [
            ("embedding_type", embedding_type, ("positional", "fourier")),
            ("encoder_type", encoder_type, ("standard", "skip", "residual")),
            ("decoder_type", decoder_type, ("standard", "skip")),
        ]:
            if value not in known:
                raise ValueError(f'{what} must be one of {", ".join(known)}, not "{value}".')
        _check_sizes(img_resolution, channel_mult, model_channels * channel_mult_noise)
        num_skips = (num_blocks + 1) * len(channel_mult)
        skip_connections = list(skip_connections) if skip_connections else [1] * num_skips
        if len(skip_connections) != num_skips or not set(skip_connections) <= {0, 1}:
            raise ValueError(
                f"skip_connections must be {num_skips} zeros or ones ((num_blocks + 1) for each of "
                f"{len(channel_mult)} resolutions), not {len(skip_connections)} values {skip_connections}."
            )
        super().__init__()
        self.skip_connections = skip_connections
        self.label_dropout = label_dropout
        emb_channels = model_channels * channel_mult_emb
        noise_channels = model_channels * channel_mult_noise
        init = dict(init_mode="xavier_uniform")
        init_zero = dict(init_mode="xavier_uniform", init_weight=1e-5)
        init_attn = dict(init_mode="xavier_uniform", init_weight=math.sqrt(0.2))

        def block(cin: int, cout: int, **kwargs: Any) -> UNetBlock:
            return UNetBlock(
                cin, cout, emb_channels, num_heads=1, dropout=dropout, skip_scale=math.sqrt(0.5), eps=1e-6,
                resample_filter=resample_filter, resample_proj=True, adaptive_scale=False,
                init=init, init_zero=init_zero, init_attn=init_attn, **kwargs,
            )  # fmt: skip

        # Mapping: noise level, label and augmentation -> emb.
        if embedding_type == "positional":
            self.map_noise = PositionalEmbedding(noise_channels, endpoint=True)
        else:
            self.map_noise = FourierEmbedding(noise_channels)
        self.map_label = Linear(label_dim, noise_channels, **init) if label_dim else None
        self.map_augment = Linear(augment_dim, noise_channels, bias=False, **init) if augment_dim else None
        self.map_layer0 = Linear(noise_channels, emb_channels, **init)
        self.map_layer1 = Linear(emb_channels, emb_channels, **init)

        # Encoder. Entries with "aux" in their name belong to the image pyramid beside the main path.
        self.enc = torch.nn.ModuleDict()
        skip_channels = []
        cout = caux = in_channels
        for level, mult in enumerate(channel_mult):
            res = img_resolution >> level
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = Conv2d(cout, model_channels, kernel=3, **init)
                cout = model_channels
            else:
                down = dict(down=True, resample_filter=resample_filter)
                self.enc[f"{res}x{res}_down"] = block(cout, cout, down=True)
                if encoder_type == "skip":
                    self.enc[f"{res}x{res}_aux_down"] = Conv2d(caux, caux, kernel=0, **down)
                    self.enc[f"{res}x{res}_aux_skip"] = Conv2d(caux, cout, kernel=1, **init)
                if encoder_type == "residual":
                    self.enc[f"{res}x{res}_aux_residual"] = Conv2d(
                        caux, cout, kernel=3, fused_resample=True, **down, **init
                    )
                    caux = cout
            skip_channels.append(cout)
            for idx in range(num_blocks):
                cin, cout = cout, model_channels * mult
                self.enc[f"{res}x{res}_block{idx}"] = block(cin, cout, attention=res in attn_resolutions)
                skip_channels.append(cout)

        # Decoder.
        self.dec = torch.nn.ModuleDict()
        for level, mult in reversed(list(enumerate(channel_mult))):
            res = img_resolution >> level
            if level == len(channel_mult) - 1:
                self.dec[f"{res}x{res}_in0"] = block(cout, cout, attention=True)
                self.dec[f"{res}x{res}_in1"] = block(cout, cout)
            else:
                self.dec[f"{res}x{res}_up"] = block(cout, cout, up=True)
            for idx in range(num_blocks + 1):
                cin, cout = cout + skip_channels.pop(), model_channels * mult
                attention = idx == num_blocks and res in attn_resolutions
                self.dec[f"{res}x{res}_block{idx}"] = block(cin, cout, attention=attention)
            if decoder_type == "skip" or level == 0:
                if decoder_type == "skip" and level < len(channel_mult) - 1:
                    self.dec[f"{res}x{res}_aux_up"] = Conv2d(
                        out_channels, out_channels, kernel=0, up=True, resample_filter=resample_filter
                    )
                self.dec[f"{res}x{res}_aux_norm"] = GroupNorm(cout, eps=1e-6)
                self.dec[f"{res}x{res}_aux_conv"] = Conv2d(cout, out_channels, kernel=3, **init_zero)

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        # Mapping.
        emb = self.map_noise(noise_labels)
        emb = emb.reshape(emb.shape[0], 2, -1).flip(1).reshape(*emb.shape)  # sines first, as DDPM++ has them
        if self.map_label is not None:
            keep = _label_keep(class_labels, self.label_dropout) if self.training else None
            emb = emb + _embed_labels(self.map_label, class_labels, math.sqrt(self.map_label.in_features), keep)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = silu(self.map_layer0(emb))
        emb = silu(self.map_layer1(emb))

        # Encoder.
        skips = []  # what the encoder computed, before any of it is removed
        aux = x
        for name, layer in self.enc.items():
            if "aux_down" in name:
                aux = layer(aux)
            elif "aux_skip" in name:
                x = skips[-1] = x + layer(aux)
            elif "aux_residual" in name:
                x = skips[-1] = aux = (x + layer(aux)) * math.sqrt(0.5)
            else:
                x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
                skips.append(x)
        skips = [s if kept else torch.zeros_like(s) for s, kept in zip(skips, self.skip_connections)]

        # Decoder.
        aux = None
        for name, layer in self.dec.items():
            if "aux_up" in name:
                aux = layer(aux)
            elif "aux_norm" in name:
                normed = silu(layer(x))
            elif "aux_conv" in name:
                aux = layer(normed) if aux is None else layer(normed) + aux
            else:
                x = layer(torch.cat([x, skips.pop()], dim=1) if "_block" in name else x, emb)
        return aux


class DhariwalUNet(torch.nn.Module):
    """ADM (Dhariwal & Nichol 2021); the parameters have the meaning that they have in `SongUNet`."""

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.10,
        label_dropout: float = 0,
    ):
        _check_sizes(img_resolution, channel_mult, model_channels)
        super().__init__()
        self.label_dropout = label_dropout
        emb_channels = model_channels * channel_mult_emb
        init = dict(init_mode="kaiming_uniform", init_weight=math.sqrt(1 / 3), init_bias=math.sqrt(1 / 3))
        init_zero = dict(init_mode="kaiming_uniform", init_weight=0, init_bias=0)

        def block(cin: int, cout: int, **kwargs: Any) -> UNetBlock:
            return UNetBlock(
                cin, cout, emb_channels, channels_per_head=64, dropout=dropout, init=init, init_zero=init_zero, **kwargs
            )

        # Mapping.
        self.map_noise = PositionalEmbedding(model_channels)
        self.map_augment = None
        if augment_dim:
            self.map_augment = Linear(augment_dim, model_channels, bias=False, **init_zero)
        self.map_layer0 = Linear(model_channels, emb_channels, **init)
        self.map_layer1 = Linear(emb_channels, emb_channels, **init)
        self.map_label = None
        if label_dim:
            self.map_label = Linear(
                label_dim, emb_channels, bias=False, init_mode="kaiming_normal", init_weight=math.sqrt(label_dim)
            )

        # Encoder.
        self.enc = torch.nn.ModuleDict()
        skip_channels = []
        cout = in_channels
        for level, mult in enumerate(channel_mult):
            res = img_resolution >> level
            if level == 0:
                cin, cout = cout, model_channels * mult
                self.enc[f"{res}x{res}_conv"] = Conv2d(cin, cout, kernel=3, **init)
            else:
                self.enc[f"{res}x{res}_down"] = block(cout, cout, down=True)
            skip_channels.append(cout)
            for idx in range(num_blocks):
                cin, cout = cout, model_channels * mult
                self.enc[f"{res}x{res}_block{idx}"] = block(cin, cout, attention=res in attn_resolutions)
                skip_channels.append(cout)

        # Decoder.
        self.dec = torch.nn.ModuleDict()
        for level, mult in reversed(list(enumerate(channel_mult))):
            res = img_resolution >> level
            if level == len(channel_mult) - 1:
                self.dec[f"{res}x{res}_in0"] = block(cout, cout, attention=True)
                self.dec[f"{res}x{res}_in1"] = block(cout, cout)
            else:
                self.dec[f"{res}x{res}_up"] = block(cout, cout, up=True)
            for idx in range(num_blocks + 1):
                cin, cout = cout + skip_channels.pop(), model_channels * mult
                self.dec[f"{res}x{res}_block{idx}"] = block(cin, cout, attention=res in attn_resolutions)
        self.out_norm = GroupNorm(cout)
        self.out_conv = Conv2d(cout, out_channels, kernel=3, **init_zero)

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        # Mapping.
        emb = self.map_noise(noise_labels)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(silu(self.map_layer0(emb)))
        if self.map_label is not None:
            keep = _label_keep(class_labels, self.label_dropout) if self.training else None
            emb = emb + _embed_labels(self.map_label, class_labels, 1, keep)
        emb = silu(emb)

        # Encoder and decoder.
        skips = []
        for layer in self.enc.values():
            x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
            skips.append(x)
        for name, layer in self.dec.items():
            x = layer(torch.cat([x, skips.pop()], dim=1) if "_block" in name else x, emb)
        return self.out_conv(silu(self.out_norm(x)))


def _check_sizes(img_resolution: int, channel_mult: Sequence[int], noise_channels: int) -> None:
    if min(channel_mult, default=0) < 1:
        raise ValueError(f"channel_mult (--cres) must be whole numbers from 1, not {list(channel_mult)}.")
    if noise_channels < 4 or noise_channels % 2:
        raise ValueError(f"An even number of channels (--num-channels), 4 or more, is needed, not {noise_channels}.")
    levels = len(channel_mult)
    if img_resolution < 1 or img_resolution % (1 << (levels - 1)):
        raise ValueError(
            f"Images of {img_resolution} pixels cannot be halved {levels - 1} times; "
            f"use fewer entries in channel_mult (--cres) or another resolution."
        )


# ----------------------------------------------------------------------------
# Preconditioning: D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), EDM Eq. 7 and Table 1.


class _Precond(torch.nn.Module):
    """What the four preconditioners share; each adds its noise range and its coefficients.

    Parameters
    ----------
    img_resolution, img_channels : image size in pixels and number of channels
    label_dim : number of classes, 0 = unconditional
    use_fp16 : run the U-Net in float16 (on CUDA only), unless `training.precision.set_precision` says otherwise
    model_type, model_kwargs : the U-Net ("SongUNet" or "DhariwalUNet") and its further arguments
    """

    channel_factor = 1  # output channels of the U-Net per image channel
    sigma_min: float
    sigma_max: float

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        model_type: str = "SongUNet",
        **model_kwargs: Any,
    ):
        super().__init__()
        if model_type not in UNETS:
            raise ValueError(f'model_type must be one of {", ".join(UNETS)}, not "{model_type}".')
        self.img_resolution = img_resolution
        self.img_channels = img_channels
        self.label_dim = label_dim
        self.use_fp16 = use_fp16
        self.precision: str | None = None  # these three: see training.precision
        self.compute_dtype: torch.dtype | None = None
        self.channels_last = False
        self.model = UNETS[model_type](
            img_resolution=img_resolution, in_channels=img_channels,
            out_channels=img_channels * self.channel_factor, label_dim=label_dim, **model_kwargs,
        )  # fmt: skip

    def coefficients(self, sigma: Tensor) -> tuple[Any, Tensor, Any, Tensor]:
        """c_skip, c_out, c_in, c_noise for sigma [batch, 1, 1, 1]."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        class_labels: Tensor | None = None,
        force_fp32: bool = False,
        **model_kwargs: Any,
    ) -> Tensor:
        """Denoise.

        Parameters
        ----------
        x : noisy images [batch, img_channels, img_resolution, img_resolution], data in [-1, 1]
        sigma : noise level, [batch] or one for all
        class_labels : int64 indices [batch] (or one), or rows [batch, label_dim]; None = no class (zeros)
        force_fp32 : override `use_fp16` and `training.precision.set_precision`

        Returns
        -------
        denoised, float32, the shape of x
        """
        x = x.to(torch.float32)
        sigma = sigma.to(torch.float32).reshape(-1, 1, 1, 1)
        if self.label_dim == 0:
            class_labels = None
        elif class_labels is None:
            class_labels = torch.zeros([1, self.label_dim], device=x.device)
        elif class_labels.is_floating_point() or class_labels.ndim == 2:
            class_labels = class_labels.to(torch.float32).reshape(-1, self.label_dim)
        else:
            class_labels = class_labels.reshape(-1)
        dtype = torch.float16 if self.use_fp16 and x.is_cuda else torch.float32
        if self.compute_dtype is not None:
            dtype = self.compute_dtype
        if force_fp32:
            dtype = torch.float32
        c_skip, c_out, c_in, c_noise = self.coefficients(sigma)
        scaled = (c_in * x).to(dtype)
        if self.channels_last:
            scaled = scaled.contiguous(memory_format=torch.channels_last)
        F_x = self.model(scaled, c_noise.flatten(), class_labels=class_labels, **model_kwargs)
        return c_skip * x + c_out * F_x[:, : self.img_channels].to(torch.float32)

    def round_sigma(self, sigma: float | Tensor) -> Tensor:
        """The nearest noise level that the network was trained for (any, but for iDDPM and VP in steps)."""
        return torch.as_tensor(sigma)


class VPPrecond(_Precond):
    """Variance preserving (DDPM++; EDM Table 1, column VP)."""

    def __init__(
        self,
        *args: Any,
        beta_d: float = 19.9,
        beta_min: float = 0.1,
        M: int = 1000,
        epsilon_t: float = 1e-5,
        steps: int | None = None,  # noise levels sigma(1 / steps), ..., sigma(1); None = all down to epsilon_t
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.beta_d, self.beta_min, self.M, self.epsilon_t, self.steps = beta_d, beta_min, M, epsilon_t, steps
        # In float32, as published: there sigma(epsilon_t) = 2^-10 and not 0.001.
        first = epsilon_t if steps is None else 1 / steps
        self.sigma_min = float(vp_sigma(torch.tensor(first, device="cpu"), beta_d, beta_min))
        self.sigma_max = float(vp_sigma(torch.tensor(1.0, device="cpu"), beta_d, beta_min))

    def coefficients(self, sigma: Tensor) -> tuple[Any, Tensor, Any, Tensor]:
        t = vp_sigma_inv(sigma, self.beta_d, self.beta_min)
        return 1, -sigma, 1 / (sigma**2 + 1).sqrt(), (self.M - 1) * t

    def round_sigma(self, sigma: float | Tensor) -> Tensor:
        """With `steps` the level of the nearest time k / steps, k = 1, ..., steps, and else `sigma`."""
        sigma = torch.as_tensor(sigma)
        if self.steps is None:
            return sigma
        t = vp_sigma_inv(sigma.to(torch.float64), self.beta_d, self.beta_min)
        k = (t * self.steps).round().clip(1, self.steps)
        return vp_sigma(k / self.steps, self.beta_d, self.beta_min).to(sigma.dtype)


class VEPrecond(_Precond):
    """Variance exploding (NCSN++; EDM Table 1, column VE)."""

    def __init__(self, *args: Any, sigma_min: float = 0.02, sigma_max: float = 100, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def coefficients(self, sigma: Tensor) -> tuple[Any, Tensor, Any, Tensor]:
        return 1, sigma, 1, (0.5 * sigma).log()


class iDDPMPrecond(_Precond):
    """Improved DDPM (EDM Table 1, column iDDPM): noise levels are the entries of the table `u`."""

    channel_factor = 2  # the network also predicts a variance, which is not used

    def __init__(
        self,
        *args: Any,
        C_1: float = 0.001,
        C_2: float = 0.008,
        M: int = 1000,
        model_type: str = "DhariwalUNet",
        **kwargs: Any,
    ):
        super().__init__(*args, model_type=model_type, **kwargs)
        self.C_1, self.C_2, self.M = C_1, C_2, M
        self.register_buffer("u", iddpm_sigmas(M, C_1, C_2, torch.float32))
        self.sigma_min, self.sigma_max = float(self.u[M - 1]), float(self.u[0])

    def _nearest(self, sigma: Tensor) -> Tensor:
        distance = (sigma.to(torch.float32).reshape(-1, 1) - self.u).abs()  # [sigmas, M + 1]
        return distance.argmin(dim=1).reshape(sigma.shape)

    def coefficients(self, sigma: Tensor) -> tuple[Any, Tensor, Any, Tensor]:
        c_noise = self.M - 1 - self._nearest(sigma).to(torch.float32)
        return 1, -sigma, 1 / (sigma**2 + 1).sqrt(), c_noise

    def round_sigma(self, sigma: float | Tensor) -> Tensor:
        sigma = torch.as_tensor(sigma, device=self.u.device)
        return self.u[self._nearest(sigma)].to(sigma.dtype)


class EDMPrecond(_Precond):
    """EDM (Table 1, last column)."""

    def __init__(
        self,
        *args: Any,
        sigma_min: float = 0,
        sigma_max: float = float("inf"),
        sigma_data: float = 0.5,
        model_type: str = "DhariwalUNet",
        **kwargs: Any,
    ):
        super().__init__(*args, model_type=model_type, **kwargs)
        self.sigma_min, self.sigma_max, self.sigma_data = sigma_min, sigma_max, sigma_data

    def coefficients(self, sigma: Tensor) -> tuple[Any, Tensor, Any, Tensor]:
        total = sigma**2 + self.sigma_data**2
        c_out = sigma * self.sigma_data / total.sqrt()
        return self.sigma_data**2 / total, c_out, 1 / total.sqrt(), sigma.log() / 4


UNETS = dict(SongUNet=SongUNet, DhariwalUNet=DhariwalUNet)
PRECONDS = dict(VPPrecond=VPPrecond, VEPrecond=VEPrecond, iDDPMPrecond=iDDPMPrecond, EDMPrecond=EDMPrecond)


def build_network(class_name: str, **kwargs: Any) -> torch.nn.Module:
    """Construct a preconditioned network by class name; it remembers what it was made of.

    The arguments are kept as ``net.init_kwargs`` (with ``class_name``), from which a snapshot rebuilds it.

    Raises
    ------
    ValueError
        If the class is unknown or an argument does not fit.
    """
    if class_name not in PRECONDS:
        raise ValueError(f'Unknown network class "{class_name}"; known are {", ".join(PRECONDS)}.')
    try:
        net = PRECONDS[class_name](**kwargs)
    except TypeError as err:
        raise ValueError(f"{class_name} cannot be built: {err}.") from err
    net.init_kwargs = dict(class_name=class_name, **kwargs)
    return net


# ----------------------------------------------------------------------------
# Noise schedules that networks, losses and samplers share.


def vp_sigma(t: Any, beta_d: float, beta_min: float) -> Any:
    """sigma(t) of the VP process, EDM Eq. 152; t a number or a tensor."""
    return (math.e ** (0.5 * beta_d * t**2 + beta_min * t) - 1) ** 0.5


def vp_sigma_inv(sigma: Tensor, beta_d: float, beta_min: float) -> Tensor:
    """t(sigma) of the VP process, the inverse of `vp_sigma`."""
    return ((beta_min**2 + 2 * beta_d * (1 + sigma**2).log()).sqrt() - beta_min) / beta_d


def iddpm_sigmas(M: int, C_1: float, C_2: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """Noise levels u_0 > ... > u_M = 0 of improved DDPM, EDM Table 1: [M + 1] in `dtype`.

    alpha_bar is float32 for either, as published: its rounding moves the levels by up to 2e-6.
    """
    alpha_bar = (0.5 * math.pi * torch.arange(M + 1, device="cpu") / M / (C_2 + 1)).sin() ** 2
    ratio = (alpha_bar[:-1] / alpha_bar[1:]).clip(min=C_1)  # [M]
    u = torch.zeros(M + 1, dtype=dtype, device="cpu")
    for j in range(M, 0, -1):
        u[j - 1] = ((u[j] ** 2 + 1) / ratio[j - 1] - 1).sqrt()
    return u
