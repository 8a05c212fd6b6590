"""The field's benchmark: its protocol as a recipe, and measured beside published figures."""

import csv
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from helpers import config, made, tables
from scipy import stats

from kd import cli
from kd.config.schema import model_name
from kd.core.errors import UserError
from kd.report import command_line, published

PAIRS = {
    "wrn_40_2_wrn_16_2", "wrn_40_2_wrn_40_1", "resnet56_resnet20", "resnet110_resnet20",
    "resnet110_resnet32", "resnet32x4_resnet8x4", "vgg13_vgg8", "vgg13_mobilenetv2",
    "resnet50_mobilenetv2", "resnet50_vgg8", "resnet32x4_shufflenetv1", "resnet32x4_shufflenetv2",
    "wrn_40_2_shufflenetv1",
}  # fmt: skip
LIGHT = ("mobilenetv2", "shufflenetv1", "shufflenetv2")
STANDARD = "+experiment=cifar100_standard"
METHODS = {
    "standard", "logits", "feature", "attention", "similarity", "correlation", "vid", "rkd", "pkt",
    "nst", "crd", "ofd", "reviewkd", "dist", "dkd", "ctkd", "wttm", "standardized", "mlkd", "srrl",
    "simkd",
}  # fmt: skip

FIGURES = """\
data,teacher,student,method,accuracy,spread,runs,epoch,source,note
cifar10,CNN_8,cnn-4,logits,71.5,0.3,5,best,Paper A,"<i>other</i> recipe, longer"
cifar10,cnn-8,cnn-4,logits,70,,,last,Paper B,
cifar10,,cnn-4,standard,69.25,,1,unknown,Paper A,
cifar10,,cnn-8,standard,88.5,,,last,Paper B,
cifar10,cnn-9,cnn-4,logits,10,,,last,another teacher,
cifar100,cnn-8,cnn-4,logits,20,,,last,other data,
cifar10,cnn-8,cnn-4,feature,30,,,last,another method,
"""


def flat(name: str) -> str:
    return "".join(c for c in name if c.isalnum())


# ---- the protocol


def test_the_pairs_are_those_of_the_published_tables() -> None:
    assert {path.stem for path in (cli.CONF / "pair").glob("*.yaml")} == PAIRS


@pytest.mark.slow
@pytest.mark.parametrize("pair", sorted(PAIRS))
def test_every_pair_composes_with_the_standard_protocol(pair: str, composed: Callable) -> None:
    config = composed(STANDARD, f"pair={pair}", small=False)
    teacher, student = config.teacher, config.student
    names = published._key(model_name(teacher), model_name(student))
    assert "".join(names) == flat(pair)
    assert names in {published._key(x.teacher, x.student) for x in published.load("published")}, (
        "what it is shown as"
    )
    light = names[1] in LIGHT
    for recipe, rate in ((config, 0.01 if light else 0.05), (config.teacher, 0.05)):
        assert recipe.optimizer.model_dump() == {
            "name": "sgd",
            "lr": rate,
            "momentum": 0.9,
            "nesterov": False,
            "weight_decay": 5e-4,
        }
        assert recipe.batch_size == 64
        epochs = [recipe.schedule.factor(100 * epoch + 50, 24_000) for epoch in range(240)]
        drops = [epoch for epoch in range(1, 240) if epochs[epoch] < epochs[epoch - 1]]
        assert (epochs[0], drops) == (1.0, [150, 180, 210])
        assert epochs[-1] == pytest.approx(0.001)
    assert (config.student.epochs, config.teacher.epochs) == (240, 240)
    assert (config.data.name, config.description.train, config.description.val) == (
        "cifar100",
        50_000,
        0,
    )
    assert config.method.model_dump() == {
        "name": "logits",
        "alpha": 0.1,
        "T": 4.0,
        "standardize": False,
    }


