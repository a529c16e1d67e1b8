"""Addresses, interfaces and ports of this machine."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable, Mapping, MutableMapping

from pipeline.options import Fault, UserError


def free_port() -> int:
    """A TCP port of the loopback interface that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def spans_hosts(environ: Mapping[str, str]) -> bool:
    """Whether a launcher's environment tells of more ranks than this host has."""
    local = environ.get("LOCAL_SIZE") or environ.get("LOCAL_WORLD_SIZE")
    return local is not None and int(local) < int(environ.get("WORLD_SIZE", "1"))


def address_towards(host: str) -> str:
    """This machine's own address on its route to `host`; nothing is sent.

    Raises OSError where `host` has no address or no route leads there.
    """
    family, _, _, _, place = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(place)
        return str(probe.getsockname()[0])


def interface_with(address: str, interfaces: Mapping[str, Iterable[str]]) -> str | None:
    """The one of `interfaces` (name → its addresses) that has `address`."""
    wanted = ipaddress.ip_address(address.partition("%")[0])
    for name, addresses in interfaces.items():
        # A link-local address carries its interface behind a percent sign.
        if any(ipaddress.ip_address(known.partition("%")[0]) == wanted for known in addresses):
            return name
    return None


def own_interfaces() -> dict[str, list[str]]:
    """The IP addresses of this machine by interface."""
    import psutil

    families = (socket.AF_INET, socket.AF_INET6)
    return {
        name: [entry.address for entry in entries if entry.family in families]
        for name, entries in psutil.net_if_addrs().items()
    }


def choose_interfaces(environ: MutableMapping[str, str]) -> str | None:
    """Tell gloo and NCCL which interface of this host leads to MASTER_ADDR; its name.

    Hosts name their interfaces differently, so one value for all cannot be forwarded, and left
    alone gloo takes the address that the host's own name has, which is often the loopback's. What
    the user set stays; a run on one host is left alone.

    Raises UserError where it is not known or is the loopback, Fault where no way leads there now.
    """
    if not spans_hosts(environ):
        return None
    master = environ.get("MASTER_ADDR", "")
    try:
        address = address_towards(master)
    except OSError as error:
        # A name that is not known is a mistake; a name server or a route that is gone may be back.
        kind = UserError if error.errno == socket.EAI_NONAME else Fault
        raise kind(
            f"MASTER_ADDR={master!r}: {error.strerror or error} on {socket.gethostname()}; give "
            "the launcher a --master_addr that every node knows and reaches"
        ) from None
    if ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        raise UserError(
            f"MASTER_ADDR={master!r}: is the loopback {address} on {socket.gethostname()}, which "
            "no other node reaches; give the launcher the node's address as --master_addr"
        )
    name = interface_with(address, own_interfaces())
    if name is not None:
        environ.setdefault("GLOO_SOCKET_IFNAME", name)
        # NCCL takes a name for a prefix unless told that it is whole.
        environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")
    return name


def is_free(port: int) -> bool:
    """Whether a server on all interfaces could listen on this TCP port now."""
    with socket.socket() as probe:
        # As servers do, so that connections which are still closing are no hindrance.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
