"""Every method against its paper.

Each row of TABLE holds a configuration and its loss, as the paper has it (see references.py).
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import references as ref
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd import methods
from kd.cli import CONF
from kd.core import registry
from kd.methods import Batch, MethodContext
from kd.methods.paired import pairs
from kd.methods.rkd import _angles
from kd.models import ModelOutput, Net

CLASSES, SIZE = 5, 6
STUDENT = {"low": (3, 8, 8), "mid": (4, 4, 4), "vec": (7,), "head": (CLASSES,)}
TEACHER = {"low": (6, 8, 8), "mid": (5, 2, 2), "vec": (9,), "head": (CLASSES,)}
LABELS = torch.arange(100) % CLASSES
LABELS[90:] = -1  # held out for validation


def net(low: int, mid: int, stride: int, vector: int) -> Net:
    """A network with the taps of STUDENT or TEACHER for images of 8 x 8."""

    def layer(inputs: int, outputs: int, stride: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU()
        )

    torch.manual_seed(7)
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(mid, vector), nn.ReLU())
    made = Net(
        low=layer(3, low, 1), mid=layer(low, mid, stride), vec=pool, head=nn.Linear(vector, CLASSES)
    )
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight), nn.init.normal_(module.bias)
    return made.double()


NETS = net(3, 4, 2, 7), net(6, 5, 4, 9).eval().requires_grad_(False)
SPEC = MethodContext(STUDENT, TEACHER, CLASSES, 100, *NETS, epochs=10, labels=LABELS)
STAGES = [("low", "low"), ("mid", "mid")]


def hint(x: Tensor, t: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The mean squared error of a regressor: maps are mapped at full size and then averaged."""
    if x.ndim == 2:
        return (x @ weight.T + bias - t).square().mean()
    mapped = torch.einsum("oi,bihw->bohw", weight[:, :, 0, 0], x) + bias[:, None, None]
    return ref.simkd(*ref._same_size(mapped, t))


def feature(c: dict, s: Any, t: Any, y: Tensor, own: dict) -> dict:
    names = [f"regressors.{i}" for i in range(len(c["pairs"]))]
    hints = [
        hint(s.taps[a], t.taps[b], own[f"{n}.weight"], own[f"{n}.bias"])
        for n, (a, b) in zip(names, c["pairs"], strict=True)
    ]
    return {
        "hard": (c["alpha"], ref.hard(s.logits, y)),
        "feature": (c["beta"], sum(hints) / len(hints)),
        "soft": (1 - c["alpha"] - c["beta"], ref.soft(s.logits, t.logits, c["T"])),
    }


def vid(c: dict, s: Any, t: Any, own: dict) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for i, (a, b) in enumerate([*STAGES, ("vec", "vec")]):
        fs, ft = (x if x.ndim == 4 else x[:, :, None, None] for x in (s.taps[a], t.taps[b]))
        fs, ft = ref._same_size(fs, ft)
        mean = ref.regress3(fs, *(own[f"means.{i}.{layer}.weight"] for layer in (0, 2, 4)))
        total = total + ref.vid(mean, ft, own[f"raws.{i}"])
    return total


def ctkd(c: dict, s: Any, t: Any, y: Tensor, own: dict) -> dict:
    """The loss at epoch 2 of 10: half of the warm-up of 0.4 is done.

    The gradient of the temperature is therefore multiplied by -1/2.
    """
    raw = own["raw"]
    T = ref.ctkd_temperature(-0.5 * raw + 1.5 * raw.detach(), c["t_min"], c["t_range"])
    return {"hard": (0.2, ref.hard(s.logits, y)), "soft": (0.7, ref.soft(s.logits, t.logits, T))}


def dkd(c: dict, s: Any, t: Any, y: Tensor, own: dict) -> dict:
    """At epoch 2 of 10 and a warm-up of 0.4, half of it is done."""
    target, other = ref.dkd(s.logits, t.logits, y, c["T"])
    return {
        "hard": (0.9, ref.hard(s.logits, y)),
        "target": (0.5 * 1.5, target),
        "non_target": (0.5 * 3.0, other),
    }


