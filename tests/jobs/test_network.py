"""By which interface nodes talk: the named one or that of the route to node 0, told to gloo, NCCL and torch by name."""

from __future__ import annotations

import pytest

from launcher.errors import UserError
from launcher.jobs import network
from launcher.jobs.network import Interface, choose, interfaces, is_here, towards


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for name in network._VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_the_interface_of_an_address_of_this_machine_is_the_one_that_has_it():
    assert "127.0.0.1" in interfaces()["lo"]
    found = choose("127.0.0.1", wanted=None)
    assert (found.name, found.address) == ("lo", "127.0.0.1")
    assert str(found) == "network interface lo, address 127.0.0.1: leads to 127.0.0.1"


def test_nccl_is_told_the_exact_name_and_what_the_user_set_stays(monkeypatch):
    interface = Interface("ib0", "10.0.0.1", "leads to node0")
    assert interface.environment() == {
        "GLOO_SOCKET_IFNAME": "ib0",
        "NCCL_SOCKET_IFNAME": "=ib0",
        "TP_SOCKET_IFNAME": "ib0",
    }
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "^docker0")
    assert interface.environment() == {"GLOO_SOCKET_IFNAME": "ib0", "TP_SOCKET_IFNAME": "ib0"}
    assert "NCCL_SOCKET_IFNAME=^docker0 set in the environment stays" in str(interface)
    assert Interface("", "10.0.0.1").environment() == {}


def test_a_named_interface_that_is_not_there_is_answered_with_those_that_are():
    with pytest.raises(UserError) as refused:
        choose("127.0.0.1", wanted="l0")
    text = str(refused.value)
    assert text.startswith("cluster.network_interface = l0: expected an interface of ")
    assert "lo (127.0.0.1)" in text
    assert "Did you mean 'lo'?" in text


def test_a_name_of_node_0_that_is_its_loopback_there_gives_the_interface_of_the_default_route(monkeypatch):
    """Debian writes `127.0.1.1 <host name>` into /etc/hosts."""
    monkeypatch.setattr(network, "towards", lambda host: "127.0.1.1")
    monkeypatch.setattr(network, "interfaces", lambda: {"lo": ["127.0.0.1"], "eth0": ["10.0.0.5"]})
    monkeypatch.setattr(network, "_default_route", lambda: "eth0")
    found = choose("node0", wanted=None)
    assert (found.name, found.address) == ("eth0", "10.0.0.5")
    monkeypatch.setattr(network, "_default_route", lambda: None)
    with pytest.raises(UserError, match=r"which no other node reaches. Give node 0's address, or name the interface"):
        choose("node0", wanted=None)


def test_routes_are_read_from_the_kernel_and_a_second_address_belongs_to_its_network(tmp_path, monkeypatch):
    head = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
    lines = [
        "eth0\t00000000\t0100000A\t0003\t0\t0\t0\t00000000\t0\t0\t0",
        "ib0\t0001000A\t0\t1\t0\t0\t0\t00FFFFFF\t0\t0\t0",
    ]
    (tmp_path / "route").write_text(head + "\n".join(lines) + "\n")
    monkeypatch.setattr(network, "_ROUTES", tmp_path / "route")
    assert network._default_route() == "eth0"
    assert network._routed("10.0.1.9") == "ib0"
    assert network._routed("10.0.2.9") is None


def test_an_unknown_name_is_refused_and_says_who_does_not_know_it(monkeypatch):
    def unknown(*_, **__):
        raise OSError(-2, "Name or service not known")

    monkeypatch.setattr(network.socket, "getaddrinfo", unknown)
    with pytest.raises(UserError, match=r"--rendezvous node9: expected a name or address of node 0 that .* knows"):
        towards("node9")


def test_this_machine_is_told_from_others_by_what_it_can_listen_on():
    assert is_here("127.0.0.1")
    assert is_here("localhost")
    assert not is_here("192.0.2.1")
