"""Averages of training quantities between two ticks, over all ranks."""

import torch

from torch_utils import distributed as dist


class Collector:
    """Accumulates count, sum and sum of squares of named quantities on the device, without waiting for it."""

    def __init__(self, device: torch.device):
        self._device = device
        self._moments: dict[str, torch.Tensor] = {}  # name -> float64 [count, sum, sum of squares]

    def report(self, name: str, value: torch.Tensor | float) -> None:
        """Add all entries of `value` to the quantity `name`. Every rank must report the same names."""
        if not isinstance(value, torch.Tensor):
            value = torch.full([], value, dtype=torch.float64, device=self._device)  # a copy of a number would wait
        value = value.detach().to(self._device, torch.float64).flatten()
        moments = torch.stack([value.new_full([], value.numel()), value.sum(), value.square().sum()])
        if name in self._moments:
            self._moments[name] += moments
        else:
            self._moments[name] = moments

    def flush(self) -> dict[str, dict[str, float]]:
        """Return {name: {num, mean, std}} over all ranks since the last call, and start anew."""
        names = sorted(self._moments)
        if not names:
            return {}
        moments = torch.stack([self._moments[name] for name in names])
        if dist.get_world_size() > 1:
            torch.distributed.all_reduce(moments)
        self._moments = {}
        result = {}
        for name, (num, total, squares) in zip(names, moments.tolist()):
            mean = total / num
            result[name] = dict(num=int(num), mean=mean, std=max(squares / num - mean**2, 0.0) ** 0.5)
        return result
