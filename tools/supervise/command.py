"""`isoflop supervise`: starts a run's command, judges how it ended, and starts it again or not."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from pipeline.network import free_port, is_free
from pipeline.options import UserError, option
from pipeline.run_folder import RunFolder
from tools.supervise import policy
from tools.supervise.launch import Launch
from tools.supervise.lock import only_supervisor
from tools.supervise.policy import Restarts, Verdict
from tools.supervise.processes import Stop, mark
from tools.supervise.world import DEFAULT_HOSTFILE, NoRanks, fit

_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Options:
    """Keep a run going without Slurm: what crashed is started again, from its last checkpoint.

    COMMAND is what you would give by itself, such as `deepspeed pipeline/pretrain.py --config
    run.yaml`. It is done when the run's folder says FINISHED (exit code 0), whatever the launcher
    says. A mistake in its settings (2) and an agreed stop (130) end it too. Any other end is a
    crash: what is left of it on this host is ended by process id, and the command is started again,
    at most max_restarts times in a row without a new checkpoint between; then the exit code is 1.
    Hosts of the hostfile that do not answer, and GPUs that are gone, are left out. SIGINT, SIGTERM,
    SIGUSR1 and the loss of its terminal are passed on to the ranks, which save and leave.
    """

    command: tuple[str, ...] = option(
        "the run's own command", (), metavar="COMMAND …", after_dashes=True
    )
    max_restarts: int = option(
        "restarts in a row that brought no new checkpoint, before it gives up", 3, minimum=0
    )
    backoff: float = option(
        "seconds before such a restart; twice as long before each further one, 300 at most",
        5.0,
        minimum=0,
    )
    stop_seconds: float = option(
        "seconds for the ranks to save after a stop; what is left then is killed", 300.0, minimum=0
    )
    probe: str = option(
        "command that succeeds where {host} of the hostfile answers (default: ssh {host} true)", ""
    )


def run(options: Options) -> None:
    """Supervise until the run ends. Exits with 130, 2 or 1 where it did not finish."""
    launch = Launch.read(options.command)
    node = launch.flag("node_rank") if launch.flag("no_ssh") is not None else None
    with only_supervisor(launch.run_dir, node or ""):
        code = Supervisor(options, launch).run()
    if code:
        sys.exit(code)


class Supervisor:
    """Attempts at one run, one after the other."""

    def __init__(self, options: Options, launch: Launch) -> None:
        self._options = options
        self._launch = launch
        self._folder = RunFolder(launch.run_dir)
        self._restarts = Restarts(options.max_restarts, options.backoff, self._newest())
        self._asked = ""

    def run(self) -> int:
        """The exit code: 0 where the run is FINISHED."""
        numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup leaves it
            numbers.append(signal.SIGHUP)
        previous = {number: signal.signal(number, self._ask) for number in numbers}
        try:
            return self._run()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _run(self) -> int:
        if self._folder.is_finished:
            self._refuse_more_steps()
            self._say("finished before; nothing to do")
            return 0
        self._clear("an earlier attempt", Stop(self._launch.run_dir))
        while True:
            try:
                code, state = self._attempt()
            except NoRanks as error:
                code, state = 1, str(error)
            verdict = policy.judge(code, finished=self._folder.is_finished, asked=bool(self._asked))
            if verdict is Verdict.FINISHED:
                return 0
            if verdict is Verdict.STOPPED:
                self._say(f"stopped at {self._where()}; the same command goes on")
                return policy.STOPPED
            if verdict is Verdict.MISTAKE:
                self._say(
                    f"{state}: it would be refused again; mend it, and the same command goes on"
                )
                return policy.MISTAKE
            wait = self._restarts.wait_after_crash(self._newest())
            if wait is None:
                self._say(
                    f"{state}, at {self._where()}; gives up after {self._options.max_restarts} "
                    "restarts without a new checkpoint"
                )
                return 1
            self._say(
                f"{state}, at {self._where()}; starts again in {wait:g} s (restart "
                f"{self._restarts.in_a_row} of {self._options.max_restarts} without a new "
                "checkpoint)"
            )
            self._sleep(wait)

    def _refuse_more_steps(self) -> None:
        """A marker of a shorter run must not pass for this one's."""
        asked = self._launch.config.steps
        known = asked
        if self._folder.config_file.exists():
            known = self._folder.read_config()["run"].get("steps", asked)
        if known != asked:
            raise UserError(
                f"steps={asked}: the run in {self._folder.path} is FINISHED with {known}; give "
                "another run_dir"
            )

    def _attempt(self) -> tuple[int, str]:
        """Run the command once, until nothing of it is left; its exit code, and a sentence."""
        if self._asked:
            return policy.STOPPED, ""
        launch, said = fit(self._launch, self._options.probe)
        if said:
            self._say(said)
        launch = self._with_free_port(launch)
        stop = Stop(launch.run_dir, since=time.time())
        try:
            # A session of its own: a terminal's Ctrl-C reaches this process alone.
            child = subprocess.Popen(launch.words, env=mark(launch.run_dir), start_new_session=True)
        except OSError as error:
            raise UserError(
                f"command {launch.words[0]!r}: {error.strerror}; give one that can be run"
            ) from error
        while child.poll() is None and not self._asked:
            time.sleep(_POLL_SECONDS)
        if self._asked:
            self._say(f"{self._asked}: waits for the run to save its state")
        self._clear("the attempt", stop)
        code = child.wait()
        program = "deepspeed" if launch.uses_deepspeed else Path(launch.words[0]).name
        state = f"{program} ended with {policy.describe_code(code)}"
        return code, state if code else f"{state}, but the run is not FINISHED"

    def _clear(self, what: str, stop: Stop) -> None:
        """Whatever still works on the run may save, and is ended where it does not leave."""
        if killed := stop.wait(self._options.stop_seconds):
            self._say(f"{killed} processes of {what} did not leave and were killed")

    def _with_free_port(self, launch: Launch) -> Launch:
        """On one host the ranks' port is nobody's concern: where it is taken, another will do."""
        on_hosts = launch.flag("hostfile") is not None or Path(DEFAULT_HOSTFILE).exists()
        if not launch.uses_deepspeed or on_hosts:
            return launch
        given = launch.flag("master_port")
        if given is not None and (not given.isdecimal() or is_free(int(given))):
            return launch
        port = free_port()
        if given is not None:
            self._say(f"master_port={given}: taken by another process; {port} is used")
        return launch.with_flag("master_port", str(port))

    def _newest(self) -> int:
        """The newest whole checkpoint's step; 0 without any."""
        found = self._folder.checkpoints.glob("step_*/COMPLETE.json")
        return max((int(path.parent.name.removeprefix("step_")) for path in found), default=0)

    def _where(self) -> str:
        newest = self._newest()
        return f"the checkpoint of step {newest}" if newest else "its start, without a checkpoint"

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = signal.Signals(number).name

    def _sleep(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self._asked:
            time.sleep(min(_POLL_SECONDS, seconds))

    def _say(self, text: str) -> None:
        name = self._launch.config.name or self._launch.run_dir.name
        print(f"supervise {name}: {text}", file=sys.stderr, flush=True)
