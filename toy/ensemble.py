"""All repeats of the two-moons study as one batch: R small networks with a leading replica dimension.

Each network predicts the noise in a 2-D point: sinusoidal embeddings of both coordinates and of time, concatenated;
Linear to 128 and GELU; three residual layers x + GELU(Linear(x)); Linear to 2. A replica sees its own data, noise and
order from its own generators, and its gradient is clipped by its own norm, so it becomes what it would alone.

Three things make it fast, and change nothing but the rounding:

- One batched matrix product serves the same layer of all replicas, in training; the gradients are written out by hand,
  and one fused AdamW updates all weights, which lie in one buffer.
- The first layer is A(x_1) + B(x_2) + c_t, for its input is a concatenation. While points are generated A and B are
  fixed functions of one number: they are tabulated on a grid and interpolated linearly, to 4e-5 of an embedding's
  amplitude at the highest frequency; float32 rounds the angle there to 1e-5. Points outside the grid are computed
  directly.
- Points are generated in chunks whose activations stay in the processor's cache.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, embedding_bag, gelu

from toy.diffusion import COORDINATE_SCALE, EMBEDDING, STEPS, add_noise, ancestral_sample, embed, seeded

HIDDEN = 128
BATCH = 32
LEARNING_RATE = 1e-3
CLIP = 1.0  # largest norm of a replica's gradient

_LAYERS = [(3 * EMBEDDING, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, 2)]  # (in, out)
_SIZE = sum((rows + 1) * columns for rows, columns in _LAYERS)  # numbers in one network
_PADDING = -_SIZE % 64  # each replica fills whole vector registers, so that its rounding is that of a replica alone
_STEPS_AT_ONCE = 4  # steps whose inputs are embedded together
_CHUNK = 2048  # points per chunk of generation on a CPU
_GRID = 1 << 14  # nodes of the table of the first layer
_REACH = 6.0  # it covers -_REACH.._REACH
_INIT, _TRAIN, _SAMPLE = range(1, 4)  # purposes of generators


class Ensemble:
    """R networks of the same size that are trained in step.

    Parameters
    ----------
    data : float32 [R, N, 2], the training points of each replica
    seeds : R numbers; a seed decides everything that is random in its replica
    device : where the networks are

    Attributes
    ----------
    epoch : epochs trained so far

    Raises
    ------
    ValueError
        If there is not one seed per replica, or there are fewer training points than a batch has.
    """

    def __init__(self, data: Tensor, seeds: list[int], device: torch.device | str = "cpu"):
        if len(seeds) != len(data):
            raise ValueError(f"There are {len(data)} training sets and {len(seeds)} seeds.")
        if data.shape[1] < BATCH:
            raise ValueError(f"The training set has {data.shape[1]} points; a batch takes {BATCH}.")
        self.seeds, self.device, self.epoch = seeds, torch.device(device), 0
        self.data = data.to(self.device, torch.float32)
        self.flat = torch.nn.Parameter(
            torch.stack([_initial(seed) for seed in seeds]).to(self.device)
        )  # [R, size + padding]
        self.flat.grad = torch.zeros_like(self.flat)
        self.optimizer = torch.optim.AdamW([self.flat], lr=LEARNING_RATE, fused=True)
        self.weights, self.biases = _views(self.flat.detach())
        self._weight_grads, self._bias_grads = _views(self.flat.grad)
        self._times = embed(torch.arange(STEPS, dtype=torch.float32, device=self.device))  # [STEPS, EMBEDDING]
        nodes = torch.linspace(-_REACH, _REACH, _GRID, device=self.device)
        self._nodes = embed(nodes, COORDINATE_SCALE)  # [_GRID, EMBEDDING]
        self._table = torch.empty(2 * _GRID + STEPS, HIDDEN, device=self.device)  # of one replica at a time

    # ------------------------------------------------------------------------
    # Training.

    @torch.no_grad()
    def train_epoch(self) -> Tensor:
        """One pass over the data in random order; an incomplete last batch is dropped. Returns the mean losses [R]."""
        steps = self.data.shape[1] // BATCH
        used = steps * BATCH
        order, t, noise = [], [], []
        for seed in self.seeds:
            generator = seeded(seed, _TRAIN, self.epoch)
            order.append(torch.randperm(self.data.shape[1], generator=generator)[:used])
            t.append(torch.randint(STEPS, [used], generator=generator))
            noise.append(torch.randn(used, 2, generator=generator))
        order, t, noise = (torch.stack(part).to(self.device) for part in (order, t, noise))
        x0 = self.data.gather(1, order[..., None].expand(-1, -1, 2))
        x = add_noise(x0, noise, t)
        total = torch.zeros(len(self.seeds), device=self.device)
        for first in range(0, used, BATCH * _STEPS_AT_ONCE):
            part = slice(first, min(first + BATCH * _STEPS_AT_ONCE, used))
            inputs = torch.cat([embed(x[:, part], COORDINATE_SCALE).flatten(2), self._times[t[:, part]]], dim=2)
            for step, target in zip(inputs.split(BATCH, dim=1), noise[:, part].split(BATCH, dim=1)):
                total += self.gradient(step, target)
                self._clip()
                self.optimizer.step()
        self.epoch += 1
        return total.cpu() / steps

    @torch.no_grad()
    def gradient(self, inputs: Tensor, noise: Tensor) -> Tensor:
        """Fill in `flat.grad` with the gradient of the mean squared error.

        Parameters
        ----------
        inputs : embedded points, [R, batch, 3 * EMBEDDING]
        noise : what is to be predicted, [R, batch, 2]

        Returns
        -------
        loss [R]
        """
        W, b = self.weights, self.biases
        pre = [torch.baddbmm(b[0], inputs, W[0])]  # before GELU, [R, batch, HIDDEN] each
        hidden = [gelu(pre[0])]
        for i in (1, 2, 3):
            pre.append(torch.baddbmm(b[i], hidden[-1], W[i]))
            hidden.append(hidden[-1] + gelu(pre[-1]))
        error = torch.baddbmm(b[4], hidden[-1], W[4]).sub_(noise)

        d = error * (2 / error[0].numel())  # d loss / d output
        self._put(4, hidden[3], d)
        dx = torch.bmm(d, W[4].transpose(1, 2))
        for i in (3, 2, 1):
            d = torch.ops.aten.gelu_backward(dx, pre[i])
            self._put(i, hidden[i - 1], d)
            dx.baddbmm_(d, W[i].transpose(1, 2))
        self._put(0, inputs, torch.ops.aten.gelu_backward(dx, pre[0]))
        return error.square_().mean(dim=(1, 2))

    def _put(self, layer: int, x: Tensor, d: Tensor) -> None:
        """Gradients of a layer from its input x and the gradient d of its output."""
        torch.bmm(x.transpose(1, 2), d, out=self._weight_grads[layer])
        torch.sum(d, dim=1, keepdim=True, out=self._bias_grads[layer])

    def _clip(self) -> None:
        """Shorten each replica's gradient to the norm CLIP, as torch.nn.utils.clip_grad_norm_ does for one network."""
        norm = torch.linalg.vector_norm(self.flat.grad, dim=1, keepdim=True)
        self.flat.grad.mul_((CLIP / (norm + 1e-6)).clamp_(max=1))

    # ------------------------------------------------------------------------
    # Generation.

    @torch.no_grad()
    def generate(self, replica: int, count: int) -> Tensor:
        """Points of one replica at this epoch, float32 [count, 2] on the CPU.

        They depend on seed, epoch and weights alone, so that measuring more or less often changes no result.
        """
        table = self._tabulate(replica)
        layers = [(W[replica], b[replica, 0]) for W, b in zip(self.weights, self.biases)]
        layers[0] = (layers[0][0][: 2 * EMBEDDING], layers[0][1])  # the table holds its part of the time
        layers[1:4] = [(W.T[:, :, None, None].contiguous(memory_format=torch.channels_last), b) for W, b in layers[1:4]]
        chunk = _CHUNK if self.device.type == "cpu" else count

        def predict(x: Tensor, t: int) -> Tensor:
            return torch.cat([self._noise(layers, table, part.to(self.device), t) for part in x.split(chunk)])

        return ancestral_sample(predict, count, seeded(self.seeds[replica], _SAMPLE, self.epoch))

    def _tabulate(self, replica: int) -> Tensor:
        """The first layer's parts that depend on x_1 alone, on x_2 alone, and on t: [2 * _GRID + STEPS, HIDDEN]."""
        first, second, time = self.weights[0][replica].split(EMBEDDING)
        torch.mm(self._nodes, first, out=self._table[:_GRID])
        torch.mm(self._nodes, second, out=self._table[_GRID : 2 * _GRID])
        torch.addmm(self.biases[0][replica], self._times, time, out=self._table[2 * _GRID :])
        return self._table

    def _noise(self, layers: list[tuple[Tensor, Tensor]], table: Tensor, x: Tensor, t: int) -> Tensor:
        """Noise predicted in x [n, 2] at step t."""
        weight = (x + _REACH) * ((_GRID - 1) / (2 * _REACH))
        node = weight.long().clamp_(0, _GRID - 2)
        weight -= node  # of the next node
        rows, weights = node.new_full([len(x), 5], 2 * _GRID + t), weight.new_ones([len(x), 5])
        node[:, 1] += _GRID
        rows[:, :2] = node
        torch.add(node, 1, out=rows[:, 2:4])
        torch.sub(1, weight, out=weights[:, :2])
        weights[:, 2:4] = weight
        h = embedding_bag(rows, table, mode="sum", per_sample_weights=weights)
        if float(x.abs().max()) > _REACH:
            outside = (x.abs() > _REACH).any(1).nonzero().flatten()
            inputs = embed(x[outside], COORDINATE_SCALE).flatten(1)
            h[outside] = inputs @ layers[0][0] + table[2 * _GRID + t]
        torch.ops.aten.gelu_(h)
        for weight, bias in layers[1:4]:
            h += torch.ops.aten.gelu_(_product(h, weight, bias))
        return torch.mm(layers[4][0].T, h.T).T + layers[4][1]  # BLAS prefers few rows to few columns

    # ------------------------------------------------------------------------
    # State.

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to go on exactly; generators are functions of seed and epoch."""
        return dict(epoch=self.epoch, flat=self.flat.detach().cpu(), optimizer=self.optimizer.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of an ensemble of the same size."""
        self.epoch = state["epoch"]
        with torch.no_grad():
            self.flat.copy_(state["flat"])
        self.optimizer.load_state_dict(state["optimizer"])


