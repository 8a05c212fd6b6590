"""Each point of the audit of the report's statistics, by its letter."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers import config, made, tables
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from kd.report import build, command_line
from kd.report.details import variance
from kd.report.inference import compare
from kd.report.published import Line, compare_with_published
from kd.report.summary import bounded, ece_floor, half_width
from kd.report.tables import PLAN
from kd.report.verdict import claims_text, headline, warnings
from kd.training.metrics import reliability

IMAGES = 10_000
STANDARD = [0.809, 0.811, 0.808, 0.812, 0.810]


def sweep(
    place: Path,
    accuracies: Mapping[str, Sequence[float | None]],
    val: Mapping[str, Sequence[float]] | None = None,
    images: int = IMAGES,
    **changes: Mapping[str, Any],
) -> None:
    """Write a sweep: by setting, the accuracy of each seed; None is a seed that diverged.

    A setting is a method, or a method and its T, such as `logits 4`.
    """
    configs, test, validation = [], [], []
    for setting, values in accuracies.items():
        method, _, t = setting.partition(" ")
        keys = {"method__T": float(t)} if t else {}
        for seed, value in enumerate(values):
            configs.append(config(method, seed, **keys, **changes.get(method, {})))
            test.append(value)
            validation.append((val or {}).get(setting, [0.8] * 100)[seed])
    made(place, configs, test, validation)
    for number, value in enumerate(test):
        folder = place / "runs" / f"r{number}"
        if value is None:
            (folder / "status.json").write_text(json.dumps({"state": "diverged", "reason": "nan"}))
            continue
        result = json.loads((folder / "result.json").read_text())
        result["samples"]["test"] = images
        (folder / "result.json").write_text(json.dumps(result))


def row_of(place: Path, setting: str = "logits") -> pd.Series:
    return tables(place).summary.set_index("setting").loc[setting]


def gaining(points: float, values: Sequence[float] = STANDARD) -> list[float]:
    """Return accuracies that gain some points over others, with noise that is not theirs."""
    noise = (0.0008, -0.0012, 0.0006, -0.0004, 0.0002)
    return [x + points / 100 + e for x, e in zip(values, noise, strict=False)]


def test_point_a_no_significance_is_not_a_finding(tmp_path: Path) -> None:
    sweep(tmp_path / "wide", {"standard": STANDARD[:3], "logits": [0.811, 0.817, 0.810]})
    wide = row_of(tmp_path / "wide")
    assert wide["decision"] == "undecided"
    assert "more seeds would decide" in wide["verdict"]
    sweep(tmp_path / "tight", {"standard": STANDARD, "logits": gaining(0.02)})
    tight = row_of(tmp_path / "tight")
    assert (tight["decision"], tight["p"] > 0.05) == ("equal", True)
    half = tight["difference_ci90"]
    low, high = (100 * (tight["difference"] + sign * half) for sign in (-1, 1))
    assert f"equal to standard within ± 0.5 points: {low:+.2f} to {high:+.2f}" in tight["verdict"]
    assert max(-low, high) < 0.5


METHODS = {  # accuracies of three seeds of the methods page
    "standard": [0.8107, 0.8110, 0.8088],
    "attention": [0.8133, 0.8110, 0.8075],
    "correlation": [0.8126, 0.8144, 0.8156],
    "feature": [0.8150, 0.8145, 0.8150],
    "pkt": [0.8227, 0.8196, 0.8188],
    "rkd": [0.8203, 0.8188, 0.8222],
    "similarity": [0.8237, 0.8243, 0.8173],
    "srrl": [0.8198, 0.8191, 0.8177],
}


def test_point_b_rows_share_one_spread(tmp_path: Path) -> None:
    """A lucky spread does not make a smaller difference the better supported one."""
    sweep(tmp_path, METHODS)
    paired = {m: stats.ttest_rel(METHODS[m], METHODS["standard"]).pvalue for m in METHODS}
    corrected = {m: 7 * paired[m] for m in ("srrl", "similarity")}
    assert corrected["srrl"] < 0.05 < corrected["similarity"], "each on its own spread"
    srrl, similarity = row_of(tmp_path, "srrl"), row_of(tmp_path, "similarity")
    assert similarity["difference"] > srrl["difference"]
    assert similarity["p"] < srrl["p"] < 0.05
    assert similarity["difference_ci95"] == srrl["difference_ci95"]
    summary = tables(tmp_path).summary.dropna(subset=["p"])
    by_size = summary.sort_values("difference", key=abs, ascending=False)
    assert by_size["p"].is_monotonic_increasing


def test_point_c_the_correlation_over_seeds_is_stated(tmp_path: Path) -> None:
    sweep(tmp_path, {"standard": STANDARD, "logits": gaining(0.5)})
    r = np.corrcoef(STANDARD, gaining(0.5))[0, 1]
    assert row_of(tmp_path)["seed_correlation"] == pytest.approx(r)
    assert f"correlate with r = {r:.2f}" in claims_text(tables(tmp_path))


def test_point_d_a_diverged_seed_forbids_better(tmp_path: Path) -> None:
    sweep(tmp_path, {"standard": STANDARD, "logits": [*gaining(3)[:3], None, None]})
    row = row_of(tmp_path)
    assert (row["n"], row["planned"], row["unstable"], row["decision"]) == (3, 5, 2, "unstable")
    assert math.isnan(row["difference"])
    assert row["verdict"].startswith("unstable (2 of 5): seeds 3, 4 diverged or collapsed")
    sweep(tmp_path / "all", {"standard": STANDARD, "logits": [None] * 5})
    found = tables(tmp_path / "all")
    assert "logits has no row: 5 of 5 seeds diverged, none is done" in warnings(found)


def test_point_e_a_collapse_is_unstable_and_spares_the_others(tmp_path: Path) -> None:
    fallen = gaining(1.0)
    fallen[2] -= 0.065
    sweep(tmp_path, {"standard": STANDARD, "logits": gaining(0.7), "feature": fallen})
    row = row_of(tmp_path, "feature")
    assert (row["decision"], row["unstable"]) == ("unstable", 1)
    assert math.isnan(row["test_accuracy_ci95"])
    assert row["test_accuracy_median"] == pytest.approx(np.median(fallen))
    low, high = proportion_confint(1, 5, method="beta")
    assert f"a rate of {100 * low:.0f} to {100 * high:.0f} %" in row["verdict"]
    text = build.write([tmp_path], tmp_path, figures=False).text
    assert f"{100 * np.median(fallen):.2f} (median)" in text
    sweep(tmp_path / "without", {"standard": STANDARD, "logits": gaining(0.7)})
    alone = row_of(tmp_path / "without")
    assert row_of(tmp_path)["difference_ci95"] == pytest.approx(alone["difference_ci95"])
    assert row_of(tmp_path)["decision"] == alone["decision"] == "better"


def test_point_f_no_spread_is_zero_and_no_interval_leaves_the_scale(tmp_path: Path) -> None:
    sweep(tmp_path, {"standard": [0.81, 0.81, 0.81], "logits": [0.8101, 0.8101, 0.8101]})
    row = row_of(tmp_path)
    assert row["test_accuracy_ci95"] == pytest.approx(stats.t.ppf(0.975, 2) * 1e-4 / math.sqrt(3))
    assert row["decision"] != "better"
    assert "± 0.00" not in build.write([tmp_path], tmp_path, figures=False).text
    rng = np.random.default_rng(0)
    for mean in (0.001, 0.5, 0.97, 0.995, 1.0):
        for n in (2, 3, 5):
            values = np.clip(rng.normal(mean, 0.01, n), 0, 1)
            low, high = bounded(values.mean(), half_width(pd.Series(values), 1e-4))
            assert 0 <= low <= values.mean() <= high <= 1
            assert low < high
    sweep(
        tmp_path / "top", {"standard": [0.99, 0.995, 1.0], "logits": [1.0, 1.0, 0.995]}, images=200
    )
    found = tables(tmp_path / "top")
    assert found.summary["test_accuracy_high"].max() <= 1
    assert any("fewer than 20 errors on 200 test images" in note for note in warnings(found))
    assert not any("errors" in note for note in warnings(tables(tmp_path)))


def test_point_g_interval_and_verdict_agree(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for trial in range(8):
        place = tmp_path / str(trial)
        gains = {"standard": 0.0, "logits": 0.004, "feature": 0.006}
        sweep(place, {name: rng.normal(0.8 + gain, 0.002, 5) for name, gain in gains.items()})
        for name in ("logits", "feature"):
            row = row_of(place, name)
            excludes = abs(row["difference"]) > row["difference_ci95"]
            assert (row["decision"] in ("better", "worse")) == excludes == (row["p"] < 0.05)


def test_point_h_claims_name_their_images_and_seeds(tmp_path: Path) -> None:
    sweep(tmp_path, {"standard": STANDARD, "logits": gaining(0.7)})
    build.write([tmp_path], tmp_path, figures=False)
    saved = pd.read_csv(tmp_path / "summary.csv").set_index("setting")
    assert "over 5 seeds, with this teacher, on these test images" in saved.loc["logits", "verdict"]
    mean = np.mean(STANDARD)
    binomial = stats.norm.ppf(0.975) * math.sqrt(mean * (1 - mean) / IMAGES)
    half = saved.loc["standard", "test_accuracy_images_ci95"]
    assert half == pytest.approx(binomial, rel=1e-3)
    assert half > saved.loc["standard", "test_accuracy_ci95"]


def test_point_i_one_teacher_is_named_and_several_are_the_unit(tmp_path: Path) -> None:
    configs, test = [], []
    for seed in range(3):
        configs.append(config("standard", seed))
        test.append(STANDARD[seed])
        for teacher in range(4):
            configs.append(config("logits", seed, teacher__seed=teacher))
            test.append(0.815 + 0.002 * teacher + 0.0004 * seed)
    made(tmp_path, configs, test)
    row = row_of(tmp_path)
    assert (row["n"], row["teachers"], row["unit"], row["seeds"]) == (12, 4, "teachers", 4)
    assert row["difference"] == pytest.approx(
        np.mean([x for x in test if x > 0.813]) - np.mean(STANDARD[:3])
    )
    between = np.std([0.002 * t for t in range(4)], ddof=1) / 2  # standard error over teachers
    assert row["difference_ci95"] > stats.t.ppf(0.975, 3) * between * 0.8
    assert "over 4 teachers, on these test images" in row["verdict"]
    assert "teachers of this kind" in claims_text(tables(tmp_path))
    detail = variance(tables(tmp_path))
    sources = {
        r.cells["source"]: r.cells for r in detail.table.rows if r.cells["setting"] == "logits"
    }
    assert set(sources) == {"teacher (teacher.seed)", "student (seed)", "rest"}
    teachers = float(sources["teacher (teacher.seed)"]["sd"])
    assert teachers == pytest.approx(100 * np.std([0.002 * t for t in range(4)], ddof=1), abs=0.01)

    made(tmp_path / "one", [c for c in configs if c["teacher"].get("seed", 0) == 0][:6], test[:6])
    assert "with this teacher" in row_of(tmp_path / "one")["verdict"]


def test_point_j_a_choice_is_claimed_on_fresh_seeds_or_marked(tmp_path: Path) -> None:
    high = [0.82] * 5
    val = {"logits 1": high, "logits 2": [0.81] * 5, "standard": high}
    sweep(
        tmp_path / "same",
        {"standard": STANDARD, "logits 1": gaining(0.9), "logits 2": gaining(0.1)},
        val,
    )
    same = row_of(tmp_path / "same", "logits T=1")
    assert same["settings_tried"] == 2
    assert "best of 2, chosen on the same seeds" in same["verdict"]
    more = [0.809, 0.811, 0.808, 0.812, 0.810]
    val = {name: values * 2 for name, values in val.items()}
    sweep(
        tmp_path / "fresh",
        {
            "standard": [*STANDARD, *more],
            "logits 1": [*gaining(0.9), *gaining(0.1, more)],
            "logits 2": gaining(0.1),
        },
        val,
    )
    fresh = row_of(tmp_path / "fresh", "logits T=1")
    assert fresh["seeds"] == 5
    assert fresh["difference"] == pytest.approx(np.mean(gaining(0.1, more)) - np.mean(more))
    assert "over 5 fresh seeds" in fresh["verdict"]
    assert "same seeds" not in fresh["verdict"]


def test_point_k_one_lucky_seed_does_not_beat_five(tmp_path: Path) -> None:
    val = {"logits 1": [0.811], "logits 2": [0.81] * 5}
    sweep(tmp_path, {"standard": STANDARD, "logits 1": [0.82], "logits 2": gaining(0.5)}, val)
    jobs = json.loads((tmp_path / PLAN).read_text())
    for seed in range(1, 5):  # four more seeds are planned
        job = config("logits", seed, method__T=1.0)
        folder = str(tmp_path / "runs" / f"more{seed}")
        jobs.append(
            {**jobs[5], "config": job, "folder": folder, "number": len(jobs), "id": str(seed)}
        )
    (tmp_path / PLAN).write_text(json.dumps(jobs))
    summary = tables(tmp_path).summary.set_index("setting")
    assert summary.loc["logits T=1", ["n", "planned", "chosen"]].tolist() == [1, 5, False]
    assert summary.loc["logits T=2", "chosen"]
    assert summary.loc["logits T=1", "verdict"].startswith("not chosen: 1 of 5 planned runs")
    assert "logits T=2" in headline(tables(tmp_path))


def test_point_l_the_family_is_declared_and_corrected_for(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    names = ("standard", "logits", "attention", "feature", "pkt", "rkd")
    values = {name: list(rng.normal(0.81 + 0.003 * (name == "logits"), 0.002, 5)) for name in names}
    sweep(tmp_path, values)
    row = row_of(tmp_path)
    estimate = compare(pd.DataFrame(values), "standard", grain=1 / IMAGES).estimates["logits"]
    alone = 2 * stats.t.sf(estimate.difference / estimate.error, 20)
    assert alone < row["p"] < 5 * alone, "corrected, and not more than by Bonferroni"
    assert row["p"] == pytest.approx(estimate.p)
    assert row["family"] == 5
    assert "The 5 comparisons with standard are one family" in claims_text(tables(tmp_path))
    sweep(tmp_path / "few", values | {"similarity": values["feature"][:1]})
    few = tables(tmp_path / "few").summary.set_index("setting")
    assert few.loc["logits", "p"] == row["p"], "one seed makes no claim to correct for"
    assert few.loc["logits", "family"] == 5
    assert pd.isna(few.loc["similarity", "family"])


def test_point_m_no_gap_is_closed_by_one_run(tmp_path: Path) -> None:
    sweep(tmp_path, {"standard": [0.80], "logits": [0.82]})
    report = build.write([tmp_path], tmp_path)
    assert row_of(tmp_path)["decision"] == "too few"
    for text in (report.text, report.page.read_text(), (tmp_path / "summary.csv").read_text()):
        shown = text.split("</style>")[-1].split("base64,")[0]
        assert "gap" not in shown.replace(tmp_path.name, "")


@pytest.mark.parametrize(("images", "expected"), [(10_000, 0.0093), (1_000, 0.0295)])
def test_point_n_the_calibration_error_has_a_floor(
    images: int, expected: float, tmp_path: Path
) -> None:
    """The audit's figures for a perfectly calibrated network of 81 % accuracy."""
    import torch

    generator = torch.Generator().manual_seed(0)
    floors, errors = [], []
    for _ in range(20):
        logits = 5.5 * torch.randn(images, 10, generator=generator, dtype=torch.float64)
        labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
        bins = reliability(logits, labels)
        floors.append(ece_floor(bins))
        gaps = np.abs(np.subtract(bins["confidence"], bins["right"]))
        errors.append(gaps.sum() / images)
    assert np.mean(floors) == pytest.approx(np.mean(errors), rel=0.1)
    assert np.mean(floors) == pytest.approx(expected, rel=0.1)
    sweep(tmp_path, {"standard": STANDARD})
    assert row_of(tmp_path, "standard")["test_ece_floor"] > 0


