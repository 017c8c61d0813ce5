"""results.json of a run that has ended, checked before anything is made of it."""

from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import read_json
from training.checkpoint import newest_first
from training.options import LEARNING_RATES

SCORES = {"macro_f1": float, "accuracy": float, "confusion_matrix": list, "per_class_f1": dict}
NEEDED = {  # what a report reads, and of which kinds; an int is a float, too
    **dict.fromkeys(("model", "dataset", "dtype", "device"), str),
    "commit": str | None,
    "processes": int,
    "sha256": {"weights": str, "data": str},
    "versions": dict,
    "options": {
        **dict.fromkeys(("epochs", "max_length", "r", "seed"), int),
        **{"train_limit": int | None, "test_limit": int | None, "revision": str | None, "method": str},
    },
    "parameters": {"trainable": int, "all": int, "percent": float},
    "before": SCORES,
    "after": SCORES,
    "train": {"examples": int, "steps": int, "seconds": float, "examples_per_second": float},
}


def read_run(folder: Path) -> dict[str, Any]:
    """The results.json of a run that has ended. Raises UserError if the folder holds none, or one that was changed."""
    path = folder / "results.json"
    if not path.exists():
        if newest_first(folder):
            raise UserError(f"the run in {folder} has not ended: go on with python train.py --resume {folder}, then report")
        raise UserError(f"{folder} is no run that has ended: it holds no results.json; name a folder that train.py wrote")
    results = read_json(path)
    if wrong := misfit(results, NEEDED) or contradiction(results):
        raise UserError(f"{path}: {wrong} is not what train.py writes there; train again")
    return results


def misfit(value: Any, kind: Any, name: str = "the whole") -> str | None:
    """The name of the first thing in `value` that is missing or not of its kind."""
    if not isinstance(kind, dict):
        return None if is_a(value, kind) else name
    if not isinstance(value, dict):
        return name
    return next((wrong for key in kind if (wrong := misfit(value.get(key), kind[key], key))), None)


def is_a(value: Any, kind: Any) -> bool:
    """Whether `value` is of that kind; a number is finite, and not below zero."""
    if isinstance(value, bool):
        return False
    if isinstance(value, int | float) and not 0 <= value < 1e15:
        return False
    return isinstance(value, int | float if kind is float else kind)


def contradiction(results: dict[str, Any]) -> str | None:
    """The name of what no run can have, though it is of its kind."""
    options, classes = results["options"], results["after"]["per_class_f1"].keys()
    if options["method"] not in LEARNING_RATES:
        return "method"
    if not options["epochs"]:
        return "epochs"
    for scores in (results["before"], results["after"]):
        matrix, f1s = scores["confusion_matrix"], scores["per_class_f1"]
        rows = [row for row in matrix if isinstance(row, list) and len(row) == len(matrix) == len(classes)]
        if not rows or rows != matrix or not all(is_a(count, int) for row in rows for count in row):
            return "confusion_matrix"
        if f1s.keys() != classes or not all(f1 is None or (is_a(f1, float) and f1 <= 1) for f1 in f1s.values()):
            return "per_class_f1"
    return None
