"""The sections of a report, from top to bottom, and the page that they make."""

import math
from dataclasses import fields
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from reporting import page, pictures
from reporting.geometry import subspace_similarity
from reporting.results import Layers, class_names, read_geometry, read_matrix, read_metrics, read_mistakes, read_results
from reporting.scores import CONFIDENCE, RESAMPLES, confidence_interval, macro, majority_baseline, per_class
from training.options import LEARNING_RATES, Options

MISTAKES = 20  # the most that are shown
MOST_CLASSES = 40  # in a confusion matrix; of more, the most frequent confusions are shown
FEW = 0.6  # of r: if the effective rank is less, a smaller r is worth a try
DIRECTIONS = 8  # the most that are compared in each layer
NOT_LISTED = {"model", "dataset", "revision", "resume", "checkpoint_every", "output_dir", "merged_output", "dtype", "device"}
NOT_LISTED |= {"quiet", "tensorboard"}


def report_page(folder: Path, against: Path | None) -> str:
    """The whole page. Raises UserError if the run has not ended or is damaged, or cannot be compared with `against`."""
    results = read_results(folder)
    try:
        options, matrix = results["options"], read_matrix(results)
        method = f"LoRA, r = {options['r']}" if options["method"] == "lora" else f"--method {options['method']}"
        title = f"{results['model']} on {results['dataset']}, {method}"
        top = [page.tiles(numbers(results, matrix)), outcome(results, matrix), mistakes(folder, results, matrix)]
        settings = what_was_run(results)
        learned = compare_with(folder, results, against) if against else what_lora_learned(folder, results)
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        damaged = f"{folder} or {against}" if against else folder
        raise UserError(f"results.json of {damaged} is damaged ({error!r}): train again") from error
    body = "\n".join([*top, training(folder), learned, settings])
    return page.document(title, f"The run in {folder.resolve().name}", body)


def numbers(results: dict[str, Any], matrix: np.ndarray) -> dict[str, str]:
    """The first thing that is seen."""
    low, high = confidence_interval(matrix)
    interval = f"{100 * CONFIDENCE:.0f} % confidence interval"
    largest, always = majority_baseline(matrix)
    return {
        f"macro-F1 ({interval} {low:.3f} to {high:.3f})": f"{results['after']['macro_f1']:.3f}",
        "macro-F1 before training": f"{results['before']['macro_f1']:.3f}",
        "accuracy": f"{results['after']['accuracy']:.3f}",
        f"accuracy of always {class_names(results)[largest]!r}": f"{np.trace(always) / always.sum():.3f}",
        "test texts": f"{matrix.sum():,}",
    }


def outcome(results: dict[str, Any], matrix: np.ndarray) -> str:
    explanation = (
        f"<p>The confidence interval is what other {matrix.sum():,} test texts of the same kind would mostly give. It comes "
        f"from {RESAMPLES:,} bootstrap resamples (percentile interval, Efron &amp; Tibshirani 1993, section 13.3). "
        "The seed of the training moves the score as well, and is not part of it."
    )
    if np.trace(matrix) == matrix.sum():
        explanation += (
            " No text was labelled wrong, so no resample can have a mistake: still, up to "
            f"{min(1, 3 / matrix.sum()):.1%} of all texts may be (the rule of three, Hanley &amp; Lippman-Hand 1983)."
        )
    if len(matrix) <= MOST_CLASSES:
        confused = page.figure(
            "Confusion matrix of the test texts",
            page.confusion(matrix.tolist(), class_names(results)),
            "Each row counts the texts of one class by the label they got, so the diagonal counts the correct labels. The "
            "strongest colour off the diagonal shows which class is most often mistaken for another.",
        )
    else:
        confused = page.figure(
            "The most frequent confusions of the test texts",
            page.columns(["true", "predicted", "texts"], confusions(results, matrix)),
            "Each row counts the texts of one class that got the label of another, the most frequent first. "
            f"With {len(matrix):,} classes the whole matrix would not fit here.",
        )
    largest, always = majority_baseline(matrix)
    scored = page.figure(
        "Each class",
        page.columns(["class", "texts", "precision", "recall", "F1"], score_rows(results, matrix, largest, always), last=2),
        "Precision is the share of correct labels among the predictions of a class, and recall that among its texts. "
        "The last row always predicts the most frequent class: what a model that has learned nothing can reach.",
    )
    return page.section("Results", explanation + "</p>", f'<div class="grid">{confused}{scored}</div>')


def score_rows(results: dict[str, Any], matrix: np.ndarray, largest: int, always: np.ndarray) -> list[list[str]]:
    """A row for each class, and one each for the mean of the classes (macro) and for the most frequent class."""

    def cells(name: str, scores: np.ndarray) -> list[str]:
        return [name, f"{scores[0]:,.0f}", *("\u2013" if np.isnan(score) else f"{score:.3f}" for score in scores[1:])]

    rows = [cells(name, scores) for name, scores in zip(class_names(results), per_class(matrix), strict=True)]
    return [*rows, cells("mean", macro(matrix)), cells(f"always {class_names(results)[largest]!r}", macro(always))]


