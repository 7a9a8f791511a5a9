"""`rlhf label serve`: the labeling app as a web server, one process."""

from __future__ import annotations

import errno
import signal
import socket
import sys

import uvicorn

from reward_model.labeling import accounts
from reward_model.labeling.app import make_app
from reward_model.labeling.links import note_of, url_of
from reward_model.labeling.security import check_bind
from reward_model.labeling.store import LabelStore
from rlhf.config_labeling import LabelingStage, ServeConfig
from rlhf.errors import ConfigError

GRACE_SECONDS = 10
"""Requests that run when the server is told to stop may take so long to end."""

KEEP_ALIVE_SECONDS = 75
"""A connection stays open over an annotator's thoughts: another one would cost a round trip, and two more for TLS."""

_BIND_FIXES = {
    errno.EADDRINUSE: "stop what listens there, or choose another one: serve.port=8421",
    errno.EACCES: "ports below 1024 need rights that this user lacks; choose another one: serve.port=8420",
    errno.EADDRNOTAVAIL: "serve.host must be an address of this machine, 0.0.0.0 or 127.0.0.1",
}


def main(cfg: LabelingStage) -> None:
    """Serve until SIGINT or SIGTERM; running requests are finished, then the database is closed.

    Raises:
        ConfigError: the address cannot be had, or would be open to others without accounts.
    """
    check_bind(cfg.serve)
    # Annotators' requests let go of the interpreter dozens of times each; behind figures that are being computed they
    # would wait for 5 ms every time.
    sys.setswitchinterval(0.0005)
    with listen(cfg.serve) as listener, LabelStore.open(cfg) as store:
        url = url_of(cfg.serve, listener.getsockname()[1])
        server = uvicorn.Server(server_config(make_app(store, cfg), cfg.serve))
        # uvicorn stops at the signal, then raises it again; without a handler it would kill us before the store closes.
        signal.signal(signal.SIGTERM, lambda *_: None)
        print(f"labeling at {url} (stop with Ctrl-C)", flush=True)
        if cfg.serve.accounts and not accounts.has_admin(store):
            token = accounts.first_admin_invite(store)
            print(f"nobody is an admin yet; the first one's invite: {url}/invite/{token}", flush=True)
        if cfg.serve.accounts and (note := note_of(cfg.serve, url)):
            print(note, flush=True)
        server.run(sockets=[listener])


def server_config(app: object, serve: ServeConfig) -> uvicorn.Config:
    """No access log, since paths hold invites; a proxy's word on the client is believed where there is a proxy."""
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        proxy_headers=serve.public_url is not None,
        timeout_graceful_shutdown=GRACE_SECONDS,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
    )


def listen(serve: ServeConfig) -> socket.socket:
    """A socket that listens at the configured address.

    Raises:
        ConfigError: somebody else does, it is none of ours, or it is forbidden.
    """
    host = "127.0.0.1" if serve.host == "localhost" else serve.host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        both = host == "::" and socket.has_dualstack_ipv6()
        return socket.create_server((host, serve.port), family=family, backlog=2048, dualstack_ipv6=both)
    except OSError as error:
        fix = _BIND_FIXES.get(error.errno or 0, "check serve.host and serve.port")
        reason = str(error.strerror).partition(" (while")[0]  # Python names the address there, which we do too
        raise ConfigError(f"cannot listen at {serve.host} port {serve.port}: {reason}", fix=fix) from None
