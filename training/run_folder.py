"""The folder of a run that a user names: what to say if it is not there, has not ended, or holds several runs."""

import os
from pathlib import Path

from common.errors import UserError
from common.files import nearest
from lora.config import CONFIG_FILE
from training.checkpoint import FOLDER, newest_first

RUNS = Path("runs")  # where train.py puts a run, unless --output-dir names another place
USABLE = ("results.json", CONFIG_FILE, "config.json")  # of an ended run, an adapter, a whole model


def require_ended(folder: Path) -> None:
    """Raises UserError if `folder` is not there, or holds a run that has not ended, or several runs and none of its own."""
    require_folder(folder, "results.json", "newest run")
    if any(os.path.exists(folder / name) for name in USABLE):
        return
    if newest_first(folder):
        raise UserError(f"the run in {folder} has not ended. Finish it first: python train.py --resume {folder}")
    refuse_several(folder, "results.json")


def require_stopped(folder: Path) -> None:
    """Raises UserError if `folder` is not there, or holds several runs that could be resumed and none of its own."""
    require_folder(folder, FOLDER, "newest run to resume")
    if not any(os.path.exists(folder / name) for name in ("results.json", FOLDER)):
        refuse_several(folder, FOLDER)
        if runs_in(folder, "results.json"):
            raise UserError(f"the runs in {folder} have ended. There is nothing to resume")


def require_folder(folder: Path, mark: str, what: str) -> None:
    if os.path.isdir(folder):
        return
    kind = f"{folder} is not a folder" if os.path.lexists(folder) else f"there is no folder {folder}"
    runs = runs_in(RUNS, mark)
    newest = f" The {what} is {runs[-1]}" if runs else " Name one that train.py wrote"
    raise UserError(f"{kind}{run_around(folder) or nearest(folder) or '.'}{newest}")


def run_around(path: Path) -> str:
    """The end of an error message about a part of a run, such as RUN/adapter, where the run itself is needed."""
    return f". Did you mean {path.parent}?" if os.path.exists(path.parent / "results.json") and os.path.lexists(path) else ""


def refuse_several(folder: Path, mark: str) -> None:
    """As of compare.py, which keeps its runs in one folder."""
    if runs := runs_in(folder, mark):
        names = ", ".join([run.name for run in runs[:10]] + ["..."] * (len(runs) > 10))
        raise UserError(f"{folder} is a folder of runs: {names}. Name one of them, for example {runs[0]}")


def runs_in(parent: Path, mark: str) -> list[Path]:
    """The folders in `parent` that contain `mark`, the oldest first."""
    marks = sorted(parent.glob(f"*/{mark}"), key=lambda path: path.stat().st_mtime)
    return [path.parent for path in marks]