def dist(c: dict, s: Any, t: Any, y: Tensor, own: dict) -> dict:
    inter, intra = ref.dist(s.logits, t.logits, c["T"])
    return {"hard": (0.9, ref.hard(s.logits, y)), "inter": (2.0, inter), "intra": (3.0, intra)}


def nkd(c: dict, s: Any, t: Any, y: Tensor, own: dict) -> dict:
    target, other = ref.nkd(s.logits, t.logits, y, c["T"])
    return {
        "hard": (0.9, ref.hard(s.logits, y)),
        "target": (0.8, target),
        "non_target": (2.0, other),
    }


def rkd(s: Tensor, t: Tensor) -> Tensor:
    distance, angle = ref.rkd(s, t)
    return 2.5 * distance + 5 * angle


def mlkd(c: dict, s: Any, t: Any, y: Tensor, own: dict) -> dict:
    """The first half of the batch are first views.

    KL is summed over the views, as cross-entropy is.
    """
    half = len(y) // 2
    levels = [ref.mlkd(s.logits[:half], t.logits[:half], T) for T in c["temperatures"]]
    instance = [
        ref.soft(s.logits[:half], t.logits[:half], T)
        + ref.soft(s.logits[half:], t.logits[half:], T)
        for T in c["temperatures"]
    ]
    return {
        "hard": (2 * 0.3, ref.hard(s.logits, y)),
        "instance": (2 * 0.9, sum(instance) / 2),
        "batch": (0.9, sum(level[1] for level in levels)),
        "class": (0.9, sum(level[2] for level in levels)),
    }


def crd(c: dict, s: Any, t: Any, y: Tensor, own: dict) -> dict:
    own, n = {k.removeprefix("memories.0."): v for k, v in own.items()}, 90
    torch.manual_seed(3)
    drawn = torch.randint(n, (c["n_negatives"],))
    torch.manual_seed(3)  # the method will draw the same
    index, keep = torch.arange(SIZE), LABELS[drawn] != y[:, None]
    v_s, v_t = (
        torch.stack(
            [
                ref._unit(row)
                for row in x.taps["vec"] @ own[f"{side}.weight"].T + own[f"{side}.bias"]
            ]
        )
        for side, x in (("student", s), ("teacher", t))
    )
    rows = torch.cat([index[:, None], drawn.expand(SIZE, -1)], dim=1)
    banks = [own["student_bank"].clone(), own["teacher_bank"].clone()]
    z = [
        ref.crd_constant(v.detach(), bank, rows, c["tau"], n)
        for v, bank in zip((v_s, v_t), banks[::-1], strict=True)
    ]
    value = ref.crd(v_s, v_t, *(bank[:n] for bank in banks), index, drawn, keep, c["tau"], *z)
    return {"hard": (0.4, ref.hard(s.logits, y)), "crd": (0.7, value)}


def reviewkd(c: dict, s: Any, t: Any, y: Tensor, own: dict) -> dict:
    """At epoch 2 of 10 and a warm-up of 0.4, half of it is done."""
    taps, below, total = ["low.pre", "mid.pre", "vec"], None, torch.zeros((), dtype=torch.float64)
    for n in (2, 1, 0):
        x, wanted = (
            o.taps[taps[n]] if n < 2 else o.taps[taps[n]][:, :, None, None] for o in (s, t)
        )
        level = {
            k.removeprefix(f"levels.{n}."): v
            for k, v in own.items()
            if k.startswith(f"levels.{n}.")
        }
        out, below = ref.abf(x, below, x.shape[2], level, wanted.shape[2:])
        total = total + ref.hcl(out, wanted)
    return {"hard": (0.4, ref.hard(s.logits, y)), "review": (0.5 * 0.7, total)}


def srrl(c: dict, s: Any, t: Any, y: Tensor, own: dict) -> dict:
    p = {
        "weight": own["connect.0.weight"],
        "scale": own["connect.1.weight"],
        "shift": own["connect.1.bias"],
    }
    head = NETS[1].head
    feature, regression = ref.srrl(
        s.taps["vec"], t.taps["vec"], t.logits, p, head.weight, head.bias
    )
    return {
        "hard": (0.4, ref.hard(s.logits, y)),
        "feature": (0.7, feature),
        "regression": (2.0, regression),
    }


