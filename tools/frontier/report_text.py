"""The report's words: fits and refusals, conventions, and where the numbers come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from tools.frontier.axes import power
from tools.frontier.markup import escape, isolated, table
from tools.frontier.points import Point, by_arch, by_run
from tools.frontier.run_folder import Run

LEARNING_NOTE = (
    "Grey: training loss, averaged over neighbouring steps. Marks: held-out evaluations, solid "
    "on the frontier's evaluation set, dashed on others. All charts share the loss axis. A "
    "finetuning run counts tokens from its parent's."
)
APPROACH_NAMES = {
    "approach1": "1 · training-curve envelope",
    "approach2": "2 · isoFLOP parabolas",
    "approach3": "3 · loss surface",
}


def lead(points: Sequence[Point], eval_set: str, source: str) -> str:
    """What the page is made from, in a sentence."""
    runs, architectures = len(by_run(points)), len(by_arch(points))
    return (
        f"{runs} run{'s' if runs != 1 else ''} of {architectures} "
        f"architecture{'s' if architectures != 1 else ''}, {len(points)} evaluations on "
        f"{isolated(eval_set)}, from <code>{isolated(source)}</code>."
    )


def frontier_note(fitted: bool) -> str:
    """How to read the frontier."""
    text = (
        "Large marks are final evaluations, small ones intermediate. The broad band is the "
        "observed envelope over all architectures, thin lines that of each: no other run "
        "reached a loss as low for as few FLOPs. Lines only join what was measured."
    )
    if fitted:
        return text + (
            " Dashed: the optimum by approach 3 within the observed compute. Dotted: the same "
            "extrapolated beyond it."
        )
    return text + " No fitted curve is drawn: approach 3 was refused, for the reasons below."


def fits(fit: Mapping[str, Any]) -> str:
    """A table for each architecture: constants with intervals, or the reason of a refusal."""
    parts = []
    for arch, found in fit["architectures"].items():
        parts.append(f"<h3>{isolated(arch)}</h3>")
        if all("refused" in found[name] for name in APPROACH_NAMES):
            rows = [_approach(name, found[name]) for name in APPROACH_NAMES]
            caption = f"No fit from {found['runs']} runs of {found['sizes']} sizes"
            parts.append(table(caption, ("Approach", "Why not"), rows, texts=2))
            continue
        parts.append(
            table(
                f"N_opt ∝ C^a and D_opt ∝ C^b, from {found['runs']} runs of {found['sizes']} sizes",
                ("Approach", "a", "b", "Constants", "Runs", "Fitted FLOPs"),
                [_approach(name, found[name]) for name in APPROACH_NAMES],
                texts=1,
            )
        )
        parts += [_notes(name, found[name]) for name in APPROACH_NAMES]
        parts.append(_predictions(found))
    return "\n".join(parts)


def _approach(name: str, found: Mapping[str, Any]) -> tuple[str, ...]:
    title = escape(APPROACH_NAMES[name])
    if "refused" in found:
        return title, f'<span class="refused">refused: {isolated(found["refused"])}</span>'
    intervals = found["intervals"] or {}

    def value(key: str, number: float) -> str:
        if key not in intervals:
            return f"{number:.4g}"
        low, high = intervals[key]
        return f'{number:.4g} <span class="interval">[{low:.4g}, {high:.4g}]</span>'

    constants = "".join(
        f"<div>{key} = {value(key, n)}</div>" for key, n in found["constants"].items()
    )
    low, high = found["fitted_flops"]
    return (
        title,
        value("a", found["exponents"]["a"]),
        value("b", found["exponents"]["b"]),
        constants,
        str(found["runs"]),
        f"{escape(power(low))} – {escape(power(high))}",
    )


def _notes(name: str, found: Mapping[str, Any]) -> str:
    """What to know before trusting a fit: its caveat, withheld intervals, runs left out."""
    notes = [found.get("caveat"), found.get("intervals_refused")]
    if found.get("outliers"):
        notes.append("left out as far from the surface: " + ", ".join(found["outliers"]))
    said = "; ".join(note for note in notes if note)
    if not said:
        return ""
    return f'<p class="note">Approach {escape(APPROACH_NAMES[name])}: {isolated(said)}.</p>'


def _predictions(found: Mapping[str, Any]) -> str:
    rows = [
        (
            escape(APPROACH_NAMES[name]),
            escape(power(row["flops"])),
            f"{row['params']:.4g}",
            f"{row['tokens']:.4g}",
            f"{row['loss']:.4f}" if "loss" in row else "—",
            "extrapolated" if row["extrapolated"] else "observed",
        )
        for name in APPROACH_NAMES
        for row in found[name].get("predictions", ())
    ]
    if not rows:
        return ""
    headers = ("Approach", "FLOPs", "N_opt", "D_opt", "Loss", "Range")
    return table("The optimum at the greatest observed budget and beyond", headers, rows, texts=1)


def conventions(fit: Mapping[str, Any]) -> str:
    """What each quantity means, in plain words."""
    named = fit["conventions"]
    bootstrap = fit["bootstrap"]
    words = {
        "Parameters (N)": f"In the fits: {named['N']}.",
        "Tokens (D)": f"{named['D']}. An encoder-decoder processes its source too but has a loss "
        "only on its targets.",
        "Training FLOPs (C)": f"By the convention {named['C']}. One multiply-add is two FLOPs.",
        "Held-out loss": f"{named['loss']}. Losses compare only over the same target tokens.",
        "Bits per byte": "The loss in bits, over the UTF-8 bytes of the text it was measured on.",
        "Unigram entropy": "The loss of a model that knows only how often each of exactly those "
        "target tokens occurs.",
        "Envelope": "Measured points that no other beats in both loss and FLOPs.",
        "Intervals": f"95 %, from {bootstrap['replicates']} resamples of runs (never of "
        f"checkpoints), seed {bootstrap['seed']}.",
        "Refusals": "A fit is refused rather than guessed: fewer than five sizes, no interior "
        "minimum, negative curvature, or too few runs for its constants.",
        "Runs": "Only finished ones unless asked otherwise; of a step trained twice, the last "
        "attempt counts. Approach 3 takes the last evaluation of each run.",
    }
    items = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(text[:1].upper() + text[1:])}</dd>"
        for name, text in words.items()
    )
    return f"<dl>{items}</dl>"


def provenance(runs: Sequence[Run]) -> str:
    """Versions and fingerprints."""
    made = f"<p>Made by isoflop {escape(own_version())}.</p>"
    if not runs:
        return made + "<p>Read from a table: what the runs were is not known.</p>"
    headers = (
        *("Run", "Folder", "Size", "Data fingerprint", "Tokenizer sha256", "Versions"),
        *("Seed", "Discarded evaluations", "Cut lines"),
    )
    rows = [
        (
            isolated(run.name),
            isolated(run.folder),
            isolated(run.size or "—"),
            f"<code>{isolated(run.data_fingerprint[:16] or '—')}</code>",
            f"<code>{isolated(run.tokenizer_sha256[:16] or '—')}</code>",
            isolated(", ".join(f"{name} {number}" for name, number in run.versions) or "—"),
            str(run.seed),
            str(run.superseded),
            str(run.cut_lines),
        )
        for run in runs
    ]
    return made + table("The runs and what they were made of", headers, rows, texts=6)


def own_version() -> str:
    """This project's version, where it is installed."""
    try:
        return version("isoflop")
    except PackageNotFoundError:
        return "(not installed)"
