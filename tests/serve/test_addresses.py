"""Which addresses are public, by the names that IANA's registries give to the others."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vidlada.serve.addresses import NOT_PUBLIC, is_public

BY_NAME = {
    "this host on this network": "0.0.0.0",
    "this network": "0.1.2.3",
    "private use, 10": "10.1.2.3",
    "shared address space": "100.64.0.1",
    "loopback": "127.0.0.1",
    "link local, metadata services": "169.254.169.254",
    "private use, 172": "172.31.255.255",
    "IETF protocol assignments": "192.0.0.1",
    "IPv4 dummy address": "192.0.0.8",
    "port control protocol anycast": "192.0.0.9",
    "TURN anycast": "192.0.0.10",
    "NAT64/DNS64 discovery": "192.0.0.170",
    "documentation, TEST-NET-1": "192.0.2.1",
    "6to4 relay anycast": "192.88.99.1",
    "private use, 192": "192.168.1.1",
    "benchmarking": "198.19.255.255",
    "documentation, TEST-NET-2": "198.51.100.1",
    "documentation, TEST-NET-3": "203.0.113.1",
    "multicast": "224.0.0.1",
    "reserved": "240.0.0.1",
    "limited broadcast": "255.255.255.255",
    "unspecified": "::",
    "loopback, IPv6": "::1",
    "IPv4-compatible": "::127.0.0.1",
    "IPv4-compatible, public inside": "::93.184.216.34",
    "IPv4-mapped, loopback inside": "::ffff:127.0.0.1",
    "IPv4-mapped, metadata inside": "::ffff:a9fe:a9fe",
    "IPv4-translated": "::ffff:0:127.0.0.1",
    "IPv4-translated, public inside": "::ffff:0:93.184.216.34",
    "NAT64, loopback inside": "64:ff9b::7f00:1",
    "NAT64, private inside": "64:ff9b::192.168.0.1",
    "NAT64 for local use": "64:ff9b:1::5db8:d822",
    "discard only": "100::1",
    "dummy prefix": "100:0:0:1::1",
    "Teredo": "2001::1",
    "benchmarking, IPv6": "2001:2::1",
    "ORCHIDv2": "2001:20::1",
    "documentation, IPv6": "2001:db8::1",
    "6to4, loopback inside": "2002:7f00:1::",
    "documentation, 3fff": "3fff::1",
    "segment routing": "5f00::1",
    "unique local": "fd00::1",
    "link local, IPv6": "fe80::1",
    "site local": "fec0::1",
    "multicast, IPv6": "ff02::1",
    "ISATAP": "2a00:1450::5efe:7f00:1",
    "ISATAP, universal bit": "2a00:1450::200:5efe:7f00:1",
    "unassigned": "4000::1",
}
PUBLIC = {
    "a site": "93.184.216.34",
    "a resolver": "8.8.8.8",
    "beside loopback": "126.255.255.255",
    "beside private": "172.32.0.1",
    "beside protocol assignments": "192.0.1.1",
    "a site, IPv6": "2606:2800:220:1:248:1893:25c8:1946",
    "a resolver, IPv6": "2001:4860:4860::8888",
    "IPv4-mapped": "::ffff:93.184.216.34",
    "NAT64": "64:ff9b::5db8:d822",
}


@pytest.mark.parametrize("name", BY_NAME)
def test_not_public(name):
    assert not is_public(BY_NAME[name])


@pytest.mark.parametrize("name", PUBLIC)
def test_public(name):
    assert is_public(PUBLIC[name])


@pytest.mark.parametrize("network", NOT_PUBLIC)
def test_both_ends_of_every_entry(network):
    entry = ipaddress.ip_network(network)
    assert not is_public(str(entry[0])) and not is_public(str(entry[-1]))


@given(st.ip_addresses())
def test_nothing_is_public_that_python_knows_better(ip):
    """The standard library's table, where it is stricter: an oracle for what was left out here."""
    if is_public(str(ip)):
        inner = getattr(ip, "ipv4_mapped", None) or (
            ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in ipaddress.ip_network("64:ff9b::/96") else ip
        )
        assert inner.is_global and not inner.is_multicast


@given(st.ip_addresses(v=4))
def test_an_embedded_address_is_judged_as_itself(ip):
    for text in (f"::ffff:{ip}", f"64:ff9b::{ip}"):
        assert is_public(text) == is_public(str(ip))
    for text in (f"::{ip}", f"::ffff:0:{ip}", f"64:ff9b:1::{ip}"):
        assert not is_public(text)
