"""The papers' weights, slowly: float64, loops, one batch at a time, and nothing of the code under test.

Each function takes the losses of all rows as they are, `losses` [rows, seq], the mask of what is predicted, the rows'
sources and the reference losses, and returns what every token counts, and the number that the weighted sum is divided
by.
"""

import math
from fractions import Fraction

import numpy as np


def row_means(losses, mask):
    """(mean, tokens) of each row; a row without targets has mean None."""
    return [(row[m].mean() if m.any() else None, m.sum()) for row, m in zip(losses, mask, strict=True)]


def f_of(strategy, loss, low, high, floor=1e-6, delta=1.0):
    loss, low, high, delta = (Fraction(float(x)) for x in (loss, low, high, delta))
    h = 2 * delta * (loss - (low + high) / 2) / max(high - low, Fraction(floor))
    h = min(max(h, -delta), delta)
    f = {"linupper": min(h + delta, delta), "quadratic": 1 - (h / delta) ** 2, "extremes": abs(h), "uniform": 0}
    return float(f[strategy])


def softmax_weights(losses, strategy, r, delta=1.0):
    """The formula of 2502.06733 for a list of losses: weights of sum 1, and 0 for what is no number."""
    there = [loss for loss in losses if math.isfinite(loss)]
    f = [f_of(strategy, loss, min(there), max(there), delta=delta) for loss in there]
    e = iter([math.exp((value - max(f)) / r) for value in f])
    e = [next(e) if math.isfinite(loss) else 0.0 for loss in losses]
    return [value / math.fsum(e) for value in e]


def capped(weights, tokens, w_max):
    """Weights bounded by w_max times their mean, by bisection on the bound."""
    lowest, highest = min(weights), max(weights)
    for _ in range(200):
        bound = (lowest + highest) / 2
        cut = [min(w, bound) for w in weights]
        mean = sum(c * n for c, n in zip(cut, tokens, strict=True)) / sum(tokens)
        lowest, highest = (bound, highest) if max(cut) <= w_max * mean else (lowest, bound)
    return [min(w, lowest) for w in weights]


def reweighted(losses, mask, strategy, r, norm="minmax", tail=0.02, min_range=1e-6, w_max=None, **_):
    means = row_means(losses, mask)
    there = [mean for mean, n in means if n]
    if norm == "minmax":
        low, high = min(there), max(there)
    elif norm == "quantile":
        low, high = np.quantile(there, [tail, 1 - tail])
    else:
        median = np.median(there)
        spread = 3 * 1.4826 * np.median(np.abs(np.array(there) - median))
        low, high = median - spread, median + spread
    w = [math.exp(f_of(strategy, mean, low, high, min_range) / r) if n else 0.0 for mean, n in means]
    if w_max:
        kept = iter(capped([x for x, (_, n) in zip(w, means, strict=True) if n], [n for _, n in means if n], w_max))
        w = [next(kept) if n else 0.0 for _, n in means]
    token = np.array(w)[:, None] * mask
    return token, token.sum()


def by_documents(losses, mask, documents, strategy, r):
    """The same with one loss for each document of each row."""
    keys = {(i, d) for i, row in enumerate(documents) for d in row}
    means = {}
    for i, d in keys:
        chosen = mask[i] & (documents[i] == d)
        if chosen.any():
            means[i, d] = losses[i][chosen].mean()
    low, high = min(means.values()), max(means.values())
    token = np.zeros(losses.shape)
    for (i, d), mean in means.items():
        token[i][mask[i] & (documents[i] == d)] = math.exp(f_of(strategy, mean, low, high) / r)
    return token, token.sum()


def focal(losses, mask, gamma, detached):
    """By central differences of (1 - p)^gamma l, but for the detached factor."""

    def value(loss):
        return (1 - math.exp(-loss)) ** gamma * loss

    token, step = np.zeros(losses.shape), 1e-5
    for i, t in zip(*np.nonzero(mask), strict=True):
        loss = losses[i, t]
        difference = (value(loss + step) - value(loss - step)) / (2 * step)
        token[i, t] = (1 - math.exp(-loss)) ** gamma if detached else difference
    return token, mask.sum()


