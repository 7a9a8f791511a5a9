"""A PostgreSQL server of the tests' own, in a folder that goes with it. It listens on a Unix socket alone."""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from sqlalchemy import URL, create_engine, text
from sqlalchemy.exc import OperationalError


def binaries() -> Path | None:
    """The folder of `initdb` and `postgres`, the newest one; None where PostgreSQL is not installed."""
    found = [*Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    found.sort(key=lambda path: [int(part) for part in path.parts[4].split(".") if part.isdigit()])
    on_path = shutil.which("initdb")
    return found[-1].parent if found else Path(on_path).parent if on_path else None


class PostgresServer:
    """A running server; a context manager.

    Args:
        durable: every commit waits for the disk; false: as fast as it goes, for tests that do not cut the power.
    """

    def __init__(self, *, durable: bool = False) -> None:
        folder = binaries()
        assert folder is not None, "PostgreSQL is not installed"
        self._folder = Path(tempfile.mkdtemp(prefix="pg-"))
        self._numbers = itertools.count()
        # PostgreSQL refuses to run as root.
        self._as: dict[str, Any] = {}
        if os.geteuid() == 0:
            user = pwd.getpwnam("nobody")
            os.chown(self._folder, user.pw_uid, user.pw_gid)
            self._as = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        options = ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync"]
        self._run(folder / "initdb", f"--pgdata={self._folder}/data", *options)
        settings = {"listen_addresses": "", "unix_socket_directories": str(self._folder), "max_connections": "200"}
        if not durable:
            settings |= {"fsync": "off", "full_page_writes": "off"}
        command = [str(folder / "postgres"), "-D", f"{self._folder}/data"]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        self._log = (self._folder / "log").open("wb")
        self._process = subprocess.Popen(
            command, stdout=self._log, stderr=self._log, cwd=self._folder, env=_ENVIRONMENT, **self._as
        )
        self._wait()

    def __enter__(self) -> PostgresServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def _run(self, *command: str | Path) -> None:
        done = subprocess.run(
            [*map(str, command)], capture_output=True, text=True, cwd=self._folder, env=_ENVIRONMENT, **self._as
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def _wait(self, timeout: float = 60) -> None:
        end = time.monotonic() + timeout
        while True:
            assert self._process.poll() is None, (self._folder / "log").read_text()
            try:
                self._execute("SELECT 1")
            except OperationalError:
                assert time.monotonic() < end, (self._folder / "log").read_text()
                time.sleep(0.05)
            else:
                return

    def _url(self, **query: str) -> URL:
        return URL.create(
            "postgresql+psycopg", "postgres", database="postgres", query={"host": str(self._folder), **query}
        )

    def _execute(self, statement: str) -> None:
        engine = create_engine(self._url(), isolation_level="AUTOCOMMIT")
        try:
            with engine.connect() as connection:
                connection.execute(text(statement))
        finally:
            engine.dispose()

    def database(self) -> str:
        """A new place without tables, as the URL that a user would write; a schema, which costs a millisecond."""
        name = f"labels_{next(self._numbers)}"
        self._execute(f"CREATE SCHEMA {name}")
        url = self._url(options=f"-csearch_path={name}").set(drivername="postgresql")
        return url.render_as_string(hide_password=False)

    def stop(self) -> None:
        """Ends the server and removes its folder."""
        self._process.send_signal(signal.SIGINT)  # without waiting for clients
        self._process.wait(30)
        self._log.close()
        shutil.rmtree(self._folder, ignore_errors=True)


_ENVIRONMENT = {"PATH": os.environ.get("PATH", ""), "LC_ALL": "C", "TZ": "UTC"}
