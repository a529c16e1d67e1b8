"""`isoflop`: one table of commands; a command's module is imported only when it is run."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from pipeline.options import UserError, parse_command_line
from pipeline.program import run_as_program

# Each module offers `Options`, a frozen dataclass, and `run(options)`.
COMMANDS: dict[str, tuple[str, str]] = {
    "sample-corpus": ("tools.sample_corpus", "real text of this Python installation, as RedPajama"),
    "tokenizer train": ("tools.tokenizer", "train a SentencePiece tokenizer"),
    "tokenize": ("tools.tokenize_corpus", "a corpus to sharded tokens with a manifest"),
    "flan": ("tools.flan", "instruction rows to shards of input and target tokens"),
    "inspect": ("tools.inspect_shards", "what a shard folder holds"),
    "audit": ("tools.audit", "prove every byte, count and id of a shard folder"),
    "supervise": ("tools.supervise.command", "a run that is started again after a crash"),
    "stop": ("tools.stop", "ask a run to save its state and leave"),
    "verify": ("tools.verify", "prove from its ledger which samples a run saw"),
    "doctor": ("tools.doctor", "where each rank of a run is, and what keeps it"),
    "flops": ("tools.flops", "parameters and FLOPs of an architecture and size"),
    "plan": ("tools.planning.command", "memory, time, energy and disk of a run on a cluster"),
    "export": ("tools.export.command", "a run's weights for other programs"),
    "generate": ("tools.generate", "what a trained run writes after a prompt"),
    "demo": ("tools.demo.command", "the whole line on real text, on two cores"),
    "frontier": ("tools.frontier.command", "runs to points, envelope, fits, figure and report"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """The console command's entry."""
    words = list(sys.argv[1:] if argv is None else argv)
    run_as_program(lambda: dispatch(words))


def dispatch(words: list[str]) -> None:
    """Run the command that `words` begin with. Raises UserError."""
    for length in (2, 1):
        name = " ".join(words[:length])
        if name in COMMANDS:
            module = importlib.import_module(COMMANDS[name][0])
            options = parse_command_line(module.Options, words[length:], f"isoflop {name}")
            module.run(options)
            return
    if not words or words[0] in ("--help", "-h", "help"):
        print(overview())
        return
    if words[0] == "--version":
        from importlib.metadata import version

        print(version("isoflop"))
        return
    group = [name for name in COMMANDS if name.startswith(words[0] + " ")]
    if group and len(words) == 2 and words[1] in ("--help", "-h"):
        print("\n".join(f"isoflop {name} — {COMMANDS[name][1]}" for name in group))
        return
    known = ", ".join(group or COMMANDS)
    raise UserError(f"command {' '.join(words[:2])!r}: not known; give one of: {known}")


def overview() -> str:
    """The text of `isoflop --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: isoflop COMMAND [--option VALUE …]",
            "",
            "Which architecture, how big, on how many tokens.",
            "",
            "commands (isoflop COMMAND --help for each):",
            *lines,
            "",
            "Training runs under DeepSpeed's launcher: deepspeed pipeline/pretrain.py --help",
        ]
    )


if __name__ == "__main__":
    main()
