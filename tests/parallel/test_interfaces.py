"""Interfaces by their address."""

import os

import pytest

from shoal.parallel.interfaces import interface_of, use_interface_of


def test_loopback_is_found_and_a_stranger_is_not() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.77") is None


def test_a_name_the_user_gave_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine0")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    use_interface_of("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "mine0" and os.environ["NCCL_SOCKET_IFNAME"] == "=lo"
