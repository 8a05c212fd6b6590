"""Every mistake that a user can type ends in one line that names the key, before any work.

The exit code is 2.
"""

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir

from kd import cli, data, models
from kd.config.validate import validate_config
from kd.core.errors import RENAMED, UserError
from kd.core.registry import choices
from kd.methods import MethodContext
from kd.models import weights
from kd.optim import Schedule

METHODS = choices("methods")
DIGITS = [
    "data=digits",
    "student.epochs=1",
    "teacher.epochs=1",
    "student.scale=1",
    "teacher.scale=2",
    "device=cpu",
]

BAD = {  # what is typed: what the one line must say
    "unknown key": (
        "method.temprature=3",
        "method.temprature: unknown key; did you mean method.T? Valid: name, alpha, T",
    ),
    "unknown key, forced in": (
        "+method.temprature=3",
        "method.temprature: unknown key; did you mean method.T? Valid: alpha, T, name, standardize",
    ),
    "near miss, forced in": (
        "+optimizer.momentun=0.9",
        "optimizer.momentun: unknown key; did you mean optimizer.momentum? Valid: ",
    ),
    "in another case": (
        "method.t=3",
        "method.t: unknown key; did you mean method.T? Valid: name, alpha, T",
    ),
    "a group's name": ("metod=dkd", "metod: unknown key; did you mean method? Valid: "),
    "nothing near": ("method.zzz=3", "method.zzz: unknown key; valid: name, alpha, T"),
    "near miss at the top": ("+sed=1", "sed: unknown key; did you mean seed? Valid: "),
    "near miss in the student": (
        "+student.epoch=1",
        "student.epoch: unknown key; did you mean student.epochs? Valid: ",
    ),
    "unknown choice": (
        "method=logit",
        "Could not find 'method/logit' Available options in 'method': " + " ".join(METHODS),
    ),
    "unknown name": (
        "method.name=nope",
        "method.name: 'nope' is not known; allowed: " + ", ".join(METHODS),
    ),
    "unknown model name": ("student.name=nope", "student.name: 'nope' is not known; allowed: cnn"),
    "word for a number": ("method.T=hot", "method.T: should be a valid number, got 'hot'"),
    "temperature nan": ("method.T=nan", "method.T: should be a finite number, got nan"),
    "temperature inf": ("method.T=inf", "method.T: should be a finite number, got inf"),
    "temperature zero": ("method.T=0", "method.T: should be greater than or equal to 0.001, got 0"),
    "alpha above one": (
        "method.alpha=1.5",
        "method.alpha: should be less than or equal to 1, got 1.5",
    ),
    "alpha below zero": (
        "method.alpha=-0.1",
        "method.alpha: should be greater than or equal to 0, got -0.1",
    ),
    "alpha and beta": (
        "method=feature method.alpha=0.6 method.beta=0.6",
        "method: alpha + beta must be <= 1, got 0.6 + 0.6",
    ),
    "half an epoch": ("student.epochs=2.5", "student.epochs: should be a valid integer, got 2.5"),
    "no epoch": ("student.epochs=0", "student.epochs: should be greater than 0, got 0"),
    "truth for a number": ("optimizer.lr=true", "optimizer.lr: should be a valid number, got True"),
    "negative seed": ("seed=-1", "seed: should be greater than or equal to 0, got -1"),
    "no width": ("student.scale=0", "student.scale: should be greater than or equal to 1, got 0"),
    "learning rate zero": ("optimizer.lr=0", "optimizer.lr: should be greater than 0, got 0"),
    "teacher's learning rate": (
        "teacher.optimizer.lr=-1",
        "teacher.optimizer.lr: should be greater than 0, got -1",
    ),
    "unknown optimizer": (
        "optimizer=lion",
        "Could not find 'optimizer/lion' Available options in 'optimizer': adam",
    ),
    "nesterov alone": ("optimizer.momentum=0", "optimizer: nesterov=true needs momentum > 0"),
    "outputs of another order": (
        "teacher.outputs=shuffled",
        "teacher.outputs: should be 'aligned' or 'misaligned', got 'shuffled'",
    ),
    "misaligned blends": (
        "method=function_matching teacher.outputs=misaligned",
        "teacher.outputs: function_matching blends images and cannot be misaligned; "
        "allowed: aligned",
    ),
    "no label": (
        "student.label_fraction=0",
        "student.label_fraction: should be greater than 0, got 0",
    ),
    "too few labels": (
        "student.label_fraction=0.001",
        "student.label_fraction: 0.001 of 1,237 images leaves 1 labelled; "
        "at least 10 are needed (one per class)",
    ),
    "labels that are needed": (
        "method=dkd student.label_fraction=0.5",
        "student.label_fraction: dkd needs the label of every image; allowed: 1",
    ),
    "labels of generations": (
        "method=born_again student.label_fraction=0.5",
        "student.label_fraction: each generation of born_again would get other labelled images; "
        "allowed: 1",
    ),
    "labels that a part needs": (
        "method=sum method.parts=[logits,nkd] student.label_fraction=0.5",
        "student.label_fraction: sum needs the label of every image; allowed: 1",
    ),
    "padding": (
        "data.augment.padding_mode=wrap",
        "data.augment.padding_mode: should be 'zeros', 'reflect' or 'edge', got 'wrap'",
    ),
    "validation takes all": (
        "data.val_size=1437",
        "data.val_size: 1437 leaves nothing to train on; allowed: 0 to 1436",
    ),
    "tap": (
        "method=feature method.pairs=[[nose,pool2]]",
        "method.pairs: the student has no tap 'nose'; "
        "allowed: conv1, conv2, pool1, conv3, conv4, pool2, hidden, head",
    ),
    "map and vector": (
        "method=feature method.pairs=[[pool2,hidden]]",
        "method.pairs: pool2 -> hidden pairs a map with a",
    ),
    "a second choice of a group": (
        "+pair=vgg13_vgg8",
        "pair: already chosen; change it with pair=..., without the +",
    ),
    "unknown pair": (
        "pair=vgg13",
        "Could not find 'pair/vgg13' Available options in 'pair': resnet110_resnet20",
    ),
    "tracker": (
        "tracker.mode=maybe",
        "tracker.mode: should be 'auto', 'online', 'offline' or 'disabled', got 'maybe'",
    ),
    "device": ("device=tpu", "device: 'tpu' is not known; allowed: auto, cpu, mps, cuda"),
    "missing root": (
        "data=imagefolder",
        "data.root: this key is missing; set it with data.root=...",
    ),
    "missing folder": (
        "data=imagefolder data.root=nowhere",
        "data.root: no such folder: nowhere; it must contain train/<class>/*",
    ),
    "no checkpoint": (
        "teacher.checkpoint=none.safetensors",
        "teacher.checkpoint: none.safetensors does not exist or is not a file",
    ),
    "grammar": ("method.T=[1", "no viable alternative at input '[1'"),
    "flag": ("--cfg job --info all", "Only one of"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_line_and_exit_code_2(case: str, kd: Callable) -> None:
    words, expected = BAD[case]
    said = kd(*DIGITS, *([] if "method=" in words else ["method=logits"]), *words.split())
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("kd: ")
    assert said.err.count("\n") == 1
    assert expected in said.err
    assert list(Path().iterdir()) == [], "something was written"


METHOD_OF = {"other": "dkd", "warmup": "dkd", "low": "ctkd", "span": "ctkd", "width": "crd"}
# How a key reaches the check: Hydra's error, kd's own after a +, an inner node, Hydra's own node
TYPED = ["kernels", "+teacher.members", "teacher.store.gigabytes", "hydra.launcher.pack"]


@pytest.mark.parametrize(
    "key", [*TYPED, *(pytest.param(key, marks=pytest.mark.slow) for key in RENAMED)]
)
def test_a_renamed_key_is_answered_with_its_new_name(key: str, kd: Callable) -> None:
    old = key.removeprefix("+")
    method = METHOD_OF.get(old.partition(".")[2], "crd")
    result = kd(*DIGITS, f"method={method}", f"{key}=1")
    assert (result.code, result.out, list(Path().iterdir())) == (2, "", [])
    assert result.err == f"kd: {old}: this key is now {RENAMED[old]}\n"


@pytest.mark.slow
@pytest.mark.parametrize("key", sorted(set(RENAMED) - {"teacher.store"}))
def test_a_new_name_is_a_key(key: str, kd: Callable) -> None:
    new = RENAMED[key]
    value = {"average": "logits", "fill": "lazy", "padding_mode": "edge", "feature_maps": "true"}
    value |= {"cpu_kernels": "torch"}
    method = METHOD_OF.get(key.partition(".")[2], "crd")
    word = f"{new}={value.get(new.split('.')[-1], 1)}"
    result = kd(*DIGITS, f"method={method}", word, "--cfg=job")
    assert result.code == 0, result.err


@pytest.mark.parametrize("key", ["hydra.launcher.pack", "student.labels"])
def test_a_renamed_key_in_a_file_of_the_users_is_answered_too(key: str, kd: Callable) -> None:
    Path("own/experiment").mkdir(parents=True)
    node = ": {".join(key.split(".")) + ": 1" + "}" * key.count(".")
    Path("own/experiment/mine.yaml").write_text(f"# @package _global_\n{node}\n")
    result = kd("--config-dir=own", "+experiment=mine", *DIGITS, "method=logits")
    assert (result.code, result.err) == (2, f"kd: {key}: this key is now {RENAMED[key]}\n")


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("checkpoint=3", "checkpoint: {} (every_n_epochs, every_n_minutes), got 3"),
        ("teacher.cache=no", "teacher.cache: {} (max_gb, feature_maps, fill), got 'no'"),
        ("student=3", "student: {}, got 3"),
    ],
)
def test_a_value_for_a_node_is_answered_with_its_keys(word: str, line: str, kd: Callable) -> None:
    result = kd(*DIGITS, "method=logits", word)
    assert result.code == 2
    assert result.err == f"kd: {line.format('should be a node with keys')}\n"


