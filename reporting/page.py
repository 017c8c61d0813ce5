"""The HTML of a report: one page without scripts that loads nothing.

Titles, captions and bodies are HTML of our own. Everything else (class names, options, texts) is escaped here.
"""

from html import escape
from typing import Any

MAX_CHARACTERS = 300  # of a text; a run saves some more, so that a text that it has cut ends in an ellipsis
MAX_HEADS = 32  # characters in the heads of the confusion matrix, all together

CSS = """
:root { color-scheme: light dark; --page: #f4f5f7; --card: #fff; --ink: #1a1e24; --soft: #5b6573; --line: #dde1e7;
  --c1: #2460c4; --c2: #c05a0a; --c3: #0b8268; --c4: #9a3bb0; --c5: #85690a; --c6: #c02f50; }
@media (prefers-color-scheme: dark) { :root { --page: #101318; --card: #191d24; --ink: #e7eaee; --soft: #9ca6b3;
  --line: #343b46; --c1: #7eaefc; --c2: #fba05c; --c3: #4fcfac; --c4: #d991e8; --c5: #d8bd4c; --c6: #ff8aa0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 72rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0; font-size: 1.6rem; line-height: 1.25; } h2 { margin: 2.5rem 0 .75rem; font-size: 1.25rem; }
h3 { margin: 0 0 .75rem; font-size: 1rem; } p { margin: .5rem 0 1rem; max-width: 44rem; }
small, figcaption, dt { color: var(--soft); }
.tiles, .grid { display: grid; gap: 1rem; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); margin-top: 1.25rem; }
.grid { grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.tiles > div, figure, dl, .card, .texts { margin: 0; padding: 1rem 1.1rem; min-width: 0; background: var(--card);
  border: 1px solid var(--line); border-radius: .6rem; }
.tiles b { display: block; font-size: 1.7rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.tiles span, figcaption, dl, small { font-size: .875rem; }
figure { display: flex; flex-direction: column; } figcaption { margin-top: auto; padding-top: .9rem; }
svg { display: block; width: 100%; max-width: 29rem; margin: auto; color: var(--ink); }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
dl, .texts { columns: 26rem 2; column-gap: 2.5rem; } dl > div, .texts li { break-inside: avoid; } dd { margin: 0; }
.card { align-self: start; } .card dl { padding: 0; border: 0; }
dl > div { display: grid; grid-template-columns: 9rem 1fr; gap: .75rem; padding: .15rem 0; }
.wide { overflow-x: auto; margin: auto 0; }
table { border-collapse: separate; border-spacing: 2px; width: 100%; font-size: .875rem; overflow-wrap: normal; }
table td, table th { padding: .45rem .3rem; text-align: right; font-variant-numeric: tabular-nums; font-weight: 400; }
table th { max-width: 9rem; overflow-wrap: break-word; color: var(--soft); } th b { color: var(--ink); }
tr > :first-child { position: sticky; left: 0; text-align: left; color: var(--soft); background: var(--card); }
.apart > * { border-top: 1px solid var(--line); }
.matrix th[scope=row] { max-width: 8rem; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.matrix td, .matrix th[scope=col] { text-align: center; } .matrix tr > :first-child { text-align: left; }
.right { outline: 1px solid var(--c1); outline-offset: -1px; }
@media (max-width: 30rem) { .matrix { font-size: .75rem; } .matrix td, .matrix th { padding: .45rem .1rem; }
  .matrix th[scope=row] { max-width: 4.5rem; } .matrix td:first-child { max-width: 4.5rem; } }
details { margin-top: 1rem; } summary { cursor: pointer; padding: .25rem 0 .75rem; color: var(--soft); }
.right, .wrong { border-radius: .25rem; background: color-mix(in srgb, var(--hue) calc(var(--strength) * .55), transparent); }
.right { --hue: var(--c1); } .wrong { --hue: var(--c2); }
.phi { display: grid; grid-template-columns: repeat(var(--columns), 1fr); gap: 1px; max-width: 4rem; margin-left: auto; }
.phi i { aspect-ratio: 1; background: color-mix(in srgb, var(--c1) var(--strength), var(--page)); }
.scale { position: relative; height: .6rem; margin-top: .9rem; border-radius: .3rem;
  background: linear-gradient(90deg, var(--page), var(--c1)); }
.scale i { position: absolute; top: -.25rem; bottom: -.25rem; width: 2px; background: var(--c2); }
.scale + small { display: flex; justify-content: space-between; }
.texts { padding-left: 2.6rem; } .texts li { padding: .5rem 0; } .texts li::marker { color: var(--soft); }
.texts p { margin: 0; }
"""


def document(title: str, subtitle: str, body: str) -> str:
    """The whole page. Its Content-Security-Policy forbids the browser to load anything."""
    return f"""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{CSS}</style>
<h1>{escape(title)}</h1>
<small>{escape(subtitle)}</small>
{body}
</html>
"""


