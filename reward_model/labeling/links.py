"""What a link to the labeling server begins with, and for whom it works."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

from reward_model.labeling.security import is_loopback, origin_of
from rlhf.config_labeling import ServeConfig
from rlhf.errors import ConfigError


def url_of(serve: ServeConfig, port: int) -> str:
    """What to open in a browser; of a bind to all addresses the one that this machine has towards its network.

    A number and no name: `security.check_host` answers to numbers, and of names to that of `serve.public_url` alone.

    Raises:
        ConfigError: the port is 0, which stands for any free one.
    """
    if serve.public_url:
        return origin_of(serve.public_url)
    if port == 0:
        raise ConfigError(
            "serve.port is 0: the server takes any free port when it starts, so no link can be known before",
            fix="set serve.port to the port that the server prints, e.g. serve.port=8420, or set serve.public_url",
        )
    families = {"0.0.0.0": socket.AF_INET, "": socket.AF_INET, "::": socket.AF_INET6}
    host = serve.host.strip("[]")
    host = _own_address(families[host]) if host in families else host
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def note_of(serve: ServeConfig, url: str) -> str:
    """For whom a link works that begins with `url`; "" where the configuration says how browsers come."""
    if serve.public_url:
        return ""
    fix = "set serve.public_url to the address that they open"
    if is_loopback(urlsplit(url).hostname or ""):
        return f"links to {url} work on this machine alone; for others, {fix}"
    return f"if others cannot open {url}, {fix}"


def _own_address(family: socket.AddressFamily) -> str:
    """The address from which this machine sends to others; its loopback where it knows no way to them."""
    # Addresses for documentation. To connect a datagram socket asks for the route; nothing is sent.
    others, loopback = ("2001:db8::1", "::1") if family == socket.AF_INET6 else ("192.0.2.1", "127.0.0.1")
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as asking:
            asking.connect((others, 9))
            return asking.getsockname()[0]
    except OSError:
        return loopback
