"""docs/break-it.md is true of the code as it is: what it breaks is there once, and the tests it names exist and fail."""

import ast
import subprocess
import sys

import pytest
from break_it import DOCUMENT, ROOT, Break, read_breaks, why_not_caught

BREAKS = read_breaks()


@pytest.mark.parametrize("broken", BREAKS, ids=lambda broken: broken.title)
def test_the_lines_it_breaks_are_there_once_and_the_test_it_names_exists(broken, tmp_path):
    source = (ROOT / broken.file).read_text(encoding="utf-8")
    (tmp_path / broken.file).parent.mkdir(exist_ok=True)
    (tmp_path / broken.file).write_text(source, encoding="utf-8")
    broken.apply(tmp_path)
    assert ast.dump(ast.parse((tmp_path / broken.file).read_text(encoding="utf-8"))) != ast.dump(ast.parse(source))
    file, _, name = broken.test.partition("::")
    functions = [node.name for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body if hasattr(node, "name")]
    assert name.partition("[")[0] in functions


def test_its_breaks_are_numbered_and_each_is_one_of_its_own():
    assert [int(broken.title.split(".")[0]) for broken in BREAKS] == list(range(1, len(BREAKS) + 1))
    assert len({(broken.file, broken.new) for broken in BREAKS}) == len(BREAKS) >= 10
    assert DOCUMENT.read_text(encoding="utf-8").count("```diff\n") == len(BREAKS)


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="git lists what is to be copied")
def test_a_break_that_breaks_nothing_is_reported_and_so_is_one_that_only_raises():
    test = "tests/test_the_paper.py::test_the_output_is_W0_x_plus_BA_x"
    line = "\n        self.disable_adapters = False\n"
    harmless, raising = (line.replace("False", value) for value in ("not True", "nothing"))
    assert why_not_caught(Break("harmless", "lora/layer.py", line, harmless, test)) == "passes all the same"
    assert "NameError" in why_not_caught(Break("raising", "lora/layer.py", line, raising, test))
    with pytest.raises(ValueError, match=r"occurs 0 times in lora/layer\.py"):
        why_not_caught(Break("elsewhere", "lora/layer.py", "\nnowhere\n", "\n", test))


@pytest.mark.slow
def test_every_break_is_caught_by_the_test_that_is_named_beside_it():
    done = subprocess.run([sys.executable, ROOT / "tests" / "robustness" / "break_it.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"{len(BREAKS)} breaks, each caught\n")
