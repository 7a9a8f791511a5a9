"""Jobs under the real launcher, and its processes, which faults are sent to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ON_CPU = {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "PET_LOCAL_ADDR": "127.0.0.1",
    "PYTHONUNBUFFERED": "1",
}


class Launched:
    """`accelerate launch --config_file launch/FILE OPTIONS -m rlhf ARGUMENTS`.

    Args:
        log: gets what launcher and ranks say.
    """

    def __init__(
        self, file: str, options: list[str], arguments: list[str], log: Path, environment: dict[str, str] | None = None
    ) -> None:
        start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"launch/{file}"]
        self.log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [*start, *options, "-m", "rlhf", *arguments],
                cwd=ROOT,
                env={**os.environ, **ON_CPU, **(environment or {})},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.pid = self._process.pid

    def wait_for(self, condition: Callable[[], bool], timeout: float = 300) -> None:
        """Until `condition` holds; an error when the job ends before, or `timeout` seconds pass."""
        end = time.monotonic() + timeout
        while not condition():
            assert self._process.poll() is None, self.said()
            assert time.monotonic() < end, self.said()
            time.sleep(0.01)

    def end(self, timeout: float = 400) -> int:
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the launcher still runs after {timeout} s:\n{self.said()}") from None
        finally:
            self.kill()

    def ranks(self) -> dict[int, int]:
        """Local rank -> process."""
        found = {}
        for pid in descendants(self.pid):
            with suppress(OSError):
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                found |= {int(entry[11:]): pid for entry in environment if entry.startswith(b"LOCAL_RANK=")}
        return found

    def send(self, number: signal.Signals) -> None:
        """To the launcher itself."""
        self._process.send_signal(number)

    def kill(self) -> None:
        """The launcher and all that it started, as when a machine is lost."""
        for pid in (*descendants(self.pid), self.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


def descendants(pid: int) -> list[int]:
    """Processes that a process started, and those that they did."""
    try:
        own = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [*own, *(below for child in own for below in descendants(child))]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
