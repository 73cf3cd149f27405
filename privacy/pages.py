"""The house's pages for people: one HTML file each, which asks for nothing from outside.

They read on a screen, light or dark, on a phone, on paper, and by ear: no meaning hangs on colour alone, and what is
drawn is in a table too.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from html import escape
from pathlib import Path

STYLE = """
@page { size: A4; margin: 11mm 14mm; }
:root { color-scheme: light dark; --ground: #fff; --ink: #111; --quiet: #444; --line: #bbb;
        --bar: #6b6b6b; --bar-2: #b0b0b0; --bar-3: #fff; }
* { box-sizing: border-box; }
body { font: 9pt/1.33 "Helvetica Neue", Arial, "Liberation Sans", "DejaVu Sans", sans-serif; color: var(--ink);
       background: var(--ground); max-width: 182mm; margin: 8mm auto; padding: 0 4mm; }
h1 { font-size: 17pt; line-height: 1.2; margin: 0; }
h2 { font-size: 10.5pt; margin: 3.5mm 0 1.2mm; border-bottom: 0.4mm solid var(--ink); padding-bottom: 0.6mm;
     break-after: avoid; }
h3 { font-size: 9pt; margin: 2mm 0 0.8mm; break-after: avoid; }
p, ul { margin: 0 0 1.5mm; }
ul { padding-left: 4.5mm; }
li { margin-bottom: 0.5mm; break-inside: avoid; }
table { border-collapse: collapse; width: 100%; }
caption { text-align: left; font-weight: 600; padding-bottom: 0.6mm; }
th, td { text-align: left; vertical-align: top; padding: 0.6mm 2.5mm 0.6mm 0; border-bottom: 0.2mm solid var(--line); }
th { font-weight: 600; }
tbody th { font-weight: 400; }
.facts tbody th, .facts th { font-weight: 600; }
thead th { border-bottom: 0.3mm solid var(--ink); }
tr { break-inside: avoid; }
thead { display: table-header-group; }
.where { color: var(--quiet); }
.verdict { border: 0.7mm solid var(--ink); padding: 2.5mm 4mm; margin: 3mm 0; font-size: 13pt; font-weight: 600; }
.verdict.false { border-width: 1.6mm; }
.two { display: grid; grid-template-columns: 1fr 1fr; gap: 0 7mm; }
.two h2 { margin-top: 2mm; }
.name { white-space: nowrap; }
.number { text-align: right; white-space: nowrap; }
.mark { white-space: nowrap; font-weight: 600; width: 16mm; }
.facts th { width: 38mm; }
.small, code { font-size: 8pt; }
code { font-family: "DejaVu Sans Mono", "Liberation Mono", monospace; overflow-wrap: anywhere; }
td { overflow-wrap: anywhere; }
figure { margin: 2mm 0 0; break-inside: avoid; }
svg { width: 100%; height: auto; display: block; }
.drawn { background: #fff; }
.wide { overflow-x: auto; margin-bottom: 2.5mm; }
.wide td, .wide th { overflow-wrap: break-word; }
.wide tbody th code { white-space: nowrap; }
.bars { width: 26%; min-width: 24mm; }
svg.bar { height: 2.6mm; margin-top: 0.7mm; }
svg.bar rect { stroke: var(--ink); stroke-width: 0.4; fill: var(--bar); }
svg.bar rect.second { fill: var(--bar-2); }
svg.bar rect.third { fill: var(--bar-3); }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(76mm, 1fr)); gap: 3mm 7mm; }
.sample { break-inside: avoid; margin: 0; }
.sample .two { gap: 0 4mm; overflow-wrap: anywhere; }
.sample .two > * { min-width: 0; }
.sample img { display: block; width: 100%; height: 26mm; object-fit: contain; margin-bottom: 1mm;
              border: 0.2mm solid var(--line); background: #fff; }
.gone { height: 26mm; border: 0.2mm dashed var(--line); display: grid; place-items: center; text-align: center;
        padding: 0 2mm; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ground: #16181a; --ink: #ececec; --quiet: #b4b4b4; --line: #4c4f52;
          --bar: #a9a9a9; --bar-2: #666; --bar-3: #16181a; }
}
@media screen and (max-width: 640px) {
  body { font-size: 11pt; margin: 4mm auto; }
  h2 { font-size: 13pt; }
  .small, code { font-size: 9.5pt; }
  .two { grid-template-columns: 1fr; }
  .sample .two { grid-template-columns: 1fr 1fr; }
  .samples { grid-template-columns: 1fr; }
  .facts th { width: 26mm; }
}
@media print { body { margin: 0; padding: 0; max-width: none; } }
"""


def document(title: str, body: str) -> str:
    """A whole page; `body` is HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}</body>\n</html>\n"
    )


def items(texts: Iterable[str]) -> str:
    """List items of HTML texts."""
    return "".join(f"<li>{text}</li>" for text in texts)


def write_whole(path: Path, text: str) -> None:
    """A reader sees the old file or the new one, never half of one."""
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(aside).chmod(0o644)
        Path(aside).replace(path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
