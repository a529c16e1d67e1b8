"""HTML from text that may hold anything: the only place where the report's tags are made."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Sequence


def escape(text: object) -> str:
    """`text` for an element's content or a quoted attribute."""
    return html.escape(str(text), quote=True)


def isolated(text: object) -> str:
    """`text` of a run's, kept from turning the reading direction of what stands around it."""
    return f"<bdi>{escape(text)}</bdi>"


def table(caption: str, headers: Sequence[str], rows: Iterable[Sequence[str]], texts: int) -> str:
    """A table in a scrolling box of its own; the first `texts` columns hold text, others numbers.

    `rows` are markup already; captions and headers are escaped here.
    """
    kinds = ["" if index < texts else ' class="number"' for index in range(len(headers))]
    head = "".join(
        f'<th scope="col"{kind}>{escape(header)}</th>'
        for kind, header in zip(kinds, headers, strict=True)
    )
    body = "\n".join("<tr>" + _cells(row, kinds) + "</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f"<table><caption>{escape(caption)}</caption>"
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _cells(row: Sequence[str], kinds: Sequence[str]) -> str:
    cells = [f'<th scope="row">{row[0]}</th>']
    if len(row) < len(kinds):  # the last cell speaks for the rest
        *between, last = row[1:]
        cells += [f"<td{kinds[i]}>{cell}</td>" for i, cell in enumerate(between, start=1)]
        cells.append(f'<td colspan="{len(kinds) - len(row) + 1}">{last}</td>')
    else:
        cells += [f"<td{kinds[i]}>{cell}</td>" for i, cell in enumerate(row[1:], start=1)]
    return "".join(cells)


def script_json(value: object) -> str:
    """`value` as JSON that a script element can hold: nothing in it can end the element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def source_hash(text: str) -> str:
    """The Content-Security-Policy source that allows exactly the inline `text`."""
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"
