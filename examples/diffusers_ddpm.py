"""A small DDPM on 64 digits, trained by diffusers' own means: somebody else's model, to be measured here.

    python examples/diffusers_ddpm.py --out=ddpm-digits
    python mem_ratio.py --model=diffusers:ddpm-digits/pipeline --knn-ref=ddpm-digits/train ...

See docs/other-models.md. Needs `pip install diffusers`.
"""

from pathlib import Path

import click
import numpy as np
import PIL.Image
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from sklearn.datasets import load_digits
from tqdm import trange


@click.command()
@click.option("--out", help="Folder for the pipeline and the training images", metavar="DIR", required=True)
@click.option("--size", help="Training images", metavar="INT", type=click.IntRange(2, 1797), default=64)
@click.option("--steps", help="Training steps", metavar="INT", type=click.IntRange(min=1), default=6000)
@click.option("--seed", help="Seed of weights and noise", metavar="INT", type=int, default=0)
def main(out: str, size: int, steps: int, seed: int) -> None:
    """Train, and save the pipeline and the training images as PNGs."""
    torch.manual_seed(seed)
    digits = np.round(load_digits().images[:size] * 255 / 16).astype(np.uint8)
    folder = Path(out) / "train"
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(digits):
        PIL.Image.fromarray(image).save(folder / f"{i:04d}.png")
    data = torch.from_numpy(digits)[:, None].float() / 127.5 - 1  # [size, 1, 8, 8]

    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8, attention_head_dim=8,
    )  # fmt: skip
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.Adam(unet.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in trange(steps, disable=None):
        y = data[torch.randint(size, [32])]
        n, t = torch.randn_like(y), torch.randint(1000, [len(y)])
        loss = (unet(scheduler.add_noise(y, n, t), t).sample - n).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    DDPMPipeline(unet, scheduler).save_pretrained(Path(out) / "pipeline")
    click.echo(f"Saved to {out}/pipeline; loss of the last batch {float(loss):.4f}.")


if __name__ == "__main__":
    main()
