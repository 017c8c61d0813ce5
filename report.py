"""What a run did and what it learned, as one page that needs nothing beside it: RUN_FOLDER/report.html.

python report.py runs/2026-11-24-103855                              the run by itself
python report.py runs/2026-11-24-103855 --against runs/another       and how alike the directions are that the two chose
python report.py runs/2026-11-24-103855 --output somewhere.html

It labels the run's test part again, to show the texts that are labelled wrong; it needs `pip install -e '.[report]'`.
"""

import argparse
import json
import sys
from html import escape
from pathlib import Path
from types import ModuleType
from typing import Any

from common.errors import UserError, run_cli
from common.files import write_file
from data import load_dataset, tokenize
from lora import LoRALinear, PeftModel
from model import load_pretrained
from reporting.geometry import Geometry, geometry, subspace_similarity
from reporting.page import bars, confusion, document, figure, left_out, section, shown, table, texts, tiles
from reporting.results import read_run
from training.evaluation import progress_bar
from training.inference import label, load_classifier
from training.loading import data_sha256
from training.options import Parser

WRONG = 20  # texts that are shown
DIRECTIONS = 8  # that are compared of each adapter
TOLD_ELSEWHERE = (
    "model",
    "dataset",
    "revision",
    "resume",
    "checkpoint_every",
    "output_dir",
    "merged_output",
    "dtype",
    "device",
)
WITHOUT_LORA = {
    "full": "Every weight of the model was trained, without LoRA: there are no A and B to look at.",
    "head": "Only the head was trained, without LoRA: there are no A and B to look at.",
}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; none if the file is missing or damaged, for the rest of the report does not need it."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [{key: float(line[key]) for key in ("step", "loss", "learning_rate")} for line in lines]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def wrong_texts(folder: Path, results: dict[str, Any]) -> list[dict[str, Any]]:
    """The texts of the test part that the run's model labels wrong, the highest score first, each with its "truth".

    Raises UserError if model or data cannot be had any more, or the data is not what the run had.
    """
    options = results["options"]
    dataset = load_dataset(results["dataset"])
    train, test = dataset.train.first(options["train_limit"]), dataset.test.first(options["test_limit"])
    forward, tokenizer, names = load_classifier(folder, None, "auto", options["max_length"])
    train_texts, test_texts = (tokenize(tokenizer, part.texts, options["max_length"]) for part in (train, test))
    if data_sha256(train_texts, train.labels, test_texts, test.labels) != results["sha256"]["data"]:
        raise UserError(f"the data set {results['dataset']} is not what it was when the run had it")
    wrong = []
    with progress_bar(len(test), "label", leave=False) as bar:
        for answer, truth in zip(label(forward, tokenizer, names, test.texts, options["max_length"]), test.labels, strict=True):
            if answer["label"] != names[truth]:
                wrong.append(answer | {"truth": names[truth]})
            bar.update()
    return sorted(wrong, key=lambda answer: -answer["score"])


def read_geometry(folder: Path, results: dict[str, Any]) -> dict[str, Geometry]:
    """The geometry of each adapted layer, by its name. Raises UserError if the adapter or its base cannot be had."""
    commit = results.get("commit") or results["options"].get("revision")
    base, _ = load_pretrained(results["model"], len(results["after"]["per_class_f1"]), commit)
    PeftModel.from_pretrained(base, folder / "adapter")
    return {name: geometry(layer) for name, layer in base.named_modules() if isinstance(layer, LoRALinear)}


def compare(folder: Path, results: dict[str, Any], other: Path) -> tuple[dict[str, Any], dict[str, Geometry]]:
    """The other run's results and geometry. Raises UserError if there is nothing to compare."""
    theirs = read_run(other)
    for path, run in [(folder, results), (other, theirs)]:
        if run["options"]["method"] != "lora":
            raise UserError(f"--against compares two runs with LoRA, and {path} has none: leave it out")
    if results["sha256"]["weights"] != theirs["sha256"]["weights"]:
        raise UserError(
            f"--against {other} started from {theirs['model']}, and {folder} from {results['model']} or from other weights: "
            "name a run that started from the same model"
        )
    return theirs, read_geometry(other, theirs)


