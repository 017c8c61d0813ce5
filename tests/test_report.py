"""The report of a run: the maths of the paper's section 7, the content of the page, and the page in a browser."""

import html
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import safetensors.torch
import torch
from matplotlib.figure import Figure
from torch import nn

import report
import train
from common.errors import UserError
from data import load_dataset
from lora import LoRALinear
from lora.variants import DoRALinear
from reporting import page
from reporting.geometry import Geometry, amplification, effective_rank, geometry, subspace_similarity, thin_svd
from reporting.pictures import STYLE, spectra, svg
from reporting.results import place, read_geometry, read_mistakes
from reporting.scores import confidence_interval, macro, majority_baseline, per_class
from reporting.sections import in_short
from training.evaluation import macro_f1
from training.inference import load_classifier

SCRIPT = "Breaking <script>alert('news')</script> & <b>markets</b> fell by 3 % on Monday."
NAMES = ["World", "Sports & <i>games</i>", "Business", "Sci/Tech"]
CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome", "chrome"])), None)


# The maths


def adapted_layer(r: int, kind: type[LoRALinear] = LoRALinear) -> LoRALinear:
    torch.manual_seed(r)
    layer = kind(nn.Linear(24, 40), r, lora_alpha=16)
    nn.init.normal_(layer.lora_B.weight)
    if isinstance(layer, DoRALinear):
        with torch.no_grad():
            layer.lora_magnitude_vector.mul_(1.5)
    return layer


@pytest.mark.parametrize("r", [1, 3, 24, 30])
def test_the_thin_svd_is_the_svd_of_the_product(r):
    torch.manual_seed(r)
    B, A = torch.randn(40, r).double(), torch.randn(r, 24).double()
    U, values, Vh = thin_svd(B, A)
    assert torch.allclose(U @ torch.diag(values) @ Vh, B @ A)
    assert torch.allclose(values, torch.linalg.svdvals(B @ A)[: len(values)])
    assert torch.allclose(U.T @ U, torch.eye(len(values)).double())
    assert torch.allclose(Vh @ Vh.T, torch.eye(len(values)).double())