def test_point_o_published_spreads_are_deviations_and_never_a_verdict(tmp_path: Path) -> None:
    sweep(tmp_path, {"logits": STANDARD})
    line = Line(
        data="digits", teacher="cnn-8", student="cnn-4", method="logits", accuracy=80.0,
        spread="0.3", runs="5", epoch="last", source="Paper", note="",
    )  # fmt: skip
    found = compare_with_published(tables(tmp_path), [line])
    sd = 100 * np.std(STANDARD, ddof=1)
    test = stats.ttest_ind_from_stats(100 * np.mean(STANDARD), sd, 5, 80.0, 0.3, 5, equal_var=False)
    half = found.table["difference_ci95"][0]
    difference = found.table["difference"][0]
    df = (sd**2 / 5 + 0.09 / 5) ** 2 / ((sd**2 / 5) ** 2 / 4 + (0.09 / 5) ** 2 / 4)
    assert difference / (half / stats.t.ppf(0.975, df)) == pytest.approx(test.statistic)
    assert "80.00 (SD 0.30)" in found.text_table.texts()[1]
    assert not {"verdict", "decision"} & set(found.table.columns)
    unknown = compare_with_published(tables(tmp_path), [line.model_copy(update={"runs": None})])
    assert math.isnan(unknown.table["difference_ci95"][0])