def section(title: str, *parts: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n" + "\n".join(parts) + "\n</section>"


def left_out(what: str, why: object) -> str:
    return f"<p>{what}: left out, because {escape(str(why))}.</p>"


def figure(title: str, body: str, caption: str) -> str:
    return f"<figure>\n<h3>{title}</h3>\n{body}\n<figcaption>{caption}</figcaption>\n</figure>"


def tiles(numbers: dict[str, str]) -> str:
    items = (f"<div><b>{escape(number)}</b><span>{escape(what)}</span></div>" for what, number in numbers.items())
    return f'<div class="tiles">{"".join(items)}</div>'


def table(rows: dict[str, Any]) -> str:
    items = (f"<div><dt>{escape(key)}</dt><dd>{escape(as_text(value))}</dd></div>" for key, value in rows.items())
    return "<dl>" + "\n".join(items) + "</dl>"


def as_text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, float):
        return f"{value:g}"
    return {"True": "yes", "False": "no", "None": "none"}.get(str(value), str(value))


def confusion(matrix: list[list[int]], names: list[str]) -> str:
    """Rows are true classes, columns predicted ones. Many or long names stand beside the rows only, with the number of each.

    The names stay in sight while a wide matrix is scrolled.
    """
    is_short = sum(map(len, names)) <= MAX_HEADS
    heads = names if is_short else [str(number) for number in range(1, len(names) + 1)]
    rows = []
    for i, (name, row) in enumerate(zip(names, matrix, strict=True)):
        # The square root, and at least 0.2, keep the few mistakes of a good model visible.
        strengths = [0.2 + 0.8 * (count / sum(row)) ** 0.5 if count else 0 for count in row]
        cells = "".join(
            f'<td class="{"right" if i == j else "wrong"}" style="--strength: {strength:.0%}" '
            f'title="true {escape(name)}, predicted {escape(names[j])}">{count or ""}</td>'
            for j, (count, strength) in enumerate(zip(row, strengths, strict=True))
        )
        number = "" if is_short else f"<b>{i + 1}</b> "
        rows.append(f'<tr><th scope=row title="{escape(name)}">{number}{escape(name)}</th>{cells}</tr>')
    columns = "".join(
        f'<th scope=col title="{escape(name)}">{escape(head)}</th>' for head, name in zip(heads, names, strict=True)
    )
    table = f'<table class="matrix">\n<tr><td>true / predicted</td>{columns}</tr>\n{"".join(rows)}\n</table>'
    return f'<div class="wide">{table}</div>'


def columns(heads: list[str], rows: list[list[str]], last: int = 0) -> str:
    """A table of text. The `last` rows are set apart from those above."""
    first = "".join(f"<th scope=col>{escape(head)}</th>" for head in heads)
    lines = []
    for number, (name, *cells) in enumerate(rows):
        mark = ' class="apart"' if last and number == len(rows) - last else ""
        lines.append(f"<tr{mark}><th scope=row>{escape(name)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    return f'<div class="wide"><table>\n<tr>{first}</tr>\n{"".join(lines)}\n</table></div>'


def folded(summary: str, body: str) -> str:
    """Shown on a click."""
    return f"<details><summary>{summary}</summary>\n{body}\n</details>"


def similarities(phi: dict[str, dict[int, list[list[float]]]], chance: float) -> str:
    """A small matrix phi[kind][layer] for each adapted layer: kinds of module down, layers across.

    The colours go from phi = 0 to 1. `chance`: the phi of random directions, which is marked on the scale.
    """
    layers = sorted({layer for matrices in phi.values() for layer in matrices})
    rows = ["<tr><td>layer</td>" + "".join(f"<th scope=col>{layer}</th>" for layer in layers) + "</tr>"]
    for kind, matrices in phi.items():
        panels = []
        for matrix in (matrices.get(layer, [[]]) for layer in layers):
            cells = "".join(
                f'<i style="--strength: {value:.0%}" title="i = {i}, j = {j}: {value:.3f}"></i>'
                for i, row in enumerate(matrix, 1)
                for j, value in enumerate(row, 1)
            )
            panels.append(f'<td><div class="phi" style="--columns: {len(matrix[0])}">{cells}</div></td>')
        rows.append(f"<tr><th scope=row>{escape(kind)}</th>{''.join(panels)}</tr>")
    scale = f'<div class="scale"><i style="left: {chance:.2%}"></i></div><small><span>phi = 0</span><span>1</span></small>'
    highest = max(max(map(max, matrix)) for matrices in phi.values() for matrix in matrices.values())
    mark = f"<small>The line is at phi = {chance:.2g}, that of random directions; the highest here is {highest:.2g}.</small>"
    return f'<div class="wide"><table>\n{"".join(rows)}\n</table></div>{scale}{mark}'


def answers(wrong: list[dict[str, Any]]) -> str:
    items = (
        f'<li><p dir="auto">{escape(shorten(answer["text"]))}</p><small>true label <b>{escape(answer["label"])}</b>, predicted '
        f"<b>{escape(answer['predicted'])}</b> with score {answer['score']:.3f}</small></li>"
        for answer in wrong
    )
    return '<ol class="texts">' + "\n".join(items) + "</ol>"


def shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS - 1].rstrip() + "\u2026"