def test_the_effective_rank_counts_the_directions():
    """1 for one direction, r for r equal ones, and the definition in between."""
    assert effective_rank(torch.tensor([3.0, 0.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.full((5,), 0.2)) == pytest.approx(5)
    assert effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    assert math.isnan(effective_rank(torch.zeros(2)))


def test_phi_is_the_overlap_of_spans_by_equation_4():
    torch.manual_seed(0)
    A, other = torch.randn(3, 50), torch.randn(5, 50)
    phi = subspace_similarity(A, other)
    U, other_U = torch.linalg.svd(A.double())[2].T, torch.linalg.svd(other.double())[2].T  # whole, right singular vectors
    for i in range(1, 4):
        for j in range(1, 6):
            expected = torch.linalg.norm(U[:, :i].T @ other_U[:, :j]) ** 2 / min(i, j)
            assert phi[i - 1, j - 1].item() == pytest.approx(expected.item())


def test_phi_is_1_for_equal_spans_and_0_for_orthogonal_ones():
    """Between random spans it is small."""
    torch.manual_seed(0)
    A = torch.randn(4, 1000)
    assert torch.allclose(subspace_similarity(A, 3 * A), torch.ones(4, 4).double())  # the smaller span lies within the other
    assert subspace_similarity(A, torch.randn(4, 4) @ A)[-1, -1].item() == pytest.approx(1)
    assert subspace_similarity(torch.eye(9)[:3], torch.eye(9)[3:]).abs().max().item() == pytest.approx(0)
    assert subspace_similarity(A, torch.randn(4, 1000)).max() < 0.05  # 4 / 1000 on average


@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
def test_the_geometry_is_that_of_the_whole_matrices(kind):
    layer = adapted_layer(3, kind)
    result = geometry(layer)
    W0, dW = layer.weight.detach().double(), (layer.merged_weight() - layer.weight).detach().double()
    U, _, Vh = torch.linalg.svd(dW)
    U, V = U[:, :3], Vh[:3].T
    assert result.relative_size == pytest.approx((dW.norm() / W0.norm()).item(), rel=1e-4)
    assert result.amplification == pytest.approx((dW.norm() / (U.T @ W0 @ V).norm()).item(), rel=1e-4)
    values = torch.linalg.svdvals(layer.delta_weight().detach().double())[:3]
    assert torch.allclose(result.singular_values, values, rtol=1e-4)
    assert result.effective_rank == pytest.approx(effective_rank(values), rel=1e-4)


def test_the_geometry_is_the_same_while_merged():
    layer = adapted_layer(2)
    before = geometry(layer)
    layer.merge()
    assert geometry(layer).relative_size == pytest.approx(before.relative_size)


def test_an_adapter_that_does_nothing_has_no_effective_rank():
    layer = adapted_layer(2)
    nn.init.zeros_(layer.lora_B.weight)
    nothing = geometry(layer)
    assert nothing.relative_size == 0
    assert math.isnan(nothing.effective_rank)
    assert math.isnan(nothing.amplification)


def test_amplification_is_a_factor_in_the_updates_direction():
    W0 = torch.diag(torch.tensor([1.0, 0.1, 0.1])).double()
    dW = torch.zeros(3, 3).double()
    dW[1, 1] = 2.0
    U, _, Vh = torch.linalg.svd(dW)
    assert amplification(dW, W0, U[:, :1], Vh[:1]) == pytest.approx(20)


# The page


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    """A tiny run with LoRA, and one with DoRA, another r and another seed. Each of the 7 test texts is there once for every
    class, so 21 of the 28 are labelled wrong."""
    folder = tmp_path_factory.mktemp("report")
    dataset = folder / "data"
    dataset.mkdir()
    sample = load_dataset("sample")
    texts = [SCRIPT, "long " * 400, *sample.test.texts[:5]]
    rows = {
        "train": [(text, label) for text, label in zip(sample.train.texts[:48], sample.train.labels[:48], strict=True)],
        "test": [(text, label) for text in texts for label in range(4)],
    }
    for part, pairs in rows.items():
        lines = (json.dumps({"text": text, "label": int(label), "label_text": NAMES[label]}) + "\n" for text, label in pairs)
        (dataset / f"{part}.jsonl").write_text("".join(lines))
    where = [
        "--model",
        "minilm",
        "--dataset",
        str(dataset),
        "--epochs",
        "1",
        "--max-length",
        "64",
        "--batch-size",
        "4",
        "--quiet",
    ]
    assert train.main([*where, "--output-dir", str(folder / "one")]) == 0
    more = ["--r", "3", "--seed", "1", "--use-dora"]
    assert train.main([*where, *more, "--output-dir", str(folder / "two")]) == 0
    return folder / "one", folder / "two"


@pytest.fixture(scope="module")
def content(runs) -> str:
    assert report.main([str(runs[0]), "--against", str(runs[1])]) == 0
    return (runs[0] / "report.html").read_text(encoding="utf-8")


def changed(run: Path, folder: Path, **changes: object) -> Path:
    """A copy of a run with changes in results.json."""
    shutil.copytree(run, folder)
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps(results | changes))
    return folder


def refused(capsys, *arguments: object) -> str:
    """The one line of the error."""
    assert report.main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    return captured.err


def report_of(folder: Path) -> str:
    assert report.main([str(folder)]) == 0
    return (folder / "report.html").read_text(encoding="utf-8")


def test_the_page_shows_the_options_and_the_results(runs, content):
    results = json.loads((runs[0] / "results.json").read_text())
    for value in (
        f"{results['before']['macro_f1']:.3f}",
        f"{results['after']['macro_f1']:.3f}",
        "167,812 of 22,881,800 parameters (0.7334 %)",
        "48 to train on, 28 to test on",
        f"torch {results['versions']['torch']}",
        "<dt>target modules</dt><dd>q_lin, v_lin</dd>",
        "<dt>learning rate</dt><dd>0.0005</dd>",
    ):
        assert value in content
    cells = [int(cell or 0) for cell in re.findall(r'<td class="(?:right|wrong)"[^>]*>(\d*)</td>', content)]
    assert cells == [count for row in results["after"]["confusion_matrix"] for count in row]
    for name, f1 in results["after"]["per_class_f1"].items():
        assert re.search(f"<tr><th scope=row>{re.escape(html.escape(name))}</th><td>7</td>.*<td>{f1:.3f}</td></tr>", content)


def test_results_come_first_and_defaults_are_folded_away(runs, content):
    titles = re.findall("<h2>(.*?)</h2>", content)
    assert titles[:4] == ["Results", "The most confident mistakes", "Training", "What LoRA learned"]
    assert titles[-1] == "What was run"
    typed, defaults = content.split("<h2>What was run</h2>")[1].split("<details>")
    assert set(re.findall("<dt>(batch size|epochs|max length)</dt>", typed)) == {"batch size", "epochs", "max length"}
    for name in ("learning rate", "target modules", "lora alpha", "seed"):
        assert f"<dt>{name}</dt>" not in typed
        assert f"<dt>{name}</dt>" in defaults
    assert "<dt>resume</dt>" not in content


def test_the_twenty_most_confident_mistakes_of_the_run_are_shown_in_order(runs, content):
    lines = [json.loads(line) for line in (runs[0] / "predictions.jsonl").read_text().splitlines()]
    wrong = [line for line in lines if line["predicted"] != line["label"]]
    assert len(wrong) == 21
    assert "Labelled wrong: 21 of 28 test texts." in content
    shown = re.findall(r"true label <b>(.*?)</b>, predicted <b>(.*?)</b> with score ([\d.]+)<", content)
    assert len(shown) == 20
    scores = sorted((line["score"] for line in wrong), reverse=True)
    assert [float(score) for _, _, score in shown] == pytest.approx(scores[:20], abs=6e-4)
    pairs = {(html.escape(line["label"]), html.escape(line["predicted"])) for line in wrong}
    assert {(truth, predicted) for truth, predicted, _ in shown} <= pairs


def test_the_predictions_are_those_of_the_saved_adapter(runs):
    """In the order of the test part, each text as it begins. Together they are the confusion matrix."""
    classifier = load_classifier(runs[0], device="cpu", max_length=64, dtype="float32")
    results = json.loads((runs[0] / "results.json").read_text())
    test = load_dataset(results["dataset"]).test
    lines = [json.loads(line) for line in (runs[0] / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["text"] for line in lines] == [text[:320] for text in test.texts]
    assert [line["label"] for line in lines] == [classifier.label_names[label] for label in test.labels]
    for line, answer in zip(lines, classifier.label(test.texts), strict=True):
        assert line["score"] == pytest.approx(answer["scores"][line["predicted"]], abs=0.02)
        assert line["score"] == pytest.approx(answer["score"], abs=0.02)  # of the label, which may differ on the brink
    matrix = np.zeros((4, 4), dtype=int)
    for line in lines:
        matrix[classifier.label_names.index(line["label"]), classifier.label_names.index(line["predicted"])] += 1
    assert matrix.tolist() == results["after"]["confusion_matrix"]


def test_texts_are_escaped_and_cut_and_the_page_loads_nothing(content):
    assert html.escape(SCRIPT) in content
    assert "long long" in content
    assert "long " * 100 not in content
    assert "<i>games" not in content
    assert not re.search(r"<script|<link|<iframe|<img|<image|@import|@font-face|javascript:", content, re.IGNORECASE)
    assert "://" not in content
    assert re.findall(r"url\((?!#)", content) == []
    assert re.findall(r'(?:src|href)\s*=\s*"(?!#)', content) == []
    assert not re.search(r"\son\w+=", content)


def test_each_picture_has_two_sentences_and_ids_of_its_own(content):
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", content, re.DOTALL)
    assert len(captions) == content.count("<figure>") == 8
    assert content.count("<svg") == 5
    for caption in captions:
        assert len(re.findall(r"[.!?](?=\s|$)", caption)) == 2
        assert caption.endswith(".")
    ids = re.findall(r'\sid="([^"]*)"', content)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]*)', content)) <= set(ids)