def test_a_sweep_is_checked_before_its_first_job(kd: Callable) -> None:
    said = kd("-m", *DIGITS, "method=logits", "method.T=1,4,0")
    assert said.code == 2
    assert "method.T: should be greater than or equal to 0.001, got 0 (job 3: " in said.err
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("word", "line"),
    [
        (
            "method.T=interval(1,4)",
            "kd: method.T: interval(a,b) is for hydra/sweeper=optuna; "
            "a grid takes a list of values, such as ",
        ),
        (
            "hydra.launcher.slots=two",
            "kd: hydra.launcher.slots: Value 'two' of type 'str' could not be converted to Int",
        ),
        (
            "hydra/launcher=nope",
            "kd: In 'hydra/config': Could not find 'hydra/launcher/nope' Available options in ",
        ),
    ],
)
def test_a_sweeps_own_mistakes(word: str, line: str, kd: Callable) -> None:
    said = kd("-m", *DIGITS, "method=logits", word)
    assert (said.code, said.out, said.err.count("\n")) == (2, "", 1)
    assert said.err.startswith(line)
    assert not list(Path().glob("*/*"))


def test_a_device_that_is_not_there(kd: Callable) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    said = kd(*DIGITS[:-1], "method=standard", "device=cuda")
    assert said.code == 2
    assert "device: cuda is not available on this machine; allowed: auto, cpu" in said.err