def what_was_run(results: dict[str, Any]) -> str:
    options, train = results["options"], results["train"]
    commit = f" at {results['commit'][:12]}" if results.get("commit") else ""
    tested = sum(map(sum, results["after"]["confusion_matrix"]))
    rows = {
        "model": results["model"] + commit,
        "data set": results["dataset"] + (" (embedded: one stepped in)" if results.get("embedded") else ""),
        "examples": f"{train['examples'] // options['epochs']:,} to train on, {tested:,} to test on",
        "trained": "{trainable:,} of {all:,} parameters ({percent:g} %)".format(**results["parameters"]),
    }
    for key, value in options.items():
        if key not in TOLD_ELSEWHERE and value not in (None, False):
            rows[key.replace("_", " ")] = value
    rows["arithmetic"] = f"{results['dtype']} on {results['device']}, processes: {results['processes']}"
    rows["training took"] = f"{train['seconds']:,.0f} s, {train['examples_per_second']:,.1f} examples/s"
    rows["versions"] = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return section("What was run", table(rows))


def what_came_of_it(folder: Path, results: dict[str, Any], pictures: ModuleType) -> str:
    before, after, metrics = results["before"], results["after"], read_metrics(folder / "metrics.jsonl")
    drawn = left_out("The curves of loss and learning rate are", "metrics.jsonl is missing or damaged")
    if metrics:
        drawn = figure(
            "Loss and learning rate",
            pictures.curves(metrics, results["train"]["steps"] / results["options"]["epochs"]),
            "Each point of the loss is the mean of the steps since the point before it, so follow the trend and not the ups "
            "and downs, which are those of the batches. A loss that still falls at the right edge asks for more epochs, and "
            "one that climbs where the learning rate is highest asks for a lower one.",
        )
    matrix = figure(
        "Confusion matrix of the test part",
        confusion(after["confusion_matrix"], list(after["per_class_f1"])),
        "A row counts the texts of one class by what they were taken for, so that the diagonal holds what is right. The "
        "strongest colour off the diagonal shows which class is most often taken for which other.",
    )
    per_class = figure(
        "F1 of each class",
        bars(before["per_class_f1"], after["per_class_f1"]),
        "A bar is the F1 of a class after training, from 0 to 1, and the tick across it is what a random head had before. The "
        "shortest bar is the class with the most to gain, and its row and column of the matrix say to which others it loses.",
    )
    return section("What came of it", f'<div class="grid">{drawn}<div class="stack">{matrix}{per_class}</div></div>')


def what_is_wrong(folder: Path, results: dict[str, Any]) -> str:
    title = "Wrong, and sure of it"
    try:
        wrong = wrong_texts(folder, results)
    except UserError as error:
        return section(title, left_out("The texts that are labelled wrong are", error))
    matrix = results["after"]["confusion_matrix"]
    then = sum(map(sum, matrix)) - sum(row[i] for i, row in enumerate(matrix))
    rounded = "" if then == len(wrong) else f" ({then:,} in the run itself, which rounded differently: texts on the brink)"
    if not wrong:
        return section(title, f"<p>None: every text of the test part is labelled right{rounded}.</p>")
    those = f"the {WRONG} with the highest score" if len(wrong) > WRONG else "all of them"
    counted = f"<p>Labelled wrong: {len(wrong):,} texts of the test part{rounded}. Here: {those}, the surest first.</p>"
    return section(title, counted, texts(wrong[:WRONG]))


def what_lora_learned(found: dict[str, Geometry], pictures: ModuleType) -> str:
    highest = max(len(each.singular_values) for each in found.values())
    drawings = [
        figure(
            "How far the weights moved",
            pictures.by_layer("How far the weights moved", "|dW| / |W0|", found, lambda each: each.relative_size),
            "A point is the size of what was added to one pretrained matrix as a share of that matrix (Frobenius norms). The "
            "highest are where training asked for the largest change; their common level also depends on alpha, the learning "
            "rate and the number of steps.",
        ),
        figure(
            "Singular values of BA",
            pictures.spectra("Singular values of BA", found),
            "A line holds the singular values of one layer's (alpha / r) BA in falling order, and the deeper the layer, the "
            "stronger its colour. A line that drops towards zero uses fewer directions than r allows, and a level one uses all "
            "of them alike.",
        ),
        figure(
            "Effective rank of BA",
            pictures.by_layer("Effective rank of BA", "effective rank", found, lambda each: each.effective_rank, top=highest),
            "The effective rank is 1 if a single direction does all the work and r if r of them share it equally; it is exp of "
            "the entropy of the singular values as shares of their sum. Points far below r say that a smaller r would have "
            "held most of the change, and points near r that every direction is in use.",
        ),
        figure(
            "Amplification",
            pictures.by_layer("Amplification", "|dW| / |U^T W0 V|", found, lambda each: each.amplification, top=1.2),
            "The factor compares the size of dW with what W0 does between the same r directions of input and output, U and V. "
            "Above 1, the update outweighs there what the pretrained matrix had, as the paper found it to; below 1, it adds "
            "less than was there already.",
        ),
    ]
    return section(
        "What LoRA learned",
        "<p>The questions of section 7 of the paper (Hu et al. 2021, arXiv:2106.09685), asked of every adapted matrix: W0 is "
        "the pretrained weight, dW what was added to it, which is (alpha / r) BA, and with DoRA also new lengths of its rows. "
        "The effective rank is that of Roy &amp; Vetterli 2007, the amplification factor that of section 7.3.</p>",
        f'<div class="grid">{"".join(drawings)}</div>',
    )