def test_the_same_run_gives_the_same_page(runs, content):
    assert report.main([str(runs[0]), "--against", str(runs[1]), "--output", str(runs[0] / "pages" / "again.html")]) == 0
    assert (runs[0] / "pages" / "again.html").read_text(encoding="utf-8") == content


def test_the_pictures_have_the_colours_and_the_font_of_the_page(content):
    svgs = "".join(re.findall(r"<svg.*?</svg>", content, re.DOTALL))
    assert set(re.findall(r"(?:fill|stroke): ([^;\"]+)", svgs)) <= {"none", "currentColor", "var(--soft)", "var(--line)"} | {
        f"var(--c{number})" for number in range(1, 7)
    }
    assert set(re.findall(r"font-family: ([^;\"]+)", svgs)) <= {"system-ui, sans-serif"}
    assert "DejaVu" not in svgs


def test_another_run_is_compared_by_its_options_and_phi(runs, content):
    assert "<h2>Compared with two</h2>" in content
    assert "<dt>r</dt><dd>2 here, 3 there</dd>" in content
    assert "<dt>use dora</dt><dd>no here, yes there</dd>" in content
    layers = [read_geometry(run, json.loads((run / "results.json").read_text())) for run in runs]
    phi = [
        f"{value:.3f}"
        for kind, numbered in layers[0].items()
        for number, layer in numbered.items()
        for value in subspace_similarity(layer.A, layers[1][kind][number].A).flatten().tolist()
    ]
    assert re.findall(r'title="i = \d, j = \d: ([\d.]+)"', content) == phi
    assert len(phi) == 12 * 2 * 3
    strengths = re.findall(r'--strength: (\d+)%" title="i', content)
    assert [int(strength) for strength in strengths] == pytest.approx([100 * float(value) for value in phi], abs=0.6)
    assert '<i style="left: 0.78%">' in content  # 3 / 384, the phi of random directions
    alone = report_of(runs[1])
    assert "Compared" not in alone
    assert alone.count("<figure>") == 7