def test_what_is_typed_wins_over_pair_and_protocol(composed: Callable, folder: Path) -> None:
    """In any order: the recipe's and the pair's choices are beaten by those of the command line."""
    pair = "pair=vgg13_mobilenetv2"
    for words in (("data=digits", STANDARD, pair), (pair, STANDARD, "data=digits")):
        config = composed(
            *words, "model@student=cnn4", "model@teacher=cnn", "optimizer=adam", small=False
        )
        assert (config.data.name, config.description.val, config.student.epochs) == (
            "digits",
            0,
            240,
        )
        assert (model_name(config.teacher), model_name(config.student)) == ("cnn-16", "cnn-4")
        assert (config.optimizer.name, config.optimizer.lr) == ("adam", 0.003)
    models = ["model@student=cnn4", "model@teacher=cnn"]
    words = ["method=standard", "optimizer.lr=0.2", "student.epochs=3", "data.val_size=100"]
    config = composed(STANDARD, "data=cifar10", *models, *words, small=False)
    assert (config.data.name, config.method.name, config.student.epochs) == (
        "cifar10",
        "standard",
        3,
    )
    assert (config.optimizer.lr, config.description.val) == (0.2, 100)
    images = composed(STANDARD, "data=imagefolder", f"data.root={folder}", *models, small=False)
    assert (images.data.name, images.schedule.name) == ("imagefolder", "step")


def test_a_pair_stays_with_any_data(composed: Callable) -> None:
    """`data=digits` brings models of its own, which are small; a pair is the more exact wish."""
    for words in (("pair=vgg13_vgg8", "method=logits"), (STANDARD, "pair=vgg13_vgg8")):
        config = composed("data=digits", *words, small=False)
        assert (model_name(config.teacher), model_name(config.student)) == ("vgg13", "vgg8")
        assert config.data.name == "digits"


def test_the_smoke_form_is_the_protocol_in_two_epochs(composed: Callable) -> None:
    models = ["model@student=cnn4", "model@teacher=cnn", "data=digits"]
    whole, smoke = (
        composed(f"+experiment=cifar100_{form}", *models, small=False)
        for form in ("standard", "smoke")
    )
    assert (smoke.student.epochs, smoke.teacher.epochs) == (2, 2)
    teacher = whole.teacher.model_copy(update={"epochs": 2})
    student = whole.student.model_copy(update={"epochs": 2})
    assert smoke == whole.replace(student=student, teacher=teacher)
    rates = {round(smoke.schedule.factor(step, 2 * 23), 4) for step in range(2 * 23)}
    assert rates == {1.0, 0.1, 0.01, 0.001}, "all steps of the schedule"


# ---- the table of figures


def test_the_packaged_figures_are_whole() -> None:
    lines = published.load("published")
    keys = Counter((x.data, x.teacher, x.student, x.method, x.source) for x in lines)
    assert [key for key, count in keys.items() if count > 1] == []
    assert {x.method for x in lines} == METHODS
    assert all((x.teacher == "") == (x.method == "standard") for x in lines)
    plain = {(x.data, x.student) for x in lines if x.method == "standard"}
    for x in lines:
        assert {(x.data, x.student), (x.data, x.teacher or x.student)} <= plain, (
            "no baseline, or no teacher's accuracy"
        )
        assert 0 < x.accuracy < 100
        assert x.source
    with open(published.PACKAGED, newline="") as file:
        assert next(csv.reader(file)) == list(published.Line.model_fields)
    wanted = {flat(pair) for pair in PAIRS}
    for method in ("logits", "feature", "crd", "wttm"):
        have = {
            flat(x.teacher + x.student)
            for x in lines
            if x.method == method and x.data == "cifar100"
        }
        assert wanted <= have, method


