"""Files of ds_configs/: the shipped ones are DeepSpeed's own, and mistakes are told at once."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pipeline.deepspeed_file import (
    AIO_TYPES,
    COMMUNICATION_TYPES,
    LOGGER_TYPES,
    OFFLOAD_TYPES,
    ZERO_FLAGS,
    ZERO_KEYS,
    read_deepspeed_file,
    run_problems,
)
from pipeline.options import UserError

FOLDER = Path("ds_configs")
FILES = sorted(FOLDER.glob("*.json"))


def test_the_promised_files_are_there_and_explained() -> None:
    names = {file.name for file in FILES}
    stems = ("zero1", "zero2", "zero3", "zero3_offload", "zero3_nvme", "cpu")
    assert names == {f"{stem}.json" for stem in stems}
    explained = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+\.json)`", explained, re.MULTILINE)) == names


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_every_shipped_file_is_valid_to_us_and_to_deepspeed(file: Path) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero = read_deepspeed_file(str(file))["zero_optimization"]
    # Unknown keys are refused, and every value has the type it should have.
    checked = DeepSpeedZeroConfig(**zero)
    assert int(checked.stage) == zero["stage"]
    # Two gigabytes a rank before the first step is what DeepSpeed takes unasked.
    assert checked.reduce_bucket_size <= 50_000_000
    if zero["stage"] == 3:
        assert checked.prefetch_bucket_size <= 50_000_000


def test_deepspeed_knows_every_key_that_we_accept() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    known = set(fields) | {field.alias for field in fields.values()}
    assert set(ZERO_KEYS) <= known
    with pytest.raises(ValueError, match="Extra inputs"):
        DeepSpeedZeroConfig(stage=3, stag=1)


def test_deepspeeds_values_are_of_the_types_that_we_ask_for() -> None:
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.config import get_communication_data_type
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero = DeepSpeedZeroConfig(stage=1, offload_optimizer={}, offload_param={})
    names = {field.alias or name: name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    for key in set(ZERO_KEYS) - {"stage", *OFFLOAD_TYPES}:
        assert type(getattr(zero, names[key])) is (bool if key in ZERO_FLAGS else int), key
    sections = {name: (getattr(zero, name), types) for name, types in OFFLOAD_TYPES.items()}
    for section, types in [*sections.values(), (CommsLoggerConfig(), LOGGER_TYPES)]:
        for key, kind in types.items():
            assert kind is str or type(getattr(section, key)) is kind, key
    for name in COMMUNICATION_TYPES:
        assert get_communication_data_type({"communication_data_type": name}) is not None


def test_deepspeed_knows_every_aio_key_that_we_accept() -> None:
    """It has no schema of them that refuses: what it does not know it leaves out in silence."""
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT, get_aio_config

    assert {key: type(value) for key, value in AIO_DEFAULT_DICT.items()} == AIO_TYPES
    with_aio = [settings for file in FILES if "aio" in (settings := read_deepspeed_file(str(file)))]
    assert len(with_aio) == 1
    for settings in with_aio:
        assert get_aio_config(settings) == AIO_DEFAULT_DICT | settings["aio"]
        assert settings["zero_optimization"]["offload_param"]["device"] == "nvme"


def zero(stage: int, **keys: object) -> str:
    return json.dumps({"zero_optimization": {"stage": stage, **keys}})


def aio(**keys: object) -> str:
    return json.dumps({"zero_optimization": {"stage": 3}, "aio": keys})


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ('{"zero_optimization": {"stage": 3}, "gradient_clipping": 1}', "holds gradient_clipping"),
        (zero(4), "stage=4; give 0, 1, 2 or 3"),
        ('{"zero_optimization": {}}', "stage=None; give 0, 1, 2 or 3"),
        ('{"zero_optimization": 3}', "has no zero_optimization section"),
        ("[]", "has no zero_optimization section"),
        (zero(3, stag=1), "stag is not supported"),
        (zero(3, overlap_comm=True), "overlap_comm=true"),
        (zero(0, reduce_bucket_size=9), "reduce_bucket_size means nothing at stage 0, only at 1"),
        (zero(2, offload_param={"device": "cpu"}), "offload_param means nothing at stage 2"),
        (zero(0, offload_optimizer={"device": "cpu"}), "offload_optimizer means nothing at stage"),
        (zero(1, offload_optimizer={"device": "disk"}), "offload_optimizer.device='disk'; give"),
        (zero(1, offload_optimizer="cpu"), "offload_optimizer.device=None; give cpu or nvme"),
        (zero(3, offload_param={"device": "nvme"}), "offload_param.nvme_path is missing"),
        (aio(queue_dept=8), "aio.queue_dept is not supported; give only block_size, intra_op"),
        (aio(block_size="1M"), "aio.block_size='1M'; give a whole number"),
        (aio(queue_depth=True), "aio.queue_depth=True; give a whole number"),
        (aio(single_submit=0), "aio.single_submit=0; give true or false"),
        ('{"zero_optimization": {"stage": 3}, "aio": 1}', "aio=1; give a section of block_size"),
        (zero(1, reduce_bucket_size="auto"), "reduce_bucket_size='auto'; give a whole number"),
        (zero(1, reduce_bucket_size=2.5), "reduce_bucket_size=2.5; give a whole number"),
        (zero(1, reduce_bucket_size=0), "reduce_bucket_size=0: too small; give at least 1"),
        (zero(3, sub_group_size=-1), "sub_group_size=-1: too small; give at least 0"),
        (zero(2, contiguous_gradients=1), "contiguous_gradients=1; give true or false"),
        (
            zero(3, offload_optimizer={"device": "cpu", "ratio": 0.5}),
            "offload_optimizer.ratio is not supported; give only buffer_count, device",
        ),
        (zero(3, offload_param={"device": "cpu", "pin": 1}), "offload_param.pin is not supported"),
        (
            zero(1, offload_optimizer={"device": "cpu", "pin_memory": "yes"}),
            "offload_optimizer.pin_memory='yes'; give true or false",
        ),
        (
            '{"zero_optimization": {"stage": 3}, "communication_data_type": "int8"}',
            "communication_data_type='int8'; give one of fp32, bf16, fp16",
        ),
        (
            '{"zero_optimization": {"stage": 3}, "comms_logger": {"prof_al": true}}',
            "comms_logger.prof_al is not supported; give only debug, enabled",
        ),
        ("{", "not JSON"),
    ],
)
def test_a_deepspeed_file_may_not_decide_what_the_run_decides(
    tmp_path: Path, content: str, part: str
) -> None:
    file = tmp_path / "ds.json"
    file.write_text(content)
    with pytest.raises(UserError) as caught:
        read_deepspeed_file(str(file))
    assert part in str(caught.value)


def test_a_number_may_be_written_as_deepspeeds_pages_write_it(tmp_path: Path) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"stage": 3, "reduce_bucket_size": 5e6}}')
    read = read_deepspeed_file(str(file))["zero_optimization"]
    assert DeepSpeedZeroConfig(**read).reduce_bucket_size == 5_000_000


def test_every_mistake_of_a_file_is_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text('{"fp16": {}, "zero_optimization": {"stage": 1, "sub_group_size": 3, "a": 1}}')
    with pytest.raises(UserError, match=r"holds fp16.*\.a is not.*sub_group_size means nothing"):
        read_deepspeed_file(str(file))


def test_what_a_stage_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def problems(stage: int, precision: str = "fp32", compiled: bool = False) -> list[str]:
        file = {"zero_optimization": {"stage": stage}}
        return list(run_problems(file, precision=precision, compiled=compiled))

    monkeypatch.setenv("CXX", "true")
    assert [problems(stage) for stage in (0, 3)] == [[], []]
    assert [problems(stage, "bf16") for stage in (1, 2, 3)] == [[], [], []]
    assert [problems(stage, compiled=True) for stage in (0, 1, 2)] == [[], [], []]
    assert "give precision=fp32" in problems(0, "bf16")[0]
    assert "give a ds_config of stage 0 to 2" in problems(3, compiled=True)[0]
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "finds no C++ compiler 'no-such-compiler'" in problems(1, compiled=True)[0]
    assert problems(1) == []


def test_nvme_is_refused_before_any_work() -> None:
    """DeepSpeed takes the file, and then keeps no masters where optimizers look for them."""
    settings = read_deepspeed_file("ds_configs/zero3_nvme.json")
    found = list(run_problems(settings, precision="bf16"))
    assert [line.partition(":")[0] for line in found] == [
        "offload_optimizer.device='nvme'",
        "offload_param.device='nvme'",
    ]
    assert all("give cpu" in line for line in found)
    others = (file for file in FILES if file.stem != "zero3_nvme")
    assert not any(
        list(run_problems(read_deepspeed_file(str(file)), precision="bf16")) for file in others
    )
