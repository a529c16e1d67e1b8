"""Two hosts on this machine: network namespaces with names of their own, joined by one cable.

Each has an interface of another name, its own /etc/hosts, its own view of the file system where a
test asks for one, and a real sshd. Their traffic runs over their loopbacks and the one veth pair.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

PORT = 29_531  # of the rendezvous; the namespaces are nobody else's
_SSH_PORT = 2222
_NEEDED = {"ip": "iproute2", "unshare": "util-linux"}
_NEEDED_BY_SSH = {"sshd": "openssh-server", "ssh": "openssh-client", "pdsh": "pdsh"}
_ROOT = Path(__file__).resolve().parent.parent.parent
_SYSTEM_PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"


@dataclass
class Host:
    """One of the two.

    Attributes:
        name: what `hostname` says there.
        namespace: of its network.
        interface, address: of its end of the cable.
        names: its /etc/hosts. As on Debian its own name is the loopback's there, which gloo would
            take if it were not told otherwise.
        views: folders that it sees in the place of others, {place: what is seen there}.
    """

    name: str
    namespace: str
    interface: str
    address: str
    names: Path
    views: dict[Path, Path] = field(default_factory=dict)

    def start(
        self, command: Sequence[str | Path], environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """`command` on this host, its output to be read."""
        views = {Path("/etc/hosts"): self.names, **self.views}
        seen = "".join(f"mount --bind '{seen}' '{place}' && " for place, seen in views.items())
        script = f'hostname {self.name} && {seen}exec "$@"'
        inside = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "--mount"]
        return subprocess.Popen(
            [*inside, "sh", "-c", script, "sh", *map(str, command)],
            cwd=_ROOT,
            env={**os.environ, "PATH": _SYSTEM_PATH, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def processes(self) -> list[int]:
        """Whatever runs there."""
        found = _run("ip", "netns", "pids", self.namespace)
        return [int(pid) for pid in found.split()]


@dataclass
class Pair:
    """Two hosts, and how a run is launched over them."""

    hosts: tuple[Host, Host]
    folder: Path

    def launch_by_pdsh(self, asked: Mapping[str, object]) -> subprocess.Popen[str]:
        """`deepspeed --hostfile H pipeline/pretrain.py …` on the first host, as a user would."""
        environment = {
            "PDSH_SSH_ARGS_APPEND": f"-F {self.folder}/ssh_config",
            "DS_ENV_FILE": f"{self.folder}/deepspeed_env",
        }
        return self._launch(self.hosts[0], ["--no_ssh_check"], asked, environment)

    def launch_without_ssh(self, asked: Mapping[str, object]) -> list[subprocess.Popen[str]]:
        """`deepspeed --hostfile H --no_ssh --node_rank K pipeline/pretrain.py …` on both."""
        environment = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        return [
            self._launch(host, ["--no_ssh", "--node_rank", str(rank)], asked, environment)
            for rank, host in enumerate(self.hosts)
        ]

    def _launch(
        self,
        host: Host,
        options: Sequence[str],
        asked: Mapping[str, object],
        environment: Mapping[str, str],
    ) -> subprocess.Popen[str]:
        launcher = Path(sys.executable).parent / "deepspeed"
        words = [sys.executable, launcher, "--quiet", "--hostfile", self.folder / "hostfile"]
        words += [*options, "--master_addr", self.hosts[0].address, "--master_port", str(PORT)]
        words += ["pipeline/pretrain.py", *[f"--{key}={value}" for key, value in asked.items()]]
        return host.start(words, environment)

    def cut_the_cable(self) -> None:
        """No packet arrives any more, and nobody is told."""
        first = self.hosts[0]
        _run("ip", "-n", first.namespace, "link", "set", first.interface, "down")

    @staticmethod
    def program(pid: int) -> str:
        """The command line of a process of one of the hosts, "" once it is gone."""
        with contextlib.suppress(OSError):
            return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
        return ""

    def serve_ssh(self) -> None:
        """Start both hosts' sshd. Skips, by name, where there is none."""
        _need(_NEEDED_BY_SSH)
        folder = self.folder
        for name in ("host_key", "user_key"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name))
        Path("/run/sshd").mkdir(exist_ok=True)
        (folder / "sshd_config").write_text(
            f"Port {_SSH_PORT}\nHostKey {folder}/host_key\nPidFile none\nUsePAM no\n"
            f"AuthorizedKeysFile {folder}/user_key.pub\nStrictModes no\n"
            "PasswordAuthentication no\nPermitRootLogin prohibit-password\n"
        )
        (folder / "ssh_config").write_text(
            f"Port {_SSH_PORT}\nIdentityFile {folder}/user_key\nUserKnownHostsFile /dev/null\n"
            "StrictHostKeyChecking no\nLogLevel ERROR\nBatchMode yes\n"
            # A cable that is cut ends the session, and with it pdsh.
            "ServerAliveInterval 5\nServerAliveCountMax 2\n"
        )
        (folder / "deepspeed_env").write_text("OMP_NUM_THREADS=1\nDS_ACCELERATOR=cpu\n")
        sshd = shutil.which("sshd", path=_SYSTEM_PATH)
        for host in self.hosts:
            host.start([str(sshd), "-D", "-e", "-f", folder / "sshd_config"])
        for host in self.hosts:
            self._await_sshd(host)

    def _await_sshd(self, host: Host, seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while True:
            asked = ["ssh", "-F", self.folder / "ssh_config", host.name, "hostname"]
            answer = self.hosts[0].start(asked).communicate(timeout=20)[0]
            if answer.strip() == host.name:
                return
            if time.monotonic() > deadline:
                raise AssertionError(f"{host.name}'s sshd lets nobody in: {answer}")
            time.sleep(0.3)


def _run(*command: str) -> str:
    path = {**os.environ, "PATH": _SYSTEM_PATH}
    done = subprocess.run(command, env=path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


def _need(programs: Mapping[str, str]) -> None:
    for program, package in programs.items():
        if shutil.which(program, path=_SYSTEM_PATH) is None:
            pytest.skip(f"needs {program}: install the package {package}")


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[Pair]:
    """The hosts n0 and n1; whatever still runs there is ended with them.

    Skips, by name, without root or where no namespace can be made.
    """
    if os.getuid() != 0:
        pytest.skip("network namespaces need root")
    _need(_NEEDED)
    folder.mkdir()
    (folder / "hostfile").write_text("n0 slots=1\nn1 slots=1\n")
    first, second = (
        Host(name, f"isoflop-{os.getpid()}-{name}", interface, address, folder / f"{name}.hosts")
        for name, interface, address in (
            ("n0", "left0", "10.99.0.1"),
            ("n1", "right1", "10.99.0.2"),
        )
    )
    for host, other in ((first, second), (second, first)):
        lines = ("127.0.0.1 localhost", f"127.0.1.1 {host.name}", f"{other.address} {other.name}")
        host.names.write_text("\n".join(lines) + "\n")
    hosts = (first, second)
    made = []
    try:
        for host in hosts:
            try:
                _run("ip", "netns", "add", host.namespace)
            except AssertionError as error:
                pytest.skip(f"no network namespace can be made: {error}")
            made.append(host)
        cable = ["link", "add", first.interface, "netns", first.namespace, "type", "veth"]
        _run("ip", *cable, "peer", "name", second.interface, "netns", second.namespace)
        for host in hosts:
            inside = ("ip", "-n", host.namespace)
            _run(*inside, "address", "add", f"{host.address}/24", "dev", host.interface)
            for interface in ("lo", host.interface):
                _run(*inside, "link", "set", interface, "up")
        yield Pair(hosts, folder)
    finally:
        for host in made:
            _end(host)


def _end(host: Host) -> None:
    deadline = time.monotonic() + 20
    while (found := host.processes()) and time.monotonic() < deadline:
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
    _run("ip", "netns", "del", host.namespace)
