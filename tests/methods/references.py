"""Distillation losses in plain float64, written from the papers, with which kd's are compared.

Nothing here comes from kd, and nothing is fast: samples, classes, channels and pairs are loops, so
that each function reads as its formula. Every function returns the unweighted term as a scalar
tensor through which autograd can differentiate; nothing is detached, so a test chooses what
requires a gradient. Where public code differs from the formula, the docstring says how.

Logits are [B, K], labels [B]; taps are maps [B, C, H, W] or vectors [B, D].
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def _mean(terms: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(terms)).mean()


def _total(terms: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum()


def _norm(v: Tensor) -> Tensor:
    """The L2 norm of v, which must not be zero if its gradient is wanted."""
    return (v * v).sum().sqrt()


def _unit(v: Tensor) -> Tensor:
    """v / ||v||; a zero vector stays zero (public code divides by max(||v||, 1e-12))."""
    return v / _norm(v) if bool((v != 0).any()) else torch.zeros_like(v)


def _kl(p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of two distributions over the same classes, the second given by its logarithm."""
    terms = [p[k] * (p[k].log() - log_q[k]) for k in range(len(p)) if p[k] > 0]
    return _total(terms)


def _without(row: Tensor, k: int) -> Tensor:
    """The entries of row other than the k-th."""
    return torch.cat([row[:k], row[k + 1 :]])


def _huber(x: Tensor) -> Tensor:
    """x^2 / 2 up to |x| = 1, |x| - 1/2 beyond: smooth L1 with beta 1."""
    return 0.5 * x * x if x.abs() < 1 else x.abs() - 0.5


def _pooled(f: Tensor, height: int, width: int) -> Tensor:
    """Adaptive average pooling to height h and width w.

    Cell (i, j) is the mean of the rows floor(iH/h) .. ceil((i+1)H/h), and likewise of the columns.
    """
    full_h, full_w = f.shape[2], f.shape[3]
    rows = []
    for i in range(height):
        top, bottom = i * full_h // height, -(-(i + 1) * full_h // height)
        cells = []
        for j in range(width):
            left, right = j * full_w // width, -(-(j + 1) * full_w // width)
            cells.append(f[:, :, top:bottom, left:right].mean(dim=(2, 3)))
        rows.append(torch.stack(cells, dim=2))
    return torch.stack(rows, dim=2)


def _same_size(fs: Tensor, ft: Tensor) -> tuple[Tensor, Tensor]:
    """The map of the larger spatial size average-pooled to the smaller."""
    if fs.shape[2] > ft.shape[2]:
        return _pooled(fs, ft.shape[2], ft.shape[3]), ft
    if fs.shape[2] < ft.shape[2]:
        return fs, _pooled(ft, fs.shape[2], fs.shape[3])
    return fs, ft


# -------------------------------------------------------------------------------- labels and logits