@pytest.mark.parametrize(
    ("cell", "accuracy", "epoch", "source"),
    [
        ("cifar100 resnet32x4 resnet8x4 logits", 73.33, "last", "RepDistiller"),
        ("cifar100 resnet32x4 resnet8x4 dkd", 76.32, "best", "mdistiller"),
        ("cifar100 vgg13 mobilenetv2 nst", 58.16, "last", "RepDistiller"),
        ("cifar100 wrn-40-2 shufflenetv1 crd", 76.05, "last", "RepDistiller"),
        ("cifar10 resnet110 resnet20 similarity", 93.30, "best", "Knowledge-Distillation-Zoo"),
        ("cifar10 cnn-32 cnn-16 logits", 66.54, "unknown", "cifar10_distillation"),
    ],
)
def test_figures_by_hand(cell: str, accuracy: float, epoch: str, source: str) -> None:
    lines = published.load("published")
    found = [
        x
        for x in lines
        if f"{x.data} {x.teacher} {x.student} {x.method}" == cell and source in x.source
    ]
    assert [(x.accuracy, x.epoch) for x in found] == [(accuracy, epoch)]


def test_what_cannot_be_compared_plainly_has_a_note() -> None:
    for line in published.load("published"):
        if line.method == "mlkd":
            assert "epochs" in line.note
            assert "two views" in line.note
        if line.student == "cnn-16" and line.method == "logits":
            assert "misalignment" in line.note


HEAD = "data,teacher,student,method,accuracy,spread,runs,epoch,source,note"
BAD = {
    "no file": (None, "no such file: mine.csv; use `published` for the figures shipped with kd"),
    "empty": ("", f"mine.csv has no column {HEAD.replace(',', ', ')}; required: data"),
    "columns": (
        "data,student,method,accuracy\nx,y,z,1\n",
        "mine.csv has no column teacher, spread, runs, epoch, source",
    ),
    "no figure": (f"{HEAD}\n", "mine.csv contains no figures"),
    "word": (
        f"{HEAD}\nd,t,s,m,high,,,last,p,\n",
        "mine.csv line 2: accuracy: should be a valid number, unable to parse",
    ),
    "large": (
        f"{HEAD}\nd,t,s,m,50,,,last,p,\nd,t,s,m,100,,,last,p,\n",
        "line 3: accuracy: should be less than 100, got ",
    ),
    "nan": (f"{HEAD}\nd,t,s,m,nan,,,last,p,\n", "line 2: accuracy: should be "),
    "spread": (
        f"{HEAD}\nd,t,s,m,50,-1,,last,p,\n",
        "line 2: spread: should be greater than or equal to 0, got '-1'",
    ),
    "runs": (
        f"{HEAD}\nd,t,s,m,50,,some,last,p,\n",
        "line 2: runs: should be a valid integer, unable to parse",
    ),
    "epoch": (
        f"{HEAD}\nd,t,s,m,50,,,first,p,\n",
        "epoch: should be 'best', 'last' or 'unknown', got 'first'",
    ),
    "source": (f"{HEAD}\nd,t,s,m,50,,,last,,\n", "line 2: source is empty"),
    "short": (f"{HEAD}\nd,t,s\n", "line 2: method is empty"),
    "long": (
        f"{HEAD}\nd,t,s,m,50,,,last,p,well, then\n",
        "line 2: more cells than columns; quote cells that contain commas",
    ),
    "bytes": (b"\xff\xfe\x00", "cannot read mine.csv (it is not a UTF-8 CSV file)"),
}