def rho1(losses, mask, reference, keep):
    """Without ties."""
    excess = sorted((losses - reference)[mask], reverse=True)
    wanted = keep * len(excess)
    whole = math.floor(wanted)
    token = np.zeros(losses.shape)
    for i, t in zip(*np.nonzero(mask), strict=True):
        rank = excess.index(losses[i, t] - reference[i, t])
        token[i, t] = 1.0 if rank < whole else wanted - whole if rank == whole else 0.0
    return token, token.sum()


def of_domains(alpha, mask, domain):
    """sum_k alpha_k (mean loss of domain k) / sum of alpha_k over the domains that are there."""
    token = np.zeros(mask.shape)
    for k, a in enumerate(alpha):
        rows = domain == k
        if mask[rows].sum():
            token[rows] = mask[rows] * a / mask[rows].sum()
    return token, token.sum()


def inverse_losses(losses, mask, domain, domains):
    """1 / L_k, with L_k the mean over the tokens of domain k; 1 where it has none."""
    rows = [domain == k for k in range(domains)]
    return [1 / losses[r][mask[r]].mean() if mask[r].any() else 1.0 for r in rows]


def mftcoder(mask, domain, balance):
    if balance == "task":
        return of_domains([1.0] * (domain.max() + 1), mask, domain)
    token = np.zeros(mask.shape)
    for i, row in enumerate(mask):
        if row.any():
            rows = sum(other.any() and (balance == "sample" or domain[j] == domain[i]) for j, other in enumerate(mask))
            token[i] = row / row.sum() / rows
    return token, token.sum()


def doremi_alpha(alpha, last, losses, mask, domain, reference, eta, smoothing):
    """One update: (alpha, excess of each domain)."""
    excess = np.maximum(losses - reference, 0)
    score = [
        excess[domain == k][mask[domain == k]].mean() if mask[domain == k].any() else last[k] for k in range(len(alpha))
    ]
    e = [a * math.exp(eta * s) for a, s in zip(alpha, score, strict=True)]
    return [(1 - smoothing) * x / sum(e) + smoothing / len(e) for x in e], score


def curriculum(losses, mask, progress, until, first):
    means = row_means(losses, mask)
    there = [mean for mean, n in means if n]
    low, high = min(there), max(there)
    weights = []
    for mean, n in means:
        hard = ((mean - low) / (high - low) if high > low else 0.5) if n else 0.0
        d = hard if first == "hard" else 1 - hard
        weights.append(d * (1 - progress / until) + progress / until)
    return np.array(weights)[:, None] * mask, mask.sum()


def softmax(values):
    e = [math.exp(v - max(values)) for v in values]
    return [x / sum(e) for x in e]


def coba(history, window, start, tau):
    """CoBa's weights from all held-out losses [measurements][tasks], each over its first value, as they come."""
    k, slopes, worst = len(history[0]), [], []
    for end in range(start + 1, len(history) + 1):
        recent = np.array(history[max(0, end - window) : end])
        x = np.arange(len(recent))
        slopes.append([np.polyfit(x, recent[:, j], 1)[0] for j in range(k)])
        worst.append(np.polyfit(x, recent.max(1), 1)[0])
    if not slopes:
        return [1 / k] * k
    kept, now = np.array(slopes[-window:]), slopes[-1]
    total = sum(map(abs, now))
    rcs = softmax([k * s / total for s in now])
    acs = softmax([-len(kept) * s / np.abs(kept[:, j]).sum() for j, s in enumerate(now)])
    t = len(worst)
    df = min(1.0, t * softmax([-tau * t * s / np.abs(worst).sum() for s in worst])[-1])
    w = softmax([k * (df * a + (1 - df) * b) for a, b in zip(rcs, acs, strict=True)])
    return [0.9 * x + 1 / (10 * k) for x in w] if min(w) < 1 / (10 * k) else w
