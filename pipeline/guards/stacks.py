"""Where the threads of a process are: of this one by itself, of another by py-spy."""

from __future__ import annotations

import faulthandler
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

OUR_CODE = Path(__file__).resolve().parent.parent.parent
TORCH_COLLECTIVES = f"{os.sep}torch{os.sep}distributed{os.sep}"
DEEPSPEED = f"{os.sep}deepspeed{os.sep}"


def dump_own_stack(file: Path) -> None:
    """Write the stacks of all threads of this process."""
    try:
        with file.open("w", encoding="utf-8") as handle:
            faulthandler.dump_traceback(handle, all_threads=True)
    except OSError:
        # No room or no folder: the line on the terminal still names the place.
        return


def write_text(file: Path, text: str) -> None:
    """Write `text`, where there is room."""
    try:
        file.write_text(text, encoding="utf-8")
    except OSError:
        # As above.
        return


def own_place() -> str:
    """Where the main thread is, as `file:line in function`: its innermost frame in our code."""
    for frame in _main_frames():
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(OUR_CODE) and "site-packages" not in path.parts:
            name = path.relative_to(OUR_CODE)
            return f"{name}:{frame.f_lineno} in {frame.f_code.co_name}"
    return "unknown place"


def is_in_collective() -> bool:
    """Whether the main thread waits for the other ranks, as far as its frames show it.

    A GPU's collectives are waited for elsewhere, and do not show.
    """
    codes = [frame.f_code for frame in _main_frames()]
    # DeepSpeed waits for what it began earlier in methods of that name.
    return any(
        TORCH_COLLECTIVES in code.co_filename
        or (code.co_name == "wait" and DEEPSPEED in code.co_filename)
        for code in codes
    )


def _main_frames() -> Iterator[FrameType]:
    """The main thread's frames, the innermost first."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        yield frame
        frame = frame.f_back


def stack_of(pid: int, seconds: float = 10.0) -> tuple[str, str]:
    """The stacks of another process of this host by py-spy; or "" and why there are none."""
    beside = Path(sys.executable).parent / "py-spy"
    program = str(beside) if beside.exists() else shutil.which("py-spy")
    if program is None:
        return "", "no stack: py-spy is not installed; pip install 'isoflop[cluster]'"
    # Reading without pausing: a process that is stopped already cannot be paused.
    command = [program, "dump", "--nonblocking", "--pid", str(pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return "", f"no stack: py-spy gave none within {seconds:.0f} s"
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        return "", f"no stack: py-spy failed ({reason})"
    return done.stdout, ""