@pytest.mark.parametrize(("content", "line"), BAD.values(), ids=BAD)
def test_a_bad_file_of_figures_is_one_line(
    content: str | bytes | None,
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    made(tmp_path / "sweep", [config("standard", 0)], [0.7])
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("mine.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    said = failed(capsys, "sweep", "--compare", "mine.csv")
    assert said.startswith("kd: --compare: ")
    assert line in said
    assert not Path("sweep/summary.csv").exists(), "nothing was written"


def failed(capsys: pytest.CaptureFixture, *words: str) -> str:
    """What a report that is refused says: one line, with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        command_line.main(words)
    said = capsys.readouterr()
    assert (stop.value.code, said.out, said.err.count("\n")) == (2, "", 1)
    return said.err


# ---- the comparison


def own(tmp_path: Path, text: str = FIGURES) -> list[published.Line]:
    (tmp_path / "figures.csv").write_text(text)
    return published.load(str(tmp_path / "figures.csv"))


def swept(place: Path, data: str = "cifar10") -> Path:
    configs = [
        config(method, seed, data__name=data)
        for method in ("standard", "logits")
        for seed in (0, 1, 2)
    ]
    made(place, configs, [0.70, 0.71, 0.69, 0.72, 0.74, 0.73])
    return place


def test_measured_and_published_by_hand(tmp_path: Path) -> None:
    found = published.compare_with_published(tables(swept(tmp_path / "sweep")), own(tmp_path))
    table = found.table.set_index(["setting", "source"])
    assert list(table.index) == [
        ("logits", "Paper A"),
        ("logits", "Paper B"),
        ("standard", "Paper A"),
        ("teacher cnn-8", "Paper B"),
    ]
    assert table["measured"].tolist() == pytest.approx([73, 73, 70, 90])
    assert table["published"].tolist() == [71.5, 70, 69.25, 88.5]
    assert table["difference"].tolist() == pytest.approx([1.5, 3, 0.75, 1.5])
    half = stats.t.ppf(0.975, 2) * 1 / 3**0.5  # three seeds, a point apart
    assert table["measured_ci95"].tolist() == pytest.approx(
        [half, half, half, float("nan")], nan_ok=True
    )
    assert table["n"].tolist() == [3, 3, 3, 1]
    assert (found.missing, len(found.text_table.texts())) == ([], 5)
    assert found.text_table.texts()[1] == [
        "logits", "cifar10", "cnn-8 -> cnn-4", "3", "73.00 ± 2.48", "71.50 (SD 0.30)",
        "+1.50 ± 2.32", "best", "5", "Paper A", "<i>other</i> recipe, longer",
    ]  # fmt: skip
    assert found.text_table.texts()[2][4:10] == [
        "73.00 ± 2.48",
        "70.00",
        "+3.00",
        "last",
        "",
        "Paper B",
    ]
    assert found.notes == ["logits in Paper A: <i>other</i> recipe, longer"]


def test_names_are_compared_as_people_read_them() -> None:
    assert published._key("WRN_40_2", "CIFAR-100") == published._key("wrn-40-2", "cifar100")
    assert published._key("mobilenetv2-0.5") == published._key("mobilenetv2")
    assert published._key("mobilenetv2-1.0") != published._key("mobilenetv2")
    assert published._key("resnet32x4") != published._key("resnet32")


def test_every_setting_of_a_method_has_its_row(tmp_path: Path) -> None:
    configs = [
        config("logits", seed, method__T=t, data__name="cifar10")
        for t in (1.0, 2.0)
        for seed in (0, 1)
    ]
    made(tmp_path / "sweep", configs, [0.7, 0.72, 0.6, 0.62])
    rows = published.compare_with_published(tables(tmp_path / "sweep"), own(tmp_path)).table
    assert rows[rows["source"] == "Paper A"]["setting"].tolist() == ["logits T=1", "logits T=2"]
    assert rows[rows["source"] == "Paper A"]["difference"].tolist() == pytest.approx([-0.5, -10.5])


def test_what_has_no_figure_is_said_in_one_line(tmp_path: Path) -> None:
    nothing = published.compare_with_published(
        tables(swept(tmp_path / "digits", "digits")), published.load("published")
    )
    assert (nothing.text_table.rows, nothing.notes, len(nothing.table)) == ([], [], 0)
    assert nothing.missing == ["no published figure for cnn-4 on digits, cnn-8 on digits"]
    configs = [config("standard", 0, data__name="cifar10"), config("nst", 0, data__name="cifar10")]
    made(tmp_path / "some", configs, [0.7, 0.6])
    some = published.compare_with_published(tables(tmp_path / "some"), own(tmp_path))
    assert some.missing == ["no published figure for nst cnn-8 -> cnn-4 on cifar10"]
    configs = [
        config("standard", 0, data__name="digits", student__scale=scale) for scale in range(1, 10)
    ]
    made(tmp_path / "many", configs, [0.7] * 9)
    many = published.compare_with_published(tables(tmp_path / "many"), own(tmp_path)).missing
    listed = ", ".join(f"cnn-{k} on digits" for k in range(1, 6))
    assert many == [f"no published figure for {listed}, and for 4 more"]


def test_runs_that_did_not_finish_are_not_compared(tmp_path: Path) -> None:
    made(tmp_path, [config("standard", 0, data__name="cifar10")], [None])
    found = published.compare_with_published(tables(tmp_path), own(tmp_path))
    assert (found.text_table.rows, found.missing) == ([], [])


def test_an_image_folder_is_nobodys_data_until_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    found = tables(swept(tmp_path / "sweep", "imagefolder"))
    silent = published.compare_with_published(found, own(tmp_path))
    assert silent.text_table.rows == []
    assert silent.missing == [
        "no published figure for cnn-4 on imagefolder, cnn-8 on imagefolder",
        "to compare an image folder that contains one of the published data sets, "
        "add --as cifar10 or --as cifar100",
    ]
    said = published.compare_with_published(found, own(tmp_path), "cifar10")
    assert said.table["published"].tolist() == [71.5, 70, 69.25, 88.5]
    assert "the image folder contains cifar10, as given by --as" in said.title
    with pytest.raises(
        UserError, match="--as: no published figures for 'svhn'; allowed: cifar10, cifar100"
    ):
        published.compare_with_published(found, own(tmp_path), "svhn")
    with pytest.raises(UserError, match="--as: applies only to image folders, and no finished run"):
        published.compare_with_published(
            tables(swept(tmp_path / "cifar")), own(tmp_path), "cifar10"
        )
    assert "--as: requires --compare published" in failed(
        capsys, str(tmp_path / "sweep"), "--as", "cifar10"
    )


@pytest.mark.slow
def test_the_command_writes_tables_and_a_section(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    own(tmp_path)
    place = swept(tmp_path / "sweep", "imagefolder")
    command_line.main([str(place), "--compare", str(tmp_path / "figures.csv"), "--as", "cifar10"])
    said = capsys.readouterr().out
    assert (
        "Comparison with published figures (assuming that the image folder contains cifar10, "
        "as given by --as; not checked):" in said
    )
    line = r"73.00 ± 2.48 +71.50 \(SD 0.30\) +\+1.50 ± 2.32 +best +5 +Paper A\n"
    assert re.search(line, said)
    assert "note: logits in Paper A: <i>other</i> recipe, longer" in said
    assert "best test epoch" in said
    table = pd.read_csv(place / "published.csv")
    assert list(table.columns) == list(published.COLUMNS)
    assert table["difference"].tolist() == pytest.approx([1.5, 3, 0.75, 1.5])
    text = (place / "published.md").read_text()
    assert "| logits" in text
    assert "other code and other teachers" in text
    page = (place / "index.html").read_text()
    assert (
        "<h2>Comparison with published figures (assuming that the image folder contains cifar10"
        in page
    )
    assert "<i>other</i>" not in page
    assert "&lt;i&gt;other&lt;/i&gt; recipe, longer" in page
    assert 'href="published.csv"' in page
    assert (
        page.index("<h2>Comparison</h2>")
        < page.index("<h2>Comparison with published")
        < page.index("<h2>Figures")
    )


@pytest.mark.slow
def test_without_a_figure_the_report_says_so(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    place = swept(tmp_path / "sweep", "digits")
    command_line.main([str(place), "--compare", "published"])
    assert (
        "note: no published figure for cnn-4 on digits, cnn-8 on digits\n"
        in capsys.readouterr().out
    )
    assert (
        'class="warn">no published figure for cnn-4 on digits' in (place / "index.html").read_text()
    )
    assert len(pd.read_csv(place / "published.csv")) == 0
    command_line.main([str(place)])
    assert "published" not in capsys.readouterr().out, "it was not asked for"
    shutil.copy(published.PACKAGED, place / "published.csv")
    said = failed(capsys, str(place), "--compare", str(place / "published.csv"))
    assert "would be overwritten by this report; give your own figures another name" in said
    assert (place / "published.csv").read_bytes() == published.PACKAGED.read_bytes()