def test_an_output_directory_that_cannot_be_written(kd: Callable) -> None:
    Path("file").write_text("mine")
    said = kd(*DIGITS, "method=standard", "paths.runs=file/runs")
    assert said.code == 2
    assert "cannot write to" in said.err
    assert "paths.runs=PATH" in said.err
    assert said.err.count("\n") == 1
    assert Path("file").read_text() == "mine"


def test_cifar_that_cannot_be_downloaded(kd: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", refuse)
    said = kd("data=cifar10", "method=standard", "data.root=here", "device=cpu")
    assert said.code == 2
    line = said.err.splitlines()[-1]
    assert (
        "data.root: CIFAR10 is not in here and cannot be downloaded (Network is unreachable)"
        in line
    )
    assert "use data=digits (needs no download) or data=imagefolder data.root=PATH" in line


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (
            lambda root: (root / "train" / "empty").mkdir(),
            "train/empty has no images; add some or remove it",
        ),
        (
            lambda root: [p.unlink() for p in (root / "test" / "dark").iterdir()],
            "test/dark has no images",
        ),
        (
            lambda root: (root / "train" / "dark" / "03.png").write_bytes(b"no image"),
            "train/dark/03.png",
        ),
        (lambda root: (root / "test" / "dark" / "01.png").write_bytes(b""), "test/dark/01.png"),
        (
            lambda root: (root / "train" / "dark").rename(root / "train" / "dim"),
            "classes of test/ and train/ differ",
        ),
    ],
    ids=["empty class", "emptied class", "corrupt image", "empty image", "other classes"],
)
def test_a_bad_image_folder(kd: Callable, folder: Path, harm: Callable, expected: str) -> None:
    harm(folder)
    said = kd(
        "data=imagefolder",
        f"data.root={folder}",
        "method=standard",
        "student.scale=1",
        "device=cpu",
    )
    assert said.code == 2
    assert said.err.splitlines()[-1].startswith("kd: data.root: ")
    assert expected in said.err.splitlines()[-1]
    assert not list(Path().rglob("result.json"))


