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
from data import load_dataset
from lora import LoRALinear
from lora.variants import DoRALinear
from reporting import page
from reporting.geometry import amplification, effective_rank, geometry, subspace_similarity, thin_svd
from reporting.pictures import STYLE, spectra, svg
from reporting.results import place, read_geometry
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
    cells = [int(cell) for cell in re.findall(r"<td class=[^>]*>(\d+)</td>", content)]
    assert cells == [count for row in results["after"]["confusion_matrix"] for count in row]
    for name, f1 in results["after"]["per_class_f1"].items():
        assert re.search(f"<tr><th scope=row>{re.escape(html.escape(name))}</th>.*<td>{f1:.3f}</td></tr>", content)


def test_the_twenty_most_confident_mistakes_are_shown_in_order(runs, content):
    classifier = load_classifier(runs[0], device="cpu", max_length=64)
    names = classifier.label_names
    test = load_dataset(json.loads((runs[0] / "results.json").read_text())["dataset"]).test
    answers = zip(classifier.label(test.texts), test.labels, strict=True)
    wrong = [(answer["score"], answer["label"], names[truth]) for answer, truth in answers if answer["label"] != names[truth]]
    assert len(wrong) == 21
    shown = re.findall(r"true label <b>(.*?)</b>, predicted <b>(.*?)</b> with score ([\d.]+)<", content)
    assert len(shown) == 20
    assert [float(score) for _, _, score in shown] == pytest.approx(sorted((w[0] for w in wrong), reverse=True)[:20], abs=6e-4)
    pairs = {(html.escape(truth), html.escape(predicted)) for _, predicted, truth in wrong}
    assert {(truth, predicted) for truth, predicted, _ in shown} <= pairs


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
    assert len(captions) == content.count("<figure>") == 7
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
    assert '--strength: 100%" title' in content  # the highest of all
    alone = report_of(runs[1])
    assert "Compared" not in alone
    assert alone.count("<figure>") == 6


def test_a_missing_part_is_left_out_with_the_reason(runs, tmp_path):
    gone = changed(runs[0], tmp_path / "gone", dataset=str(tmp_path / "no" / "data"))
    assert "labelled wrong: left out, because there is no data set" in report_of(gone)
    results = json.loads((runs[0] / "results.json").read_text())
    other = shutil.copytree(results["dataset"], tmp_path / "data")
    (other / "test.jsonl").write_text((other / "test.jsonl").read_text().replace("markets", "prices"))
    content = report_of(changed(runs[0], tmp_path / "other", dataset=str(other)))
    assert "has changed since the run" in content
    assert "<ol" not in content

    bare = changed(runs[0], tmp_path / "bare")
    shutil.rmtree(bare / "adapter")
    (bare / "metrics.jsonl").write_text('{"step": 10')
    content = report_of(bare)
    assert "metrics.jsonl is missing or damaged" in content
    assert "The geometry of the adapter: left out" in content
    assert content.count("<svg") == 0


def test_a_class_that_does_not_occur_has_no_f1():
    table = page.confusion([[0, 0], [1, 3]], {"a": None, "b": 0.75})
    assert "<td>does not occur</td></tr><tr><th scope=row>b</th>" in table
    assert "<td>0.750</td></tr>" in table


def test_without_a_finished_run_the_error_says_what_to_do(runs, tmp_path, capsys):
    one, _ = runs
    assert "results.json not found. Pass a folder" in refused(capsys, tmp_path / "none")
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
        {"options": options | {"max_length": "long"}},
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
    assert len(sizes["figures"]) == 7
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
def test_the_log_shows_a_request_and_the_page_forbids_it(content, tmp_path):
    image = '<img src="https://example.org/pixel.png">'
    for name, text, asked in [
        ("open", re.sub("<meta http-equiv[^>]*>", "", content) + image, ["https://example.org/pixel.png"]),
        ("shut", content + image, []),
    ]:
        (tmp_path / f"{name}.html").write_text(text, encoding="utf-8")
        assert chromium(tmp_path / f"{name}.html", "--dump-dom")[1] == asked