def simkd(c: dict, s: Any, t: Any, y: Tensor, own: dict) -> dict:
    x = ref._pooled(s.taps["mid"], 2, 2)
    for conv in (0, 3, 6):
        x = F.conv2d(
            x,
            own[f"projector.{conv}.weight"],
            padding=own[f"projector.{conv}.weight"].shape[2] // 2,
        )
        x = ref._batch_norm(
            x, own[f"projector.{conv + 1}.weight"], own[f"projector.{conv + 1}.bias"]
        ).clamp(min=0)
    return {"hard": (0.4, ref.hard(s.logits, y)), "simkd": (0.7, ref.simkd(x, t.taps["mid"]))}


def ofd(c: dict, s: Any, t: Any, y: Tensor, own: dict) -> dict:
    total = torch.zeros((), dtype=torch.float64)
    for n, (tap, share) in enumerate((("low.pre", 0.5), ("mid.pre", 1.0))):
        fs, ft = ref._same_size(s.taps[tap], t.taps[tap])
        fs = torch.einsum("oi,bihw->bohw", own[f"connectors.{n}.0.weight"][:, :, 0, 0], fs)
        fs = ref._batch_norm(fs, own[f"connectors.{n}.1.weight"], own[f"connectors.{n}.1.bias"])
        norm = NETS[1].stages[tap.removesuffix(".pre")][1]
        total = total + share * ref.ofd(fs, ft, ref.ofd_margin(norm.weight, norm.bias))
    return {"hard": (0.4, ref.hard(s.logits, y)), "ofd": (0.7, total)}


def several(c: dict, s: Any, t: Any, y: Tensor, own: dict) -> dict:
    return {
        "hard": (0.2 + 0.5 * 1.0 + 3 * 0.1, ref.hard(s.logits, y)),
        "logits.soft": (0.8, ref.soft(s.logits, t.logits, 2)),
        "attention.attention": (0.5 * 1000, ref.attention(s.taps["mid"], t.taps["mid"])),
        "logits2.soft": (3 * 0.9, ref.soft(s.logits, t.logits, 4)),
    }


class Row(NamedTuple):
    settings: dict
    reference: Callable[[dict, Any, Any, Tensor, dict], dict]
    zero_when_equal: tuple[
        str, ...
    ] = ()  # terms that vanish when the student says what the teacher says


def soft(
    settings: dict,
    term: Callable[[dict, Tensor, Tensor, Tensor], Tensor],
    weight: float,
    zero: bool = True,
) -> Row:
    """A row of a method whose loss is 0.2 * hard + weight * soft.

    The soft term is term(settings, zs, zt, y).
    """

    def reference(c: dict, s: Any, t: Any, y: Tensor, own: dict) -> dict:
        return {
            "hard": (c["alpha"], ref.hard(s.logits, y)),
            "soft": (weight, term(c, s.logits, t.logits, y)),
        }

    return Row({"alpha": 0.2, **settings}, reference, ("soft",) if zero else ())


def paired(
    name: str, pairs: Any, term: Callable[..., Tensor], used: list[tuple[str, str]], **settings: Any
) -> Row:
    """A row of a method whose loss is hard + 0.7 * a sum over the pairs.

    Each pair adds term(student tap, teacher tap).
    """

    def reference(c: dict, s: Any, t: Any, y: Tensor, own: dict) -> dict:
        each = [term(s.taps[a], t.taps[b]) for a, b in used]
        return {"hard": (0.4, ref.hard(s.logits, y)), name: (0.7, sum(each[1:], each[0]))}

    return Row({"alpha": 0.4, "beta": 0.7, "pairs": pairs, **settings}, reference)


