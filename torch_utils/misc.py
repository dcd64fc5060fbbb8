"""The order in which training images are drawn."""

from collections.abc import Iterator

import numpy as np


class InfiniteSampler:
    """Endless stream of dataset indices for one rank (published ``torch_utils.misc.InfiniteSampler``).

    The indices 0..size-1 are shuffled once by ``RandomState(seed)``. All ranks walk the same endless
    sequence and each keeps every `num_replicas`-th entry, starting at its rank. With a window of at
    least two entries, each visited position is afterwards swapped with a random one up to a window
    before it; with `window_size` = 0 the first order is repeated for ever, as in the study.

    Parameters
    ----------
    size : number of images
    rank, num_replicas : this process, number of processes
    seed : seed of the order, the same on all ranks
    window_size : length of the shuffling window, as a fraction of `size`, 0..1
    """

    def __init__(self, size: int, rank: int = 0, num_replicas: int = 1, seed: int = 0, window_size: float = 0.5):
        if size < 1:
            raise ValueError("The dataset is empty.")
        if not 0 <= rank < num_replicas:
            raise ValueError(f"rank {rank} is not below num_replicas {num_replicas}.")
        if not 0 <= window_size <= 1:
            raise ValueError(f"window_size must lie between 0 and 1, not {window_size}.")
        self.rank, self.num_replicas = rank, num_replicas
        self.order = np.arange(size)
        self.random = np.random.RandomState(seed)
        self.random.shuffle(self.order)
        self.window = int(np.rint(size * window_size))
        self.position = 0  # in the sequence that all ranks share

    def __iter__(self) -> Iterator[int]:
        while True:
            yield int(self.take(1)[0])

    def take(self, count: int) -> np.ndarray:
        """Return the next `count` indices of this rank, int64 [count]."""
        if self.window < 2:  # nothing moves: read the order at the positions of this rank
            first = self.position + (self.rank - self.position) % self.num_replicas
            positions = first + self.num_replicas * np.arange(count)
            if count:
                self.position = int(positions[-1]) + 1
            return self.order[positions % self.order.size]
        indices = np.empty(count, dtype=np.int64)
        taken = 0
        while taken < count:
            i = self.position % self.order.size
            if self.position % self.num_replicas == self.rank:
                indices[taken] = self.order[i]
                taken += 1
            j = (i - self.random.randint(self.window)) % self.order.size
            self.order[i], self.order[j] = self.order[j], self.order[i]
            self.position += 1
        return indices

    def state_dict(self) -> dict:
        """Everything that `load_state_dict` needs to continue the stream exactly."""
        _, keys, pos, has_gauss, cached = self.random.get_state()
        return dict(
            order=self.order.tolist(),
            position=self.position,
            random=[keys.tolist(), int(pos), int(has_gauss), float(cached)],
        )

    def load_state_dict(self, state: dict) -> None:
        if len(state["order"]) != self.order.size:
            raise ValueError(
                f"The saved data order is of {len(state['order'])} images, the dataset has {self.order.size}."
            )
        self.order = np.asarray(state["order"], dtype=np.int64)
        self.position = state["position"]
        keys, pos, has_gauss, cached = state["random"]
        self.random.set_state(("MT19937", np.asarray(keys, dtype=np.uint32), pos, has_gauss, cached))
