"""The command that is supervised: a launcher with its flags, an entry point, what that is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import RunConfig
from pipeline.config_file import load_with_file
from pipeline.options import UserError

_ENTRIES = ("pretrain.py", "finetune.py")
# DeepSpeed's other names of the same flags.
_OTHER = {"hostfile": "-H", "include": "-i", "exclude": "-e", "num_gpus": "--num_accelerators"}
_SWITCHES = ("force_multi",)
# The flags that supervision reads or changes.
_READ = (
    *("hostfile", "include", "exclude", "num_gpus", "num_accelerators", "num_nodes", "force_multi"),
    *("master_addr", "master_port", "ssh_port", "no_ssh", "node_rank"),
)


def _names(flag: str) -> tuple[str, ...]:
    return f"--{flag}", *([_OTHER[flag]] if flag in _OTHER else [])


def _refuse_short(word: str) -> None:
    """Raise UserError for what the launcher would take for the beginning of a flag read here."""
    meant = [flag for flag in _READ if word.startswith("--") and f"--{flag}".startswith(word)]
    if len(word) > 2 and meant and word.removeprefix("--") not in meant:
        raise UserError(f"command: {word} is short for --{meant[0]}; write it out")


@dataclass(frozen=True)
class Launch:
    """Words of a command line.

    Attributes:
        words: all of them.
        entry: where the entry point stands among them.
        config: what the words behind it say.
    """

    words: tuple[str, ...]
    entry: int
    config: RunConfig

    @classmethod
    def read(cls, words: Sequence[str]) -> Launch:
        """Find the entry point and read what it is told. Raises UserError with every mistake."""
        places = [n for n, word in enumerate(words) if Path(word).name in _ENTRIES]
        if not places:
            raise UserError(
                f"command {' '.join(words)!r}: starts no run; give, behind --, one such as "
                "deepspeed pipeline/pretrain.py --config run.yaml"
            )
        entry = places[0]
        for word in words[:entry]:
            _refuse_short(word.partition("=")[0])
        config = load_with_file(RunConfig, words[entry + 1 :], words[entry])
        return cls(tuple(words), entry, config)

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return Path(self.config.run_dir).resolve()

    @property
    def uses_deepspeed(self) -> bool:
        """Whether DeepSpeed's launcher starts the ranks, and takes its flags in plain sight."""
        return any(Path(word).name == "deepspeed" for word in self.words[: self.entry])

    def flag(self, name: str) -> str | None:
        """What one of the launcher's flags says: its value, "" for one without, None where absent.

        The last one counts.
        """
        found = None
        launcher = self.words[: self.entry]
        for word, following in zip(launcher, [*launcher[1:], "-"], strict=True):
            head, joined, value = word.partition("=")
            if head in _names(name):
                found = value if joined or following.startswith("-") else following
        return found

    def with_flag(self, name: str, value: str = "") -> Launch:
        """The same launch with one of the launcher's flags changed or added."""
        return self.without_flag(name)._put([f"--{name}", *([value] if value else [])])

    def without_flag(self, name: str) -> Launch:
        """The same launch without one of the launcher's flags."""
        kept: list[str] = []
        words = [*self.words[: self.entry], "-"]
        while words:
            word = words.pop(0)
            head, joined, _ = word.partition("=")
            if head not in _names(name):
                kept.append(word)
            elif not joined and name not in _SWITCHES and not words[0].startswith("-"):
                words.pop(0)
        kept.pop()
        words = [*kept, *self.words[self.entry :]]
        return dataclasses.replace(self, words=tuple(words), entry=len(kept))

    def told(self, option: str, value: object) -> Launch:
        """The same launch, the run told one option that it was not told."""
        return dataclasses.replace(self, words=(*self.words, f"--{option}={value}"))

    def _put(self, flags: list[str]) -> Launch:
        words = (*self.words[: self.entry], *flags, *self.words[self.entry :])
        return dataclasses.replace(self, words=words, entry=self.entry + len(flags))