def confusions(results: dict[str, Any], matrix: np.ndarray) -> list[list[str]]:
    wrong = matrix - np.diag(np.diag(matrix))
    most = np.argsort(-wrong, axis=None, kind="stable")[:MISTAKES]
    pairs = [(i, j) for i, j in zip(*np.unravel_index(most, wrong.shape), strict=True) if wrong[i, j]]
    return [[class_names(results)[i], class_names(results)[j], f"{wrong[i, j]:,}"] for i, j in pairs]


def mistakes(folder: Path, results: dict[str, Any], matrix: np.ndarray) -> str:
    title = "The most confident mistakes"
    try:
        wrong = read_mistakes(folder, results)
    except UserError as error:
        return page.section(title, page.left_out("The texts that are labelled wrong", error))
    if not wrong:
        return page.section(title, "<p>None: every test text is labelled correctly.</p>")
    shown = f"the {MISTAKES} with the highest score" if len(wrong) > MISTAKES else "all of them, the highest score first"
    introduction = f"<p>Labelled wrong: {len(wrong):,} of {matrix.sum():,} test texts. Shown: {shown}.</p>"
    return page.section(title, introduction, page.answers(wrong[:MISTAKES]))


def training(folder: Path) -> str:
    metrics = read_metrics(folder / "metrics.jsonl")
    if not metrics:
        why = "metrics.jsonl is missing or damaged"
        return page.section("Training", page.left_out("The curves of loss and learning rate", why))
    curves = page.figure(
        "Loss and learning rate",
        pictures.curves(metrics),
        "Each point is the mean loss since the previous point: follow the trend and ignore small ups and downs. Train for "
        "more epochs if the loss still falls at the end, and lower the learning rate if the loss rises where that is high.",
    )
    return page.section("Training", f'<div class="grid">{curves}</div>')


def what_was_run(results: dict[str, Any]) -> str:
    options, train = results["options"], results["train"]
    commit = f" at {results['commit'][:12]}" if results["commit"] else ""
    tested = sum(map(sum, results["after"]["confusion_matrix"]))
    rows = {
        "model": results["model"] + commit,
        "data set": results["dataset"],
        "examples": f"{train.get('rows') or train['examples'] // options['epochs']:,} to train on, {tested:,} to test on",
        "trained": "{trainable:,} of {all:,} parameters ({percent:g} %)".format(**results["parameters"]),
    }
    if results["embedded"]:
        rows["hub"] = "could not be reached, so the embedded model or data set was used"
    shown = {key: value for key, value in options.items() if key not in NOT_LISTED}
    usual = default_options(options["method"])
    rows |= {in_words(key): value for key, value in shown.items() if value != usual.get(key)}
    if train.get("validation_macro_f1") is not None:
        rows["kept"] = f"the state after step {train['kept_step']:,} of {train['steps']:,}, the best on the validation part"
    rows["arithmetic"] = f"{results['dtype']} on {results['device']}, processes: {results['processes']}"
    rows["training took"] = f"{train['seconds']:,.0f} s, {train['examples_per_second']:,.1f} examples/s"
    rows["versions"] = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    defaults = {in_words(key): value for key, value in shown.items() if value == usual.get(key) and value not in (None, [])}
    rest = page.folded("Options that have their default", page.table(defaults))
    return page.section("What was run", page.table(rows), rest)


def default_options(method: str) -> dict[str, Any]:
    """As results.json has them: tuples are lists there."""
    defaults = {item.name: list(item.default) if isinstance(item.default, tuple) else item.default for item in fields(Options)}
    return defaults | {"method": method, "learning_rate": LEARNING_RATES[method]}


def in_words(option: str) -> str:
    return option.replace("_", " ")


def what_lora_learned(folder: Path, results: dict[str, Any]) -> str:
    title, method = "What LoRA learned", results["options"]["method"]
    if method != "lora":
        trained = {"full": "Every weight", "head": "Only the head"}[method]
        return page.section(title, f"<p>{trained} was trained, without LoRA, so there are no A and B to look at.</p>")
    try:
        return geometry_section(title, read_geometry(folder, results))
    except UserError as error:
        return page.section(title, page.left_out("The geometry of the adapter", error))