def hard(zs: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy with the labels: mean_i -log softmax(zs_i)[y_i]."""
    return _mean([-F.log_softmax(zs[i], dim=0)[int(y[i])] for i in range(len(zs))])


def soft(zs: Tensor, zt: Tensor, T: float | Tensor) -> Tensor:
    """The soft term of Hinton et al. 2015 (arXiv 1503.02531).

    T^2 mean_i sum_k p_t log(p_t / p_s), p = softmax(z / T).

    Averaged over the batch only, as in RepDistiller and mdistiller. T may be a tensor with a
    gradient (CTKD). Born-again networks, function matching (T = 1) and stored soft labels are this
    term as well.
    """
    return T**2 * _mean(
        [_kl(F.softmax(zt[i] / T, dim=0), F.log_softmax(zs[i] / T, dim=0)) for i in range(len(zs))]
    )


def standardised(z: Tensor) -> Tensor:
    """Logit standardisation, Sun et al. 2024 (arXiv 2403.01427).

    (z - mean) / (std + 1e-7) over the classes.

    Their KD, DKD and MLKD use torch.std, so Bessel's correction: the divisor of the variance is
    K - 1. (Their fork of CTKD has the same std without the 1e-7.)
    """
    rows = []
    for row in z:
        centred = row - row.sum() / len(row)
        std = ((centred * centred).sum() / (len(row) - 1)).sqrt()
        rows.append(centred / (std + 1e-7))
    return torch.stack(rows)


def dkd(zs: Tensor, zt: Tensor, y: Tensor, T: float) -> tuple[Tensor, Tensor]:
    """Decoupled KD, Zhao et al. 2022 (arXiv 2203.08679): (TCKD, NCKD).

    Each is T^2 times a KL averaged over the batch. TCKD: KL(b_t || b_s) with b = (p[y], 1 - p[y]).
    NCKD: KL of the softmax over the classes other than y; mdistiller subtracts 1000 from the
    label's logit instead of removing it, which is the same number.
    """
    target, other = [], []
    for i in range(len(zs)):
        label = int(y[i])
        ps, pt = F.softmax(zs[i] / T, dim=0), F.softmax(zt[i] / T, dim=0)
        bs = torch.stack([ps[label], _without(ps, label).sum()])
        bt = torch.stack([pt[label], _without(pt, label).sum()])
        target.append(_kl(bt, bs.log()))
        others_s, others_t = _without(zs[i], label) / T, _without(zt[i], label) / T
        other.append(_kl(F.softmax(others_t, dim=0), F.log_softmax(others_s, dim=0)))
    return T**2 * _mean(target), T**2 * _mean(other)


def _pearson(a: Tensor, b: Tensor, eps: float) -> Tensor:
    a, b = a - a.mean(), b - b.mean()
    return (a * b).sum() / (_norm(a) * _norm(b) + eps)


def dist(zs: Tensor, zt: Tensor, T: float, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """DIST, Huang et al. 2022 (arXiv 2205.10536): (inter, intra).

    Each is T^2 (1 - mean Pearson), inter over the rows and intra over the columns.

    inter: the K probabilities of one sample against the teacher's; intra: the B probabilities of
    one class. Public code adds eps = 1e-8 to the product of the two norms; here eps is 0 unless
    asked for.
    """
    ps = torch.stack([F.softmax(row / T, dim=0) for row in zs])
    pt = torch.stack([F.softmax(row / T, dim=0) for row in zt])
    inter = _mean([1 - _pearson(ps[i], pt[i], eps) for i in range(ps.shape[0])])
    intra = _mean([1 - _pearson(ps[:, k], pt[:, k], eps) for k in range(ps.shape[1])])
    return T**2 * inter, T**2 * intra


def nkd(zs: Tensor, zt: Tensor, y: Tensor, T: float) -> tuple[Tensor, Tensor]:
    """Normalised KD, Yang et al. 2023 (arXiv 2303.13005): (target, other).

    The factor gamma and the cross-entropy are not in it.

    target = mean_i -p_t[y] log p_s[y] at temperature 1;
    other = -T^2 mean_i sum_{k != y} q_t log q_s, q the softmax of z / T over the classes other than
    y. yzd-v/cls_KD sums over classes and averages over the batch, as here; until its issue 16
    (October 2023) the code of its second release kept the label among the "other" classes by
    mistake.
    """
    target, other = [], []
    for i in range(len(zs)):
        label = int(y[i])
        target.append(-F.softmax(zt[i], dim=0)[label] * F.log_softmax(zs[i], dim=0)[label])
        qt = F.softmax(_without(zt[i], label) / T, dim=0)
        log_qs = F.log_softmax(_without(zs[i], label) / T, dim=0)
        other.append(-_total([qt[k] * log_qs[k] for k in range(len(qt))]))
    return _mean(target), T**2 * _mean(other)


def wttm(zs: Tensor, zt: Tensor, power: float) -> Tensor:
    """Weighted transformed teacher matching, Zheng and Yang 2024 (arXiv 2402.11148).

    mean_i u_i KL(p_t^power / u_i || p_s) with u_i = sum_k p_t[k]^power and p = softmax(z). There is
    no T^2, and the student is at T = 1.
    """
    terms = []
    for i in range(len(zs)):
        powered = F.softmax(zt[i], dim=0) ** power
        weight = powered.sum()
        terms.append(weight * _kl(powered / weight, F.log_softmax(zs[i], dim=0)))
    return _mean(terms)


def mlkd(zs: Tensor, zt: Tensor, T: float) -> tuple[Tensor, Tensor, Tensor]:
    """Multi-level logit distillation, Jin et al. (CVPR 2023): (instance, batch, classes) at one T.

    instance = soft(); batch = ||P_t P_t' - P_s P_s'||^2 / B;
    classes = ||P_t' P_t - P_s' P_s||^2 / K, P = softmax(z/T). As in the authors' code, T^2
    multiplies the instance term only. Their halving by a mask is left out.
    """
    ps = torch.stack([F.softmax(row / T, dim=0) for row in zs])
    pt = torch.stack([F.softmax(row / T, dim=0) for row in zt])
    samples, classes = ps.shape
    batch_terms = [
        ((pt[i] * pt[j]).sum() - (ps[i] * ps[j]).sum()) ** 2
        for i in range(samples)
        for j in range(samples)
    ]
    class_terms = [
        ((pt[:, k] * pt[:, m]).sum() - (ps[:, k] * ps[:, m]).sum()) ** 2
        for k in range(classes)
        for m in range(classes)
    ]
    return soft(zs, zt, T), _total(batch_terms) / samples, _total(class_terms) / classes


def tfkd(zs: Tensor, y: Tensor, correct: float, T: float) -> Tensor:
    """Teacher-free KD, the regularisation of Yuan et al. 2020 (arXiv 1909.11723).

    mean_i KL(softmax(u_i / T) || p_s).

    u = correct on the label, (1 - correct) / (K - 1) elsewhere, used as logits; the student at
    T = 1; no T^2. The authors' code divides by B K (KLDivLoss 'mean') and undoes it by a
    multiplier; here the mean is over the batch.
    """
    terms = []
    classes = zs.shape[1]
    for i in range(len(zs)):
        u = [correct if k == int(y[i]) else (1 - correct) / (classes - 1) for k in range(classes)]
        terms.append(
            _kl(F.softmax(torch.tensor(u, dtype=zs.dtype) / T, dim=0), F.log_softmax(zs[i], dim=0))
        )
    return _mean(terms)


def uniform(zs: Tensor) -> Tensor:
    """The cross-entropy with a target that is the same for all classes.

    Szegedy et al. 2016 (arXiv 1512.00567).
    """
    target = torch.full((zs.shape[1],), 1 / zs.shape[1], dtype=zs.dtype)
    return _mean([-(target * F.log_softmax(z, dim=0)).sum() for z in zs])


def ctkd_temperature(raw: Tensor, low: float, span: float) -> Tensor:
    """Curriculum temperature, Li et al. 2022 (arXiv 2211.16231).

    T = low + span sigmoid(raw); theirs low 1, span 20. The reversal of the gradient of raw is not
    part of this value.
    """
    return low + span / (1 + torch.exp(-raw))


# ------------------------------------------------------------------------------------- feature maps


def attention(fs: Tensor, ft: Tensor) -> Tensor:
    """Attention transfer, Zagoruyko and Komodakis 2017 (arXiv 1612.03928), one pair.

    mean_{i,x} (q_s - q_t)^2 with q = vec(mean over channels of f^2) / its L2 norm; the larger map
    is average-pooled first. The mean over samples and pixels is the authors' code and
    RepDistiller's; the paper has the norm of q_s - q_t, not squared.
    """
    fs, ft = _same_size(fs, ft)
    terms = []
    for i in range(len(fs)):
        qs, qt = [_unit((f[i] ** 2).mean(dim=0).flatten()) for f in (fs, ft)]
        terms.append(((qs - qt) ** 2).mean())
    return _mean(terms)


def similarity(fs: Tensor, ft: Tensor) -> Tensor:
    """Similarity-preserving KD, Tung and Mori 2019 (arXiv 1907.09682).

    sum_{ij} (G_s - G_t)^2 / B^2 with G_ij = f_i . f_j of the flattened features, each row divided
    by its L2 norm.
    """
    fs, ft = fs.flatten(1), ft.flatten(1)
    terms = []
    for i in range(len(fs)):
        gs, gt = [
            _unit(torch.stack([(f[i] * f[j]).sum() for j in range(len(f))])) for f in (fs, ft)
        ]
        terms.append(((gs - gt) ** 2).sum())
    return _total(terms) / len(fs) ** 2


def correlation(fs: Tensor, ft: Tensor, gamma: float, order: int) -> Tensor:
    """Correlation congruence, Peng et al. 2019 (arXiv 1904.01802): mean_{ij} (K_s - K_t)^2.

    K_ij = sum_{p=0..order} exp(-2 gamma) (2 gamma)^p / p! (f_i . f_j)^p with unit f: the Taylor
    expansion of the Gaussian kernel exp(-gamma |f_i - f_j|^2). Knowledge-Distillation-Zoo has this
    form; RepDistiller's is another loss.
    """

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        dot = (a * b).sum()
        weights = [
            math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) for p in range(order + 1)
        ]
        return _total([weight * dot**p for p, weight in enumerate(weights)])

    us, ut = [_unit(f) for f in fs.flatten(1)], [_unit(f) for f in ft.flatten(1)]
    pairs = [(i, j) for i in range(len(us)) for j in range(len(us))]
    return _mean([(kernel(us[i], us[j]) - kernel(ut[i], ut[j])) ** 2 for i, j in pairs])


def regress3(f: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    """The mean network of VID: three 1x1 convolutions without bias, ReLU after the first two.

    The weights are [out,in,1,1].
    """
    hidden = F.conv2d(f, w1).clamp(min=0)
    hidden = F.conv2d(hidden, w2).clamp(min=0)
    return F.conv2d(hidden, w3)


def vid(mu: Tensor, ft: Tensor, raw: Tensor) -> Tensor:
    """Variational information distillation, Ahn et al. 2019 (arXiv 1904.05835).

    mean ((mu - t)^2 / v + log v) / 2.

    v_c = softplus(raw_c) + 1e-5 is one variance per channel of the teacher; mu already has the size
    of ft.
    """
    terms = []
    for c in range(ft.shape[1]):
        variance = torch.log(1 + torch.exp(raw[c])) + 1e-5
        for i in range(len(ft)):
            terms.append((0.5 * ((mu[i, c] - ft[i, c]) ** 2 / variance + variance.log())).mean())
    return _mean(terms)


def nst(fs: Tensor, ft: Tensor) -> Tensor:
    """Neuron selectivity transfer, Huang and Wang 2017 (arXiv 1707.01219).

    MMD^2 with the kernel k(a, b) = (a . b)^2.

    Each channel's map is flattened and divided by its L2 norm; mean over channel pairs and the
    batch of k(t, t') + k(s, s') - 2 k(s, t). The larger map is average-pooled first. RepDistiller
    detaches k(t, t'), which the student does not enter.
    """
    fs, ft = _same_size(fs, ft)

    def kernel(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
        return _mean([(a * b).sum() ** 2 for a in left for b in right])

    terms = []
    for i in range(len(fs)):
        s, t = [[_unit(channel.flatten()) for channel in f[i]] for f in (fs, ft)]
        terms.append(kernel(t, t) + kernel(s, s) - 2 * kernel(s, t))
    return _mean(terms)


def simkd(fs: Tensor, ft: Tensor) -> Tensor:
    """SimKD, Chen et al. 2022 (arXiv 2203.14001).

    The mean squared error of the projected student map and the teacher's.
    """
    return ((fs - ft) ** 2).flatten().mean()


# --------------------------------------------------------------------------- relations in the batch


def rkd(fs: Tensor, ft: Tensor) -> tuple[Tensor, Tensor]:
    """Relational KD, Park et al. 2019 (arXiv 1904.05068): (distance, angle).

    Each is the Huber loss of a relation.

    distance: |f_i - f_j| over its mean over the pairs i != j, averaged over all B^2 entries (the
    diagonal is zero).
    angle: <e_ij, e_kj> with e_ij = (f_i - f_j) / |f_i - f_j|, e_jj = 0, averaged over all B^3
    entries. As in the authors' code a squared distance is at least 1e-12.
    """
    fs, ft = fs.flatten(1), ft.flatten(1)
    n = len(fs)

    def distances(f: Tensor) -> dict[tuple[int, int], Tensor]:
        raw = {
            (i, j): ((f[i] - f[j]) ** 2).sum().clamp(min=1e-12).sqrt()
            for i in range(n)
            for j in range(n)
            if i != j
        }
        scale = _mean(list(raw.values()))
        return {pair: d / scale for pair, d in raw.items()}

    def directions(f: Tensor) -> list[list[Tensor]]:
        return [[_unit(f[i] - f[j]) for i in range(n)] for j in range(n)]

    ds, dt = distances(fs), distances(ft)
    es, et = directions(fs), directions(ft)
    distance = _total([_huber(ds[pair] - dt[pair]) for pair in ds]) / n**2
    angle = _mean(
        [
            _huber((es[j][i] * es[j][k]).sum() - (et[j][i] * et[j][k]).sum())
            for j in range(n)
            for i in range(n)
            for k in range(n)
        ]
    )
    return distance, angle


def pkt(fs: Tensor, ft: Tensor, norm_eps: float = 0.0) -> Tensor:
    """Probabilistic knowledge transfer, Passalis and Tefas 2018 (arXiv 1803.10837).

    mean_{ij} P_t log((P_t + 1e-7) / (P_s + 1e-7)), where P_ij is (cos(f_i, f_j) + 1) / 2 over the
    sum of its row, the diagonal included. The mean is over all B^2 entries, not the sum of each
    row. Public code also adds norm_eps = 1e-7 to each feature's norm; here norm_eps is 0 unless
    asked for.
    """
    eps = 1e-7

    def conditional(f: Tensor) -> list[Tensor]:
        unit = [row / (_norm(row) + norm_eps) for row in f]
        kernels = [torch.stack([((a * b).sum() + 1) / 2 for b in unit]) for a in unit]
        return [row / row.sum() for row in kernels]

    ps, pt = conditional(fs.flatten(1)), conditional(ft.flatten(1))
    n = len(ps)
    return _mean(
        [pt[i][j] * ((pt[i][j] + eps) / (ps[i][j] + eps)).log() for i in range(n) for j in range(n)]
    )


def crd_constant(v: Tensor, bank: Tensor, rows: Tensor, tau: float, n: int) -> Tensor:
    """The constant Z of CRD: n times the mean over samples and rows of exp(v . w / tau).

    rows: [R], shared by the batch, or [B, R]. The authors' code takes it once, from the first
    batch, over the positive and the K negatives of each sample, and keeps it without a gradient.
    """
    terms = []
    for i in range(len(v)):
        for row in rows[i] if rows.dim() == 2 else rows:
            terms.append(torch.exp((v[i] * bank[int(row)]).sum() / tau))
    return _mean(terms) * n


def crd(
    v_s: Tensor,
    v_t: Tensor,
    bank_s: Tensor,
    bank_t: Tensor,
    index: Tensor,
    negatives: Tensor,
    keep: Tensor,
    tau: float,
    z_s: float | Tensor,
    z_t: float | Tensor,
) -> Tensor:
    """Contrastive representation distillation, Tian et al. 2020 (arXiv 1910.10699).

    This is the form with memory banks. With D(v, w) = exp(v . w / tau) / Z, N the rows of a bank, K
    the negatives, c = K / N and eps = 1e-7, one anchor has
    mean_i -[log(P / (P + c + eps)) + K / kept_i sum_{kept} log(c / (D + c + eps))], P = D of the
    positive. The student's anchor looks in the teacher's bank with z_s, the teacher's in the
    student's with z_t; the two are summed. Sharing the negatives and the factor K / kept_i are
    ours: the authors draw K of other classes for each sample. Where nothing is kept the second sum
    is empty.
    """
    eps = 1e-7

    def anchor(v: Tensor, bank: Tensor, z: float | Tensor) -> Tensor:
        count = len(negatives)
        c = count / len(bank)
        terms = []
        for i in range(len(v)):
            positive = torch.exp((v[i] * bank[int(index[i])]).sum() / tau) / z
            term = (positive / (positive + c + eps)).log()
            kept = [int(negatives[k]) for k in range(count) if bool(keep[i, k])]
            if kept:
                scores = [torch.exp((v[i] * bank[row]).sum() / tau) / z for row in kept]
                term = term + count / len(kept) * _total(
                    [(c / (score + c + eps)).log() for score in scores]
                )
            terms.append(-term)
        return _mean(terms)

    return anchor(v_s, bank_t, z_s) + anchor(v_t, bank_s, z_t)


# ----------------------------------------------------------------------------------------- ReviewKD


def hcl(fs: Tensor, ft: Tensor) -> Tensor:
    """The hierarchical context loss of ReviewKD, Chen et al. 2021 (arXiv 2104.09044).

    One pair of equal maps: mean squared error at full size (weight 1) and of the average pools to
    4x4, 2x2, 1x1, only those smaller than the map's height, whose weights are 1/2, 1/4, ... in the
    order used (a map of height 4 has 2x2 at 1/2 and 1x1 at 1/4); divided by the sum of the weights
    used.
    """
    weight, total, weights = 1.0, ((fs - ft) ** 2).flatten().mean(), 1.0
    for size in (4, 2, 1):
        if size < fs.shape[2]:
            weight /= 2
            total = (
                total
                + weight
                * ((_pooled(fs, size, size) - _pooled(ft, size, size)) ** 2).flatten().mean()
            )
            weights += weight
    return total / weights


def _batch_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Batch normalisation in train mode: the statistics of the batch, biased variance, eps 1e-5."""
    channels = []
    for c in range(x.shape[1]):
        mean = x[:, c].mean()
        variance = ((x[:, c] - mean) ** 2).mean()
        channels.append((x[:, c] - mean) / (variance + 1e-5).sqrt() * weight[c] + bias[c])
    return torch.stack(channels, dim=1)


def _nearest(x: Tensor, height: int, width: int) -> Tensor:
    """Nearest-neighbour resizing: pixel (i, j) is that at (floor(iH/h), floor(jW/w))."""
    rows = [i * x.shape[2] // height for i in range(height)]
    columns = [j * x.shape[3] // width for j in range(width)]
    return x[:, :, rows][:, :, :, columns]


def abf(
    x: Tensor,
    y: Tensor | None,
    shape: int | tuple[int, int],
    p: Mapping[str, Tensor],
    out_shape: int | tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention based fusion of ReviewKD (arXiv 2104.09044): (out, fused).

    out is for the teacher, fused for the next stage.

    p: conv1.weight [mid,in,1,1], bn1.weight, bn1.bias [mid]; att.weight [2,2 mid,1,1],
    att.bias [2], unused without y; conv2.weight [out,mid,3,3], bn2.weight, bn2.bias [out]. The two
    convolutions have no bias, the attention has one.

    x' = BN(conv1 x); with y (the fused map of the deeper stage, None at the deepest) resized to
    `shape`, which is the size of x, (a_x, a_y) = sigmoid(att [x', y']) and fused = a_x x' + a_y y';
    out = BN(conv2 fused). The authors' code resizes fused to out_shape (the teacher's map) before
    conv2 where it differs, and hands the resized one on.
    """
    x = _batch_norm(F.conv2d(x, p["conv1.weight"]), p["bn1.weight"], p["bn1.bias"])
    if y is not None:
        height, width = (shape, shape) if isinstance(shape, int) else shape
        y = _nearest(y, height, width)
        scores = F.conv2d(torch.cat([x, y], dim=1), p["att.weight"], p["att.bias"])
        gates = 1 / (1 + torch.exp(-scores))
        x = x * gates[:, 0:1] + y * gates[:, 1:2]
    if out_shape is not None:
        height, width = (out_shape, out_shape) if isinstance(out_shape, int) else out_shape
        x = _nearest(x, height, width)
    return _batch_norm(F.conv2d(x, p["conv2.weight"], padding=1), p["bn2.weight"], p["bn2.bias"]), x


# ------------------------------------------------------------------------- the overhaul of features


def ofd_margin(weight: Tensor, bias: Tensor) -> Tensor:
    """The margins of Heo et al. 2019 (arXiv 1904.01866), vectors [C].

    E[x | x < 0] for x ~ N(bias, weight^2).

    bias - |weight| phi(bias / |weight|) / Phi(-bias / |weight|); where Phi(-bias / |weight|) is at
    most 0.001 the authors take -3 |weight| (without the bias). A weight of zero divides by zero, in
    their code as here.
    """
    margins = []
    for w, m in zip(weight.tolist(), bias.tolist(), strict=True):
        s = abs(w)
        below = 0.5 * math.erfc(m / s / math.sqrt(2))
        density = math.exp(-((m / s) ** 2) / 2) / math.sqrt(2 * math.pi)
        margins.append(m - s * density / below if below > 0.001 else -3 * s)
    return torch.tensor(margins, dtype=weight.dtype)


def ofd(fs: Tensor, ft: Tensor, margin: Tensor) -> Tensor:
    """The partial L2 distance of Heo et al. 2019 (arXiv 1904.01866).

    sum (s - t')^2 / B, t' = max(t, margin_c).

    Entries with s <= t' <= 0 do not count. The authors' module returns the sum over all channels,
    pixels and samples; their training scripts divide by the batch size (and by 1000 on CIFAR, 10000
    on ImageNet, weights not taken here).
    """
    total = fs.sum() * 0
    for i in range(fs.shape[0]):
        for c in range(fs.shape[1]):
            for s, t in zip(fs[i, c].flatten(), ft[i, c].flatten(), strict=True):
                target = torch.maximum(t, margin[c])
                if not (s <= target and target <= 0):
                    total = total + (s - target) ** 2
    return total / len(fs)


# --------------------------------------------------------------------------------------------- SRRL


def srrl(
    fs: Tensor, ft: Tensor, zt: Tensor, p: Mapping[str, Tensor], w: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    """Softmax regression representation learning, Yang et al. 2021 (ICLR): (feature, regression).

    h_i = relu(BN(W f_s,i)), p holding weight [t, s] and the norm's scale and shift; feature = mean
    over samples and entries of (h - f_t)^2, regression = that of (w h + b - z_t)^2, w and b being
    the teacher's classifier.
    """
    x = torch.stack([p["weight"] @ row for row in fs])
    h = _batch_norm(x[:, :, None, None], p["scale"], p["shift"])[:, :, 0, 0].clamp(min=0)
    feature = _mean([(h[i] - ft[i]).square().mean() for i in range(len(h))])
    return feature, _mean([(w @ h[i] + b - zt[i]).square().mean() for i in range(len(h))])
