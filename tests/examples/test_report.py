"""The report of a run folder that is invented here: no number in it comes from a training."""

import html.parser
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import yaml

from data.description import load_description
from data.layouts import find_subjects
from errors import UserError
from evaluation.charts import Curve, draw_chart, history_charts, tiles
from evaluation.scoring import Score, write_scores
from evaluation.slices import choose_cases, load_slices, save_slices
from evaluation.tables import gains
from models import build_network
from report import headline, main, verdict, write_report
from training.checkpoint import ModelMetadata, save_model

REGIONS = ("ET", "TC", "WT")
ROLES = ("teacher", "baseline", "student")
AFFINE = np.diag([-1.0, -1.0, 2.0, 1.0])


def invented_scores(cases=8, gain=0.05, unit="mm"):
    generator = np.random.default_rng(0)
    scores = []
    for index in range(cases):
        base = float(generator.uniform(0.4, 0.6))
        noise = float(generator.normal(0, 0.01))
        values = dict(zip(ROLES, (0.9, base, base + gain + noise), strict=True))
        for role, dice in values.items():
            for region in REGIONS:
                for space in ("grid", "native"):
                    empty = region == "ET" and index == 0
                    value, present = (0.0, float("nan")) if empty else (dice, dice)
                    voxels = 0 if empty else 50
                    scores.append(
                        Score(
                            role,
                            f"Case_{index}",
                            region,
                            space,
                            value,
                            present,
                            4.0,
                            unit,
                            voxels,
                            40,
                        )
                    )
    return scores


def write_data(root, names):
    labels = np.zeros((24, 20, 10), dtype=np.int16)
    labels[8:14, 6:12, 3:7] = 2
    labels[9:12, 8:11, 4:6] = 4
    for name in names:
        (root / name).mkdir(parents=True)
        for modality in ("flair", "t1", "t1ce", "t2"):
            grey = np.zeros(labels.shape, dtype=np.int16)
            grey[3:20, 2:18] = 100 + 50 * labels[3:20, 2:18]
            nib.save(nib.Nifti1Image(grey, AFFINE), root / name / f"{name}_{modality}.nii.gz")
        nib.save(nib.Nifti1Image(labels, AFFINE), root / name / f"{name}_seg.nii.gz")
    return labels


def write_role(run, role, description):
    view = tuple(description.modalities) if role == "teacher" else ("t1ce",)
    arguments = {"channels": [2, 4], "skip_connections": 1}
    described = ModelMetadata(
        role=role,
        backbone="kdnet",
        backbone_arguments=arguments,
        in_channels=len(view),
        out_channels=4,
        modalities=view,
        activation="softmax",
        description=description,
        crop=None,
        grid=(16, 16, 16),
        epoch=3,
        phantom=description.phantom,
    )
    network = build_network("kdnet", arguments, in_channels=len(view), out_channels=4)
    save_model(run / role / "model.safetensors", network, described)
    header = "epoch,step,learning_rate,seconds,train_loss,train_ground_truth,"
    header += "validation_loss,validation_dice\n"
    rows = "".join(f"{e},{e},0.001,1.5,{1 / e},{2 / e},{1.1 / e},{1 - 1 / e}\n" for e in (1, 2, 3))
    (run / role / "history.csv").write_text(header + rows)


def make_run(run, description, config=None):
    names = [f"Case_{index}" for index in range(8)]
    labels = write_data(run.parent / "data", names)
    scores = invented_scores()
    for role in ROLES:
        write_role(run, role, description)
        for name in names:
            path = run / "predictions" / role / f"{name}_seg.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(labels.astype(np.uint8), AFFINE), path)
    write_scores(run / "scores.csv", scores)
    settings = {"preset": "demo", "folds": 3, "fold": 0, "temperature": 5.0} | (config or {})
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    (run / "environment.json").write_text(json.dumps({"versions": {"torch": "2.x"}, "seed": 7}))
    parts = {"train": ["Case_a", "Case_b"], "validation": ["Case_c"], "test": names}
    (run / "cases.json").write_text(json.dumps(parts))
    summary = {
        "seconds": {"teacher": 61.0, "student": 8.25},
        "peak_mib": {"process": 1234.0},
    }
    (run / "summary.json").write_text(json.dumps(summary))
    subjects = {s.name: s for s in find_subjects(run.parent / "data", description)[1]}
    save_slices(run / "slices.npz", subjects, description, run / "predictions", scores)
    return run


