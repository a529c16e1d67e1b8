"""`isoflop sample-corpus`: real text of this Python installation, as RedPajama lies on disk."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.options import UserError, option

MARKER = "corpus.json"
FORMAT = 1


@dataclass(frozen=True)
class Options:
    """Real text of this Python installation, laid out and shaped like RedPajama's files.

    Library source becomes github, READMEs of installed distributions common_crawl, the language
    reference wikipedia, docstrings stackexchange, licences and other long texts book, all below
    OUT/redpajama, defects of RedPajama's files included. OUT/flan/{train,heldout} holds instruction
    rows shaped like FLAN's, made of code that is in none of the others. Only the standard library
    and what isoflop itself needs are read, so the corpus does not depend on what else is installed.
    """

    out: str = option("the folder to write", positional=True, metavar="OUT")
    megabytes: float = option("text in all, in 10^6 UTF-8 bytes", 24.0, minimum=0.5)
    seed: int = option("chooses among the files there are", 0)


def run(options: Options) -> None:
    """Gather and write under a temporary name; a finished OUT is left alone."""
    out = Path(options.out)
    parameters = {"format": FORMAT, "megabytes": options.megabytes, "seed": options.seed}
    if check_existing(out, parameters):
        print(f"sample-corpus: {out} is complete")
        return
    from tools.sample_corpus.gather import Installation, gather
    from tools.sample_corpus.instructions import write_instructions
    from tools.sample_corpus.redpajama import write_corpus

    started = time.monotonic()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    installation = Installation.find()
    texts = gather(installation, int(options.megabytes * 1e6), options.seed)
    sources = write_corpus(partial / "redpajama", texts, options.seed)
    flan = write_instructions(partial / "flan", installation, options.megabytes, options.seed)
    marker = {"parameters": parameters, "sources": sources, "flan": flan}
    (partial / MARKER).write_text(json.dumps(marker, indent=1) + "\n")
    if out.is_dir():
        out.rmdir()  # empty: check_existing saw to it
    os.replace(partial, out)
    told = ", ".join(f"{name} {s['text_bytes'] / 1e6:.1f}" for name, s in sources.items())
    rows = ", ".join(f"{split} {count}" for split, count in flan.items())
    print(
        f"sample-corpus: {out}: MB of text: {told}; FLAN rows: {rows} "
        f"({time.monotonic() - started:.1f} s)"
    )


def check_existing(out: Path, parameters: Mapping[str, object]) -> bool:
    """Whether OUT is finished with these parameters.

    Raises:
        UserError: it holds something else.
    """
    if (out.is_dir() and not any(out.iterdir())) or not out.exists():
        return False
    try:
        made = json.loads((out / MARKER).read_bytes())["parameters"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"out={str(out)!r}: exists and is no sample corpus; give a new or empty folder"
        ) from None
    for name, value in parameters.items():
        if made.get(name) != value:
            raise UserError(
                f"{name}={value!r}: {out} was made with {made.get(name)!r}; give that, another "
                "OUT, or remove this one"
            )
    return True