def how_alike(
    runs: tuple[Path, Path],
    results: tuple[dict[str, Any], dict[str, Any]],
    found: tuple[dict[str, Geometry], dict[str, Geometry]],
    pictures: ModuleType,
) -> str:
    here, there = (each["options"] for each in results)
    rows = {
        key.replace("_", " "): f"{shown(here.get(key))} here, {shown(there.get(key))} there"
        for key in here | there
        if key not in TOLD_ELSEWHERE and here.get(key) != there.get(key)
    }
    scores = [f"{each['after']['macro_f1']:.4f}" for each in results]
    rows["macro-F1"] = f"{scores[0]} here, {scores[1]} there"
    phi = {}
    for name, each in found[0].items():
        similarity = subspace_similarity(each.A, found[1][name].A)
        phi[pictures.place(name)] = similarity[:DIRECTIONS, :DIRECTIONS].numpy()
    drawing = figure(
        "Directions that both runs chose",
        pictures.similarities("Directions that both runs chose", phi),
        "A cell is phi of the first i directions of A here (down) and the first j there (across): 1 if one span lies within "
        "the other, and about max(i, j) / d_in if both are random. Strong colour in the upper left cell that fades from there "
        "says that the runs agree on the leading direction, and that the rest is chance.",
    )
    alike = "" if here["seed"] != there["seed"] else " Both have the same seed, so that some of these A began alike."
    about = (
        "<p>phi(A, A', i, j) = |U_i^T U'_j|^2 / min(i, j), equation 4 of section 7.2, with the right singular vectors of A, "
        f"the first {DIRECTIONS} of each run at most.{alike}</p>"
    )
    name = runs[1].resolve().name
    differ = f'<div class="card"><h3>Where the runs differ</h3>{table(rows)}</div>'
    return section(f"Against {escape(name)}", about, f'<div class="grid">{drawing}{differ}</div>')


def report(folder: Path, other: Path | None, pictures: ModuleType) -> str:
    """The whole page. Raises UserError if there is no run that has ended, or nothing to compare it with."""
    results = read_run(folder)
    title = "What LoRA learned"
    if results["options"]["method"] != "lora" and not other:
        learned = section(title, f"<p>{WITHOUT_LORA[results['options']['method']]}</p>")
    else:
        try:
            theirs, their_geometry = compare(folder, results, other) if other else ({}, {})
            found = read_geometry(folder, results)
            learned = what_lora_learned(found, pictures)
        except UserError as error:
            if other:
                raise
            learned = section(title, left_out("The geometry of the adapter is", error))
        if other:
            if found.keys() != their_geometry.keys():
                raise UserError(
                    f"--against {other} adapted other layers than {folder}: name a run with the same --target-modules"
                )
            learned += how_alike((folder, other), (results, theirs), (found, their_geometry), pictures)
    before, after, options = results["before"], results["after"], results["options"]
    numbers = {
        "macro-F1 before training": f"{before['macro_f1']:.3f}",
        "macro-F1 after training": f"{after['macro_f1']:.3f}",
        "accuracy after training": f"{after['accuracy']:.3f}",
        "parameters trained": f"{results['parameters']['trainable']:,}",
    }
    how = f"LoRA, r = {options['r']}" if results["options"]["method"] == "lora" else f"--method {results['options']['method']}"
    body = tiles(numbers) + what_was_run(results) + what_came_of_it(folder, results, pictures)
    body += what_is_wrong(folder, results) + learned
    return document(f"{results['model']} on {results['dataset']}, {how}", f"The run in {folder.resolve().name}", body)


def run(arguments: list[str] | None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="a run's folder, as train.py wrote it")
    parser.add_argument("--against", type=Path, help="another run on the same model and layers, with another r or seed")
    parser.add_argument("--output", type=Path, help="the page [report.html in the run's folder]")
    options = parser.parse_args(arguments)
    try:
        from reporting import pictures
    except ModuleNotFoundError as error:
        raise UserError("the report's pictures want matplotlib: pip install -e '.[report]'") from error
    content = report(options.folder, options.against, pictures)
    output = options.output or options.folder / "report.html"
    write_file(output, content.encode(errors="replace"))
    print(f"saved {output}")


def main(arguments: list[str] | None = None) -> int:
    return run_cli("report.py", lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
