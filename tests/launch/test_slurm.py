"""launch/slurm/stage.sbatch with SLURM's commands replaced: what it starts, when it starts again, when it requeues."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "slurm" / "stage.sbatch"
LAUNCH = "accelerate launch --config_file launch/multi_node.yaml --rdzv_backend c10d -m rlhf ppo x.yaml steps=2"

# Every stub writes its name and arguments to `calls`. srun ends with the next line of `codes`; `wait` is a step that
# runs until it gets a TERM, as an agent does that shuts its processes down.
STUBS = {
    "python": 'exit "${DRY_RUN_CODE:-0}"',
    "scontrol": '[[ "$1 $2" != "show hostnames" ]] || printf "node7\\nnode8\\n"',
    "scancel": 'kill -TERM "$(cat step)"',
    "srun": """
env | grep -E '^PET_' | sort >>environment
code=$(sed -n "$(grep -c ^srun calls)p" codes)
[[ $code == wait ]] || exit "$code"
trap 'exit "${STEP_CODE:-1}"' TERM
echo $$ >step.new && mv step.new step
while true; do sleep 0.01; done""",
}


@dataclass
class Job:
    """One run of the script: its folder, its process."""

    folder: Path
    process: subprocess.Popen[str]

    def end(self) -> int:
        self.process.communicate(timeout=60)
        return self.process.returncode

    def signal_in_the_step(self, number: signal.Signals) -> None:
        while not (self.folder / "step").exists():
            assert self.process.poll() is None
            time.sleep(0.01)
        self.process.send_signal(number)

    def calls(self, name: str) -> list[str]:
        lines = (self.folder / "calls").read_text().splitlines()
        return [line.removeprefix(f"{name} ") for line in lines if line.startswith(f"{name} ")]


@pytest.fixture
def submit(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """`submit(["1", "0"])`: the job of which the first step fails and the second succeeds."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash")
    (tmp_path / "bin").mkdir()
    for name, body in STUBS.items():
        stub = tmp_path / "bin" / name
        stub.write_text(f'#!{bash}\necho "{name} $*" >>calls\n{body}\n', encoding="utf-8")
        stub.chmod(0o755)
    started = []

    def start(codes: list[str], *arguments: str, **environment: str) -> Job:
        (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes), encoding="utf-8")
        (tmp_path / "calls").touch()
        path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
        job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2"}
        command = [bash, str(SCRIPT), *(arguments or ("ppo", "x.yaml", "steps=2"))]
        env = {**os.environ, **job, "PATH": path, **environment}
        # A session of its own: what a failed test leaves behind can be ended as a whole.
        options = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        started.append(Job(tmp_path, subprocess.Popen(command, cwd=tmp_path, env=env, **options)))
        return started[-1]

    yield start
    for job in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.process.pid, signal.SIGKILL)


def test_one_agent_per_node_meets_on_the_first(submit: Callable[..., Job]) -> None:
    job = submit(["0"])
    assert job.end() == 0
    assert job.calls("python") == ["-m rlhf ppo x.yaml steps=2 --dry-run"]
    assert job.calls("srun") == [f"--kill-on-bad-exit=1 --cpu-bind=none {LAUNCH}"]
    assert (job.folder / "environment").read_text().splitlines() == [
        "PET_NNODES=2",
        "PET_RDZV_ENDPOINT=node7:24711",
        "PET_RDZV_ID=4711.0.0",
        "PET_SHUTDOWN_TIMEOUT=300",
    ]
    assert job.calls("scontrol") == ["show hostnames node[7-8]"]


def test_another_launch_file_can_be_named(submit: Callable[..., Job]) -> None:
    job = submit(["0"], LAUNCH="launch/zero3.yaml")
    assert job.end() == 0
    assert "--config_file launch/zero3.yaml " in job.calls("srun")[0]


def test_a_failed_step_is_started_again_in_a_new_meeting(submit: Callable[..., Job]) -> None:
    job = submit(["1", "137", "0"])
    assert job.end() == 0
    assert len(job.calls("srun")) == 3
    meetings = [line for line in (job.folder / "environment").read_text().splitlines() if "RDZV_ID" in line]
    assert meetings == [f"PET_RDZV_ID=4711.0.{i}" for i in range(3)]
    assert "requeue 4711" not in job.calls("scontrol")


def test_a_step_that_keeps_failing_ends_the_job_with_its_code(submit: Callable[..., Job]) -> None:
    job = submit(["1", "1", "9"], RESTARTS="2")
    assert job.end() == 9
    assert len(job.calls("srun")) == 3
    assert "requeue 4711" not in job.calls("scontrol")


def test_before_preemption_the_step_gets_a_term_and_the_job_is_queued_again(submit: Callable[..., Job]) -> None:
    job = submit(["wait"])
    job.signal_in_the_step(signal.SIGUSR1)
    assert job.end() == 0
    assert job.calls("scancel") == ["--signal=TERM 4711"]
    assert len(job.calls("srun")) == 1
    assert job.calls("scontrol")[-1] == "requeue 4711"


def test_a_stage_that_was_finished_when_the_signal_came_is_not_queued_again(submit: Callable[..., Job]) -> None:
    job = submit(["wait"], STEP_CODE="0")
    job.signal_in_the_step(signal.SIGUSR1)
    assert job.end() == 0
    assert "requeue 4711" not in job.calls("scontrol")


def test_a_cancelled_job_waits_for_its_step_and_stays_away(submit: Callable[..., Job]) -> None:
    job = submit(["wait"], STEP_CODE="5")
    job.signal_in_the_step(signal.SIGTERM)
    time.sleep(0.1)  # so that the script would have ended by now, did it not wait
    assert job.process.poll() is None
    os.kill(int((job.folder / "step").read_text()), signal.SIGTERM)  # SLURM signals the step's processes itself
    assert job.end() == 5
    assert len(job.calls("srun")) == 1
    assert job.calls("scancel") == []
    assert "requeue 4711" not in job.calls("scontrol")


def test_a_refused_configuration_starts_nothing_and_is_not_queued_again(submit: Callable[..., Job]) -> None:
    job = submit(["0"], DRY_RUN_CODE="2")
    assert job.end() == 2
    assert job.calls("srun") == job.calls("scontrol") == []


@pytest.mark.parametrize("arguments", [("ppo",), ("pipeline", "x.yaml")])
def test_a_wrong_call_is_told_the_right_one(submit: Callable[..., Job], arguments: tuple[str, ...]) -> None:
    job = submit(["0"], *arguments)
    _, said = job.process.communicate(timeout=60)
    assert job.process.returncode == 2
    assert "sbatch launch/slurm/stage.sbatch STAGE CONFIG" in said
    assert job.calls("python") == []
