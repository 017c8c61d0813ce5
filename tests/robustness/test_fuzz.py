"""A slice of `python tests/fuzz.py`, in a process of its own because it limits memory."""

import subprocess
import sys
from pathlib import Path

FUZZ = Path(__file__).parent / "fuzz.py"


def test_damaged_input_is_read_correctly_or_refused():
    done = subprocess.run([sys.executable, FUZZ, "--count", "150", "--seed", "1"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "150 inputs" in done.stdout
    kinds = [line.split() for line in done.stdout.splitlines() if line.endswith("refused")]
    assert len(kinds) == 13
    assert sum(int(words[-2]) for words in kinds) > 50  # refused
    assert sum(int(words[-4]) for words in kinds) > 5  # read