def test_a_missing_part_is_left_out_with_the_reason(runs, tmp_path):
    old = changed(runs[0], tmp_path / "old", dataset=str(tmp_path / "no" / "data"))
    assert "Labelled wrong: 21 of 28" in report_of(old)  # the data set is not needed
    (old / "predictions.jsonl").unlink()
    assert "predictions.jsonl is missing: a run of an older version has none" in report_of(old)

    bare = changed(runs[0], tmp_path / "bare")
    shutil.rmtree(bare / "adapter")
    (bare / "metrics.jsonl").write_text('{"step": 10')
    content = report_of(bare)
    assert "metrics.jsonl is missing or damaged" in content
    assert "The geometry of the adapter: left out" in content
    assert content.count("<svg") == 0


def test_damaged_predictions_are_not_listed(runs, tmp_path):
    results = json.loads((runs[0] / "results.json").read_text())
    path = tmp_path / "predictions.jsonl"
    lines = (runs[0] / "predictions.jsonl").read_text().splitlines(keepends=True)
    first = json.loads(lines[0])
    other = next(name for name in NAMES if name != first["predicted"])
    damages: list[tuple[dict[str, object], str]] = [
        ({"predicted": other}, "does not belong to results.json"),
        ({"predicted": "Nobody"}, "is damaged"),
        ({"predicted": ["World"]}, "is damaged"),
        ({"label": None}, "is damaged"),
        *(({"score": score}, "is damaged") for score in (None, "0.5", math.nan, 10**400, -1)),
        ({"text": 1}, "line 1: the text 1 is not a string"),
    ]
    for changes, why in damages:
        path.write_text("".join([json.dumps(first | changes) + "\n", *lines[1:]]))
        with pytest.raises(UserError, match=f"{re.escape(str(path))}.*{why}"):
            read_mistakes(tmp_path, results)
    for content, why in [("".join(lines)[:100], "not JSON"), ("", "does not belong to"), ("[" + "".join(lines), "not JSON")]:
        path.write_text(content)
        with pytest.raises(UserError, match=why):
            read_mistakes(tmp_path, results)


# The scores


MATRIX = np.array([[40, 5, 0, 5], [2, 20, 0, 0], [0, 0, 0, 0], [3, 0, 0, 1]])


def test_precision_and_recall_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    true, predicted = (np.repeat(index, MATRIX.flatten()) for index in np.indices(MATRIX.shape).reshape(2, -1))
    precision, recall, f1, support = metrics.precision_recall_fscore_support(
        true, predicted, labels=range(4), zero_division=np.nan
    )
    assert per_class(MATRIX) == pytest.approx(np.stack([support, precision, recall, f1], axis=1), nan_ok=True)
    means = metrics.precision_recall_fscore_support(true, predicted, average="macro", zero_division=0)[:3]
    assert macro(MATRIX) == pytest.approx([76, *means])


