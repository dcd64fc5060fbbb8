"""The update of the weights: clean gradients and Adam, in a number of calls that does not grow with the network."""

from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors


def clean_gradients(params: list[Tensor], loss_scaling: float = 1) -> None:
    """Divide all gradients by `loss_scaling`; then NaN -> 0 and +-inf -> +-1e5, as published.

    Afterwards they are parts of one flat tensor.
    """
    grads = [p.grad for p in params]
    if loss_scaling != 1:
        torch._foreach_div_(grads, loss_scaling)
    flat = _flatten_dense_tensors(grads)
    flat.nan_to_num_(nan=0, posinf=1e5, neginf=-1e5)
    for p, grad in zip(params, _unflatten_dense_tensors(flat, grads)):
        p.grad = grad


def _leave_dynamo_out() -> None:
    """Spare each process seconds of start-up: torch.optim imports torch._dynamo to have it pass over these methods.

    Nothing here compiles an optimizer, so they can be called as they are; nor is torch's `step`, which does the same.
    """
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        method = getattr(getattr(torch.optim.Optimizer, name), "__wrapped__", None)
        if method is not None and not hasattr(method, "__dynamo_disable"):
            method.__dynamo_disable = method


_leave_dynamo_out()


class Adam(torch.optim.Adam):
    """torch.optim.Adam(fused=True) for parameters that all have a gradient at every step: the same numbers and states.

    The original groups the parameters and counts up one number per parameter anew at each step, which takes longer
    than the update of a small network. Here they share one count.
    """

    def __init__(self, params: Any, **kwargs: Any):
        super().__init__(params, **{**kwargs, "fused": True})
        self._lists: list[list[Tensor]] | None = None

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with a count for each parameter."""
        saved = super().state_dict()
        saved["state"] = {key: {**state, "step": state["step"].clone()} for key, state in saved["state"].items()}
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._lists = None

    @torch.no_grad()
    def step(self) -> None:
        (group,) = self.param_groups
        params = group["params"]
        if self._lists is None:
            for p in params:
                if not self.state[p]:
                    moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                    self.state[p].update(step=torch.zeros((), device=p.device), **moments)
            count = self.state[params[0]]["step"]
            for p in params:
                self.state[p]["step"] = count
            self._lists = [[self.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq", "step")]
        means, squares, counts = self._lists
        counts[0].add_(1)
        beta1, beta2 = group["betas"]
        torch._fused_adam_(
            params, [p.grad for p in params], means, squares, [], counts, lr=group["lr"], beta1=beta1, beta2=beta2,
            weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False, maximize=False,
        )  # fmt: skip
