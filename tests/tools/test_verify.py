"""The ledger of real, interrupted runs is proved; whatever is changed in it is named by step."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.options import UserError
from tests.distributed.entry import flags, records, run_entry
from tools.cli import dispatch
from tools.ledger import read_ledger

pytestmark = pytest.mark.distributed
Lines = list[dict[str, Any]]


@pytest.fixture(scope="module")
def pretrained(shards_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps on two ranks, thrown back to step 2, made again on three ranks.

    The weights change inside a batch, and documents are kept apart.
    """
    run = tmp_path_factory.mktemp("verify") / "run"
    stages = {"weight_stages.30": "github=3,wikipedia=1", "document_masks": "true"}
    asked = flags(run, shards_dir, checkpoint_every=2, keep_checkpoints=9, **stages)
    run_entry("pretrain", 2, asked)
    for step in (4, 6):
        shutil.rmtree(run / "checkpoints" / f"step_{step}")
    (run / "FINISHED").unlink()
    run_entry("pretrain", 3, asked)
    assert [r["attempt"] for r in records(run, "ledger.jsonl")] == [1] * 6 + [2] * 4
    return run


@pytest.fixture(scope="module")
def finetuned(pretrained: Path, shards_dir: Path, flan_dir: Path) -> Path:
    """Three steps whose shards lie behind URLs."""
    run = pretrained.parent / "finetuned"
    places = {"flan": f"file://{flan_dir}", "cache_dir": pretrained.parent / "cache"}
    asked = flags(run, Path("x"), init_from=pretrained, steps=3, **places)
    run_entry("finetune", 1, {**asked, "data": f"file://{shards_dir}"})
    return run


def records_data(run: Path) -> str:
    """The shard folder that a run was trained on."""
    return str(json.loads((run / "config.json").read_text())["run"]["data"])