def geometry_section(title: str, layers: Layers) -> str:
    r = max(len(layer.singular_values) for numbered in layers.values() for layer in numbered.values())
    figures = [
        page.figure(
            "How far the weights moved",
            pictures.by_layer("How far the weights moved", "|dW| / |W0|", layers, "relative_size"),
            "Each point is the size of the update relative to the pretrained matrix (Frobenius norms). Training changed the "
            "highest ones most; the general level also depends on alpha, the learning rate and the number of steps.",
        ),
        page.figure(
            "Singular values of BA",
            pictures.spectra("Singular values of BA", layers),
            "Each line shows the singular values of (alpha / r) BA in one layer, and the deeper the layer, the stronger its "
            "colour. A line that drops to zero uses fewer than r directions, and a flat line uses all of them equally.",
        ),
        page.figure(
            "Effective rank of BA",
            pictures.by_layer("Effective rank of BA", "effective rank", layers, "effective_rank", top=r),
            "The effective rank is 1 if one direction does all the work, and r if all r directions do the same amount. Points "
            "far below r mean that a smaller r would have kept most of the change; near r, every direction is in use.",
        ),
        page.figure(
            "Amplification",
            pictures.by_layer("Amplification", "|dW| / |U^T W0 V|", layers, "amplification", top=1.2),
            "The factor is the size of dW divided by that of W0 in the same r directions, V of the input and U of the output. "
            "Above 1, the update is larger there than the pretrained weight, as the paper found; below 1, it is smaller.",
        ),
    ]
    return page.section(
        title,
        f"<p>{in_short(layers, r)}</p>",
        "<p>Section 7 of the LoRA paper (Hu et al. 2021, arXiv:2106.09685) asks these questions. W0 is a pretrained matrix, "
        "and dW = (alpha / r) BA the update of it; with DoRA, dW also contains the new lengths of the rows. The effective rank "
        "is exp of the entropy of the singular values, scaled to sum to 1 (Roy &amp; Vetterli 2007).</p>",
        f'<div class="grid">{"".join(figures)}</div>',
    )


def in_short(layers: Layers, r: int) -> str:
    """Which layers changed, and whether r could be smaller."""
    changes = [(layer.relative_size, f"{kind} of layer {number}") for kind in layers for number, layer in layers[kind].items()]
    (least, lowest), (most, highest) = min(changes), max(changes)
    if not most:
        return "Training changed no layer: every dW is zero."
    if len(changes) == 1:
        changed = f"Training changed {escape(highest)}: |dW| / |W0| is {most:.3g}."
    else:
        where = f"{escape(highest)} most (|dW| / |W0| = {most:.3g}) and {escape(lowest)} least ({least:.3g})"
        changed = f"Training changed {where}."
    used = np.nanmean([layer.effective_rank for numbered in layers.values() for layer in numbered.values()])
    if r == 1:
        return f"{changed} r = 1 cannot be smaller."
    smaller = f"r = {math.ceil(used)} would keep most of it" if used < FEW * r else "a smaller r would lose a part of it"
    return f"{changed} On average the change uses {used:.1f} of its r = {r} directions, so {smaller}."


def compare_with(folder: Path, results: dict[str, Any], against: Path) -> str:
    """What LoRA learned in two runs. Raises UserError if they cannot be compared."""
    other = read_results(against)
    for path, run in [(folder, results), (against, other)]:
        if run["options"]["method"] != "lora":
            raise UserError(f"--against compares two LoRA runs, and {path} was trained without LoRA: leave out --against")
    if results["sha256"]["weights"] != other["sha256"]["weights"]:
        models = f"{results['model']} and {other['model']}"
        raise UserError(f"--against {against} started from other weights ({models}): pass a run on the same model")
    layers, other_layers = read_geometry(folder, results), read_geometry(against, other)
    if {kind: set(layers[kind]) for kind in layers} != {kind: set(other_layers[kind]) for kind in other_layers}:
        raise UserError(f"--against {against} adapted other layers: pass a run with the same --target-modules")

    here, there = ({k: v for k, v in run["options"].items() if k not in NOT_LISTED} for run in (results, other))
    here["macro-F1"], there["macro-F1"] = (round(each["after"]["macro_f1"], 4) for each in (results, other))
    rows = {
        in_words(key): f"{page.as_text(here[key])} here, {page.as_text(there.get(key))} there"
        for key in here
        if key == "macro-F1" or here[key] != there.get(key)
    }
    phi: dict[str, dict[int, list[list[float]]]] = {kind: {} for kind in layers}
    chance = 0.0  # the highest phi that random directions have on average: max(i, j) / d_in
    for kind, numbered in layers.items():
        for number, layer in numbered.items():
            similarity = subspace_similarity(layer.A, other_layers[kind][number].A)
            phi[kind][number] = similarity[:DIRECTIONS, :DIRECTIONS].clamp(0, 1).tolist()
            compared = max(similarity[:DIRECTIONS, :DIRECTIONS].shape)
            chance = max(chance, compared / layer.A.shape[1])
    directions = page.figure(
        "Directions that both runs learned",
        page.similarities(phi, chance),
        "Each cell is phi of the first i directions of A here (down) and the first j there (across): 1 if one span contains "
        "the other, about max(i, j) / d_in if both are random. If only the upper left cell is strong, the runs agree on the "
        "leading direction alone.",
    )
    same_seed = " Both runs have the same seed, so some of these A started equal." if here["seed"] == there["seed"] else ""
    return geometry_section("What LoRA learned", layers) + page.section(
        f"Compared with {escape(against.resolve().name)}",
        "<p>phi(A, A', i, j) = |U_i^T U'_j|^2 / min(i, j), equation 4 of section 7.2, where U_i holds the first i right "
        f"singular vectors of A. At most {DIRECTIONS} directions of each run are compared.{same_seed}</p>",
        f'<div class="grid">{directions}<div class="card"><h3>Where the runs differ</h3>{page.table(rows)}</div></div>',
    )