def test_point_p_a_search_chooses_by_its_objective_and_is_marked(tmp_path: Path) -> None:
    trials = {f"logits {t}": [0.81 + t / 1000] for t in (1, 2, 3)}
    sweep(tmp_path, trials, {f"logits {t}": [0.8 + t / 1000] for t in (1, 2, 3)})
    for number, nll in enumerate((0.5, 0.7, 0.6)):
        path = tmp_path / "runs" / f"r{number}" / "result.json"
        result = json.loads(path.read_text())
        result["metrics"]["val_nll"] = nll
        path.write_text(json.dumps(result))
    assert tables(tmp_path).summary["setting"][0] == "logits T=3", "by accuracy"
    study = {"study": "s", "storage": "sqlite:///x.db", "objective": "val_nll"}
    (tmp_path / "study.json").write_text(json.dumps(study))
    found = tables(tmp_path)
    assert found.summary["setting"].tolist() == ["logits T=1", "logits T=3", "logits T=2"]
    assert found.summary["settings_tried"].tolist() == [3, 3, 3]
    assert "Best of 3 settings on val_nll: logits T=1" in headline(found)
    (tmp_path / "study.json").write_text(json.dumps(study | {"objective": "unknown"}))
    assert tables(tmp_path).summary["setting"][0] == "logits T=3", "by accuracy"


