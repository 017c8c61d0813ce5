"""The imports between the rooms point one way: scripts -> reporting -> training -> model, data -> common -> lora."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "lora": set(),
    "common": {"lora"},
    "model": {"common"},
    "data": {"common"},
    "training": {"lora", "model", "data", "common"},
    "reporting": {"training", "lora", "model", "data", "common"},
    "scripts": {"reporting", "training", "lora", "model", "data", "common"},
}
SCRIPTS = ["train", "predict", "compare", "report"]


def imported_by(path: Path) -> set[str]:
    """The top-level names that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names.add(str(node.module).partition(".")[0])
    return names


def arrows() -> dict[str, set[str]]:
    """The rooms that each room imports."""
    files = {room: list((ROOT / room).glob("*.py")) for room in MAY_IMPORT if room != "scripts"}
    files["scripts"] = [ROOT / f"{name}.py" for name in SCRIPTS]
    ours = {*MAY_IMPORT, *SCRIPTS}
    return {room: {name for path in paths for name in imported_by(path) & ours} - {room} for room, paths in files.items()}


def test_imports_between_rooms_point_one_way():
    for room, imported in arrows().items():
        assert imported <= MAY_IMPORT[room], f"{room} imports {imported - MAY_IMPORT[room]}"


def test_the_root_holds_four_scripts_and_the_rooms():
    assert sorted(path.stem for path in ROOT.glob("*.py")) == sorted(SCRIPTS)
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert rooms == MAY_IMPORT.keys() - {"scripts"}