def test_the_confidence_interval_is_that_of_resampled_texts():
    """The percentile interval of texts drawn one by one. It is narrower with more texts."""
    pairs = np.repeat(np.arange(16), MATRIX.flatten())
    random = np.random.default_rng(1)
    drawn = (np.bincount(random.choice(pairs, len(pairs)), minlength=16).reshape(4, 4) for _ in range(2000))
    expected = np.quantile([macro_f1(matrix) for matrix in drawn], [0.025, 0.975])
    low, high = confidence_interval(MATRIX)
    assert [low, high] == pytest.approx(expected, abs=0.015)
    narrow_low, narrow_high = confidence_interval(100 * MATRIX)
    assert narrow_high - narrow_low < 0.15 * (high - low)


def test_the_simplest_classifier_always_predicts_the_most_frequent_class():
    largest, always = majority_baseline(MATRIX)
    assert largest == 0
    assert always.tolist() == [[50, 0, 0, 0], [22, 0, 0, 0], [0, 0, 0, 0], [4, 0, 0, 0]]


def test_a_class_that_does_not_occur_has_no_scores(runs, tmp_path):
    after = {"macro_f1": 0.75, "accuracy": 1.0, "confusion_matrix": [[0, 0], [0, 30]], "per_class_f1": {"a": None, "b": 1.0}}
    content = report_of(changed(runs[0], tmp_path / "run", after=after))
    assert "<tr><th scope=row>a</th><td>0</td><td>\u2013</td><td>\u2013</td><td>\u2013</td></tr>" in content
    assert "No text was labelled wrong" in content
    assert "up to 10.0% of all texts may be" in content


def test_of_many_classes_the_most_frequent_confusions_are_shown(runs, tmp_path):
    counts = np.diag([9] * 41)
    counts[3, 5] = 4
    scores = {f"class {i}": 0.9 for i in range(41)}
    after = {"macro_f1": 0.9, "accuracy": 0.99, "confusion_matrix": counts.tolist(), "per_class_f1": scores}
    content = report_of(changed(runs[0], tmp_path / "run", after=after))
    assert "<tr><th scope=row>class 3</th><td>class 5</td><td>4</td></tr>\n</table>" in content
    assert 'class="right"' not in content


def test_the_geometry_begins_with_what_it_says():
    def layers(*ranks: float) -> dict[str, dict[int, Geometry]]:
        return {
            "q_lin": {i: Geometry(0.01 * (i + 1), torch.ones(8), rank, 1.0, torch.ones(8, 9)) for i, rank in enumerate(ranks)}
        }

    said = in_short(layers(2.0, 3.0), 8)
    assert said.startswith("Training changed q_lin of layer 1 most (|dW| / |W0| = 0.02) and q_lin of layer 0 least (0.01).")
    assert said.endswith("uses 2.5 of its r = 8 directions, so r = 3 would keep most of it.")
    assert in_short(layers(7.0, 6.0), 8).endswith("so a smaller r would lose a part of it.")
    assert in_short(layers(1.0), 1) == "Training changed q_lin of layer 0: |dW| / |W0| is 0.01. r = 1 cannot be smaller."
    nothing = {"q_lin": {0: replace(layers(1.0)["q_lin"][0], relative_size=0.0, effective_rank=math.nan)}}
    assert in_short(nothing, 8) == "Training changed no layer: every dW is zero."


def test_without_a_finished_run_the_error_says_what_to_do(runs, tmp_path, capsys):
    one, _ = runs
    assert f"there is no folder {tmp_path / 'none'}" in refused(capsys, tmp_path / "none")
    stopped = tmp_path / "stopped"
    (stopped / "checkpoints").mkdir(parents=True)
    (stopped / "checkpoints" / "step-00000010.safetensors").touch()
    assert f"train.py --resume {stopped}" in refused(capsys, stopped)
    assert "results.json not found" in refused(capsys, one, "--against", tmp_path)
    assert "cannot be written" in refused(capsys, one, "--output", tmp_path)
    assert "unrecognized" in refused(capsys, one, "--frobnicate")


