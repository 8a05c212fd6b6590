"""The references themselves, held to facts from elsewhere: identities, libraries, invariances."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import references as ref
import torch
from scipy import integrate, stats
from torch import Tensor, nn
from torch.nn import functional as F

B, K, T = 6, 5, 3.0
close = torch.testing.assert_close


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def labels() -> Tensor:
    return torch.tensor([0, 1, 2, 3, 4, 2])


def rotation(n: int) -> Tensor:
    return torch.linalg.qr(draw(n, n))[0]


def gram(f: Tensor) -> Tensor:
    """sum_c u_c u_c' of the unit channel maps u_c of one sample, over the number of channels."""
    u = f.flatten(1)
    u = u / u.norm(dim=1, keepdim=True)
    return u.T @ u / len(u)


# ---- labels and logits


def test_hard_and_soft_are_what_torch_computes() -> None:
    zs, zt, y = draw(B, K), draw(B, K), labels()
    close(ref.hard(zs, y), F.cross_entropy(zs, y))
    log_s, log_t = (zs / T).log_softmax(1), (zt / T).log_softmax(1)
    close(
        ref.soft(zs, zt, T), T**2 * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)
    )
    assert ref.soft(zt, zt, T).abs() < 1e-14


def test_the_gradient_of_soft_keeps_its_size_as_the_temperature_grows() -> None:
    """Hinton et al.: at high T it tends to that of |z_s - z_t|^2 / (2 K B), with centred logits."""
    zs, zt = draw(B, K).requires_grad_(), draw(B, K)
    (grad,) = torch.autograd.grad(ref.soft(zs, zt, 1e4), zs)
    difference = zs.detach() - zt
    close(grad, (difference - difference.mean(1, keepdim=True)) / (K * B), rtol=1e-3, atol=1e-5)


def test_standardised_logits_have_the_mean_and_the_deviation_of_bessel() -> None:
    z = ref.standardised(draw(B, K) * 7 + 3)
    close(z.mean(1), torch.zeros(B, dtype=z.dtype), rtol=0, atol=1e-12)
    close(
        torch.from_numpy(np.std(z.numpy(), axis=1, ddof=1)),
        torch.ones(B, dtype=z.dtype),
        rtol=1e-6,
        atol=0,
    )


def test_dkd_recombines_to_soft() -> None:
    """The identity of the paper, sample by sample: KD = TCKD + (1 - p_t[y]) NCKD."""
    zs, zt, y = draw(B, K), draw(B, K), labels()
    for i in range(B):
        one = slice(i, i + 1)
        target, other = ref.dkd(zs[one], zt[one], y[one], T)
        certain = (zt[i] / T).softmax(0)[y[i]]
        close(target + (1 - certain) * other, ref.soft(zs[one], zt[one], T))
    mean = torch.stack(
        [torch.stack(ref.dkd(zs[i : i + 1], zt[i : i + 1], y[i : i + 1], T)) for i in range(B)]
    ).mean(0)
    close(torch.stack(ref.dkd(zs, zt, y, T)), mean)


def test_dkd_other_does_not_see_the_logit_of_the_label() -> None:
    zs, zt, y = draw(B, K), draw(B, K), labels()
    moved = zs.clone()
    moved[torch.arange(B), y] += 5
    close(ref.dkd(moved, zt, y, T)[1], ref.dkd(zs, zt, y, T)[1])
    close(ref.nkd(moved, zt, y, T)[1], ref.nkd(zs, zt, y, T)[1])


def test_dist_is_the_correlation_of_numpy() -> None:
    zs, zt = draw(B, K), draw(B, K)
    ps, pt = (zs / T).softmax(1).numpy(), (zt / T).softmax(1).numpy()
    inter, intra = ref.dist(zs, zt, T)
    assert inter.item() == pytest.approx(
        T**2 * (1 - np.mean([np.corrcoef(ps[i], pt[i])[0, 1] for i in range(B)]))
    )
    assert intra.item() == pytest.approx(
        T**2 * (1 - np.mean([np.corrcoef(ps[:, k], pt[:, k])[0, 1] for k in range(K)]))
    )