LAST, VECTOR = STAGES[-1:], [("vec", "vec")]
TABLE = {
    "standard": Row({}, lambda c, s, t, y, own: {"hard": (1, ref.hard(s.logits, y))}),
    "label_smoothing": Row(
        {"smoothing": 0.3},
        lambda c, s, t, y, own: {
            "hard": (0.7, ref.hard(s.logits, y)),
            "uniform": (0.3, ref.uniform(s.logits)),
        },
    ),
    "logits": soft({"T": 4.0}, lambda c, zs, zt, y: ref.soft(zs, zt, 4), 0.8),
    "soft_labels": Row(
        {"T": 3.0},
        lambda c, s, t, y, own: {"soft": (1, ref.soft(s.logits, t.logits, 3))},
        ("soft",),
    ),
    "standardized": soft(
        {"beta": 9.0, "T": 2.0},
        lambda c, zs, zt, y: ref.soft(ref.standardised(zs), ref.standardised(zt), 2),
        9.0,
    ),
    "wttm": soft(
        {"beta": 3.0, "power": 0.3}, lambda c, zs, zt, y: ref.wttm(zs, zt, 0.3), 3.0, zero=False
    ),
    "tfkd": soft(
        {"correct": 0.9, "T": 2.0}, lambda c, zs, zt, y: ref.tfkd(zs, y, 0.9, 2), 0.8, zero=False
    ),
    "ctkd": Row(
        {"alpha": 0.2, "beta": 0.7, "t_min": 1.0, "t_range": 4.0, "warmup_fraction": 0.4},
        ctkd,
        ("soft",),
    ),
    "dkd": Row(
        {"alpha": 0.9, "target": 1.5, "non_target": 3.0, "T": 4.0, "warmup_fraction": 0.4},
        dkd,
        ("target", "non_target"),
    ),
    "dist": Row({"alpha": 0.9, "inter": 2.0, "intra": 3.0, "T": 4.0}, dist, ("inter", "intra")),
    "nkd": Row({"alpha": 0.9, "target": 0.8, "non_target": 2.0, "T": 3.0}, nkd),
    "feature": Row(
        {
            "alpha": 0.2,
            "beta": 0.3,
            "T": 2.0,
            "pairs": [["low", "low"], ["mid", "mid"], ["vec", "vec"]],
        },
        feature,
        ("soft",),
    ),
    "attention": paired("attention", "stages", ref.attention, STAGES),
    "similarity": paired("similarity", "last", ref.similarity, LAST),
    "correlation": paired(
        "correlation",
        "penultimate",
        lambda s, t: ref.correlation(s, t, 0.4, 2),
        VECTOR,
        gamma=0.4,
        order=2,
    ),
    "vid": Row(
        {"alpha": 0.4, "beta": 0.7, "pairs": [["low", "low"], ["mid", "mid"], ["vec", "vec"]]},
        lambda c, s, t, y, own: {
            "hard": (0.4, ref.hard(s.logits, y)),
            "vid": (0.7, vid(c, s, t, own)),
        },
    ),
    "rkd": paired("rkd", "penultimate", rkd, VECTOR, distance=2.5, angle=5.0),
    "pkt": paired("pkt", "penultimate", ref.pkt, VECTOR),
    "nst": paired("nst", "stages", ref.nst, STAGES),
    "mlkd": Row(
        {"alpha": 0.3, "beta": 0.9, "temperatures": [2.0, 4.0]},
        mlkd,
        ("instance", "batch", "class"),
    ),
    "function_matching": Row(
        {"T": 1.0},
        lambda c, s, t, y, own: {"soft": (1, ref.soft(s.logits, t.logits, 1))},
        ("soft",),
    ),
    "born_again": soft({"T": 2.0, "generation": 3}, lambda c, zs, zt, y: ref.soft(zs, zt, 2), 0.8),
    "crd": Row(
        {
            "alpha": 0.4,
            "beta": 0.7,
            "embed_dim": 4,
            "n_negatives": 30,
            "tau": 0.2,
            "momentum": 0.5,
            "pairs": "penultimate",
        },
        crd,
    ),
    "reviewkd": Row(
        {"alpha": 0.4, "beta": 0.7, "warmup_fraction": 0.4, "pairs": "stages"}, reviewkd
    ),
    "srrl": Row({"alpha": 0.4, "beta": 0.7, "regression": 2.0}, srrl),
    "simkd": Row({"alpha": 0.4, "beta": 0.7, "factor": 2, "pairs": "last"}, simkd),
    "ofd": Row({"alpha": 0.4, "beta": 0.7, "pairs": "stages"}, ofd),
    "sum": Row(
        {
            "parts": [
                {"name": "logits", "alpha": 0.2, "T": 2.0},
                {"name": "attention", "weight": 0.5, "pairs": "last"},
                {"name": "logits", "weight": 3},
            ]
        },
        several,
        ("logits.soft", "logits2.soft"),
    ),
}


