"""Report on a run: one HTML page with pictures, which needs no other file. It is saved as RUN_FOLDER/report.html.

python report.py runs/2026-11-24-103855                              one run
python report.py runs/2026-11-24-103855 --against runs/another       also compare the directions that both runs learned
python report.py runs/2026-11-24-103855 --output somewhere.html

The test texts are labelled again, to show the mistakes. Install what it needs with `pip install -e '.[report]'`.
"""

if __name__ == "__main__":
    import training.interrupt  # noqa: F401 - Ctrl-C during the imports below

import sys
from pathlib import Path

from common.errors import UserError, run_cli
from common.files import is_special, write_file, writing
from training.artifacts import refuse_own_files
from training.options import Parser


def run(arguments: list[str] | None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, help="a run folder that train.py wrote")
    parser.add_argument("--against", type=Path, help="another run with the same model and adapted layers, to compare with")
    parser.add_argument("--output", type=Path, help="file to write [report.html in the run folder]")
    options = parser.parse_args(arguments)
    try:
        from reporting.sections import report_page
    except ModuleNotFoundError as error:
        raise UserError(f"report.py needs {error.name}: pip install -e '.[report]'") from error
    output = options.output or options.folder / "report.html"
    for folder in filter(None, [options.folder, options.against]):
        refuse_own_files(output, folder, "--output")
    page = report_page(options.folder, options.against)
    if is_special(output):
        with writing(output), open(output, "ab") as opened:  # as in `--output /dev/stdout | gzip`
            opened.write(page.encode(errors="replace"))
    else:
        write_file(output, page.encode(errors="replace"))
    print(f"saved {output}")


def main(arguments: list[str] | None = None) -> int:
    return run_cli("report.py", lambda: run(arguments), needs_output=False)  # its answer is the page


if __name__ == "__main__":
    sys.exit(main())