def test_dist_ignores_the_scale_and_the_offset_of_a_sample() -> None:
    """DIST requires only that student probabilities are an affine map of the teacher's, a > 0."""
    pt = draw(B, K).softmax(1)
    a = torch.rand(B, 1, dtype=torch.float64) * 0.8 + 0.1
    inter, _ = ref.dist((a * pt + (1 - a) / K).log(), pt.log(), 1.0)
    assert inter.abs() < 1e-12
    # The same map for every sample
    inter, intra = ref.dist((0.4 * pt + 0.6 / K).log(), pt.log(), 1.0)
    assert inter.abs() < 1e-12
    assert intra.abs() < 1e-12


def test_nkd_other_is_dkd_other_plus_the_entropy_of_the_teacher() -> None:
    zs, zt, y = draw(B, K), draw(B, K), labels()
    target, other = ref.nkd(zs, zt, y, T)
    rest = torch.stack([torch.cat([zt[i, : y[i]], zt[i, y[i] + 1 :]]) for i in range(B)])
    entropy = torch.distributions.Categorical(logits=rest / T).entropy().mean()
    close(other, ref.dkd(zs, zt, y, T)[1] + T**2 * entropy)
    weights = zt.softmax(1).gather(1, y[:, None])[:, 0]
    close(target, (weights * F.cross_entropy(zs, y, reduction="none")).mean())


def test_wttm_transforms_the_teacher_as_a_temperature_does() -> None:
    zs, zt = draw(B, K), draw(B, K)
    close(ref.wttm(zs, zt, 1.0), ref.soft(zs, zt, 1.0))
    uniform = torch.zeros(B, K, dtype=torch.float64)
    # sum_k (1/K)^0.3 = K^0.7
    close(ref.wttm(zs, uniform, 0.3), K**0.7 * ref.soft(zs, uniform, 1.0))
    one = slice(0, 1)
    weight = (zt[one].softmax(1) ** 0.3).sum()
    close(ref.wttm(zs[one], zt[one], 0.3), weight * ref.soft(zs[one], zt[one] * 0.3, 1.0))


def test_mlkd_is_the_trace_of_the_gram_matrices() -> None:
    """||A'A - C'C||^2 = ||AA'||^2 + ||CC'||^2 - 2 ||AC'||^2, and AA' and A'A have the same norm."""
    zs, zt = draw(B, K), draw(B, K)
    s, t = (zs / T).softmax(1), (zt / T).softmax(1)
    instance, batch, classes = ref.mlkd(zs, zt, T)
    close(instance, ref.soft(zs, zt, T))
    own = (s @ s.T).pow(2).sum() + (t @ t.T).pow(2).sum()
    close(batch * B, own - 2 * ((s @ s.T) * (t @ t.T)).sum())
    close(classes * K, own - 2 * (s @ t.T).pow(2).sum())


def test_tfkd_is_zero_at_its_own_teacher() -> None:
    y = labels()
    u = torch.full((B, K), 0.1 / (K - 1), dtype=torch.float64).scatter(1, y[:, None], 0.9)
    assert ref.tfkd(u / 20, y, 0.9, 20.0).abs() < 1e-14
    zs = draw(B, K)
    close(
        ref.tfkd(zs, y, 0.9, 20.0),
        F.kl_div(zs.log_softmax(1), (u / 20).softmax(1), reduction="batchmean"),
    )


def test_ctkd_temperature_is_a_sigmoid() -> None:
    raw = torch.tensor([-50.0, 0.0, 1.0, 50.0], dtype=torch.float64)
    close(ref.ctkd_temperature(raw, 1.0, 20.0), 1 + 20 * raw.sigmoid())


# ---- feature maps


def test_the_pooling_and_the_resizing_are_those_of_torch() -> None:
    f = draw(2, 3, 7, 7)
    for size in (1, 2, 4, 7):
        close(ref._pooled(f, size, size), F.adaptive_avg_pool2d(f, size))
    for size in (3, 7, 14):
        close(ref._nearest(f, size, size), F.interpolate(f, size=(size, size), mode="nearest"))