def _product(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """h [n, HIDDEN] times weight [HIDDEN, HIDDEN, 1, 1], as a convolution with 1x1 kernels.

    For that CPUs use oneDNN, which computes it up to twice as fast as BLAS; with one thread only from 16 images on.
    """
    images = 16 if len(h) % 16 == 0 else 1
    image = h.view(images, -1, 1, HIDDEN).permute(0, 3, 1, 2)  # [images, HIDDEN, n / images, 1], channels last
    return conv2d(image, weight, bias).permute(0, 2, 3, 1).reshape(len(h), HIDDEN)


def _initial(seed: int) -> Tensor:
    """Weights and biases uniform within 1 / sqrt(inputs), as torch.nn.Linear draws them; float32 [size + padding]."""
    generator = seeded(seed, _INIT)
    parts = []
    for rows, columns in _LAYERS:
        limit = rows**-0.5
        parts += [limit * (2 * torch.rand(n, generator=generator) - 1) for n in (rows * columns, columns)]
    return torch.cat([*parts, torch.zeros(_PADDING)])


def _views(flat: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Weights [R, in, out] and biases [R, 1, out] of the layers, as views of [R, size + padding]."""
    weights, biases, at = [], [], 0
    for rows, columns in _LAYERS:
        weights.append(flat[:, at : at + rows * columns].view(-1, rows, columns))
        at += rows * columns
        biases.append(flat[:, at : at + columns].view(-1, 1, columns))
        at += columns
    return weights, biases
