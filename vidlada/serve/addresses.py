"""Which IP addresses lie on the public internet: the special-purpose registries of IANA, written out.

https://www.iana.org/assignments/iana-ipv4-special-registry and https://www.iana.org/assignments/iana-ipv6-special-registry.
`ipaddress.is_global` follows the registries of the day its Python was released, and looks into no embedded address.
"""

import ipaddress

NOT_PUBLIC = {
    # IPv4
    "0.0.0.0/8": "this network",
    "10.0.0.0/8": "private use",
    "100.64.0.0/10": "shared address space of carriers",
    "127.0.0.0/8": "loopback",
    "169.254.0.0/16": "link local, metadata services of clouds",
    "172.16.0.0/12": "private use",
    "192.0.0.0/24": "IETF protocol assignments (DS-Lite, dummy, NAT64 discovery …)",
    "192.0.2.0/24": "documentation",
    "192.88.99.0/24": "6to4 relay anycast, deprecated",
    "192.168.0.0/16": "private use",
    "198.18.0.0/15": "benchmarking",
    "198.51.100.0/24": "documentation",
    "203.0.113.0/24": "documentation",
    "224.0.0.0/4": "multicast",
    "240.0.0.0/4": "reserved, limited broadcast",
    # IPv6 inside 2000::/3; outside it nothing is public
    "2001::/23": "IETF protocol assignments (Teredo, benchmarking, ORCHID …)",
    "2001:db8::/32": "documentation",
    "2002::/16": "6to4, leads to an IPv4 address",
    "3fff::/20": "documentation",
}
GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
EMBEDDED = [ipaddress.IPv6Network(text) for text in ("::ffff:0:0/96", "64:ff9b::/96")]  # IPv4-mapped, NAT64
NETWORKS = [ipaddress.ip_network(text) for text in NOT_PUBLIC]


def is_public(address: str) -> bool:
    """Whether an IP address, or the IPv4 address embedded in it, lies on the public internet.

    Raises:
        ValueError: it is not an IP address.
    """
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        if any(ip in network for network in EMBEDDED):
            ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        elif ip not in GLOBAL_UNICAST or is_isatap(ip):
            return False
    return not any(ip in network for network in NETWORKS)


def is_isatap(ip: ipaddress.IPv6Address) -> bool:
    """Whether an address is one of ISATAP (RFC 5214), whose last half names an IPv4 address of the site."""
    return (int(ip) >> 32) & 0xFCFFFFFF == 0x5EFE