def test_attention_ignores_scale_and_order_of_channels() -> None:
    fs, ft = draw(B, 4, 8, 8), draw(B, 6, 4, 4)
    value = ref.attention(fs, ft)
    close(ref.attention(3 * fs, ft[:, torch.randperm(6)]), value)
    qs = F.normalize(F.adaptive_avg_pool2d(fs, 4).pow(2).mean(1).flatten(1))
    qt = F.normalize(ft.pow(2).mean(1).flatten(1))
    close(value, F.mse_loss(qs, qt))
    assert ref.attention(fs, fs) == 0
    close(ref.attention(ft, fs), value)  # either side may be the larger


def test_similarity_ignores_scale_and_rotation() -> None:
    fs, ft = draw(B, 4, 2, 2), draw(B, 9)
    value = ref.similarity(fs, ft)
    close(ref.similarity(-2 * fs.flatten(1) @ rotation(16), 5 * ft @ rotation(9)), value)
    gs, gt = [F.normalize(f.flatten(1) @ f.flatten(1).T) for f in (fs, ft)]
    close(value, (gs - gt).norm() ** 2 / B**2)


def test_correlation_tends_to_the_gaussian_kernel() -> None:
    fs, ft = draw(B, 4, 2, 2), draw(B, 9)

    def kernel(f: Tensor) -> Tensor:
        u = F.normalize(f.flatten(1))
        return torch.exp(-0.4 * torch.cdist(u, u, compute_mode="donot_use_mm_for_euclid_dist") ** 2)

    close(ref.correlation(fs, ft, 0.4, 25), F.mse_loss(kernel(fs), kernel(ft)))
    assert ref.correlation(fs, fs, 0.4, 2) == 0


def test_vid_is_the_log_likelihood_of_a_gaussian() -> None:
    mu, ft, raw = draw(B, 3, 4, 4), draw(B, 3, 4, 4), draw(3)
    deviation = (F.softplus(raw) + 1e-5).sqrt()[None, :, None, None]
    likelihood = torch.distributions.Normal(mu, deviation).log_prob(ft).mean()
    close(ref.vid(mu, ft, raw), -likelihood - 0.5 * math.log(2 * math.pi))


def test_regress3_is_three_convolutions() -> None:
    f = draw(2, 3, 4, 4)
    convs = [
        nn.Conv2d(a, b, 1, bias=False, dtype=torch.float64) for a, b in ((3, 5), (5, 6), (6, 2))
    ]
    net = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])
    close(ref.regress3(f, *[conv.weight for conv in convs]), net(f))


def test_nst_is_its_loops_and_the_distance_of_two_gram_matrices() -> None:
    fs, ft = draw(2, 3, 3, 3), draw(2, 4, 3, 3)

    def term(a: Tensor, b: Tensor) -> float:
        total = 0.0
        for i in range(len(a)):
            for c in a[i].flatten(1):
                for d in b[i].flatten(1):
                    dot = sum(float(c[x]) * float(d[x]) for x in range(9))
                    total += dot**2 / float(c.norm() ** 2 * d.norm() ** 2)
        return total / (a.shape[0] * a.shape[1] * b.shape[1])

    value = ref.nst(fs, ft)
    assert value.item() == pytest.approx(term(ft, ft) + term(fs, fs) - 2 * term(fs, ft))
    close(value, torch.stack([(gram(fs[i]) - gram(ft[i])).pow(2).sum() for i in range(2)]).mean())
    assert ref.nst(fs, fs).abs() < 1e-14


def test_simkd_is_the_mean_squared_error() -> None:
    fs, ft = draw(B, 3, 4, 4), draw(B, 3, 4, 4)
    close(ref.simkd(fs, ft), F.mse_loss(fs, ft))


# ---- relations in the batch


def test_rkd_ignores_scale_rotation_and_translation() -> None:
    fs, ft = draw(B, 4, 2, 2), draw(B, 9)
    value = torch.stack(ref.rkd(fs, ft))
    close(
        torch.stack(ref.rkd(3 * fs.flatten(1) @ rotation(16) + 1, 0.1 * ft @ rotation(9) - 2)),
        value,
    )
    close(torch.stack(ref.rkd(ft, 2 * ft)), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-14)


