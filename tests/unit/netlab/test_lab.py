"""What the lab refuses before it touches the machine, and when it says that it cannot run."""

import sys

import pytest
from tests.netlab import lab as lab_module
from tests.netlab.lab import NetLab, unavailable_reason


@pytest.mark.parametrize("hosts", [0, 65])
def test_the_number_of_hosts_is_bounded(hosts: int) -> None:
    with pytest.raises(ValueError, match="1 to 64 hosts"):
        NetLab(hosts)


def test_links_are_between_two_hosts_that_exist() -> None:
    lab = NetLab(2)
    with pytest.raises(ValueError, match="no host 2 in a lab of 2"):
        lab.link(0, 2)
    with pytest.raises(ValueError, match="no link to itself"):
        lab.link(1, 1)


def test_settings_are_checked_in_the_test_and_not_in_the_switch() -> None:
    with pytest.raises(ValueError, match="probability"):
        NetLab(2, loss=2)
    with pytest.raises(ValueError, match="probability"):
        NetLab(2).link(0, 1).set(loss=2)


def test_a_lab_that_is_not_open_says_so() -> None:
    with pytest.raises(RuntimeError, match="not open"):
        NetLab(2).link(0, 1).cut()


def test_hosts_have_different_addresses() -> None:
    lab = NetLab(64)
    assert len({lab.addr(host) for host in lab.hosts}) == 64
    assert lab.addr(0) == "10.77.0.1"


def test_a_host_has_an_address_on_each_network() -> None:
    lab = NetLab(2, networks=("ipv4", "ipv6"))
    assert [lab.addr(1, network) for network in range(2)] == ["10.77.0.2", "2001:db8:0:2::2"]
    with pytest.raises(ValueError, match="1 to 4 networks"):
        NetLab(2, networks=("ipx",))


def test_the_reason_names_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr(lab_module.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(sys, "platform", "linux")
    assert "root" in (unavailable_reason() or "")

    monkeypatch.setattr(lab_module.os, "geteuid", lambda: 0)
    monkeypatch.setattr(lab_module, "TUN_DEVICE", f"{tmp_path}/tun")
    assert f"{tmp_path}/tun" in (unavailable_reason() or "")

    monkeypatch.setattr(sys, "platform", "darwin")
    assert "Linux" in (unavailable_reason() or "")
