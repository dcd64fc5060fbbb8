"""Training images in the space of a feature network, for nearest neighbours there."""

import numpy as np
import torch

from memorization.measure.features import FeatureNetwork
from memorization.measure.knn import Neighbors
from torch_utils import distributed as dist


class FeatureSpace:
    """Features of the training images, computed once, and searched by features of other images.

    The ranks share the work; all of them make each call together, with images of their own or none. If the
    network fails on one rank, all get its ValueError. `key` begins the names of arrays of distances in this space, so
    that those of another network are never taken for them.

    Parameters
    ----------
    network : computes the features
    images : uint8 [N, C, H, W], the training images, the same on all ranks
    device : where to search
    """

    def __init__(self, network: FeatureNetwork, images: np.ndarray, device: torch.device | str):
        self.name, self.sha256, self._embed = network.name, network.sha256, network.embed
        self.key = f"features-{network.sha256[:16]}"
        rank, world = dist.get_rank(), dist.get_world_size()
        share = images[len(images) * rank // world : len(images) * (rank + 1) // world]
        parts = [part for part in dist.gather(self.embed_together(share)) if len(part)]
        self.reference = np.concatenate(parts)  # float32 [N, F]
        self.neighbors = Neighbors(self.reference, device=device, shard=True)

    def query(self, images: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Distances [n, k] between features, and rows [n, k], of the training images nearest to `images`."""
        features = self.embed_together(images)
        if not len(features):
            features = self.reference[:0]
        return self.neighbors.query(features, k)

    def embed_together(self, images: np.ndarray) -> np.ndarray:
        """Features of this rank's images, float32 [n, F]; of none [0, 0]."""
        features = problem = None
        try:
            features = self._embed(images)
        except ValueError as err:
            problem = str(err)
        problems = [text for text in dist.gather(problem) if text is not None]
        if problems:
            raise ValueError(problems[0])
        return features