def test_rkd_is_the_huber_loss_of_distances_and_of_angles() -> None:
    fs, ft = draw(B, 7), draw(B, 9)
    distance, angle = ref.rkd(fs, ft)
    ds, dt = [F.pdist(f) / F.pdist(f).mean() for f in (fs, ft)]
    close(distance, 2 * F.smooth_l1_loss(ds, dt, reduction="sum") / B**2)
    total = 0.0
    for j in range(B):
        for i in range(B):
            for k in range(B):
                if i != j and k != j:
                    cosines = [
                        F.cosine_similarity(f[i] - f[j], f[k] - f[j], dim=0) for f in (fs, ft)
                    ]
                    total += F.smooth_l1_loss(*cosines).item()
    assert angle.item() == pytest.approx(total / B**3)


def test_pkt_is_a_divergence_of_the_rows() -> None:
    fs, ft = draw(B, 4, 2, 2), draw(B, 9)
    value = ref.pkt(fs, ft)
    close(ref.pkt(4 * fs, ft @ rotation(9)), value)
    assert ref.pkt(ft, ft) == 0
    rows = [(F.cosine_similarity(f[:, None], f[None], dim=2) + 1) / 2 for f in (fs.flatten(1), ft)]
    ps, pt = [row / row.sum(1, keepdim=True) for row in rows]
    close(value, F.kl_div(ps.log(), pt, reduction="sum") / B**2, rtol=1e-3, atol=1e-7)
    close(ref.pkt(fs, ft, norm_eps=1e-7), value, rtol=1e-5, atol=0)


def test_crd_of_embeddings_that_no_bank_knows() -> None:
    """Orthogonal to both banks, every score is exp(0): with Z = N, D = 1 / N, the loss is known."""
    n, k = 20, 7
    v = torch.eye(10, dtype=torch.float64)[:B]
    bank = torch.cat(
        [torch.zeros(n, 9, dtype=torch.float64), torch.ones(n, 1, dtype=torch.float64)], dim=1
    )
    index, negatives = torch.arange(B), torch.arange(10, 10 + k)
    z = ref.crd_constant(v, bank, negatives, 0.07, n)
    close(z, torch.tensor(float(n), dtype=torch.float64))
    expected = 2 * (math.log(1 + k) + k * math.log((k + 1) / k))
    for keep in (
        torch.ones(B, k, dtype=torch.bool),
        torch.arange(k)[None] <= torch.arange(B)[:, None],
    ):
        value = ref.crd(v, v, bank, bank, index, negatives, keep, 0.07, z, z)
        assert value.item() == pytest.approx(expected, rel=1e-4)  # eps 1e-7 against K / N
    nothing = torch.zeros(B, k, dtype=torch.bool)
    alone = ref.crd(v, v, bank, bank, index, negatives, nothing, 0.07, z, z)
    assert alone.item() == pytest.approx(2 * math.log(1 + k), rel=1e-4)


def test_crd_is_the_noise_contrastive_estimate_of_a_classifier() -> None:
    """With all negatives kept, up to eps: binary cross-entropy of logits log D - log(K / N).

    Z makes the mean of D equal to 1/N.
    """
    n, k, tau = 20, 7, 0.5
    v_s, v_t, bank_s, bank_t = [F.normalize(draw(size, 4)) for size in (B, B, n, n)]
    index, negatives, keep = (
        torch.arange(B),
        torch.arange(B, B + k),
        torch.ones(B, k, dtype=torch.bool),
    )
    rows = torch.cat([index[:, None], negatives.expand(B, k)], dim=1)
    z_s, z_t = (
        ref.crd_constant(v_s, bank_t, rows, tau, n),
        ref.crd_constant(v_t, bank_s, rows, tau, n),
    )
    expected = 0.0
    for v, bank, z in ((v_s, bank_t, z_s), (v_t, bank_s, z_t)):
        scores = (v[:, None] * bank[rows]).sum(2) / tau - z.log()
        assert scores.exp().mean().item() == pytest.approx(1 / n)
        truth = torch.zeros_like(scores)
        truth[:, 0] = 1
        expected += (
            F.binary_cross_entropy_with_logits(
                scores - math.log(k / n), truth, reduction="sum"
            ).item()
            / B
        )
    assert ref.crd(
        v_s, v_t, bank_s, bank_t, index, negatives, keep, tau, z_s, z_t
    ).item() == pytest.approx(expected, rel=1e-5)
    close(
        ref.crd_constant(v_s, bank_t, negatives, tau, n),
        torch.exp(v_s @ bank_t[negatives].T / tau).mean() * n,
    )


