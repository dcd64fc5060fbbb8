"""Time the two-moons study's ensemble against one model at a time, in one run.

The plain loop is what one writes down first: an nn.Module, autograd, torch.optim.AdamW and clip_grad_norm_ per batch;
all points generated at once; torch.cdist against the training and the test points in chunks. Prints seconds per model
and epoch of each phase, their ratios, and how far the results of both are apart.
"""

import time
from collections.abc import Callable

import click
import numpy as np
import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn

from dnnlib.cli import report_errors
from toy.data import ToyData
from toy.diffusion import ALPHA_BAR, BETA, COORDINATE_SCALE, EMBEDDING, STEPS, seeded
from toy.ensemble import BATCH, CLIP, HIDDEN, LEARNING_RATE, Ensemble
from toy.measure import Neighbours
from toy.study import PRESETS


class SinusoidalEmbedding(nn.Module):
    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        half = EMBEDDING // 2
        frequency = torch.exp(-torch.log(torch.tensor(10000.0)) / (half - 1) * torch.arange(half))
        angles = (x * self.scale)[:, None] * frequency
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.gelu(self.linear(x))


class PlainNetwork(nn.Module):
    """The network of the study, one at a time."""

    def __init__(self):
        super().__init__()
        self.time, self.coordinate = SinusoidalEmbedding(1.0), SinusoidalEmbedding(COORDINATE_SCALE)
        layers = [nn.Linear(3 * EMBEDDING, HIDDEN), nn.GELU(), *[Residual() for _ in range(3)], nn.Linear(HIDDEN, 2)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(torch.cat([self.coordinate(x[:, 0]), self.coordinate(x[:, 1]), self.time(t)], dim=1))

    def copy_from(self, ensemble: Ensemble, replica: int) -> None:
        """Take the weights of one replica."""
        linear = [module for module in self.modules() if isinstance(module, nn.Linear)]
        with torch.no_grad():
            for layer, weight, bias in zip(linear, ensemble.weights, ensemble.biases):
                layer.weight.copy_(weight[replica].T)
                layer.bias.copy_(bias[replica, 0])


def plain_epoch(network: PlainNetwork, optimizer: torch.optim.Optimizer, data: Tensor) -> None:
    """Train one model for one epoch."""
    signal, spread = ALPHA_BAR.sqrt().float(), (1 - ALPHA_BAR).sqrt().float()
    order = torch.randperm(len(data))
    for start in range(0, len(data) - BATCH + 1, BATCH):
        x0 = data[order[start : start + BATCH]]
        noise, t = torch.randn_like(x0), torch.randint(STEPS, [BATCH])
        noisy = signal[t, None] * x0 + spread[t, None] * noise
        loss = nn.functional.mse_loss(network(noisy, t), noise)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def plain_points(network: PlainNetwork, count: int, generator: torch.Generator) -> Tensor:
    """Generate points with one model."""
    x = torch.randn(count, 2, generator=generator)
    for t in reversed(range(STEPS)):
        eps = network(x, torch.full([count], t))
        beta, abar = float(BETA[t]), float(ALPHA_BAR[t])
        x = (x - beta / (1 - abar) ** 0.5 * eps) / (1 - beta) ** 0.5
        if t > 0:
            variance = beta * (1 - float(ALPHA_BAR[t - 1])) / (1 - abar)
            x = x + variance**0.5 * torch.randn(count, 2, generator=generator)
    return x


def plain_memorized(points: Tensor, data: ToyData, ratio: float, chunk: int = 2000) -> int:
    """Count memorized points by all distances."""
    train, test = torch.from_numpy(data.train), torch.from_numpy(data.test)
    count = 0
    for part in points.split(chunk):
        count += int((ratio * torch.cdist(part, train).amin(1) < torch.cdist(part, test).amin(1)).sum())
    return count


def sklearn_memorized(points: Tensor, data: ToyData, ratio: float) -> int:
    """Count memorized points with scikit-learn's nearest neighbours, which choose a KD-tree here."""
    near = [NearestNeighbors(n_neighbors=1).fit(y).kneighbors(points.numpy())[0][:, 0] for y in (data.train, data.test)]
    return int((ratio * near[0] < near[1]).sum())


def timed(call: Callable, times: int) -> tuple[float, object]:
    """Seconds of the fastest of several calls, and the result of the last."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - start)
    return min(seconds), result


@click.command(context_settings=dict(max_content_width=120))
@click.option(
    "--preset", metavar="|".join(PRESETS), type=click.Choice(list(PRESETS)), default="fig1", show_default=True
)
@click.option("--repeats", help="Networks", metavar="INT", type=click.IntRange(min=1), default=10, show_default=True)
@click.option("--times", help="Runs of each; the fastest counts", metavar="INT", type=click.IntRange(min=1), default=3)
@report_errors
def main(preset: str, repeats: int, times: int) -> None:
    """Time training, generating and measuring of the ensemble and of one plain model, on the CPU."""
    settings = PRESETS[preset]
    data = [settings.data(repeat) for repeat in range(repeats)]
    size, ratio = len(data[0].train), settings.ratio
    click.echo(
        f"{preset}: {size} training points, {repeats} networks, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads; seconds per model and epoch, the fastest of {times}"
    )
    ensemble = Ensemble(torch.stack([torch.from_numpy(d.train) for d in data]), list(range(repeats)))
    neighbours = [Neighbours(d) for d in data]
    network = PlainNetwork()
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE)
    train = torch.from_numpy(data[0].train)

    ours, plain = {}, {}
    ours["train"] = timed(ensemble.train_epoch, times)[0] / repeats
    plain["train"], _ = timed(lambda: plain_epoch(network, optimizer, train), times)

    network.copy_from(ensemble, 0)
    seconds, points = timed(lambda: [ensemble.generate(r, size) for r in range(repeats)], times)
    ours["generate"] = seconds / repeats
    plain["generate"], same = timed(lambda: plain_points(network, size, seeded(0, 3, ensemble.epoch)), times)

    def measure() -> int:
        return [int(n.measure(p.numpy(), ratio).memorized.sum()) for n, p in zip(neighbours, points)][0]

    seconds, count = timed(measure, times)
    ours["measure"] = seconds / repeats
    plain["measure"], plain_count = timed(lambda: plain_memorized(same, data[0], ratio), times)
    sklearn, sklearn_count = timed(lambda: sklearn_memorized(same, data[0], ratio), times)

    click.echo(f"{'':>10} {'ours':>8} {'plain':>8} {'ratio':>7}")
    for phase in ours:
        click.echo(f"{phase:>10} {ours[phase]:>8.3f} {plain[phase]:>8.3f} {plain[phase] / ours[phase]:>7.1f}")
    total, reference = sum(ours.values()), sum(plain.values())
    click.echo(f"{'total':>10} {total:>8.3f} {reference:>8.3f} {reference / total:>7.1f}")
    other = reference - plain["measure"] + sklearn
    click.echo(f"with scikit-learn's neighbours in the plain loop: {other:.3f}, ratio {other / total:.1f}")
    apart = np.abs(points[0].numpy() - same.numpy()).max()
    click.echo(f"memorized: {count} ours, {plain_count} and {sklearn_count} plain; points at most {apart:.1e} apart")


if __name__ == "__main__":
    main()