def card(classes: int = 10, size: int = 32) -> dict:
    model = {"name": "cnn", "scale": 2, "activation": "relu", "dropout": 0.5}
    return weights.build_metadata(
        model, tuple(map(str, range(classes))), size, torch.zeros(3), torch.ones(3)
    )


def saved(path: Path, classes: int = 10, size: int = 32, scale: int = 2) -> Path:
    config = models.find("cnn", "model").Config(
        name="cnn", scale=scale, activation="relu", dropout=0.5
    )
    weights.save(models.build(config, classes, size), path, card(classes, size))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (
            lambda p: saved(p, classes=7),
            "has 7 classes, the data has 10; teacher and student must have the same classes",
        ),
        (
            lambda p: saved(p, size=16),
            "takes images of 16 pixels, the data has 32; "
            "teacher and student must take the same images",
        ),
        (lambda p: saved(p, scale=3), "does not fit the teacher model: "),
        (
            lambda p: p.write_bytes(saved(p).read_bytes()[:-100]),
            "is not an intact safetensors file",
        ),
        (lambda p: p.write_bytes(b""), "is not an intact safetensors file"),
        (
            lambda p: torch.save({"a": torch.ones(1)}, p),
            "is a pickle, which could run code when read",
        ),
        (
            lambda p: p.write_bytes(pickle.dumps({"a": 1})),
            "is a pickle, which could run code when read",
        ),
    ],
    ids=["classes", "size", "architecture", "truncated", "empty", "torch.save", "pickle"],
)
def test_a_bad_checkpoint(kd: Callable, tmp_path: Path, make: Callable, expected: str) -> None:
    path = tmp_path / "weights.safetensors"
    make(path)
    said = kd(*DIGITS, "method=logits", f"teacher.checkpoint={path}")
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("kd: teacher.checkpoint: ")
    assert said.err.count("\n") == 1
    assert expected in said.err
    assert list(Path().iterdir()) == []


def choices() -> list[str]:
    found = []
    for path in sorted(cli.CONF.rglob("*.yaml")):
        if path.parent != cli.CONF:
            found.append(f"{path.parent.name}={path.stem}")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("choice", choices())
def test_every_yaml_composes_and_builds(choice: str, composed: Callable, folder: Path) -> None:
    group, name = choice.split("=")
    words = {
        "model": [f"model@student={name}", f"model@teacher={name}", "data=digits", "method=logits"],
        "data": [choice, *([f"data.root={folder}"] if name == "imagefolder" else [])],
        "experiment": [f"+{choice}"],
        "pair": [choice, "method=logits"],
    }.get(group, [choice])
    config = composed(*words, small=group not in ("data", "experiment", "model", "pair"))
    with torch.device("meta" if group in ("model", "pair") else "cpu"):  # some are large
        nets = [
            models.build(m, len(config.description.classes), 32)
            for m in (config.student, config.teacher)
        ]
    shapes = [net.shapes(32) for net in nets]
    labels = torch.zeros(2000, dtype=torch.int64)
    spec = MethodContext(*shapes, len(config.description.classes), 2000, *nets, labels=labels)
    method = config.method_class(config.method, spec)
    for recipe in (config, config.teacher):
        for optimizer in recipe.optimizer.build([*nets[0].parameters(), *method.parameters()]):
            optimizer.step()
        assert all(0 <= recipe.schedule.factor(step, 100) <= 1 for step in range(100))


