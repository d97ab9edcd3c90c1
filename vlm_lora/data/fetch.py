"""Images from the web, for `--allow-urls`: of public addresses only, within a size and a time.

Data may be anyone's: a row must not make us ask `http://169.254.169.254/` or a host inside of the reader's network.
Every address that a name resolves to is looked at, and the connection goes to one that was: no second look-up can
give another. The same again after each redirect. Proxies of the environment are not used.
"""

import ipaddress
import socket
import ssl
import tempfile
import time
from functools import cache
from pathlib import Path
from urllib.parse import quote, urljoin, urlsplit

import httpcore

from vlm_lora.data.example import FilePart, ImageRef
from vlm_lora.data.images import content_hash
from vlm_lora.errors import DataError
from vlm_lora.version import __version__

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
FAILURES = (OSError, ValueError, httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError)


def fetch_image(url: str) -> ImageRef:
    """Download an image. Raises DataError where it cannot or may not be had; what it is, `load_image` finds out."""
    asked, deadline = url, time.monotonic() + MAX_SECONDS
    try:
        for _ in range(MAX_REDIRECTS + 1):
            answer = _get(url, deadline)
            if isinstance(answer, bytes):
                return keep(answer, asked)
            url = urljoin(url, answer)
        raise DataError(f"it leads on more than {MAX_REDIRECTS} times")
    except (DataError, *FAILURES) as error:
        late = time.monotonic() > deadline
        reason = f"it took longer than {MAX_SECONDS:g} seconds" if late else str(error) or type(error).__name__
        raise DataError(
            f"{asked[:200]!r} cannot be fetched: {reason}; download it yourself, or remove the row"
        ) from None


def keep(data: bytes, name: str) -> ImageRef:
    """The image as bytes in a temporary file, which all fetched images share and which ends with the process."""
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
    scheme, host = parts.scheme.encode(), parts.hostname.encode("idna")
    path = quote((parts.path or "/") + (f"?{parts.query}" if parts.query else ""), safe="/?%:@!$&'()*+,;=~")
    target = httpcore.URL(scheme=scheme, host=host, port=parts.port, target=path.encode())
    headers = {"User-Agent": f"vlm-lora/{__version__}", "Accept": "image/*", "Accept-Encoding": "identity"}
    context, network = ssl.create_default_context(), _PublicNetwork(deadline)
    with (
        httpcore.HTTPConnection(target.origin, context, network_backend=network) as connection,
        connection.stream("GET", target, headers=list(headers.items())) as response,
    ):
        locations = [value for name, value in response.headers if name.lower() == b"location"]
        if response.status in (301, 302, 303, 307, 308) and locations:
            return locations[0].decode("latin-1")
        if response.status != 200:
            reason = response.extensions["reason_phrase"].decode("latin-1")[:100]
            raise DataError(f"the server answered {response.status} {reason}")
        data = bytearray()
        try:
            for part in response.iter_stream():
                data += part
                if len(data) > MAX_BYTES:
                    raise DataError(f"it has more than {MAX_BYTES:,} bytes")
        except httpcore.RemoteProtocolError:
            raise DataError("it was cut off") from None
        return bytes(data)


class _PublicNetwork(httpcore.NetworkBackend):
    """Connects to an address of the host that was looked at."""

    def __init__(self, deadline: float):
        self.deadline = deadline

    def connect_tcp(self, host, port, timeout=None, local_address=None, socket_options=None):
        stream = httpcore.SyncBackend().connect_tcp(_public_address(host, port), port, _left(self.deadline))
        return _Stream(stream, self.deadline)


class _Stream(httpcore.NetworkStream):
    """A connection with one limit for all of it: a socket's own starts anew with every byte that comes."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: float):
        self.stream, self.deadline = stream, deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self.stream.read(max_bytes, _left(self.deadline))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self.stream.write(buffer, _left(self.deadline))

    def start_tls(self, ssl_context, server_hostname=None, timeout=None):
        return _Stream(self.stream.start_tls(ssl_context, server_hostname, _left(self.deadline)), self.deadline)

    def close(self) -> None:
        self.stream.close()


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


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
    return [str(address[0]) for *_, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
