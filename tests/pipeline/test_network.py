"""Which interface of a host its collectives take."""

from __future__ import annotations

import errno
import socket

import pytest

from pipeline import network
from pipeline.network import address_towards, choose_interfaces, interface_with, spans_hosts
from pipeline.options import UserError

INTERFACES = {
    "lo": ["127.0.0.1", "::1"],
    "eth0": ["192.168.7.4", "fe80::1%eth0"],
    "ib0": ["10.99.0.2", "fd00:0:0::2"],
}
TWO_HOSTS = {"WORLD_SIZE": "4", "LOCAL_SIZE": "2"}


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("10.99.0.2", "ib0"),
        ("192.168.7.4", "eth0"),
        ("fd00::2", "ib0"),
        ("fe80::1%eth0", "eth0"),
        ("127.0.0.1", "lo"),
        ("10.99.0.3", None),
    ],
)
def test_an_address_names_its_interface(address: str, name: str | None) -> None:
    assert interface_with(address, INTERFACES) == name


@pytest.mark.parametrize(
    ("environ", "several"),
    [
        ({}, False),
        ({"WORLD_SIZE": "2"}, False),
        ({"WORLD_SIZE": "2", "LOCAL_SIZE": "2"}, False),
        (TWO_HOSTS, True),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "1"}, True),
    ],
)
def test_a_run_spans_hosts_where_there_are_more_ranks_than_here(
    environ: dict[str, str], several: bool
) -> None:
    assert spans_hosts(environ) == several


def test_the_way_to_the_loopback_starts_there() -> None:
    assert address_towards("127.0.0.1") == "127.0.0.1"


def test_the_interface_that_leads_to_the_master_is_taken_and_what_is_set_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(network, "own_interfaces", lambda: INTERFACES)
    monkeypatch.setattr(network, "address_towards", lambda host: {"n0": "10.99.0.2"}[host])
    environ = {**TWO_HOSTS, "MASTER_ADDR": "n0"}
    assert choose_interfaces(environ) == "ib0"
    assert environ["GLOO_SOCKET_IFNAME"] == "ib0"
    assert environ["NCCL_SOCKET_IFNAME"] == "=ib0"
    environ = {**TWO_HOSTS, "MASTER_ADDR": "n0", "NCCL_SOCKET_IFNAME": "eth"}
    choose_interfaces(environ)
    assert environ["NCCL_SOCKET_IFNAME"] == "eth"
    one_host = {"WORLD_SIZE": "2", "LOCAL_SIZE": "2", "MASTER_ADDR": "n0"}
    choose_interfaces(one_host)
    assert "GLOO_SOCKET_IFNAME" not in one_host


@pytest.mark.parametrize(
    ("master", "part"),
    [
        ("localhost", "is the loopback 127.0.0.1 on "),
        ("nowhere.invalid", "MASTER_ADDR='nowhere.invalid': "),
    ],
)
def test_a_master_that_other_hosts_do_not_reach_is_refused(master: str, part: str) -> None:
    with pytest.raises(UserError, match="--master_addr") as caught:
        choose_interfaces({**TWO_HOSTS, "MASTER_ADDR": master})
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (socket.gaierror(socket.EAI_AGAIN, "try again"), 1),
        (OSError(errno.ENETUNREACH, "unreachable"), 1),
        (socket.gaierror(socket.EAI_NONAME, "not known"), 2),
    ],
)
def test_a_name_server_or_a_route_may_be_back_at_another_start(
    error: OSError, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(host: str) -> str:
        raise error

    monkeypatch.setattr("pipeline.network.address_towards", fail)
    with pytest.raises(UserError) as caught:
        choose_interfaces({**TWO_HOSTS, "MASTER_ADDR": "n0"})
    assert caught.value.exit_code == code
