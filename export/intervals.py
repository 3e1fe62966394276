"""The interval beside every proportion: k of n images -> Wilson's score interval."""

from statistics import NormalDist


def wilson(successes: int, n: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Bound a proportion by Wilson's score interval.

    It keeps its coverage for few samples and for proportions near 0 and 1, where the textbook's interval
    (estimate plus and minus 1.96 standard errors) shrinks to nothing.

    Args:
        successes: how many of the samples count, 0 to n.
        n: how many samples there are, at least 1.
        confidence: the two-sided coverage, in (0, 1).

    Returns:
        The lower and the upper bound, each in [0, 1]; the observed proportion lies between them.

    Raises:
        ValueError: n is below 1, successes is outside 0 to n, or confidence is outside (0, 1).

    Source: Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", Journal of the
    American Statistical Association 22 (1927); recommended by Brown, Cai and DasGupta, "Interval Estimation
    for a Binomial Proportion", Statistical Science 16 (2001).
    """
    if n < 1:
        raise ValueError(f"expected n of at least 1, got {n}; a proportion needs samples")
    if not 0 <= successes <= n:
        raise ValueError(f"expected successes from 0 to n = {n}, got {successes}; count both over the same samples")
    if not 0 < confidence < 1:
        raise ValueError(f"expected confidence between 0 and 1, got {confidence}; 0.95 is usual")
    squared = NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    proportion = successes / n
    centre = proportion + squared / (2 * n)
    margin = (squared * (proportion * (1 - proportion) / n + squared / (4 * n * n))) ** 0.5
    scale = 1 + squared / n
    # The bounds below are exact at both ends, where rounding would leave 1e-18 or 0.9999999999999999.
    lower = 0.0 if successes == 0 else (centre - margin) / scale
    upper = 1.0 if successes == n else (centre + margin) / scale
    return lower, upper
