"""Constructor arguments of networks that come from a file: their names, types and ranges, before anything is built.

The ranges are wide. They keep a hostile file from asking for endless loops or numbers that overflow; whether a
network fits its tensors is another question (`training.snapshots.snapshot`).
"""

import math
from collections.abc import Callable
from typing import Any

from dnnlib.pickles import show

_Check = Callable[[Any], str | None]  # what is expected instead, None if the value is good


def _whole(low: int, high: int) -> _Check:
    text = f"a whole number from {low} to {high}"
    return lambda v: None if type(v) is int and low <= v <= high else text


def _number(low: float, high: float) -> _Check:
    text = f"a number from {low:g} to {high:g}"
    return lambda v: None if type(v) in (int, float) and low <= v <= high else text  # not nan


def _flag(value: Any) -> str | None:
    return None if type(value) is bool or (type(value) is int and value in (0, 1)) else "true or false"


def _word(value: Any) -> str | None:
    return None if type(value) is str and len(value) <= 100 else "a word"


def _list(item: _Check, longest: int, shortest: int = 0, none: bool = False) -> _Check:
    def check(value: Any) -> str | None:
        if none and value is None:
            return None
        if type(value) not in (list, tuple) or not shortest <= len(value) <= longest:
            return f"a list of {shortest} to {longest} entries"
        wrong = [text for text in map(item, value) if text is not None]
        return f"a list, each of it {wrong[0]}" if wrong else None

    return check


_CHANNELS, _FACTOR, _POSITIVE = _whole(1, 1 << 16), _whole(1, 1 << 10), _number(0, math.inf)

CHECKS: dict[str, _Check] = dict(
    class_name=_word,
    # preconditioners
    img_resolution=_whole(1, 1 << 14),
    img_channels=_whole(1, 1 << 12),
    label_dim=_whole(0, 1 << 24),
    use_fp16=_flag,
    model_type=_word,
    beta_d=_number(0, 1e3),
    beta_min=_number(0, 1e3),
    epsilon_t=_number(0, 1),
    M=_whole(1, 10_000),
    steps=_whole(1, 1 << 24),
    C_1=_number(0, 1),
    C_2=_number(0, 1),
    sigma_min=_POSITIVE,
    sigma_max=_POSITIVE,
    sigma_data=_POSITIVE,
    # U-Nets
    augment_dim=_whole(0, 1 << 12),
    model_channels=_CHANNELS,
    channel_mult=_list(_FACTOR, 16, 1),
    channel_mult_emb=_FACTOR,
    channel_mult_noise=_FACTOR,
    num_blocks=_whole(0, 64),
    attn_resolutions=_list(_whole(0, 1 << 14), 64),
    dropout=_number(0, 1),
    label_dropout=_number(0, 1),
    embedding_type=_word,
    encoder_type=_word,
    decoder_type=_word,
    resample_filter=_list(_number(-1e3, 1e3), 64, 1),
    skip_connections=_list(_flag, 2048, none=True),
)


def check_arguments(kwargs: dict[str, Any]) -> None:
    """Refuse arguments for `training.networks.build_network` that no network has.

    Raises
    ------
    ValueError
        If an argument is unknown, or of the wrong type or out of range. The text begins with its name.
    """
    for name, value in kwargs.items():
        if name not in CHECKS:
            raise ValueError(f"{show(str(name))} is no argument of a network.")
        expected = CHECKS[name](value)
        if expected is not None:
            raise ValueError(f"{name} must be {expected}, not {show(ascii(value), 60)}.")
    if "class_name" not in kwargs:
        raise ValueError("class_name is missing.")