def test_point_q_unequal_tuning_is_said(tmp_path: Path) -> None:
    sweep(
        tmp_path / "unequal",
        {"standard": STANDARD, "logits 1": STANDARD, "logits 2": gaining(1), "feature": STANDARD},
    )
    notes = warnings(tables(tmp_path / "unequal"))
    assert any("tuned unequally" in note and "logits 2" in note for note in notes)
    sweep(tmp_path / "equal", {"standard": STANDARD, "logits": STANDARD})
    assert not any("tuned" in note for note in warnings(tables(tmp_path / "equal")))


def test_splits_are_folded_like_seeds(tmp_path: Path) -> None:
    """A setting whose runs of one split are missing is not complete, and is not chosen."""
    configs, test, val = [], [], []
    for method, t in (("standard", None), ("logits", 1.0), ("logits", 2.0)):
        for split in (0, 1):
            for seed in range(3):
                keys = {"method__T": t} if t else {}
                configs.append(config(method, seed, data__split_seed=split, **keys))
                missing = t == 1.0 and split == 1
                gain = 0.01 * (method == "logits") + 0.004 * split + 0.0001 * seed
                test.append(None if missing else 0.8 + gain)
                val.append(0.9 if t == 1.0 else 0.8)
    made(tmp_path, configs, test, val)
    summary = tables(tmp_path).summary.set_index("setting")
    assert set(summary.index) == {"standard", "logits T=1", "logits T=2"}
    assert summary["n"].to_dict() == {"standard": 6, "logits T=1": 3, "logits T=2": 6}
    assert summary.loc["logits T=2", "chosen"]
    assert not summary.loc["logits T=1", "chosen"]
    assert summary.loc["logits T=2", "seeds"] == 6, "each pair of seed and split is one"
    assert summary.loc["logits T=2", "difference"] == pytest.approx(0.01)
    detail = variance(tables(tmp_path))
    sources = {row.cells["source"] for row in detail.table.rows}
    assert {"student (seed)", "split (data.split_seed)"} <= sources