def verify(run: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and what was printed."""
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            dispatch(["verify", str(run), "--workers=1", *arguments])
        except SystemExit as error:
            return int(error.code or 0), out.getvalue()
    return 0, out.getvalue()


def test_an_interrupted_run_is_proved_across_world_sizes(pretrained: Path) -> None:
    code, out = verify(pretrained, "--json")
    assert code == 0
    told = json.loads(out)
    counts = {"steps": 6, "samples": 72, "attempts": 2, "applied": 6, "made_again": 4}
    assert {key: told[key] for key in counts} == counts
    assert told["hashes_checked"] == 6
    from pipeline.data.sequences import SequenceStore

    sizes = SequenceStore(Path(records_data(pretrained)), "train", 16).num_sequences
    seen = {name: epochs * sizes[name] for name, epochs in told["epochs"].items()}
    # 42 of the 72 samples came by the second weights, 3 to 1.
    natural = 30 * sizes["github"] / sum(sizes.values())
    assert abs(seen["github"] - natural - 31.5) < 2
    assert sum(seen.values()) == pytest.approx(72, abs=0.1)
    code, out = verify(pretrained)
    assert code == 0
    assert "steps 1 to 6 of 6 saw samples 0 to 72" in out


def test_a_finetuning_run_is_proved_too(finetuned: Path) -> None:
    code, out = verify(finetuned, "--json")
    assert (code, json.loads(out)["steps"]) == (0, 3)
    ledger = finetuned / "ledger.jsonl"
    before = ledger.read_text()
    lines = records(finetuned, "ledger.jsonl")
    lines[1]["hash"] = lines[0]["hash"]
    ledger.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, out = verify(finetuned)
    ledger.write_text(before)
    assert code == 1
    assert out.startswith("ledger.jsonl: step 2: the hash ")


def test_it_needs_no_torch(pretrained: Path) -> None:
    code = (
        "import sys; from tools.cli import dispatch; "
        f"dispatch(['verify', {str(pretrained)!r}, '--workers=1']); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def drop(step: int) -> Callable[[Lines], Lines]:
    return lambda lines: [line for line in lines if line["step"] != step]


def change(index: int, **fields: Any) -> Callable[[Lines], Lines]:
    return lambda lines: [
        {**line, **fields} if number == index else line for number, line in enumerate(lines)
    ]


def swapped(lines: Lines) -> Lines:
    """The hashes of two steps that count change places."""
    lines[7]["hash"], lines[8]["hash"] = lines[8]["hash"], lines[7]["hash"]
    return lines


TAMPERED: dict[str, tuple[Callable[[Lines], Lines], str]] = {
    "a gap": (drop(4), "step 4 missing before it in attempt 1"),
    "a gap between attempts": (
        lambda lines: (
            [line for line in lines if (line["attempt"], line["step"]) < (1, 2)] + lines[6:]
        ),
        "step 2 missing before it in attempt 2",
    ),
    "a repeat": (lambda lines: [*lines, lines[-1]], "step 6: is repeated within attempt 2"),
    "a wrong hash": (change(9, hash="0" * 16), "step 6: the hash 0000000000000000 is not"),
    "swapped hashes": (swapped, "step 4: the hash"),
    "another range": (change(8, start=1), "step 5: has the positions 1 to 60"),
    "an attempt backwards": (change(9, attempt=1), "attempt 1 comes after attempt 2"),
    "the end cut off": (lambda lines: lines[:-1], "step 5: is the last, but the run is FINISHED"),
    "an unknown event": (change(3, event="lost"), "line 4: event='lost' is none of"),
    "a broken number": (change(3, step="4"), "line 4: step='4' is not a count"),
    "more than the run": (
        lambda lines: [*lines, {**lines[-1], "step": 7, "start": 72, "end": 84}],
        "step 7: the run has 6 steps",
    ),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_tampered_ledger_is_found_and_the_step_named(
    name: str, pretrained: Path, tmp_path: Path
) -> None:
    tamper, told = TAMPERED[name]
    run = tmp_path / "run"
    shutil.copytree(pretrained, run, ignore=shutil.ignore_patterns("*.distcp"))
    lines = tamper(records(run, "ledger.jsonl"))
    (run / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, out = verify(run)
    assert code == 1
    assert told in out


def test_a_replaced_step_need_not_agree_and_a_torn_line_is_no_finding(
    pretrained: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(pretrained, run, ignore=shutil.ignore_patterns("*.distcp"))
    lines = change(4, hash="0" * 16)(records(run, "ledger.jsonl"))
    lines = change(9, event="skipped")(lines)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "ledger.jsonl").write_text(text + '{"step": 7, "att')
    code, out = verify(run, "--json")
    assert code == 0
    told = json.loads(out)
    assert (told["applied"], told["skipped"], told["discarded"]) == (5, 1, 0)
    assert told["torn_last_line"]


def test_a_share_of_the_steps_still_looks_for_gaps_in_all(pretrained: Path, tmp_path: Path) -> None:
    code, out = verify(pretrained, "--fraction=0", "--json")
    assert (code, json.loads(out)["hashes_checked"]) == (0, 2)
    run = tmp_path / "run"
    shutil.copytree(pretrained, run, ignore=shutil.ignore_patterns("*.distcp"))
    lines = drop(3)(records(run, "ledger.jsonl"))
    (run / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, out = verify(run, "--fraction=0")
    assert code == 1
    assert "step 3 missing" in out


def test_a_run_of_another_version_s_order_is_refused(pretrained: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(pretrained, tmp_path / "run"))
    document = json.loads((run / "config.json").read_text())
    assert document["data"].pop("order") == 2
    (run / "config.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="natural proportions in order 1, this version makes"):
        verify(run)


def test_other_or_corrupt_data_is_told(pretrained: Path, shards_dir: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(shards_dir, moved)
    assert verify(pretrained, f"--data={moved}")[0] == 0
    shard = next(iter(sorted((moved / "train" / "github").glob("*.tar"))))
    content = bytearray(shard.read_bytes())
    for position in range(1000, len(content), 3000):
        content[position] ^= 1
    shard.write_bytes(content)
    code, out = verify(pretrained, f"--data={moved}")
    assert code == 1
    assert "its samples cannot be read: shard " in out
    manifest = json.loads((moved / "manifest.json").read_text())
    manifest["settings"]["task_bytes"] = 1
    (moved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="fingerprint"):
        verify(pretrained, f"--data={moved}")
    with pytest.raises(UserError, match=r"holds no config\.json"):
        verify(tmp_path)


def test_garbage_in_a_ledger_is_a_finding_and_never_a_traceback(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    garbage = [
        b"",
        b"[]",
        b"\xff\xfe",
        b'{"step": true}',
        b'{"step": -1}',
        b"9" * 5000,
        b"[" * 9000,
    ]
    path.write_bytes(b"".join(line + b"\n" for line in garbage))
    ledger = read_ledger(path, 4)
    assert [finding.partition(":")[0] for finding in ledger.findings] == [
        f"line {number}" for number in range(1, len(garbage) + 1)
    ]