# ---- ReviewKD


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_hcl_of_equal_maps_and_of_an_offset(size: int) -> None:
    f = draw(2, 3, size, size)
    assert ref.hcl(f, f) == 0
    # Every level sees the same offset
    close(ref.hcl(f + 0.5, f), torch.tensor(0.25, dtype=torch.float64))


def test_hcl_of_a_map_whose_pools_vanish() -> None:
    """A board of +1 and -1 has error 1 and pools to nothing: 1 over the sum of the weights used."""
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64)
    for size, weights in ((8, 1.875), (4, 1.75), (2, 1.5), (1, 1.0)):
        board = (signs.repeat(4)[:size, None] * signs.repeat(4)[None, :size])[None, None]
        close(
            ref.hcl(board, torch.zeros_like(board)), torch.tensor(1 / weights, dtype=torch.float64)
        )


def test_abf_is_made_of_the_layers_of_torch() -> None:
    into, mid, out = 3, 4, 5
    conv1, bn1 = nn.Conv2d(into, mid, 1, bias=False), nn.BatchNorm2d(mid)
    attention = nn.Conv2d(2 * mid, 2, 1)
    conv2, bn2 = nn.Conv2d(mid, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
    layers = {"conv1": conv1, "bn1": bn1, "att": attention, "conv2": conv2, "bn2": bn2}
    p = {
        f"{name}.{key}": w
        for name, layer in layers.items()
        for key, w in layer.double().named_parameters()
    }
    for name in ("bn1.weight", "bn1.bias", "bn2.weight", "bn2.bias"):
        nn.init.normal_(p[name])
    x, y = draw(B, into, 8, 8), draw(B, mid, 4, 4)

    deepest, own = bn2(conv2(bn1(conv1(x)))), bn1(conv1(x))
    close(ref.abf(x, None, 8, p), (deepest, own))

    larger = F.interpolate(y, size=(8, 8), mode="nearest")
    gates = attention(torch.cat([own, larger], dim=1)).sigmoid()
    fused = own * gates[:, :1] + larger * gates[:, 1:]
    close(ref.abf(x, y, 8, p), (bn2(conv2(fused)), fused))

    resized = F.interpolate(fused, size=(16, 16), mode="nearest")
    close(ref.abf(x, y, (8, 8), p, out_shape=16), (bn2(conv2(resized)), resized))


# ---- the overhaul of features


def test_ofd_margin_is_an_integral() -> None:
    weight = torch.tensor([1.0, -0.5, 2.0, 0.1, 0.3], dtype=torch.float64)
    bias = torch.tensor([0.0, 0.7, -1.5, -0.2, 0.9], dtype=torch.float64)
    for margin, w, m in zip(
        ref.ofd_margin(weight, bias).tolist(), weight.tolist(), bias.tolist(), strict=True
    ):
        s = abs(w)
        mass, _ = integrate.quad(lambda x, m=m, s=s: stats.norm.pdf(x, m, s), m - 12 * s, 0)
        first, _ = integrate.quad(lambda x, m=m, s=s: x * stats.norm.pdf(x, m, s), m - 12 * s, 0)
        assert margin == pytest.approx(first / mass, rel=1e-6)
        assert margin < 0
    rare = ref.ofd_margin(
        torch.tensor([-0.5], dtype=torch.float64), torch.tensor([1.6], dtype=torch.float64)
    )
    assert rare.item() == -1.5  # P(x < 0) = 0.0007


def test_ofd_counts_what_the_teacher_would_let_through() -> None:
    margin = torch.tensor([-0.5], dtype=torch.float64)

    def one(s: float, t: float) -> float:
        return ref.ofd(
            *[torch.full((1, 1, 1, 1), x, dtype=torch.float64) for x in (s, t)], margin
        ).item()

    assert one(2.0, 1.5) == pytest.approx(0.25)  # a positive teacher: the distance
    assert one(-2.0, 1.5) == pytest.approx(12.25)
    assert one(-2.0, -1.0) == 0  # below the margin: enough
    assert one(-0.6, -0.2) == 0
    assert one(0.1, -1.0) == pytest.approx(0.36)  # above it: down to the margin
    assert one(0.1, -0.2) == pytest.approx(0.09)  # between margin and 0: down to the teacher
    fs, ft, margins = draw(B, 3, 4, 4), draw(B, 3, 4, 4), -torch.rand(3, dtype=torch.float64)
    target = torch.maximum(ft, margins[None, :, None, None])
    counted = (fs > target) | (target > 0)
    close(ref.ofd(fs, ft, margins), ((fs - target) ** 2)[counted].sum() / B)


# ---- gradients

TAPS: dict[str, Callable[[Tensor, Tensor], Tensor | tuple[Tensor, ...]]] = {
    "attention": ref.attention,
    "similarity": ref.similarity,
    "correlation": lambda s, t: ref.correlation(s, t, 0.4, 2),
    "nst": ref.nst,
    "rkd": ref.rkd,
    "pkt": ref.pkt,
    "hcl": ref.hcl,
    "simkd": ref.simkd,
    "ofd": lambda s, t: ref.ofd(s, t, torch.tensor([-0.3, -0.6], dtype=torch.float64)),
}
LOGITS: dict[str, Callable[[Tensor, Tensor], Tensor | tuple[Tensor, ...]]] = {
    "soft": lambda s, t: ref.soft(s, t, T),
    "standardised": lambda s, t: ref.soft(ref.standardised(s), ref.standardised(t), T),
    "dkd": lambda s, t: ref.dkd(s, t, labels()[:3], T),
    "dist": lambda s, t: ref.dist(s, t, T),
    "nkd": lambda s, t: ref.nkd(s, t, labels()[:3], T),
    "wttm": lambda s, t: ref.wttm(s, t, 0.3),
    "mlkd": lambda s, t: ref.mlkd(s, t, T),
}


@pytest.mark.parametrize("name", TAPS)
def test_autograd_goes_through_the_taps(name: str) -> None:
    fs, ft = draw(3, 2, 2, 2), draw(3, 2, 2, 2)
    assert torch.autograd.gradcheck(lambda s: TAPS[name](s, ft), (fs.requires_grad_(),))


@pytest.mark.parametrize("name", LOGITS)
def test_autograd_goes_through_the_logits(name: str) -> None:
    zs, zt = draw(3, 4), draw(3, 4)
    assert torch.autograd.gradcheck(lambda s: LOGITS[name](s, zt), (zs.requires_grad_(),))


def test_autograd_goes_through_what_a_method_learns() -> None:
    zs, zt, raw = draw(3, 4), draw(3, 4), draw(1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda r: ref.soft(zs, zt, ref.ctkd_temperature(r, 1.0, 20.0)).sum(), (raw,)
    )
    f, ft = draw(2, 2, 2, 2), draw(2, 3, 2, 2)
    weights = [draw(*shape, 1, 1).requires_grad_() for shape in ((3, 2), (3, 3), (3, 3))]
    assert torch.autograd.gradcheck(
        lambda r, *w: ref.vid(ref.regress3(f, *w), ft, r), (draw(3).requires_grad_(), *weights)
    )
    v_s, v_t, bank = [F.normalize(draw(size, 4)) for size in (3, 3, 9)]
    keep = torch.tensor([[True, False, True], [True, True, True], [False, False, True]])
    assert torch.autograd.gradcheck(
        lambda s, t: ref.crd(
            s, t, bank, bank, torch.arange(3), torch.tensor([4, 6, 8]), keep, 0.5, 9.0, 8.0
        ),
        (v_s.requires_grad_(), v_t.requires_grad_()),
    )


def test_a_dead_channel_breaks_neither_value_nor_gradient() -> None:
    fs, ft = draw(2, 3, 2, 2), draw(2, 3, 2, 2)
    fs[0, 1] = 0
    fs.requires_grad_()
    (grad,) = torch.autograd.grad(ref.nst(fs, ft) + ref.attention(fs, ft), fs)
    assert grad.isfinite().all()
