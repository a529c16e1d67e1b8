"""`isoflop plan`: what it says, refuses and recommends."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from pipeline.accelerators import ACCELERATORS
from pipeline.config import RunConfig
from pipeline.options import UserError, load
from tools.cli import dispatch
from tools.planning.choose import Choice
from tools.planning.command import Options, plan
from tools.planning.memory import host, moments

DECLLM = {"arch": "decllm", "size": "1b", "gpus": 8}


def planned(**changes: Any) -> Any:
    return plan(load(Options, DECLLM | changes))


def say(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    dispatch(["plan", *words, "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_parts_make_the_whole_and_the_recommendation_fits(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = say(capsys, "--arch", "redllm", "--size", "1b", "--gpus", "16", "--gpu", "a100-40")
    memory = found["memory"]
    assert sum(memory["bytes"].values()) == memory["tensors"] < memory["needed"] <= 40e9
    assert found["fits"]
    assert found["cluster"]["nodes"] == 2
    assert 512 // 16 % found["micro_batch"] == 0
    step, rates = found["predicted"]["step_seconds"]["step"], found["predicted"]
    assert step["low"] < step["high"]
    assert rates["tokens_per_second"]["high"] == pytest.approx(512 * 2048 / step["low"])
    assert rates["days"]["low"] == pytest.approx(step["low"] * found["steps"] / 86_400)
    assert "never checked on a GPU" in found["caveat"]


NO_HOST = {"host_memory_gb": 0.0, "async_checkpoints": False}


def test_what_cannot_fit_is_one_line_that_says_what_would() -> None:
    with pytest.raises(UserError) as refused:
        planned(size="8b", gpus=2, **NO_HOST)
    line = str(refused.value)
    assert "does not fit h100's 80.0 GB" in line
    assert "most of it optimizer states" in line
    assert "zero3_offload.json would fit with host_memory_gb=" in line
    assert "\n" not in line
    enough = int(line.split("smallest cluster that holds it is ")[1].split(" ×")[0])
    assert planned(size="8b", gpus=enough, **NO_HOST).cluster.devices == enough
    with pytest.raises(UserError):
        planned(size="8b", gpus=enough // 2, **NO_HOST)


def test_a_host_that_is_too_small_for_copies_of_checkpoints_is_told() -> None:
    fixed = {"size": "8b", "ds_config": "ds_configs/zero3.json"}
    with pytest.raises(
        UserError, match=r"checkpoint copy 104\.7 GB\); give .*=105 or async"
    ) as said:
        planned(**fixed, host_memory_gb=104.0)
    assert str(said.value).startswith("gpus=8: host_memory_gb=104: too little for decllm 8b")
    found = planned(**fixed, host_memory_gb=105.0)
    copy = host(found.chosen.request)
    assert copy == {"checkpoint copy": found.disk.checkpoint // 8}
    for without in ({"async_checkpoints": False}, {"checkpoint_every": 0}):
        assert not host(planned(**fixed, host_memory_gb=0.0, **without).chosen.request)
    assert host(planned(**fixed, checkpoint_every=0, keep_every=500).chosen.request) == copy


def test_an_evaluation_can_be_the_fullest_moment() -> None:
    fixed = {
        "ds_config": "ds_configs/zero3.json",
        "micro_batch": 1,
        "activation_checkpointing": True,
    }

    def scored(**changes: Any) -> Choice:
        found: Choice = planned(**fixed, **changes).chosen
        return found

    usual, few = scored(), scored(eval_micro_batch=1)
    assert usual.peak is usual.evaluation
    assert usual.peak.name.startswith("evaluation")
    assert few.peak is few.step
    assert few.step == usual.step
    assert scored(eval_micro_batch=64).needs > usual.needs > few.needs
    # A rank's share of them is all that it can hold.
    assert usual.needs == scored(eval_micro_batch=64, eval_sequences=256).needs
    assert RunConfig.__dataclass_fields__["eval_micro_batch"].default == usual.eval_micro_batch
    # Where the usual number does not fit, it is the most below that does.
    room = (usual.needs - 1) / 1e9
    assert scored(memory_gb=room).eval_micro_batch == 16
    with pytest.raises(UserError, match=r"needs at least .* GB \(evaluation, "):
        planned(**fixed, memory_gb=room, eval_micro_batch=32)


def test_a_refusal_has_exit_code_2_and_its_json_says_the_same() -> None:
    flags = ["--arch", "decllm", "--size", "8b", "--gpus", "1", "--host_memory_gb", "0"]
    flags.append("--async_checkpoints=false")
    command = [sys.executable, "-m", "tools.cli", "plan", *flags, "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 2
    assert len(ran.stderr.splitlines()) == 1
    found = json.loads(ran.stdout)
    assert found["fits"] is False
    assert found["reason"] in ran.stderr
    assert found["smallest_cluster"]["gpus"] > 1
    assert found["memory"]["bytes"][found["largest"]] == max(found["memory"]["bytes"].values())


def test_no_torch_is_imported() -> None:
    code = (
        "import sys; from tools.cli import dispatch; "
        "dispatch(['plan', '--arch', 'entp', '--size', 'tiny', '--gpus', '4']); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 5, "tokens": 1e9}, "one of the two"),
        ({"global_batch": 12}, "give 8 or 16, or gpus 6 or 12"),
        ({"gpus": 600}, "give 600, or gpus 512"),
        ({"gpu": "v100"}, "v100 has no such numbers"),
        ({"factored": True}, "optimizer=adafactor"),
        ({"size": "entp-small", "arch": "redllm"}, "not a size of redllm"),
        ({"model": {"num_layers": "many"}}, "not a whole number"),
        ({"model": {"activation_checkpointing": "true"}}, "give --activation_checkpointing"),
        ({"ds_config": "ds_configs/zero3_nvme.json"}, "nvme"),
        ({"prefix_len": 4096}, "give less than seq_len"),
        ({"memory_gb": -1.0}, "not above zero"),
        ({"gpu": "tpu"}, "not one of the choices"),
    ],
)
def test_mistakes_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        planned(**changes)


def test_what_is_asked_for_is_kept() -> None:
    found = planned(
        ds_config="ds_configs/zero3.json", micro_batch=2, activation_checkpointing=True
    ).chosen
    assert found.file == "ds_configs/zero3.json"
    assert found.request.stage == 3
    assert found.request.micro_batch == 2
    assert found.request.backward_calls == 32
    assert found.request.model.activation_checkpointing


def test_more_of_anything_never_takes_less() -> None:
    def most(**changes: Any) -> int:
        fixed = {"micro_batch": 4, "activation_checkpointing": False, "memory_gb": 1e4}
        found: int = planned(ds_config="ds_configs/zero3.json", **(fixed | changes)).chosen.needs
        return found

    base = most()
    assert most(micro_batch=8) > base
    assert most(seq_len=4096) > base
    assert most(vocab_size=65_536) > base
    assert most(size="2b") > base
    assert most(precision="fp32") > base
    assert most(activation_checkpointing=True) < base
    assert most(gpus=64, micro_batch=4) < base
    assert most(optimizer="adafactor", factored=True) < base


@pytest.mark.parametrize("arch", ["decllm", "redllm", "entp", "ared"])
def test_every_kind_of_device_gets_an_answer_for_every_architecture(arch: str) -> None:
    for kind in ACCELERATORS if arch == "decllm" else ("h100", "cpu"):
        precision = "fp32" if kind in ("cpu", "v100") else "bf16"
        found = planned(arch=arch, size="100m", gpu=kind, precision=precision)
        assert found.chosen.needs <= ACCELERATORS[kind].memory
        assert all(m.total <= found.chosen.peak.total for m in moments(found.chosen.request))


def test_slower_networks_and_more_recomputation_take_longer() -> None:
    fixed = {"gpus": 64, "ds_config": "ds_configs/zero3.json", "micro_batch": 1}
    quick, slow = planned(**fixed), planned(**fixed, network_gbs=5.0)
    assert quick.chosen.speed.step.high < slow.chosen.speed.step.low * 4
    assert slow.chosen.speed.messages.low > quick.chosen.speed.messages.low
    again = planned(**fixed, activation_checkpointing=True)
    without = planned(**fixed, activation_checkpointing=False)
    assert again.chosen.speed.products.low > 1.2 * without.chosen.speed.products.low
