"""Every method: its row below holds a configuration and its loss, written again in float64 NumPy from the paper."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from kd import methods, registry
from kd.cli import CONF
from kd.methods import Batch, Spec
from kd.models import Out

CLASSES, SIZE = 5, 6
STUDENT = {"low": (3, 8, 8), "mid": (4, 4, 4), "vec": (7,)}
TEACHER = {"low": (6, 8, 8), "mid": (5, 2, 2), "vec": (9,)}
SPEC = Spec(STUDENT, TEACHER, CLASSES, samples=100)


# ---- references: plain loops and formulas, sharing nothing with kd


def softmax(z: np.ndarray) -> np.ndarray:
    return np.exp(z - z.max()) / np.exp(z - z.max()).sum()


def cross_entropy(z: np.ndarray, y: np.ndarray) -> float:
    return float(np.mean([-np.log(softmax(row)[label]) for row, label in zip(z, y, strict=True)]))


def soft(zs: np.ndarray, zt: np.ndarray, T: float) -> float:
    """The mean over the batch of T^2 sum_k p_k (log p_k - log q_k)."""
    total = 0.0
    for row_s, row_t in zip(zs, zt, strict=True):
        q, p = softmax(row_s / T), softmax(row_t / T)
        total += sum(p[k] * (np.log(p[k]) - np.log(q[k])) for k in range(len(p)))
    return T * T * total / len(zs)


def pooled(x: np.ndarray, to: int) -> np.ndarray:
    k = x.shape[-1] // to
    return x.reshape(*x.shape[:2], to, k, to, k).mean((3, 5))


def hint(x: np.ndarray, t: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> float:
    """The mean squared error of a regressor, with maps first mapped at full size and then averaged."""
    if x.ndim == 2:
        return float(np.mean((x @ weight.T + bias - t) ** 2))
    mapped = np.einsum("oi,bihw->bohw", weight[:, :, 0, 0], x) + bias[:, None, None]
    to = min(x.shape[-1], t.shape[-1])
    return float(np.mean((pooled(mapped, to) - pooled(t, to)) ** 2))


def feature_reference(c: dict, s: Any, t: Any, y: np.ndarray, own: dict) -> dict:
    names = [f"regressors.{i}" for i in range(len(c["pairs"]))]
    hints = [
        hint(s.taps[a], t.taps[b], own[f"{n}.weight"], own[f"{n}.bias"])
        for n, (a, b) in zip(names, c["pairs"], strict=True)
    ]
    return {
        "hard": (c["alpha"], cross_entropy(s.logits, y)),
        "feature": (c["beta"], np.mean(hints)),
        "soft": (1 - c["alpha"] - c["beta"], soft(s.logits, t.logits, c["T"])),
    }


class Row(NamedTuple):
    settings: dict
    reference: Callable[[dict, Any, Any, np.ndarray, dict], dict]
    zero_when_equal: tuple[str, ...] = ()  # terms that vanish when the student says what the teacher says


TABLE = {
    "standard": Row({}, lambda c, s, t, y, own: {"hard": (1, cross_entropy(s.logits, y))}),
    "logits": Row(
        {"alpha": 0.3, "T": 4.0},
        lambda c, s, t, y, own: {
            "hard": (0.3, cross_entropy(s.logits, y)),
            "soft": (0.7, soft(s.logits, t.logits, 4)),
        },
        ("soft",),
    ),
    "feature": Row(
        {"alpha": 0.2, "beta": 0.3, "T": 2.0, "pairs": [["low", "low"], ["mid", "mid"], ["vec", "vec"]]},
        feature_reference,
        ("soft",),
    ),
}


def build(name: str) -> methods.Method:
    kind = methods.find(name)
    settings = kind.Config.model_validate({"name": name, **TABLE[name].settings})
    kind.check(settings, SPEC)
    torch.manual_seed(0)
    return kind(settings, SPEC).double()


def outputs(seed: int, shapes: dict, grad: bool = False) -> Out:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(SIZE, *shape, generator=g, dtype=torch.float64).mul(3).requires_grad_(grad)

    return Out(draw(CLASSES), {name: draw(*shape) for name, shape in shapes.items()})


def batch() -> Batch:
    index = torch.arange(SIZE)
    return Batch(torch.zeros(SIZE, 3, 8, 8), index % CLASSES, index, index, epoch=0.0)


def as_numpy(out: Out) -> Out:
    return Out(out.logits.detach().numpy(), {k: v.detach().numpy() for k, v in out.taps.items()})


def loss(terms: methods.Terms) -> Tensor:
    return sum((weight * value for weight, value in terms.values()), torch.zeros((), dtype=torch.float64))


def test_every_method_has_a_row_here_and_a_yaml() -> None:
    chosen = set(registry.choices("methods"))
    assert not chosen - set(TABLE), f"add a row to TABLE in {__file__} for: {', '.join(sorted(chosen - set(TABLE)))}"
    assert {path.stem for path in (CONF / "method").glob("*.yaml")} == chosen


@pytest.mark.parametrize("name", TABLE)
def test_the_loss_is_the_papers(name: str) -> None:
    method, s, t = build(name), outputs(1, STUDENT), outputs(2, TEACHER)
    own = {k: v.numpy() for k, v in method.state_dict().items()}
    expected = TABLE[name].reference(TABLE[name].settings, as_numpy(s), as_numpy(t), batch().y.numpy(), own)
    found = method(batch(), s, t)
    assert list(found) == list(expected)
    for term, (weight, value) in expected.items():
        assert found[term][0] == pytest.approx(weight, rel=1e-12)
        assert found[term][1].item() == pytest.approx(value, rel=1e-10)


@pytest.mark.parametrize("name", TABLE)
def test_the_gradient_is_the_losses(name: str) -> None:
    method, t = build(name), outputs(2, TEACHER)
    s = outputs(1, STUDENT, grad=True)
    used = [s.logits, *(s.taps[name] for name in method.student_taps)]

    def of(logits: Tensor, *taps: Tensor) -> Tensor:
        return loss(method(batch(), Out(logits, dict(zip(method.student_taps, taps, strict=True))), t))

    assert torch.autograd.gradcheck(of, used)
    loss(method(batch(), s, t)).backward()
    for key, parameter in method.named_parameters():
        assert parameter.grad is not None, f"{key} gets no gradient"
        assert parameter.grad.abs().sum() > 0, f"{key} gets no gradient"


@pytest.mark.parametrize("name", TABLE)
def test_only_declared_taps_are_read(name: str) -> None:
    method, s, t = build(name), outputs(1, STUDENT), outputs(2, TEACHER)
    lean = [
        Out(o.logits, {k: o.taps[k] for k in taps}) for o, taps in ((s, method.student_taps), (t, method.teacher_taps))
    ]
    assert loss(method(batch(), *lean)) == loss(method(batch(), s, t))


@pytest.mark.parametrize("name", TABLE)
def test_terms_vanish_when_the_student_is_the_teacher(name: str) -> None:
    s = outputs(1, STUDENT)
    terms = build(name)(batch(), s, Out(s.logits, outputs(2, TEACHER).taps))
    for term in TABLE[name].zero_when_equal:
        assert terms[term][1].abs() < 1e-12


@pytest.mark.parametrize("T", [0.001, 1.0, 100.0, 1e4])
@pytest.mark.parametrize("name", TABLE)
def test_extreme_logits_stay_finite(name: str, T: float) -> None:
    """As a network in bfloat16 gives them, and as large as the teacher's table can hold: the loss is in float32."""
    method = build(name).float()
    if hasattr(method.config, "T"):
        method.config = method.config.model_copy(update={"T": T})
    s, t = (
        Out((2e4 * o.logits).clamp(-65504, 65504).bfloat16(), {k: v.bfloat16() for k, v in o.taps.items()}).float()
        for o in (outputs(1, STUDENT), outputs(2, TEACHER))
    )
    s.logits.requires_grad_()
    total = loss(method(batch(), s, t))
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(s.logits.grad).all()


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([["nose", "low"]], "student has no tap 'nose'; it has low, mid, vec"),
        ([["low", "nose"]], "teacher has no tap 'nose'"),
        ([["low", "vec"]], "pairs a map with a vector"),
    ],
)
def test_feature_refuses_pairs_that_cannot_be(pairs: list, message: str) -> None:
    kind = methods.find("feature")
    config = kind.Config(name="feature", alpha=0.1, beta=0.5, T=1.0, pairs=pairs)
    with pytest.raises(ValueError, match=message):
        kind.check(config, SPEC)