def test_every_group_is_in_the_help(kd: Callable) -> None:
    said = kd("--help")
    assert said.code == 0
    groups = {path.name for path in cli.CONF.iterdir() if path.is_dir()}
    for group in groups - {"schedule"}:
        assert f"\n  {group} " in said.out or f"\n        {group} " in said.out, group
    for choice in choices():
        assert choice.split("=")[1] in said.out


def test_flags_may_come_last(kd: Callable) -> None:
    said = kd("data=digits", "--cfg", "job")
    assert said.code == 0
    assert yaml.safe_load(said.out)["data"]["name"] == "digits"


@pytest.mark.slow
def test_the_identity_is_what_determines_the_result(composed: Callable, tmp_path: Path) -> None:
    base = composed("method=logits").identity()
    same = [
        "threads=1",
        "tracker.mode=offline",
        "tracker.tags=[a]",
        "rerun=true",
        "device=auto",
        "method.T=4",
    ]
    for word in [*same, f"paths.runs={tmp_path}"]:
        assert composed("method=logits", word).identity() == base, word
    other = [
        "method.T=5",
        "seed=1",
        "student.scale=2",
        "student.epochs=2",
        "optimizer.lr=0.1",
        "teacher.scale=3",
    ]
    other += [
        "teacher.seed=7",
        "data.val_size=100",
        "data.augment.crop_padding=2",
        "batch_size=32",
        "schedule.warmup_fraction=0.3",
    ]
    found = {composed("method=logits", word).identity() for word in other}
    assert base not in found
    assert len(found) == len(other)
    assert (
        composed("method=standard", "teacher.scale=3").identity()
        == composed("method=standard").identity()
    )


def test_the_root_of_an_image_folder_is_not_its_identity(composed: Callable, folder: Path) -> None:
    words = ["data=imagefolder", "method=standard"]
    here = composed(*words, f"data.root={folder}").identity()
    moved = folder.rename(folder.with_name("elsewhere"))
    assert composed(*words, f"data.root={moved}").identity() == here
    (moved / "train" / "dark" / "00.png").unlink()
    assert composed(*words, f"data.root={moved}").identity() != here


@pytest.mark.parametrize(
    ("name", "points"),
    [
        ("cosine", [(0.0, 0.0), (0.1, 0.5), (0.2, 1.0), (0.6, 0.5), (1.0, 0.0)]),
        ("triangle", [(0.0, 0.0), (0.1, 0.5), (0.2, 1.0), (0.6, 0.5), (1.0, 0.0)]),
        ("step", [(0.1, 0.5), (0.49, 1.0), (0.51, 0.1), (0.76, 0.01)]),
        ("constant", [(0.1, 0.5), (0.3, 1.0), (0.99, 1.0)]),
    ],
)
def test_schedules(name: str, points: list) -> None:
    schedule = Schedule(
        name=name, warmup_fraction=0.2, final_lr_factor=0.0, milestones=[0.5, 0.75], gamma=0.1
    )
    steps = 100_000
    for progress, factor in points:
        assert schedule.factor(int(progress * steps), steps) == pytest.approx(factor, abs=1e-3)


def test_check_needs_no_hydra() -> None:
    with initialize_config_dir(str(cli.CONF), version_base="1.3"):
        plain = cli.to_container(compose("config", ["data=digits"]))
    assert validate_config(plain).to_dict()["data"] == plain["data"]
    with pytest.raises(UserError, match="this key is missing"):
        validate_config({k: v for k, v in plain.items() if k != "seed"})
    assert data.describe(validate_config(plain).data).classes[0] == "0"


def test_an_agents_commands_are_understood(composed: Callable) -> None:
    """W&B's agent writes a value as Python prints it."""
    sweep = yaml.safe_load((cli.CONF.parent / "examples" / "wandb-sweep.yaml").read_text())
    for pick in (0, -1):
        words = []
        for key, said in sweep["parameters"].items():
            values = said.get("values") or [said[k] for k in ("value", "min", "max") if k in said]
            words.append(f"{key}={values[pick]}")
        assert composed(*words, small=False).method.name == "logits"


def test_the_clusters_launchers_compose(kd: Callable) -> None:
    said = kd("hydra/launcher=submitit_slurm", "--cfg", "hydra", "-p", "hydra.launcher")
    assert said.code == 0
    assert "timeout_min" in said.out
