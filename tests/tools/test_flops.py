"""`isoflop flops`: its numbers are the model's own, its mistakes are readable, and it is quick."""

import dataclasses
import json
import subprocess
import sys

import pytest

from models.config import named
from models.flops import decode_pass, inference_flops, parameters, prefill_pass, training_flops
from models.registry import ARCHITECTURES
from models.shapes import sizes_of
from pipeline.options import UserError
from tools.cli import dispatch


def test_json_holds_what_the_functions_say(capsys):
    flags = "--arch redllm --size 150m --seq_len 512 --prefix_len 128 --json"
    dispatch(["flops", *flags.split()])
    found = json.loads(capsys.readouterr().out)
    model = named("redllm", "150m", 32_768, max_seq_len=512)
    expected = training_flops(model, seq_len=384, source_len=128)
    training = found["training"]
    assert set(training["flops"]) == {"6n", "model_causal", "model_full", "hardware"}
    assert training["flops"]["model_causal"] == expected.model_causal
    assert training["flops_per_token"]["hardware"] == expected.hardware / 512
    assert found["parameters"]["total"] == parameters(model).total
    assert 3 * sum(training["operations"].values()) == expected.model_full
    for name, step in (
        ("prefill", prefill_pass(model, 256)),
        ("decode", decode_pass(model, 256, 512)),
    ):
        assert found[name]["flops"]["model_full"] == inference_flops(model, step).model_full
        assert sum(found[name]["operations"].values()) == found[name]["flops"]["model_full"]


def test_a_prompt_and_a_context_of_ones_own(capsys):
    flags = "--arch decllm --size nano --prompt_len 5 --context_len 77 --json"
    dispatch(["flops", *flags.split()])
    found = json.loads(capsys.readouterr().out)
    model = named("decllm", "nano", 32_768)
    assert (
        found["decode"]["flops"]["hardware"]
        == inference_flops(model, decode_pass(model, 5, 77)).hardware
    )
    assert found["prefill"]["flops"]["6n"] == 2 * 5 * parameters(model).non_embedding


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ("decllm", {"num_kv_heads": 1}),
        ("entp", {"entp_causal_layers": 1, "entp_sampled_prefixes": 4}),
        ("redllm", {"merged_attention": True, "num_encoder_layers": 5}),
        ("ared", {"num_cross_heads": 1, "num_layers": 3}),
    ],
)
def test_variants_are_asked_for_as_in_pretraining(arch, changes, capsys):
    flags = " ".join(f"--model.{name}={str(value).lower()}" for name, value in changes.items())
    dispatch(f"flops --arch {arch} --size tiny --seq_len 64 --json {flags}".split())
    found = json.loads(capsys.readouterr().out)
    plain, model = (named(arch, "tiny", 32_768, max_seq_len=64, **c) for c in ({}, changes))
    assert found["model"] == dataclasses.asdict(model) != dataclasses.asdict(plain)
    lengths = {"seq_len": 32, "source_len": 32} if arch == "redllm" else {"seq_len": 64}
    flops = training_flops(model, **lengths)
    assert found["training"]["flops"]["hardware"] == flops.hardware
    assert flops != training_flops(plain, **lengths)
    assert found["parameters"]["active"] == parameters(model).active


def test_a_prompt_in_both_directions(capsys):
    causal = []
    for flag in ("", " --bidirectional"):
        dispatch(f"flops --arch decllm --size nano --json{flag}".split())
        causal.append(json.loads(capsys.readouterr().out)["prefill"]["flops"]["model_causal"])
    assert causal[1] > causal[0]


