"""What CONTRIBUTING.md says makes an architecture does make one, with no other edit."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.network import free_port

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
# The built model against its own table and counts, with and without recomputation.
CHECKS = """
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from models.batch import Batch
from models.config import named
from models.flops import parameters, training_flops
from models.registry import architecture, build

ids = torch.zeros(2, 7, dtype=torch.int64)
flags = torch.ones_like(ids, dtype=torch.bool)
batch = Batch(ids, ids, flags)
# What it does not have.
unread = {"prefix_lengths": ids[:, 0], "document_ids": ids, "encoder_ids": ids,
          "encoder_mask": flags, "encoder_document_ids": ids}

@pytest.mark.parametrize("again", [False, True])
def test_counts_equal_the_built_parallel(again):
    config = named("parallel", "nano", 50, activation_checkpointing=again, dropout=0.1)
    model = build(config)
    assert parameters(config).total == sum(p.numel() for p in model.parameters())
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(batch).objective.backward()
    assert 2 * training_flops(config, seq_len=7).hardware == counter.get_total_flops()
    assert not torch.equal(model(batch).objective, model(batch).objective)  # dropout

@pytest.mark.parametrize("field", unread)
def test_parallel_refuses_what_it_would_ignore(field):
    with pytest.raises(ValueError):
        build(named("parallel", "nano", 50))(replace(batch, **{field: unread[field]}))

def test_parallel_has_no_documents():
    with pytest.raises(ValueError):
        training_flops(named("parallel", "nano", 50), seq_len=7, documents=(3, 4))
    assert not architecture("parallel").has_document_mask
"""
# What the tests of the house ask of every architecture, and of all of them together.
GENERIC = ("config", "contract", "generation", "inference_flops", "kept")


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A copy of the packages, and of generic tests, with the guide's file and line."""
    for package in ("models", "pipeline", "tools", "ds_configs"):
        shutil.copytree(ROOT / package, tmp_path / package)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    tests = tmp_path / "tests" / "models"
    tests.mkdir(parents=True)
    generic = {f"test_{subject}.py" for subject in GENERIC}
    for path in (ROOT / "tests" / "models").glob("*.py"):
        if path.name in generic or not path.name.startswith("test_"):
            shutil.copy(path, tests)
    (tests / "test_parallel.py").write_text(CHECKS, encoding="utf-8")
    code, line = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)
    assert re.search(r"`models/parallel\.py`:\n\n```python", GUIDE)
    (tmp_path / "models" / "parallel.py").write_text(code, encoding="utf-8")
    registry = tmp_path / "models" / "registry.py"
    before, opening, after = registry.read_text(encoding="utf-8").partition("str] = {\n")
    assert opening
    registry.write_text(before + opening + line + after, encoding="utf-8")
    return tmp_path


def run(house: Path, *words: str) -> str:
    """`python words…` in the copy: one rank of the launcher's environment."""
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=house,
        env={**os.environ, **rank, "MASTER_PORT": str(free_port()), "PYTHONPATH": str(house)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@pytest.mark.distributed
def test_a_file_and_a_line_make_an_architecture(house: Path, shards_dir: Path) -> None:
    assert "parallel" in run(house, "-m", "tools.cli", "flops", "--help")
    # A path is a keyword too: all of test_config, and elsewhere what is asked of `parallel`.
    chosen = ("-k", "parallel or test_config", "-p", "no:cacheprovider")
    assert " passed" in run(house, "-m", "pytest", "tests", *chosen)
    told = run(house, "-m", "tools.cli", "flops", "--arch=parallel", "--size=150m", "--json")
    found = json.loads(told)
    # Per layer four attention matrices and three of the feed-forward, and the head.
    layer = 2 * (4 * 1024 * 1024 + 3 * 1024 * 4096)
    products = 8 * (2048 * layer + 4 * 2048**2 * 1024) + 2 * 2048 * 1024 * 32_768
    assert found["training"]["flops"]["model_full"] == 3 * products
    settings = {
        "run_dir": house / "run",
        "data": shards_dir,
        "arch": "parallel",
        "size": "nano",
        "seq_len": 16,
        "steps": 3,
        "global_batch": 4,
        "precision": "fp32",
        "ds_config": "ds_configs/cpu.json",
        "eval_sequences": 4,
        "threads": 1,
    }
    run(house, "pipeline/pretrain.py", *(f"--{key}={value}" for key, value in settings.items()))
    metrics = (house / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(metrics) == 3
    assert json.loads(metrics[-1])["flops_model_full"] > 0
    assert (house / "run" / "FINISHED").exists()


def test_every_module_of_the_house_that_the_guide_names_exists() -> None:
    for path in re.findall(r"`((?:models|pipeline|tools|tests)/[\w/]+\.py)`", GUIDE):
        if path != "models/parallel.py":
            assert (ROOT / path).exists(), path