def test_a_damaged_results_json_is_one_line(runs, tmp_path, capsys):
    results = json.loads((runs[0] / "results.json").read_text())
    options, after = results["options"], results["after"]
    damages: list[dict[str, object]] = [
        {"options": []},
        {"train": {}},
        {"options": options | {"method": "prefix"}},
        {"after": after | {"confusion_matrix": [[-1] * 4] * 4}},
        {"after": after | {"confusion_matrix": [[0] * 4] * 4}},
        {"sha256": {}},
        {"after": after | {"macro_f1": "high"}},
        {"after": after | {"confusion_matrix": [["<b>"] * 4] * 4}},
        {"after": after | {"confusion_matrix": [[1]]}},
    ]
    for i, changes in enumerate(damages):
        assert "is damaged" in refused(capsys, changed(runs[0], tmp_path / str(i), **changes)), changes
    folder = changed(runs[0], tmp_path / "run")
    (folder / "results.json").write_text('{"model": "minilm"}')
    assert "is damaged (KeyError('options')): train again" in refused(capsys, folder)
    (folder / "results.json").write_text("{")
    assert "is not JSON" in refused(capsys, folder)


def test_runs_that_cannot_be_compared_are_refused(runs, tmp_path, capsys):
    one, two = runs
    results = json.loads((two / "results.json").read_text())
    other = changed(two, tmp_path / "model", sha256=results["sha256"] | {"weights": "0" * 64})
    assert "pass a run on the same model" in refused(capsys, one, "--against", other)
    full = changed(two, tmp_path / "full", options=results["options"] | {"method": "full"})
    assert f"{full} was trained without LoRA" in refused(capsys, one, "--against", full)
    assert f"{full} was trained without LoRA" in refused(capsys, full, "--against", one)
    queries = changed(two, tmp_path / "queries")
    path = queries / "adapter" / "adapter_model.safetensors"
    tensors = {key: tensor for key, tensor in safetensors.torch.load_file(path).items() if "v_lin" not in key}
    safetensors.torch.save_file(tensors, path)
    path = queries / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": ["q_lin"]}))
    assert "pass a run with the same --target-modules" in refused(capsys, one, "--against", queries)