def test_masks_are_in_the_causal_convention_and_documents_also_in_hardware(capsys):
    reports = []
    for flags in ("", " --prefix_len 16", " --documents 40,24"):
        dispatch(f"flops --arch decllm --size tiny --seq_len 64 --json{flags}".split())
        reports.append(json.loads(capsys.readouterr().out)["training"]["flops"])
    causal = [flops.pop("model_causal") for flops in reports]
    hardware = [flops.pop("hardware") for flops in reports]
    assert reports[0] == reports[1] == reports[2]
    assert causal[1] > causal[0] > causal[2]
    assert hardware[0] == hardware[1] > hardware[2]


def test_documents_are_cut_where_an_encoder_s_input_ends(capsys):
    """30, 20 and 14 tokens with 40 in the encoder: 30 + 10 + 0 there, 0 + 10 + 14 predicted."""
    flags = "--prefix_len 40 --seq_len 64 --documents 30,20,14 --json"
    dispatch(f"flops --arch redllm --size tiny {flags}".split())
    found = json.loads(capsys.readouterr().out)["training"]["flops"]
    expected = training_flops(
        named("redllm", "tiny", 32_768),
        seq_len=24,
        source_len=40,
        documents=(0, 10, 14),
        source_documents=(30, 10, 0),
    )
    assert found["hardware"] == expected.hardware
    assert found["model_causal"] == expected.model_causal


def test_recomputation_is_only_in_the_hardware_convention(capsys):
    reports = []
    for flags in ("", " --activation_checkpointing"):
        dispatch(f"flops --arch decllm --size tiny --json{flags}".split())
        reports.append(json.loads(capsys.readouterr().out)["training"]["flops"])
    plain, checkpointed = reports
    assert checkpointed.pop("hardware") > plain.pop("hardware")
    assert checkpointed == plain


def test_the_table_names_every_convention(capsys):
    dispatch(["flops", "--arch", "entp", "--size", "micro", "--seq_len", "64"])
    printed = capsys.readouterr().out
    for word in (
        "6n",
        "model_causal",
        "model_full",
        "hardware",
        "without embeddings",
        "logits",
        "prefill",
    ):
        assert word in printed


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_named_size_has_a_report(arch, capsys):
    for size in sizes_of(arch):
        dispatch(f"flops --arch {arch} --size {size} --seq_len 32 --json".split())
        assert json.loads(capsys.readouterr().out)["parameters"]["total"] > 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--arch gpt --size 1b", ("arch='gpt'", "decllm")),
        ("--arch entp --size 9b", ("size='9b'", "nano")),
        ("--arch decllm --size ared-15m", ("size='ared-15m'", "ared-baseline")),
        ("--arch decllm --size 1b --seq_len 0", ("seq_len=0", "at least 1")),
        ("--arch entp --size 1b --prefix_len 4", ("prefix_len=4", "give none")),
        ("--arch decllm --size 1b --documents 4,5", ("documents=(4, 5)", "2048")),
        ("--arch redllm --size 1b --documents 4,5", ("documents=(4, 5)", "2048")),
        ("--arch decllm --size 1b --prompt_len 0", ("prompt_len=0", "at least 1")),
        ("--arch decllm --size 1b --prompt_len 9 --context_len 9", ("context_len=9", "give more")),
        ("--arch redllm --size 1b --seq_len 8 --prefix_len 8", ("prefix_len=8", "less than")),
        ("--arch decllm --size 1b --seq_len 8 --scored 9", ("scored=9", "8 tokens")),
        ("--arch ared --size 1b --bidirectional", ("bidirectional=True", "give False")),
        ("--arch redllm --size 1b --model.kv_heads=2", ("model.kv_heads='2'", "num_kv_heads")),
        ("--arch redllm --size 1b --model.num_kv_heads=x", ("model.num_kv_heads='x'", "number")),
        ("--arch redllm --size 1b --model.num_kv_heads=3", ("num_kv_heads=3", "give")),
        ("--arch decllm --size 1b --model.merged_attention=true", ("merged_attention", "redllm")),
        ("--arch decllm --size 1b --model.vocab_size=9", ("model.vocab_size=9", "--vocab_size")),
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