def build(name: str, dtype: torch.dtype = torch.float64) -> methods.Method:
    kind = methods.find(name)
    settings = kind.Config.model_validate({"name": name, **TABLE[name].settings})
    kind.check(settings, SPEC)
    torch.manual_seed(0)
    student, teacher = (copy.deepcopy(net).to(dtype) for net in NETS)
    return kind(settings, replace(SPEC, student_net=student, teacher_net=teacher)).to(dtype)


def outputs(seed: int, shapes: dict, grad: bool = False) -> ModelOutput:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return (
            torch.randn(SIZE, *shape, generator=g, dtype=torch.float64).mul(3).requires_grad_(grad)
        )

    logits, taps = draw(CLASSES), {name: draw(*shape) for name, shape in shapes.items()}
    return ModelOutput(
        logits, taps | {f"{name}.pre": draw(*shape) for name, shape in shapes.items()}
    )


def batch() -> Batch:
    index = torch.arange(SIZE)
    return Batch(torch.zeros(SIZE, 3, 8, 8), index % CLASSES, index, index, epoch=2.0)


def loss(terms: methods.Terms) -> Tensor:
    return sum(
        (weight * value for weight, value in terms.values()), torch.zeros((), dtype=torch.float64)
    )


def test_every_method_has_a_row_here_and_a_yaml() -> None:
    chosen = set(registry.choices("methods"))
    assert not chosen - set(TABLE), (
        f"add a row to TABLE in {__file__} for: {', '.join(sorted(chosen - set(TABLE)))}"
    )
    assert {path.stem for path in (CONF / "method").glob("*.yaml")} == chosen


@pytest.mark.parametrize("name", TABLE)
def test_the_loss_and_its_gradients_are_the_papers(name: str) -> None:
    """With respect to the student's logits and taps, and to what the method trains."""
    method, t = build(name), outputs(2, TEACHER)
    s = outputs(1, STUDENT, grad=True)
    leaves = {"logits": s.logits, **s.taps, **dict(method.named_parameters())}
    own = method.state_dict(keep_vars=True)
    expected = TABLE[name].reference(TABLE[name].settings, s, t, batch().y, own)
    found = method(batch(), s, t)
    assert list(found) == list(expected)
    for term, (weight, value) in expected.items():
        assert found[term][0] == pytest.approx(weight, rel=1e-12)
        assert found[term][1].item() == pytest.approx(value.item(), rel=1e-9)
    ours, theirs = (
        torch.autograd.grad(loss(terms), leaves.values(), allow_unused=True)
        for terms in (found, expected)
    )
    for key, a, b in zip(leaves, ours, theirs, strict=True):
        assert (a is None) == (b is None), key
        if a is not None:
            assert torch.allclose(a, b, rtol=1e-7, atol=1e-10), key
    for key, parameter in method.named_parameters():
        loss(method(batch(), s, t)).backward(inputs=[parameter])
        assert parameter.grad is not None, f"{key} gets no gradient"
        assert parameter.grad.abs().sum() > 0, f"{key} gets no gradient"


@pytest.mark.parametrize("name", TABLE)
def test_only_declared_taps_are_read(name: str) -> None:
    method, s, t = build(name), outputs(1, STUDENT), outputs(2, TEACHER)
    lean = [
        ModelOutput(o.logits, {k: o.taps[k] for k in taps})
        for o, taps in ((s, method.student_taps), (t, method.teacher_taps))
    ]
    found = []
    for said in (lean, (s, t)):
        torch.manual_seed(0)
        found.append(loss(copy.deepcopy(method)(batch(), *said)))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", TABLE)