@pytest.fixture(scope="module")
def phantom_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantom") / "run"
    return make_run(folder, load_description("phantom"), {"note": "<script>alert(1)</script>"})


@pytest.fixture(scope="module")
def page(phantom_run):
    return write_report(phantom_run).read_text(encoding="utf-8")


class Links(html.parser.HTMLParser):
    """Collects every address that a browser would load."""

    def __init__(self):
        super().__init__()
        self.found, self.open, self.identifiers = [], [], []

    def handle_starttag(self, tag, attributes):
        if tag in {"script", "link", "iframe", "object", "embed", "base"}:
            self.found.append(tag)
        for name, value in attributes:
            if name in {"src", "href", "srcset", "data", "xlink:href", "poster", "action"}:
                self.found.append(value)
            if name == "id":
                self.identifiers.append(value)


def read(page):
    links = Links()
    links.feed(page)
    return links


def test_page_loads_nothing(page):
    loaded = [link for link in read(page).found if not link.startswith(("data:image/png", "#"))]
    assert loaded == []
    assert re.findall(r"url\((?!#)", page) == []
    assert "@import" not in page


def test_identifiers_are_unique(page):
    identifiers = read(page).identifiers
    assert len(identifiers) == len(set(identifiers))


def test_phantom_is_shown_large_and_with_every_section(page):
    assert "<strong>PHANTOM</strong>" in page
    assert page.count('<span class="tag">phantom</span>') == 6
    assert "(phantom)</title>" in page


def test_real_data_are_not_called_phantoms(tmp_path):
    description = replace(load_description("brats2021"), name="Invented", citation="A. Author")
    page = write_report(make_run(tmp_path / "run", description)).read_text(encoding="utf-8")
    assert "phantom" not in re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL).lower()
    assert "cites: A. Author" in page


def test_text_from_the_run_is_escaped(page):
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_page_states_both_conventions_and_counts(page):
    assert "Dice, all cases" in page
    assert "Dice, cases with the region in the reference" in page
    assert "1 of 8" in page
    assert "1 predicted all the same, 0 missed" in page
    assert "HD95 [mm]" in page
    assert "373.13 mm" in page


def test_page_holds_settings_cases_times_and_memory(page):
    for text in ("temperature", "versions: torch", "Case_b", "train: 2", "1 min 1 s", "1,234 MiB"):
        assert text in page, text


def test_figure_shows_modalities_reference_and_networks(page):
    pictures = re.findall(r'<img src="data:image/png;base64,[^"]+" alt="([^"]+)"', page)
    assert len(pictures) == 3 * 8  # three cases, four modalities, reference, three networks
    shown = [text.split(": ")[1] for text in pictures[:8]]
    names = ["flair", "t1", "t1ce", "t2", "reference", "teacher", "baseline", "student"]
    assert shown == [f"{name} (phantom)" for name in names]


def test_report_is_the_same_when_made_again(phantom_run, page):
    assert write_report(phantom_run).read_text(encoding="utf-8") == page


def test_report_without_slices_history_and_summary(phantom_run, tmp_path):
    for name in ("config.yaml", "scores.csv"):
        (tmp_path / name).write_text((phantom_run / name).read_text())
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "there is no figure" in page
    assert "No history was kept" in page