@pytest.mark.parametrize("text", ["0", "-1", "nan", "101", "half"])
def test_a_margin_that_is_none_is_refused(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    sweep(tmp_path, {"standard": [0.8], "logits": [0.81]})
    with pytest.raises(SystemExit) as error:
        command_line.main([str(tmp_path), "--margin", text])
    assert error.value.code == 2
    assert capsys.readouterr().err.startswith("kd: --margin: should be a number of points above 0")
    assert not (tmp_path / "index.html").exists()


def test_the_margin_is_that_of_the_runs_or_the_later_one(tmp_path: Path) -> None:
    values = {"standard": STANDARD, "logits": gaining(0.3)}
    sweep(
        tmp_path, values, standard={"report": {"margin": 1.0}}, logits={"report": {"margin": 0.8}}
    )
    assert tables(tmp_path).margin == pytest.approx(0.008), "the smaller of two"
    build.write([tmp_path], tmp_path, figures=False)
    saved = pd.read_csv(tmp_path / "summary.csv").set_index("setting")
    assert "better than standard, by less than the margin of 0.8" in saved.loc["logits", "verdict"]
    late = build.write([tmp_path], tmp_path, figures=False, margin=0.0001)
    assert late.tables.summary["decision"].tolist().count("equal") == 0
    assert "given with --margin, after the test images had been read" in late.text


@pytest.mark.parametrize("same", [True, False])
def test_only_runs_on_the_same_images_are_compared_image_by_image(
    same: bool, tmp_path: Path
) -> None:
    from safetensors.numpy import save_file

    val = {"standard": [0.8], "logits": [0.9]}
    sweep(tmp_path, {"standard": [0.75], "logits": [1.0]}, val, images=4)
    for number, predictions in enumerate(([0, 1, 0, 0], [0, 1, 0, 1])):
        labels = [0, 1, 0, 1] if same or not number else [1, 0, 1, 0]
        arrays = {"labels": labels, "predictions": predictions if same else labels}
        save_file(
            {name: np.array(values, np.int32) for name, values in arrays.items()},
            tmp_path / "runs" / f"r{number}" / "test_outputs.safetensors",
            {"classes": '["cat", "dog"]'},
        )
    report = build.write([tmp_path], tmp_path)
    row = report.tables.summary.set_index("setting").loc["logits"]
    page = report.page.read_text()
    assert pd.isna(row["difference_images_ci95"]) != same
    assert ("1 only here, 0 only there right (p = 1.000)" in page) == same
    assert ("Classes: logits and standard" in page) == same
    assert "Classes: logits" in page
