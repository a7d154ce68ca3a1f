"""The guard: which URLs and addresses may be reached. Every way out of the process asks it, the browser's included.

    guard = Guard(deny=("example.org",))
    target = guard.check_url(url)               # scheme, host, port, domain lists
    addresses = await guard.resolve(target)     # dial one of exactly these

A name is resolved once, every answer must be allowed, and the caller dials what was checked: a name that answers with
another address a moment later (DNS rebinding) gains nothing.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from tools.pages import canonical_url
from tools.types import ToolErrorKind, ToolFailure

Resolver = Callable[[str], Awaitable[Sequence[str]]]
"""Addresses of a host name, as text. Raises OSError if there are none."""
RESOLVE_S = 10.0
"""Seconds that a name may take to resolve."""

# Not `ipaddress.is_global`: it calls some of these global, and its tables differ between releases of Python.
CLOSED_IPV4 = tuple(
    IPv4Network(text)
    for text in (
        "0.0.0.0/8",  # this network (RFC 791)
        "10.0.0.0/8",  # private (RFC 1918)
        "100.64.0.0/10",  # shared (RFC 6598); metadata of Alibaba Cloud
        "127.0.0.0/8",  # loopback
        "168.63.129.16/32",  # services of Azure
        "169.254.0.0/16",  # link-local (RFC 3927); metadata of most clouds
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments (RFC 6890)
        "192.0.2.0/24",  # documentation (RFC 5737)
        "192.88.99.0/24",  # relays of 6to4 (RFC 7526)
        "192.168.0.0/16",  # private
        "198.18.0.0/15",  # benchmarks (RFC 2544)
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
    )
)
OPEN_IPV6 = IPv6Network("2000::/3")
"""Global unicast (RFC 4291); all else of IPv6 is closed, but for addresses that stand for an IPv4 one."""
CLOSED_IPV6 = tuple(
    IPv6Network(text)
    for text in (
        "2001::/23",  # protocol assignments, Teredo among them (RFC 2928, RFC 4380)
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4: carries any IPv4 address (RFC 3056)
        "3fff::/20",  # documentation (RFC 9637)
    )
)
NAT64 = IPv6Network("64:ff9b::/96")
"""Carries an IPv4 address in its last 32 bits (RFC 6052): where a network has IPv6 only, all sites have such ones."""

DENIED = (
    "huggingface.co/datasets/AIM-Harvard",
    "huggingface.co/api/datasets/AIM-Harvard",
    "huggingface.co/papers/2505.14963",
    "hf.co/datasets/AIM-Harvard",
    "hf-mirror.com/datasets/AIM-Harvard",
    "hf-mirror.com/api/datasets/AIM-Harvard",
    "datasets-server.huggingface.co/",
    "github.com/shan23chen",
    "api.github.com/repos/shan23chen",
    "codeload.github.com/shan23chen",
    "raw.githubusercontent.com/shan23chen",
    "cdn.jsdelivr.net/gh/shan23chen",
    "shan23chen.github.io/",
    "moreirap12.github.io/",
    "arxiv.org/abs/2505.14963",
    "arxiv.org/pdf/2505.14963",
    "arxiv.org/html/2505.14963",
    "ar5iv.org/abs/2505.14963",
    "ar5iv.org/html/2505.14963",
    "alphaxiv.org/abs/2505.14963",
)
"""Pages with the questions and answers of MedBrowseComp, and copies of its paper."""

_NUMERIC = re.compile(r"(?:\d+|0[xX][0-9a-fA-F]*)")
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where a request goes."""

    url: str
    """Canonical, in ASCII."""
    scheme: str
    host: str
    """Lower case, ASCII, without a dot at its end; an IPv6 address without brackets."""
    port: int


@dataclass(frozen=True, slots=True)
class _Open:
    network: IPv4Network | IPv6Network
    port: int | None