def test_without_matplotlib_the_error_says_what_to_install(runs, capsys, monkeypatch):
    for name in ("reporting.sections", "reporting.pictures"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr("reporting.pictures", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "report.py needs matplotlib: pip install -e '.[report]'" in refused(capsys, runs[0])


def test_the_place_of_a_layer_is_its_kind_and_its_number():
    assert place("distilbert.transformer.layer.11.attention.q_lin") == ("q_lin", 11)
    assert place("projection") == ("projection", 0)


def test_any_text_can_stand_in_a_picture():
    with matplotlib.rc_context(STYLE):
        figure = Figure()
        figure.text(0.5, 0.5, "a $b$ <c>")
        assert "a $b$ &lt;c&gt;" in svg(figure, "Words")


def test_the_axis_of_the_spectra_holds_every_panel():
    small, large = (replace(geometry(adapted_layer(2)), singular_values=torch.tensor([top, 0.1])) for top in (1.0, 10.0))
    assert ">10<" in spectra("Spectra", {"q_lin": {0: small}, "v_lin": {0: large}})


# The browser

MEASURE = """<script>
const box = e => { const b = e.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; };
const bodies = [...document.querySelectorAll("figure > :nth-child(2)")];
parent.postMessage(JSON.stringify({
  width: innerWidth, scroll: document.documentElement.scrollWidth, height: document.documentElement.scrollHeight,
  figures: bodies.map(box), svgs: [...document.querySelectorAll("svg")].map(s => [box(s), [...s.querySelectorAll("text")].map(
    t => [t.textContent, ...box(t)])]) }), "*");
</script>"""
FRAME = """<!DOCTYPE html><script>addEventListener("message", event => { document.title = event.data; });</script>
<iframe src="measured.html" width="WIDTH" height="800" style="border: 0">"""  # a window has at least 500 pixels


def chromium(page: Path, *options: str) -> tuple[str, list[str]]:
    """What headless Chromium prints of a page, and the addresses that the page requested.

    Chromium's log tells its own requests from those of the page. Nothing leaves the machine: no proxy listens at that port.
    """
    assert CHROMIUM is not None
    log = page.with_suffix(".json")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += ["--proxy-server=127.0.0.1:9", "--proxy-bypass-list=<-loopback>", f"--log-net-log={log}"]
    command += [f"--user-data-dir={page.parent}/profile", *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    asked = [event["params"] for event in json.loads(log.read_text())["events"] if "initiator" in event.get("params", {})]
    return done.stdout, [params["url"] for params in asked if params["initiator"] != "not an origin"]


def overlap(a: list[float], b: list[float]) -> bool:
    """Whether two boxes overlap by more than a pixel in both directions."""
    return min(a[2], b[2]) - max(a[0], b[0]) > 1 and min(a[3], b[3]) - max(a[1], b[1]) > 1


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [400, 1200])
def test_a_browser_shows_every_picture_in_light_and_dark(content, tmp_path, width):
    plain, frame = tmp_path / "plain.html", tmp_path / "frame.html"
    plain.write_text(content, encoding="utf-8")
    frame.write_text(FRAME.replace("WIDTH", str(width)), encoding="utf-8")
    measured = re.sub("<meta http-equiv[^>]*>", "", content) + MEASURE
    frame.with_name("measured.html").write_text(measured, encoding="utf-8")
    title = re.search("<title>(.*?)</title>", chromium(frame, "--dump-dom")[0], re.DOTALL)
    assert title is not None
    sizes = json.loads(html.unescape(title[1]))
    assert sizes["width"] == width
    assert sizes["scroll"] <= width
    assert len(sizes["figures"]) == 8
    for left, _, right, _ in sizes["figures"]:
        assert 0 <= left < right <= width
    for frame, texts in sizes["svgs"]:
        for i, (text, *box) in enumerate(texts):
            assert frame[0] - 1 <= box[0] <= box[2] <= frame[2] + 1, f"{text!r} is cut off"
            assert frame[1] - 1 <= box[1] <= box[3] <= frame[3] + 1, f"{text!r} is cut off"
            assert box[3] - box[1] >= 9, f"{text!r} is too small to read"
            for other, *its in texts[:i]:
                assert not overlap(box, its), f"{text!r} and {other!r} overlap"

    for dark in (0, 1):
        picture = tmp_path / f"{width}-{dark}.png"
        mode = f"--blink-settings=preferredColorScheme={1 - dark}"
        size = f"--window-size={width},{math.ceil(sizes['height'])}"
        assert chromium(plain, mode, size, f"--screenshot={picture}")[1] == []
        pixels = matplotlib.image.imread(picture)[..., :3]
        assert pixels.shape[1] == width
        assert (np.median(pixels) < 0.2) == bool(dark)
        for left, top, right, bottom in sizes["figures"]:
            inside = pixels[round(top) : round(bottom), round(left) : round(right)].reshape(-1, 3)
            colours, counts = np.unique((inside * 255).astype(np.uint8), axis=0, return_counts=True)
            assert len(colours) > 10
            assert counts.max() < 0.98 * counts.sum()  # something is drawn ...
            ground = colours[counts.argmax()].astype(float)
            assert np.abs(colours - ground).max() > 90  # ... and can be seen


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_phone_shows_a_matrix_of_twelve_long_names(tmp_path):
    """Its diagonal needs no scrolling. A wider matrix is scrolled under its names, which stay."""
    names = [f"A long name of class {i}" for i in range(12)]
    few, many = (page.confusion(np.full((12, 12), count).tolist(), names) for count in (88, 8888))
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.replace("WIDTH", "400"), encoding="utf-8")
    measure = """<script>
const wide = [...document.querySelectorAll(".wide")], left = e => e.getBoundingClientRect().left; wide[1].scrollLeft = 1e6;
parent.postMessage(JSON.stringify([wide[0].scrollWidth - wide[0].clientWidth, wide[1].scrollLeft,
  left(wide[1].querySelector("th[scope=row]")) - left(wide[1])]), "*");</script>"""
    content = page.document("Matrix", "", page.figure("Few", few, "") + page.figure("Many", many, ""))
    content = re.sub("<meta http-equiv[^>]*>", "", content) + measure
    frame.with_name("measured.html").write_text(content, encoding="utf-8")
    title = re.search("<title>(.*?)</title>", chromium(frame, "--dump-dom")[0])
    assert title is not None
    hidden, scrolled, left = json.loads(title[1])
    assert hidden == 0
    assert scrolled > 50
    assert 0 <= left < 5


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_log_shows_a_request_and_the_page_forbids_it(content, tmp_path):
    image = '<img src="https://example.org/pixel.png">'
    for name, text, asked in [
        ("open", re.sub("<meta http-equiv[^>]*>", "", content) + image, ["https://example.org/pixel.png"]),
        ("shut", content + image, []),
    ]:
        (tmp_path / f"{name}.html").write_text(text, encoding="utf-8")
        assert chromium(tmp_path / f"{name}.html", "--dump-dom")[1] == asked
