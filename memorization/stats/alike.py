"""How alike the images of runs are that were sampled from the same latents.

Two networks that are trained on the same images make, in part, the same of a latent: whether an image is memorized
correlates between runs. Measured ratios of such runs are wrong together, and their mean is surer of the latents than of
the ratio: with the correlation rho of two runs, of n images each, the mean of K runs has the variance

    mu (1 - mu) / (n K) (1 + (K - 1) rho)    instead of    mu (1 - mu) / (n K).

rho is the covariance of the indicators, summed over all pairs of runs and the latents that they have in common, divided
by the sum of (n_j n_l)^(1/2) times the product of their standard deviations: the correlation of their counts, which is
less than that of their indicators where only a part of the latents is common. Runs that memorize all or nothing, which
say nothing of it, have no weight.
"""

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

MOST = 0.95  # rho is taken to be this at most, so that some of the variance stays that of a run


def same_latents(seeds: Sequence[np.ndarray]) -> np.ndarray:
    """Numbers of the sets of runs that have latents in common, directly or through others.

    Parameters
    ----------
    seeds : int [n] of each run, of the latents that its images were made from.

    Returns
    -------
    int [K], from 0 in the order of the runs
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    run, seed = (
        np.repeat(np.arange(len(seeds)), [len(own) for own in seeds]),
        np.concatenate([*seeds, np.zeros(0, dtype=np.int64)]),
    )
    order = np.argsort(seed, kind="stable")
    run, linked = run[order], np.flatnonzero(np.diff(seed[order]) == 0)  # neighbours of the same seed
    links = coo_array((np.ones(len(linked)), (run[linked], run[linked + 1])), shape=(len(seeds), len(seeds)))
    return connected_components(links, directed=False)[1]


class Alike:
    """Runs that are compared in pairs, each pair once.

    Parameters
    ----------
    seeds : int [n] of each run, of the latents; each seed once.
    flags : bool [n] of each run, whether the image is memorized; None: not known, and the run is in no pair.
    """

    def __init__(self, seeds: Sequence[np.ndarray], flags: Sequence[np.ndarray | None]) -> None:
        self._seeds = seeds
        self._off = [None if own is None else own - own.mean() for own in flags]
        self._norm = [None if off is None else float(off.std() * len(off) ** 0.5) for off in self._off]
        self._covariances: dict[tuple[int, int], float | None] = {}
        # Runs of equal seeds, as a rule all, at once.
        blocks: dict[bytes, list[int]] = {}
        for run, off in enumerate(self._off):
            if off is not None:
                blocks.setdefault(np.asarray(seeds[run], dtype=np.int64).tobytes(), []).append(run)
        for runs in blocks.values():
            off = np.array([self._off[run] for run in runs])
            for i, row in zip(runs, off @ off.T):
                self._covariances |= {(i, j): float(value) for j, value in zip(runs, row)}

    def correlation(self, pairs: Iterable[tuple[int, int]]) -> float | None:
        """Correlation of the counts of memorized images of runs of the same latents, 0 to `MOST`.

        None if no two of the pairs have latents in common, or of none both memorize some and not all.
        """
        covariance, scale, common = 0.0, 0.0, False
        for i, j in pairs:
            if (i, j) not in self._covariances:
                self._covariances[i, j] = self._covariances[j, i] = self._covariance(i, j)
            found = self._covariances[i, j]
            common = common or found is not None
            covariance += found or 0.0
            scale += self._norm[i] * self._norm[j]
        return float(np.clip(covariance / scale, 0.0, MOST)) if common and scale > 0 else None

    def _covariance(self, i: int, j: int) -> float | None:
        """Summed over the latents in common; None without one."""
        _, first, second = np.intersect1d(self._seeds[i], self._seeds[j], return_indices=True)
        return float(self._off[i][first] @ self._off[j][second]) if len(first) else None


def correlation(seeds: Sequence[np.ndarray], flags: Sequence[np.ndarray]) -> float | None:
    """`Alike.correlation` of all pairs."""
    return Alike(seeds, flags).correlation(itertools.combinations(range(len(seeds)), 2))