async def system_resolver(host: str) -> Sequence[str]:
    """By the system's own means."""
    found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return tuple(dict.fromkeys(str(entry[4][0]) for entry in found))


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """What may be reached.

    Raises:
        ValueError: an entry of `open_addresses` is none.
    """

    allow: tuple[str, ...] = ()
    """Domains, with their subdomains. Empty: all."""
    deny: tuple[str, ...] = DENIED
    """Domains, or `domain/path` prefixes. Stronger than `allow`. What has a slash is denied in the path and query of
    other sites too: archives, readers and translators show `https://archive.example/https://domain/path`."""
    ports: tuple[int, ...] = (80, 443)
    open_addresses: tuple[str, ...] = ()
    """Addresses that are not public and may be reached all the same: `10.1.0.0/16`, `127.0.0.1:8000`, `[::1]:8000`.
    With a port: at that one only, which need not be one of `ports`."""
    resolver: Resolver = system_resolver
    _open: tuple[_Open, ...] = field(init=False, repr=False, default=())

    def __post_init__(self) -> None:
        object.__setattr__(self, "_open", tuple(_read_open(text) for text in self.open_addresses))

    def check_url(self, url: str) -> Target:
        """What a URL names, if it may be asked at all. Nothing is resolved.

        Raises:
            ToolFailure: `invalid_arguments` if it is no web URL, `blocked` if host, port or path are not allowed.
        """
        try:
            parts = urlsplit(canonical_url(url))
            host = _ascii_host(parts.hostname or "")
            port = parts.port if parts.port is not None else {"http": 80, "https": 443}[parts.scheme]
            path = quote(parts.path, safe="/%:@!$&'()*+,;=~-._")
            query = quote(parts.query, safe="/%:@!$&'()*+,;=~-._?")
        except UnicodeEncodeError:
            raise ToolFailure("cannot open this URL: it is no Unicode text", ToolErrorKind.INVALID_ARGUMENTS) from None
        except ValueError as error:
            raise ToolFailure(f"cannot open this URL: {error}", ToolErrorKind.INVALID_ARGUMENTS) from None
        if _address(host) is None and "." not in host and not self._open:
            raise ToolFailure("cannot open this URL: its host has no domain", ToolErrorKind.INVALID_ARGUMENTS)
        if port not in self.ports and port not in {entry.port for entry in self._open}:
            raise ToolFailure(f"port {port} may not be reached", ToolErrorKind.BLOCKED)
        if self.allow and not any(_matches(entry, host, parts.path) for entry in self.allow):
            raise ToolFailure(f"{host} is not among the sites that may be opened", ToolErrorKind.BLOCKED)
        if any(_matches(entry, host, parts.path) or _named(entry, parts.path, parts.query) for entry in self.deny):
            raise ToolFailure(f"this page of {host} may not be opened", ToolErrorKind.BLOCKED)
        shown = f"[{host}]" if ":" in host else host
        if parts.port is not None:
            shown = f"{shown}:{port}"
        return Target(url=urlunsplit((parts.scheme, shown, path, query, "")), scheme=parts.scheme, host=host, port=port)

    async def resolve(self, target: Target) -> tuple[str, ...]:
        """The addresses to dial, all of them checked.

        Raises:
            ToolFailure: `blocked` if one of them may not be reached, `not_found` if there is none, `timeout`.
        """
        if _address(target.host) is not None:
            answers: Sequence[str] = (target.host,)
        else:
            try:
                async with asyncio.timeout(RESOLVE_S):
                    answers = await self.resolver(target.host)
            except TimeoutError:
                raise ToolFailure(f"the name {target.host} took too long to resolve", ToolErrorKind.TIMEOUT) from None
            except (OSError, UnicodeError):
                answers = ()
        if not answers:
            raise ToolFailure(f"there is no host {target.host}", ToolErrorKind.NOT_FOUND)
        if not all(self.is_open(answer, target.port) for answer in answers):
            # The address itself is not told: names of an internal network would be a map of it.
            raise ToolFailure(f"{target.host} is not on the public web", ToolErrorKind.BLOCKED)
        return tuple(answers)

    def is_open(self, address: str, port: int) -> bool:
        """Whether an address may be dialled at a port."""
        found = _address(address)
        if found is None:
            return False
        opened = any(
            found in entry.network and port in ((entry.port,) if entry.port is not None else self.ports)
            for entry in self._open
            if found.version == entry.network.version
        )
        return opened or (port in self.ports and is_public(found) and not is_ours(found, port))


