"""Images from the web, for `--allow-urls`: of public addresses only, within a size and a time.

Data may be anyone's: a row must not make us ask `http://169.254.169.254/` or a host inside of the reader's network.
Every address that a name resolves to is looked at, and the connection goes to one that was: no second look-up can
give another. The same again behind each redirect. Proxies of the environment are not used.
"""

import http.client
import ipaddress
import socket
import ssl
import tempfile
import threading
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from urllib.parse import quote, urljoin, urlsplit

from vlm_lora import __version__
from vlm_lora.data.example import FilePart, ImageRef
from vlm_lora.data.images import content_hash
from vlm_lora.errors import DataError

MAX_BYTES = 64 << 20
MAX_SECONDS = 30.0
"""For one image in all, redirects included."""
MAX_REDIRECTS = 5
NAT64 = ipaddress.ip_network("64:ff9b::/96")
"""Where a network of IPv6 alone has all addresses of IPv4."""
NOT_PUBLIC = tuple(
    ipaddress.ip_network(network)
    for network in ("168.63.129.16/32", "192.0.0.0/24", "192.88.99.0/24", "64:ff9b:1::/48", "3fff::/20", "5f00::/16")
)
"""What `is_global` of some Python lets pass: a cloud's own host, protocols, relays, examples."""


def fetch_image(url: str) -> ImageRef:
    """Download an image. Raises DataError where it cannot or may not be had; what it is, `load_image` finds out."""
    asked, deadline = url, time.monotonic() + MAX_SECONDS
    try:
        for _ in range(MAX_REDIRECTS + 1):
            found = _get(url, deadline)
            if isinstance(found, bytes):
                return keep(found, asked)
            url = urljoin(url, found)
        raise DataError(f"it leads on more than {MAX_REDIRECTS} times")
    except (DataError, OSError, http.client.HTTPException, ValueError) as error:
        late = time.monotonic() > deadline
        reason = f"it took longer than {MAX_SECONDS:g} seconds" if late else str(error) or type(error).__name__
        raise DataError(
            f"{asked[:200]!r} cannot be fetched: {reason}; download it yourself, or remove the row"
        ) from None


def keep(data: bytes, name: str) -> ImageRef:
    """The bytes in a temporary file that all fetched images share and that ends with the process."""
    file = _kept()
    offset = file.seek(0, 2)
    file.write(data)
    file.flush()
    path = Path(file.name)
    return ImageRef(path, name, len(data), content_hash(data), FilePart(path, name, offset, len(data)))


@cache
def _kept():
    return tempfile.NamedTemporaryFile(prefix="vlm-lora-", suffix=".images")


def _get(url: str, deadline: float) -> bytes | str:
    """The body, or where a redirect leads."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise DataError(f"{url[:200]!r} is no http:// or https:// address")
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    host = parts.hostname.encode("idna").decode()
    wire = _connect((_public_address(host, port), port), max(0.01, deadline - time.monotonic()))
    if parts.scheme == "https":
        context = ssl.create_default_context()
        wire = context.wrap_socket(wire, server_hostname=host, do_handshake_on_connect=False)
    # The socket's own time limit starts anew with every byte that comes; this one ends the whole
    alarm = threading.Timer(max(0, deadline - time.monotonic()), _hang_up, (wire,))
    alarm.daemon = True
    alarm.start()
    try:
        if parts.scheme == "https":
            wire.do_handshake()
        connection = http.client.HTTPConnection(host, port)
        connection.sock = wire
        path = quote((parts.path or "/") + (f"?{parts.query}" if parts.query else ""), safe="/?%:@!$&'()*+,;=~")
        headers = {"User-Agent": f"vlm-lora/{__version__}", "Accept": "image/*", "Accept-Encoding": "identity"}
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        if response.status in (301, 302, 303, 307, 308) and response.headers["Location"]:
            return response.headers["Location"]
        if response.status != 200:
            raise DataError(f"the server answered {response.status} {response.reason[:100]}")
        data = response.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise DataError(f"it has more than {MAX_BYTES:,} bytes")
        if response.length or time.monotonic() > deadline:
            raise DataError("it was cut off")
        return data
    finally:
        alarm.cancel()
        wire.close()


def _hang_up(wire: socket.socket) -> None:
    with suppress(OSError):  # it has ended in this very moment
        socket.socket.shutdown(wire, socket.SHUT_RDWR)


def _public_address(host: str, port: int) -> str:
    """An address of the host. Raises DataError if any of them is not public: an honest name has no such one."""
    addresses = [ipaddress.ip_address(address.partition("%")[0]) for address in _resolve(host, port)]
    for address in addresses:
        if not _is_public(address):
            raise DataError(f"{host} is {address}, which is no public address")
    return str(addresses[0])


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if address.version == 6:
        if address in NAT64:
            return _is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if address.sixtofour or address.teredo or address.is_site_local:
            return False
    if any(address in network for network in NOT_PUBLIC):
        return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def _resolve(host: str, port: int) -> list[str]:
    return [found[4][0] for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def _connect(address: tuple[str, int], timeout: float) -> socket.socket:
    return socket.create_connection(address, timeout)
