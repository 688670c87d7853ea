"""A wrong address of a cluster is told at once: Ray itself would try for minutes."""

import socket

import pytest

from shoal.launcher.cli import main


@pytest.mark.parametrize("address", ["nonsense", "http://127.0.0.1:8265", "10.0.0.1:x", "10.0.0.1:70000"])
def test_what_cannot_be_an_address_is_refused(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "prod", "--ray-address", address]) == 2
    assert f"launcher.address = {address}: must be host:port" in capsys.readouterr().err


def test_an_address_from_the_environment_is_named_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    assert main(["up", "demo", "--name", "prod"]) == 2
    assert "RAY_ADDRESS = http://127.0.0.1:8265: must be host:port" in capsys.readouterr().err


def test_an_address_where_nobody_listens_is_an_error_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        assert main(["logs", "prod", "--ray-address", address]) == 1
    error = capsys.readouterr().err
    assert f"no Ray cluster answers at launcher.address = {address}: Connection refused" in error
    assert "--log-level" not in error, "the command has no such flag"
