"""Imported before the rest: if what everything here needs is not installed, one line that says so, and status 2."""

import sys
from importlib.util import find_spec

NEEDED = ("torch", "tokenizers", "safetensors", "huggingface_hub", "numpy", "tqdm")

if missing := [name for name in NEEDED if find_spec(name) is None]:
    print(f"not installed for {sys.executable}: {', '.join(missing)}; pip install -e '.[offline]' does that", file=sys.stderr)
    sys.exit(2)