def test_folder_of_no_run_is_status_two(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "expected the folder of a run, found no config.yaml" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_run_without_scores_is_explained(tmp_path):
    (tmp_path / "config.yaml").write_text("fold: 0\n")
    with pytest.raises(UserError, match="expected the scores of a run"):
        write_report(tmp_path)


def gain_of(metric, lower, upper, p_holm=0.01):
    interval = SimpleNamespace(lower=lower, upper=upper)
    return SimpleNamespace(metric=metric, interval=interval, p_holm=p_holm)


@pytest.mark.parametrize(
    ("metric", "lower", "upper", "expected"),
    [
        ("dice", 0.01, 0.1, "better"),
        ("dice", -0.1, -0.01, "worse"),
        ("dice", -0.1, 0.1, "open"),
        ("dice", float("nan"), float("nan"), "open"),
        ("hd95", -5.0, -1.0, "better"),
        ("hd95", 1.0, 5.0, "worse"),
    ],
)
def test_verdict_needs_an_interval_without_zero(metric, lower, upper, expected):
    assert verdict(gain_of(metric, lower, upper)) == expected


@pytest.mark.parametrize("p_holm", [0.05, 0.4, float("nan")])
def test_verdict_needs_the_corrected_test_too(p_holm):
    assert verdict(gain_of("dice", 0.01, 0.1, p_holm)) == "open"


def test_headline_says_loss_as_plainly_as_gain():
    (lost, *_) = headline(gains(invented_scores(gain=-0.3)))
    assert "the student is worse than the baseline" in lost
    (unknown, *_) = headline(gains(invented_scores(cases=4)))
    assert unknown.endswith("Nothing can be concluded.")


def test_shown_cases_are_the_extremes_and_the_median():
    chosen = choose_cases(invented_scores(cases=5))
    assert [why.split()[0] for why in chosen.values()] == ["lowest", "median", "highest"]


def test_shown_cases_without_student_come_from_the_baseline():
    scores = [score for score in invented_scores(cases=3) if score.role == "baseline"]
    assert all("Dice of the baseline" in why for why in choose_cases(scores).values())


def test_slices_are_turned_to_the_radiological_view(tmp_path):
    # Under the identity a voxel at the patient's right front has the largest x and y.
    description = load_description("brats2021")
    labels = np.zeros((12, 10, 6), dtype=np.int16)
    labels[10, 8, 2] = 1
    grey = np.full(labels.shape, 9, dtype=np.int16)
    grey[0, 0, 0] = 10
    folder = tmp_path / "Case_0"
    folder.mkdir()
    for modality in ("flair", "t1", "t1ce", "t2"):
        nib.save(nib.Nifti1Image(grey, np.eye(4)), folder / f"Case_0_{modality}.nii")
    nib.save(nib.Nifti1Image(labels, np.eye(4)), folder / "Case_0_seg.nii")
    subjects = {s.name: s for s in find_subjects(tmp_path, description)[1]}
    path = tmp_path / "slices.npz"
    save_slices(path, subjects, description, tmp_path / "none", invented_scores(cases=1))
    _, (shown,) = load_slices(path)
    assert shown.position == (3, 6)
    (row,), (column,) = np.nonzero(shown.labels["reference"])
    assert (row, column) == (1, 1)  # top left: front, patient's right


def test_colours_of_charts_are_left_to_the_page():
    markup = draw_chart("a & b", [Curve("student", [1.0, 0.5]), Curve("teacher", [1.0, 2.0])])
    assert markup.startswith('<svg role="img" aria-label="a &amp; b" viewBox')
    assert "var(--student)" in markup
    assert "#a1000" not in markup
    assert "DejaVu" not in markup


def test_history_columns_become_charts_in_order():
    row = {"epoch": 1, "step": 5, "learning_rate": 0.1, "seconds": 2.0, "train_loss": 1.0}
    row |= {"train_latent_kl": 0.2, "validation_loss": 1.0, "validation_dice": 0.5}
    charts = history_charts({"student": [row]})
    assert list(charts) == ["loss", "Dice (validation)", "term: latent kl", "learning rate"]
    assert [curve.dashed for curve in charts["loss"]] == [False, True]


def test_labels_are_drawn_over_what_the_student_sees(phantom_run):
    _, (case, *_) = load_slices(phantom_run / "slices.npz")
    pictures = tiles(case, ("t1ce",))
    assert [tile.title for tile in pictures if tile.note] == ["t1ce"]
    assert all(tile.source.startswith("data:image/png;base64,iVBOR") for tile in pictures)
