"""Every method in a run: what it trains, saves and ships; several teachers, or one's own."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run
from torch import Tensor

import kd as package
from kd import data, methods, models
from kd.config.schema import Config, run_dir
from kd.core import registry
from kd.core.errors import UserError
from kd.core.interleave import RunCache, run_interleaved
from kd.data import augment as views
from kd.data.loader import batches
from kd.models import weights
from kd.models.ensemble import Ensemble
from kd.report import tables
from kd.training import metrics
from kd.training.device import resolve
from kd.training.run import TrainingRun, build_components
from kd.training.teacher import TeacherForward
from kd.training.teacher_cache import TeacherCache, TeacherCacheSpec, key

ALL = registry.choices("methods")
QUICK = {"crd": ["method.n_negatives=64", "method.embed_dim=8"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")  # one teacher for all


@pytest.fixture
def small(composed: Callable, place: Path) -> Callable[..., Config]:
    def compose(*words: str) -> Config:
        found: Config = composed(*words, "optimizer.lr=0.001", f"paths.runs={place}")
        return found

    return compose


def seen(config: Config) -> Any:
    device = resolve("cpu", config.precision, Path(config.paths.cache), False, False)
    return data.load(
        config.data, config.description, Path(config.paths.cache), device.torch
    ), device


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_a_run_trains_saves_and_ships_what_it_should(name: str, small: Callable) -> None:
    config = small(f"method={name}", *QUICK.get(name, []))
    result, folder = run(config), run_dir(config)
    images, device = seen(config)
    fresh = build_components(config, images, device, RunCache())

    own = fresh.method.state_dict()
    assert (folder / "method.safetensors").exists() == bool(own)
    if own:
        trained = weights.safe_open(folder / "method.safetensors", "pt")
        assert set(trained.keys()) == set(own)
        for key, _ in fresh.method.named_parameters():
            assert not torch.equal(trained.get_tensor(key), own[key]), f"{key} was not trained"
    assert result["size"]["method_params"] == metrics.count(fresh.method.parameters())

    shipped = package.load(folder)
    logits = metrics.predict(shipped, images.test, device)
    for what, value in metrics.metrics(logits, images.test.targets).items():
        assert value == pytest.approx(result["metrics"][f"test_{what}"], abs=1e-3), what
    assert metrics.count(shipped.parameters()) == result["size"]["params"]
    if name != "simkd":
        assert set(shipped.net.state_dict()) == set(fresh.student.state_dict()), (
            "the student, and nothing else"
        )


def test_simkd_ships_the_teachers_last_layers(small: Callable, tmp_path: Path) -> None:
    config = small("method=simkd")
    run(config)
    shipped, taught = (
        package.load(run_dir(config)).net,
        package.load(run_dir(config.as_teacher())).net,
    )
    assert list(shipped.stages)[-3:] == ["projector", "teacher_hidden", "teacher_head"]
    for stage in ("hidden", "head"):
        own = taught.stages[stage].state_dict()
        assert all(
            torch.equal(v, own[k])
            for k, v in shipped.stages[f"teacher_{stage}"].state_dict().items()
        )
    trained = weights.safe_open(run_dir(config) / "method.safetensors", "pt")
    for name, tensor in shipped.stages["projector"].state_dict().items():
        assert torch.equal(tensor, trained.get_tensor(f"projector.{name}")), name
    card = json.loads(
        weights.safe_open(run_dir(config) / "student.safetensors", "pt").metadata()["kd"]
    )
    card["graft"]["teacher_tap"] = "nose"
    weights.save(shipped, tmp_path / "bad.safetensors", card)
    with pytest.raises(
        UserError, match=r"the metadata in .*bad.safetensors: graft: there is no tap 'nose'"
    ):
        package.load(tmp_path / "bad.safetensors")


BAD = {  # what is typed: how the one line begins
    "method=simkd method.pairs=stages": "method.pairs: simkd takes one pair",
    "method=simkd method.pairs=[[conv1,conv2],[pool2,pool2]]": "method.pairs: simkd takes one pair",
    "method=simkd method.pairs=[[pool2,conv4]]": (
        "method.pairs: the student's pool2 is [8, 8, 8], smaller than the"
    ),
    "method=simkd method.pairs=[[pool2.pre,pool2]]": (
        "method.pairs: simkd cuts the student after pool2.pre, which"
    ),
    "method=simkd model@teacher=torchvision": (
        "method.pairs: simkd cuts the teacher after layer3, which must be"
    ),
    "method=srrl model@teacher=torchvision teacher.model=squeezenet1_1": (
        "method.name: srrl needs a teacher whose"
    ),
    "method=ofd method.pairs=[[pool2,pool2]]": (
        "method.pairs: the teacher's pool2 does not come from a batch norm"
    ),
    "method=ofd model@student=vit_tiny student.patch=8": (
        "method.pairs: no map of the student comes from a batch norm"
    ),
    "method=feature teacher.ensemble.size=2": (
        "method.pairs: the teacher has no feature map to tap (teacher.ensemble.size=2:"
    ),
    "method=logits teacher.ensemble.size=0": (
        "teacher.ensemble.size: should be greater than or equal to 1, got 0"
    ),
    "method=logits teacher.ensemble.average=votes": (
        "teacher.ensemble.average: should be 'logits' or 'probabilities', got 'votes'"
    ),
    "method=logits teacher.ensemble.size=2 teacher.checkpoint=x": (
        "teacher.ensemble.size: teacher.checkpoint holds a single teacher, not"
    ),
    "method=born_again teacher.ensemble.size=2": (
        "teacher.ensemble.size: born_again is taught only by its own previous generation; "
    ),
    "method=born_again teacher.checkpoint=x": (
        "teacher.checkpoint: born_again is taught only by its own previous generation"
    ),
    "method=born_again method.generation=0": (
        "method.generation: should be greater than or equal to 1, got 0"
    ),
    "method=mlkd method.temperatures=[]": "method.temperatures: ",
    "method=mlkd method.temperatures=[1,0]": (
        "method.temperatures.1: should be greater than or equal to 0.001, got 0"
    ),
    "method=crd method.n_negatives=0": (
        "method.n_negatives: should be greater than or equal to 1, got 0"
    ),
    "method=crd method.pairs=last": (
        "method.pairs: the student's pool2 has shape [8, 8, 8]; allowed: vectors"
    ),
    "method=sum method.parts=[]": "method.parts: ",
    "method=sum method.parts=[nose]": "method.parts.0: 'nose' is not known; allowed: attention, ",
    "method=sum method.parts=[3]": (
        "method.parts.0: should be the name of a method or {name: ..., weight: ...,"
    ),
    "method=sum method.parts=[logits,{name:rkd,weight:-1}]": (
        "method.parts.1: rkd.weight: should be a number from 0 to"
    ),
    "method=sum method.parts=[{name:logits,T:0}]": "method.parts.0: logits.T: ",
    "method=sum method.parts=[{name:logits,beta:0}]": "method.parts.0: logits.beta: ",
    "method=sum method.parts=[{name:nst,pairs:[[nose,pool2]]}]": (
        "method.parts: nst.pairs: the student has no tap"
    ),
    **{
        f"method=sum method.parts=[{name}]": f"method.parts.0: {name} "
        for name in ("sum", "mlkd", "simkd", "born_again", "function_matching", "standard", "tfkd")
    },
}


@pytest.mark.parametrize("words", BAD)
def test_a_mistake_is_one_line(words: str, composed: Callable) -> None:
    with pytest.raises(UserError) as told:
        composed("data=digits", *words.split(), small=False)
    assert str(told.value).startswith(BAD[words])
    assert str(told.value).isprintable()


def test_parts_have_the_defaults_of_their_files(composed: Callable) -> None:
    config = composed("method=sum", "method.parts=[{name:logits,weight:2,T:1.5},vid]")
    assert config.method.model_dump()["parts"] == [
        {"weight": 2, "name": "logits", "alpha": 0.1, "T": 1.5, "standardize": False},
        {"weight": 1.0, "name": "vid", "alpha": 1.0, "beta": 1.0, "pairs": "stages"},
    ]
    same = "[{name:logits,weight:2,T:1.5,alpha:0.1},{name:vid}]"
    assert composed("method=sum", f"method.parts={same}").identity() == config.identity()


# ---- contrast


def test_a_memory_keeps_the_batch_and_draws_from_what_is_trained_on(composed: Callable) -> None:
    config = composed("method=crd", "method.n_negatives=50", "method.embed_dim=4")
    labels = torch.arange(100) % 10
    labels[60:] = -1
    shapes = {"vec": (5,), "head": (10,)}
    method = methods.find("crd")(
        config.method, methods.MethodContext(shapes, shapes, 10, 100, labels=labels)
    )
    (memory,) = method.memories
    out = [models.ModelOutput(torch.randn(6, 10), {"vec": torch.randn(6, 5)}) for _ in "st"]
    index = torch.tensor([3, 9, 20, 41, 55, 59])
    batch = methods.Batch(torch.zeros(6, 3, 4, 4), labels[index], index, index, 0.0)
    before = memory.student_bank.clone()
    method(batch, *out)
    moved = (memory.student_bank != before).any(dim=1)
    assert moved.nonzero()[:, 0].tolist() == index.tolist()
    vector = torch.nn.functional.normalize(memory.student(out[0].taps["vec"]), dim=1)
    expected = torch.nn.functional.normalize(0.5 * before[index] + 0.5 * vector, dim=1)
    assert torch.allclose(memory.student_bank[index], expected, atol=1e-6)
    constants = memory.constants.clone()
    assert (constants > 0).all()
    method(batch, *out)
    assert torch.equal(memory.constants, constants), "the first batch sets them"
    with torch.no_grad():  # what is not trained on is never looked at
        memory.student_bank[60:], memory.teacher_bank[60:] = float("nan"), float("nan")
    assert method(batch, *out)["crd"][1].isfinite()


# ---- blends


def test_blends_are_pure_functions_of_seed_epoch_and_sample(composed: Callable) -> None:
    config = composed("method=function_matching")
    images, _ = seen(config)
    augment = config.data.augment

    def whole(size: int, seed: int = 1, epoch: int = 2, start: int = 0) -> dict[int, Tensor]:
        parts = batches(images.train, size, seed, epoch, augment, start=start, mixed=True)
        return {int(i): x for part in parts for i, x in zip(part.index, part.x, strict=True)}

    first, other, later = whole(64), whole(50), whole(64, start=7)
    shared = set(first) & set(other)
    assert len(shared) > 1000
    assert all(torch.equal(first[i], other[i]) for i in shared)
    assert all(torch.equal(first[i], x) for i, x in later.items())
    again = whole(64, epoch=3)
    assert not any(torch.equal(first[i], again[i]) for i in set(first) & set(again))

    index = images.train.index
    other_, view, share = views.mixup_params(1, 2, index, index, augment)
    assert set(other_.tolist()) <= set(index.tolist()), "no validation image"
    assert 0 <= share.min() < 0.01 < 0.24 < share.mean() < 0.26 < 0.49 < share.max() < 0.5
    row = int(index[5])
    own = views.apply_view(
        images.train.images, index[5:6], views.sample_views(1, 2, index[5:6], augment), augment
    ).float()
    mate = views.apply_view(images.train.images, other_[5:6], view[5:6], augment).float()
    blend = (1 - share[5]) * own + share[5] * mate
    blend = (blend / 255 - images.train.mean) / images.train.std
    assert row in first
    assert torch.allclose(first[row], blend[0].permute(2, 0, 1), atol=1e-5)


@pytest.mark.slow
def test_what_the_teacher_says_of_blends_is_kept_for_their_epoch_alone(
    composed: Callable, tmp_path: Path
) -> None:
    config = composed("method=function_matching")
    images, device = seen(config)
    torch.manual_seed(0)
    net = models.build(config.teacher, 10, 32).eval().requires_grad_(False)
    live, augment = TeacherForward(net, [], device), config.data.augment
    asked: list[int] = []

    def compare(seed: int, mixed: bool = True) -> TeacherCache:
        made = TeacherCache(
            live,
            images.train,
            augment,
            seed,
            1,
            TeacherCacheSpec(tmp_path, 1.0, False, False),
            mixed,
        )
        for epoch in range(2):
            for batch in batches(images.train, 128, seed, epoch, augment, mixed=mixed):
                now = live(batch).logits.half().float()
                assert (made(batch).logits - now).abs().max() <= 2e-3 * now.abs().max()
        asked.append(made.computed)
        return made

    compare(0), compare(1, mixed=False), compare(0), compare(1)
    assert asked[0] > 0
    assert asked[2] == 0, "the same seed finds all of it"
    assert asked[3] == asked[0], "another seed nothing"
    fewer = replace(images.train, index=images.train.index[:-1])
    for mixed in (False, True):  # blends are of what is trained on
        names = {
            key("w", config.teacher.network, "c", split, augment, device, mixed)
            for split in (images.train, fewer)
        }
        assert len(names) == (2 if mixed else 1)


# ---- teachers


def test_an_ensemble_is_the_mean_of_its_members(composed: Callable) -> None:
    config = composed("method=logits")
    nets = []
    for seed in range(3):
        torch.manual_seed(seed)
        nets.append(models.build(config.teacher, 10, 32).eval())
    x = torch.randn(4, 3, 32, 32)
    each = torch.stack([net(x) for net in nets])
    assert torch.allclose(Ensemble(nets, "logits")(x), each.mean(dim=0), atol=1e-6)
    said = Ensemble(nets, "probabilities")(x)
    assert torch.allclose(said.softmax(dim=1), each.softmax(dim=2).mean(dim=0), atol=1e-6)
    assert torch.allclose(said.exp().sum(dim=1), torch.ones(4), atol=1e-5), (
        "they are log probabilities"
    )
    assert Ensemble(nets, "logits").shapes(32) == {"head": (10,)}
    with pytest.raises(RuntimeError, match="an ensemble has no taps; requested: pool2"):
        Ensemble(nets, "logits").forward_taps(x, ["pool2"])


@pytest.mark.slow
def test_a_student_of_several_teachers(small: Callable, place: Path) -> None:
    config = small(
        "method=logits",
        "teacher.ensemble.size=2",
        "teacher.ensemble.average=probabilities",
        "teacher.seed=7",
    )
    result = run(config)
    assert [one.seed for one in config.as_teachers()] == [7, 8]
    folders = [run_dir(one) for one in config.as_teachers()]
    assert result["teacher"]["source"] == [
        str(folder / "student.safetensors") for folder in folders
    ]
    assert result["teacher"]["name"] == "2 x cnn-2"
    assert (
        result["teacher"]["params"]
        == 2 * json.loads((folders[0] / "result.json").read_text())["size"]["params"]
    )
    images, device = seen(config)
    nets = [package.load(folder).net for folder in folders]
    both = metrics.predict(Ensemble(nets, "probabilities"), images.test, device)
    accuracy = metrics.metrics(both, images.test.targets)["accuracy"]
    assert result["teacher"]["metrics"]["test_accuracy"] == pytest.approx(accuracy, abs=1e-3)
    words = ["method=logits", "teacher.seed=7"]
    others = [
        small(*words),
        small(*words, "teacher.ensemble.size=2"),
        small(*words, "teacher.ensemble.size=2", "teacher.seed=8"),
    ]
    assert len({config.identity(), *(other.identity() for other in others)}) == 4
    assert (
        small(*words, "teacher.ensemble.average=probabilities").identity() == others[0].identity()
    ), "of one there is no mean"


@pytest.mark.slow
def test_generations_teach_one_another(small: Callable) -> None:
    config = small("method=born_again", "method.generation=2", "teacher.seed=5", "seed=3")
    second, first = config.as_teacher(), config.as_teacher().as_teacher()
    assert (second.method.name, second.method.generation, second.seed) == ("born_again", 1, 6)
    assert (first.method.name, first.seed, first.student) == ("standard", 5, config.student)
    assert first.optimizer == config.optimizer
    assert (first.student.epochs, first.batch_size) == (config.student.epochs, config.batch_size)
    result = run(config)
    assert result["teacher"]["source"] == str(run_dir(second) / "student.safetensors")
    assert result["teacher"]["name"] == result["student"]
    between = json.loads((run_dir(second) / "result.json").read_text())
    assert between["teacher"]["source"] == str(run_dir(first) / "student.safetensors")
    other = small(
        "method=born_again", "method.generation=2", "teacher.seed=5", "seed=3", "teacher.epochs=9"
    )
    assert other.identity() == config.identity(), "what teaches is the student's own recipe"


@pytest.mark.slow
def test_generations_that_train_together_keep_their_own_teachers(small: Callable) -> None:
    """Their configurations differ only in the generation, and they see the same batches."""
    words = [
        ["method=born_again", f"method.generation={n}", "teacher.seed=5", "student.epochs=2"]
        for n in (1, 2)
    ]
    alone = [run(small(*one))["metrics"] for one in words]
    shared = RunCache()
    with shared.signals.installed():
        again = [
            TrainingRun(small(*one, "rerun=true"), cache=shared, packed=2).steps() for one in words
        ]
        assert [end["metrics"] for end in run_interleaved(again)] == alone


@pytest.mark.slow
def test_a_table_tells_settings_apart_by_the_teacher_only_where_it_teaches(
    small: Callable, tmp_path: Path
) -> None:
    runs = [
        small(f"method={name}", "student.epochs=1") for name in ("logits", "born_again", "standard")
    ]
    for config in runs:
        run(config)
    found = tables.load_tables([run_dir(config) for config in runs])
    assert sorted(found.runs["setting"]) == ["born_again", "logits", "standard"]
