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

from collections.abc import Sequence

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

    run, seed = np.repeat(np.arange(len(seeds)), [len(own) for own in seeds]), np.concatenate([*seeds, []])
    order = np.argsort(seed, kind="stable")
    run, linked = run[order], np.flatnonzero(np.diff(seed[order]) == 0)  # neighbours of the same seed
    links = coo_array((np.ones(len(linked)), (run[linked], run[linked + 1])), shape=(len(seeds), len(seeds)))
    return connected_components(links, directed=False)[1]


def correlation(
    seeds: Sequence[np.ndarray], flags: Sequence[np.ndarray], pairs: Sequence[tuple[int, int]] | None = None
) -> float | None:
    """Correlation of the counts of memorized images of runs of the same latents, 0 to `MOST`.

    Parameters
    ----------
    seeds : int [n] of each run, of the latents; each seed once.
    flags : bool [n] of each run, whether the image is memorized.
    pairs : of runs to be compared; None: all.

    Returns
    -------
    None if no two runs have latents in common of which both memorize some and not all.
    """
    if pairs is None:
        pairs = [(i, j) for i in range(len(seeds)) for j in range(i)]
    covariance = scale = 0.0
    any_common = False
    for i, j in pairs:
        one, other = np.asarray(flags[i], dtype=float), np.asarray(flags[j], dtype=float)
        scale += (len(one) * len(other)) ** 0.5 * one.std() * other.std()
        first = second = slice(None)
        if not np.array_equal(seeds[i], seeds[j]):
            _, first, second = np.intersect1d(seeds[i], seeds[j], return_indices=True)
        any_common = any_common or len(one[first]) > 0
        covariance += ((one[first] - one.mean()) * (other[second] - other.mean())).sum()
    return float(np.clip(covariance / scale, 0.0, MOST)) if any_common and scale > 0 else None
