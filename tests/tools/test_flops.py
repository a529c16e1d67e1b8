"""`isoflop flops`: its numbers are the model's own, its mistakes are readable, and it is quick."""

import json
import subprocess
import sys

import pytest

from models.config import SIZES, STYLES, named
from models.flops import parameters, training_flops
from pipeline.options import UserError
from tools.cli import dispatch


def test_json_holds_what_the_functions_say(capsys):
    flags = "--arch redllm --size 150m --seq_len 512 --prefix_len 128 --json"
    dispatch(["flops", *flags.split()])
    found = json.loads(capsys.readouterr().out)
    model = named("redllm", "150m", 32_768, max_seq_len=512)
    expected = training_flops(model, seq_len=384, source_len=128)
    assert found["flops_per_sequence"]["model_causal"] == expected.model_causal
    assert found["flops_per_token"]["hardware"] == expected.hardware / 512
    assert found["parameters"]["total"] == parameters(model).total
    assert 3 * sum(found["operations"].values()) == expected.model_full


def test_recomputation_is_only_in_the_hardware_convention(capsys):
    reports = []
    for flags in ("", " --activation_checkpointing"):
        dispatch(f"flops --arch decllm --size tiny --json{flags}".split())
        reports.append(json.loads(capsys.readouterr().out)["flops_per_sequence"])
    plain, checkpointed = reports
    assert checkpointed.pop("hardware") > plain.pop("hardware")
    assert checkpointed == plain


def test_the_table_names_every_convention(capsys):
    dispatch(["flops", "--arch", "entp", "--size", "micro", "--seq_len", "64"])
    printed = capsys.readouterr().out
    for word in ("six_n", "model_causal", "model_full", "hardware", "without embeddings", "logits"):
        assert word in printed


@pytest.mark.parametrize("arch", STYLES)
def test_every_named_size_has_a_report(arch, capsys):
    for size in (name for name, shape in SIZES.items() if arch in shape.archs):
        dispatch(f"flops --arch {arch} --size {size} --seq_len 32 --json".split())
        assert json.loads(capsys.readouterr().out)["parameters"]["total"] > 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--arch gpt --size 1b", ("arch='gpt'", "decllm")),
        ("--arch entp --size 9b", ("size='9b'", "nano")),
        ("--arch decllm --size ared-15m", ("size='ared-15m'", "ared-baseline")),
        ("--arch decllm --size 1b --seq_len 0", ("seq_len=0", "at least 1")),
        ("--arch decllm --size 1b --prefix_len 4", ("prefix_len=4", "leave out")),
        ("--arch redllm --size 1b --seq_len 8 --prefix_len 8", ("prefix_len=8", "less than")),
        ("--arch decllm --size 1b --seq_len 8 --scored 9", ("scored=9", "seq_len=8")),
    ],
)
def test_mistakes_name_field_value_and_remedy(flags, words):
    with pytest.raises(UserError) as error:
        dispatch(["flops", *flags.split()])
    for word in words:
        assert word in str(error.value)


def test_needs_no_torch():
    code = "import sys, tools.flops; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
