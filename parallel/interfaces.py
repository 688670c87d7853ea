"""Which network interface of this host has an address: gloo and NCCL are told by name where to talk."""

import fcntl
import os
import socket
import struct

SIOCGIFADDR = 0x8915


def interface_of(address: str) -> str | None:
    """The name of the interface with this IPv4 or IPv6 address; None when there is none."""
    if ":" in address:
        return _interface_of_ipv6(address)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)
            except OSError:
                continue  # it has no IPv4 address
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def _interface_of_ipv6(address: str) -> str | None:
    wanted = socket.inet_pton(socket.AF_INET6, address.partition("%")[0]).hex()
    try:
        with open("/proc/net/if_inet6") as lines:
            return next((line.split()[5] for line in lines if line.startswith(wanted)), None)
    except OSError:
        return None


def use_interface_of(address: str) -> None:
    """Have gloo and NCCL of this process use the interface with this address, unless the user named one."""
    name = interface_of(address)
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # without the sign it would be a prefix