def test_what_reads_labels_says_so(name: str) -> None:
    """From an image without a label, a method learns the same as from one with a label.

    If it does not, it says that it needs labels. The hard loss is compared on the labelled images.
    """
    kind, s, t = methods.find(name), outputs(1, STUDENT), outputs(2, TEACHER)
    if not kind.needs_teacher:
        return  # it is given labelled images only
    some = replace(batch(), y=torch.where(torch.arange(SIZE) < 2, batch().y, -1))
    needs = kind.needs_labels(build(name).config)
    found = []
    for seen in (batch(), some):
        torch.manual_seed(0)
        try:
            found.append(build(name)(seen, s, t))
        except (RuntimeError, IndexError):
            assert needs
            return
    whole, few = (
        {term: value for term, (_, value) in terms.items() if term != "hard"} for terms in found
    )
    assert needs == any(whole[term] != few[term] for term in whole)
    if "hard" in found[1]:
        value = found[1]["hard"][1]
        assert value.isfinite()
        assert value.item() == pytest.approx(ref.hard(s.logits[:2], some.y[:2]).item() * 2 / SIZE)


@pytest.mark.parametrize("name", TABLE)
def test_terms_vanish_when_the_student_is_the_teacher(name: str) -> None:
    s = outputs(1, STUDENT)
    terms = build(name)(batch(), s, ModelOutput(s.logits, outputs(2, TEACHER).taps))
    for term in TABLE[name].zero_when_equal:
        assert terms[term][1].abs() < 1e-12


@pytest.mark.parametrize("T", [0.001, 1.0, 100.0, 1e4])
@pytest.mark.parametrize("name", TABLE)
def test_extreme_logits_stay_finite(name: str, T: float) -> None:
    """With logits as a network in bfloat16 gives them, as large as the teacher's table can hold.

    The loss is in float32.
    """
    method = build(name, torch.float32)
    if hasattr(method.config, "T"):
        method.config = method.config.model_copy(update={"T": T})
    s, t = (
        ModelOutput(
            (2e4 * o.logits).clamp(-65504, 65504).bfloat16(),
            {k: v.bfloat16() for k, v in o.taps.items()},
        ).float()
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
        ([["nose", "low"]], "student has no tap 'nose'; allowed: low, mid, vec"),
        ([["low", "nose"]], "teacher has no tap 'nose'"),
        ([["low", "vec"]], "pairs a map with a vector"),
    ],
)
def test_feature_refuses_pairs_that_cannot_be(pairs: list, message: str) -> None:
    kind = methods.find("feature")
    config = kind.Config(name="feature", alpha=0.1, beta=0.5, T=1.0, pairs=pairs)
    with pytest.raises(ValueError, match=message):
        kind.check(config, SPEC)


@pytest.mark.parametrize(
    "name", [name for name in TABLE if "standardize" in methods.find(name).Config.model_fields]
)
def test_logits_are_standardised_if_that_is_wanted(name: str) -> None:
    """The compared logits are standardised, and those of the hard loss are not.

    Adding a constant to all logits and scaling all changes only the hard loss.
    """
    method, s, t = build(name), outputs(1, STUDENT), outputs(2, TEACHER)
    method.config = method.config.model_copy(update={"standardize": True})
    terms, moved = (
        method(batch(), s, t),
        method(
            batch(), ModelOutput(2 * s.logits + 1, s.taps), ModelOutput(3 * t.logits - 2, t.taps)
        ),
    )
    for term in terms:
        same = terms[term][1].item() == pytest.approx(moved[term][1].item(), rel=1e-5)
        assert same == (term != "hard")


@pytest.mark.parametrize(
    "wrong", ["first", "[[low, low]]", [], [["low"]], [["low"] * 3], [[1, 2]], 3, None, {}]
)
def test_what_is_no_pairs_is_refused(wrong: Any) -> None:
    with pytest.raises(
        ValueError,
        match=r"should be last, stages, penultimate or \[\[student tap, teacher tap\], \.\.\.\]",
    ):
        methods.find("nst").Config(name="nst", alpha=1, beta=1, pairs=wrong)