def is_ours(address: IPv4Address | IPv6Address, port: int) -> bool:
    """Whether an address is one of this machine's own: what listens on all of them is not for pages to reach, under a
    public address neither. Nothing is sent: connecting a UDP socket only asks which address we would send from."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((str(address), port))
            return ipaddress.ip_address(probe.getsockname()[0].partition("%")[0]) == address
    except OSError:
        return False  # no way there at all


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether an address is one of the public internet, by the tables above."""
    if isinstance(address, IPv6Address):
        if address.scope_id is not None:
            return False
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address in NAT64:
            return is_public(IPv4Address(int(address) & 0xFFFFFFFF))
        return address in OPEN_IPV6 and not any(address in network for network in CLOSED_IPV6)
    return not any(address in network for network in CLOSED_IPV4)


def _address(text: str) -> IPv4Address | IPv6Address | None:
    """None for a name. Only the plain notations: four decimal numbers, or IPv6."""
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _ascii_host(host: str) -> str:
    """
    Raises:
        ValueError: it is no host name and no plain address: `0x7f.1`, `2130706433`, a zone, a label that is too long.
    """
    if ":" in host:
        if "%" in host or _address(host) is None:
            raise ValueError("this is no IPv6 address")
        return str(ipaddress.IPv6Address(host))
    host = host.removesuffix(".")
    try:
        host = host.encode("idna").decode("ascii").lower()
    except UnicodeError:
        raise ValueError("the host is no domain name") from None
    labels = host.split(".")
    if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError("the host is no domain name")
    # Browsers and resolvers read a host whose last label is a number as an IPv4 address, in odd notations too.
    if _NUMERIC.fullmatch(labels[-1]) and _address(host) is None:
        raise ValueError("the host is a number")
    return host


def _matches(entry: str, host: str, path: str) -> bool:
    domain, slash, prefix = entry.partition("/")
    domain = domain.lower().strip(".")
    if host != domain and not host.endswith(f".{domain}"):
        return False
    return not slash or _plain_path(path).startswith(_plain_path(f"/{prefix}"))


def _named(entry: str, path: str, query: str) -> bool:
    return "/" in entry and any(f"/{entry}".rstrip("/").casefold() in _plain_path(text) for text in (path, query))


def _plain_path(path: str) -> str:
    """As servers read it: without escapes, doubled slashes, dots and case."""
    for _ in range(3):
        path = unquote(path)
    kept: list[str] = []
    for part in path.replace("\\", "/").split("/"):
        if part == "..":
            kept = kept[:-1]
        elif part not in ("", "."):
            kept.append(part.casefold())
    return "/" + "/".join(kept)


def _read_open(text: str) -> _Open:
    match = re.fullmatch(
        r"(?:\[([0-9a-fA-F:.]+(?:/\d+)?)\]|([0-9.]+(?:/\d+)?)|([0-9a-fA-F:.]+(?:/\d+)?))(?::(\d+))?", text
    )
    # Without brackets an IPv6 address has no port: what looks like one is its end.
    bare = None if match is None else match.group(1) or match.group(2)
    port = None if match is None or match.group(4) is None else int(match.group(4))
    if bare is None:
        bare, port = text, None
    try:
        network = ipaddress.ip_network(bare, strict=False)
    except ValueError:
        network = None
    if network is None or (port is not None and not 1 <= port <= 65535):
        raise ValueError(f"open_addresses: {text!r} is no address: wanted 10.1.0.0/16, 127.0.0.1:8000 or [::1]:8000")
    return _Open(network, port)