def test_pairs_by_word() -> None:
    shapes = {
        "a": (3, 8, 8),
        "b": (4, 8, 8),
        "c": (4, 4, 4),
        "d": (5, 2, 2),
        "v": (6,),
        "w": (7,),
        "head": (5,),
    }
    other = {"x": (2, 8, 8), "y": (2, 4, 4), "pixel": (9, 1, 1), "u": (3,), "head": (5,)}
    spec = MethodContext(shapes, other, 5, 10)
    assert pairs("stages", spec) == [("c", "x"), ("d", "y")]
    assert pairs("last", spec) == [("d", "y")]
    assert pairs("penultimate", spec) == [("w", "u")]
    assert pairs([["a", "u"]], spec) == [("a", "u")]
    flat = MethodContext(shapes, {"tokens": (4, 3), "u": (3,), "head": (5,)}, 5, 10)
    assert pairs("penultimate", flat) == [("w", "u")]
    for word in ("stages", "last"):
        with pytest.raises(ValueError, match="pairs: the teacher has no feature map"):
            pairs(word, flat)


def test_maps_only() -> None:
    kind = methods.find("attention")
    with pytest.raises(
        ValueError, match=r"pairs: the student's vec has shape \[7\]; allowed: maps"
    ):
        kind.check(kind.Config(name="attention", alpha=1, beta=1, pairs="penultimate"), SPEC)


@pytest.mark.parametrize("name", ["dkd", "nkd"])
def test_two_classes_are_too_few_for_the_others(name: str) -> None:
    kind = methods.find(name)
    with pytest.raises(ValueError, match=r"name: .* needs 3 or more, not 2"):
        kind.check(
            kind.Config(name=name, **TABLE[name].settings),
            MethodContext(STUDENT, TEACHER, 2, samples=10),
        )


@pytest.mark.parametrize("kind", ["far from the origin", "twins", "nearly twins", "all the same"])
def test_angles_in_float32(kind: str) -> None:
    """Angles come from products of samples, where rounding could hide a small distance.

    Twins have no direction.
    """
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(8, 6, generator=draw, dtype=torch.float64)
    if kind == "far from the origin":
        x += 1000
    elif kind == "nearly twins":
        x[4:] = x[:4] + 1e-5 * torch.randn(4, 6, generator=draw)
    else:
        x[1 if kind == "twins" else slice(1, None)] = x[0]
    leaf = x.float().requires_grad_()
    found = _angles(leaf)
    (found**2).sum().backward()
    e = F.normalize(x.float().double()[None] - x.float().double()[:, None], dim=2)
    if kind != "nearly twins":
        torch.testing.assert_close(found.double(), e @ e.transpose(1, 2), rtol=0, atol=2e-3)
    assert found.abs().max() < 1.01
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()
    assert leaf.grad.abs().max() < 100


@pytest.mark.parametrize("name", ["feature", "vid", "reviewkd", "ofd", "simkd"])
def test_maps_that_are_learned_from_keep_their_order_in_memory(name: str) -> None:
    """The gradients that a method's own convolutions and norms give keep their order in memory.

    A norm in channels_last is slow with gradients in another order.
    """
    method, s, t = build(name), outputs(1, STUDENT, grad=True), outputs(2, TEACHER)
    method.to(memory_format=torch.channels_last)
    seen = []

    def watch(_: nn.Module, __: Any, y: Tensor) -> None:
        y.register_hook(
            lambda grad: seen.append(grad.is_contiguous(memory_format=torch.channels_last))
        )

    for module in method.modules():
        # Those of reviewkd: small, and cut in two
        gates = isinstance(module, nn.Conv2d) and module.out_channels == 2
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d) and not gates:
            module.register_forward_hook(watch)
    for taps in (s.taps, t.taps):
        taps.update(
            {
                k: x.contiguous(memory_format=torch.channels_last)
                for k, x in taps.items()
                if x.ndim == 4
            }
        )
    loss(method(batch(), s, t)).backward()
    assert seen
    assert all(seen)
