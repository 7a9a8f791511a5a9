"""The only door to accelerate and DeepSpeed: processes, devices, gradients, global sums.

Everything that differs between one CPU, one GPU and many nodes is in this file, in `sharding.py` and in
`launch/*.yaml`.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.errors import ConfigError, InvariantError, MemoryLimitError
from rlhf.sharding import TrainState, gathered, make_whole

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Runtime:
    """One process of the run. `start` makes it; stages never name accelerate themselves."""

    def __init__(self, accelerator: Any, precision: str) -> None:
        self._accelerator = accelerator
        self._plugin: Any = getattr(accelerator.state, "deepspeed_plugin", None)  # transformers' trainer resets states
        self.precision = precision
        self.dtype = _DTYPES[precision]
        self.device: torch.device = accelerator.device
        self.rank: int = accelerator.process_index
        self.world_size: int = accelerator.num_processes
        self.is_main: bool = accelerator.is_main_process
        self.skipped_in_a_row = 0
        self.has_sigterm = False
        self._engines: dict[Any, Any] = {}  # module -> DeepSpeed's engine around it

    @classmethod
    def start(cls, *, seed: int, precision: str) -> Runtime:
        """Join the process group and seed every generator (rank r gets seed + r).

        Ranks that wait for another longer than `RLHF_TIMEOUT_S` seconds (1800) give up, and the launcher ends the job.

        Raises:
            ConfigError: `RLHF_TIMEOUT_S` is no number.
            InvariantError: the launcher started more processes than accelerate sees; each would train alone.
        """
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # what DeepSpeed would find, without its warning
        from accelerate import Accelerator, InitProcessGroupKwargs

        launched = int(os.environ.get("WORLD_SIZE", "1"))
        # accelerate with DeepSpeed on CPU believes that every rank is alone unless the backend is named.
        name_backend = launched > 1 and not torch.cuda.is_available()
        group = InitProcessGroupKwargs(timeout=_timeout(), **({"backend": "gloo"} if name_backend else {}))
        if launched > 1:
            _wait_no_longer_than(_timeout())
        # accelerate's launcher does not hand `use_cpu` on: unasked, every rank would train alone.
        on_cpu = name_backend and os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true"
        accelerator = Accelerator(cpu=on_cpu, kwargs_handlers=[group] if launched > 1 else [])
        alone = accelerator.num_processes != launched or (launched > 1 and accelerator.distributed_type.value == "NO")
        if alone:
            raise InvariantError(
                f"the launcher started {launched} processes, accelerate sees {accelerator.num_processes}",
                fix="start with `accelerate launch --config_file launch/<file>.yaml -m rlhf ...`",
            )
        if accelerator.device.type == "cpu":
            keep_freed_memory()
        runtime = cls(accelerator, precision)
        if runtime.uses_deepspeed:  # two lines for every exchange of weights, about names that DeepSpeed uses
            warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
        runtime.load_models_whole()
        random.seed(seed + runtime.rank)
        torch.manual_seed(seed + runtime.rank)
        return runtime

    def load_models_whole(self) -> None:
        """From now on models are read whole on every rank: under ZeRO-3 transformers would shard them as it reads."""
        if self.zero_stage == 3:
            from transformers.integrations.deepspeed import unset_hf_deepspeed_config

            unset_hf_deepspeed_config()

    # --- forward and backward -------------------------------------------------------------------------

    def autocast(self) -> Any:
        """Matrix products in bf16 when asked for; weights, norms and losses keep their own precision."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def prepare(
        self, module: nn.Module, optimizer: Any, *, micro_batch_size: int, max_grad_norm: float
    ) -> tuple[Any, Any]:
        """Wrap a trained module and its optimizer for this kind of run."""
        if self.uses_deepspeed:
            config = self._plugin.deepspeed_config
            config |= {"train_micro_batch_size_per_gpu": micro_batch_size, "gradient_clipping": max_grad_norm}
            # DeepSpeed turns an autocast around its forward off on GPUs; within, it is left alone.
            module.forward = self.autocast()(module.forward)
        wrapped, optimizer = self._accelerator.prepare(module, optimizer)
        self._engines |= {module: wrapped} if self.uses_deepspeed else {}
        return wrapped, optimizer

    def freeze(self, module: Any) -> Any:
        """A module for inference only: on the device, no gradients, dropout off."""
        return module.to(self.device).requires_grad_(False).eval()

    def shard(self, module: Any) -> Any:
        """A frozen module of which, under ZeRO-3, each rank keeps a part; its forwards then need all ranks.

        Returns:
            The module itself, which fetches weights when its submodules are called.
        """
        if self.zero_stage != 3:
            return module
        import deepspeed

        zero = self._plugin.deepspeed_config["zero_optimization"]
        config = {"zero_optimization": zero, "train_micro_batch_size_per_gpu": 1}
        self._engines[module], *_ = deepspeed.initialize(model=module, config=config)
        return module

    def train_state(self, module: Any, optimizer: Any) -> TrainState:
        """What changes while `module` (unwrapped) is trained, for checkpoints; `optimizer` as `prepare` gave it."""
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        zero = optimizer.optimizer if self.zero_stage else None
        inner = zero.optimizer if zero is not None else getattr(optimizer, "optimizer", optimizer)
        return TrainState(named, inner, zero, self.rank, self.world_size)

    @contextlib.contextmanager
    def gathered(self, parameters: Sequence[Any]) -> Iterator[None]:
        """Weights whole on every rank, to be read, where ZeRO-3 shards them; all ranks enter together."""
        with gathered(list(parameters)):
            yield

    def make_whole(self, module: Any, *, everywhere: bool = False) -> None:
        """End training and, under ZeRO-3, sharding of a module: rank 0, or every rank, gets the weights on its CPU.

        The other ranks are left with empty ones. All ranks call it.
        """
        if self.zero_stage == 3:
            make_whole(module, keep=everywhere or self.is_main)
            if engine := self._engines.pop(module, None):  # not transformers' own
                engine.destroy()

    def unwrap(self, module: Any) -> Any:
        """The module that `prepare` was given."""
        return self._accelerator.unwrap_model(module)

    @contextlib.contextmanager
    def accumulate(self, module: Any, *, last: bool) -> Iterator[None]:
        """Ranks exchange gradients only in the last micro-batch of an optimizer step."""
        self._accelerator.gradient_state._set_sync_gradients(last)
        no_sync = getattr(module, "no_sync", None)
        is_ddp = isinstance(module, nn.parallel.DistributedDataParallel)
        with contextlib.nullcontext() if last or not is_ddp or no_sync is None else no_sync():
            yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, which the caller has already divided (denominator rule)."""
        self._accelerator.backward(loss)

    def step(self, module: Any, optimizer: Any, *, max_grad_norm: float) -> float:
        """One clip of the global gradient norm, one optimizer step; returns the norm before the clip.

        A step whose norm is not finite is skipped on all ranks (they share the norm); the caller counts it.
        """
        norm = self._accelerator.clip_grad_norm_(module.parameters(), max_grad_norm)
        norm = float(norm) if norm is not None else float("nan")
        finite = math.isfinite(norm)
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if finite or self.uses_deepspeed:
            optimizer.step()
        optimizer.zero_grad()
        return norm

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's ZeRO stage; 0 without DeepSpeed."""
        return self._plugin.zero_stage if self.uses_deepspeed else 0

    @property
    def is_alone(self) -> bool:
        """One process without an engine around the module: a graph may wait while other forwards run."""
        return self.world_size == 1 and not self.uses_deepspeed

    @property
    def uses_deepspeed(self) -> bool:
        """Whether parameters or optimizer state may be sharded."""
        return self._plugin is not None

    # --- being asked to end ----------------------------------------------------------------------------

    @contextlib.contextmanager
    def minding_sigterm(self) -> Iterator[None]:
        """SIGTERM, what schedulers send before they take a machine away, only leaves a mark in here."""
        if threading.current_thread() is not threading.main_thread():  # only there a handler can be set
            yield
            return
        before = signal.signal(signal.SIGTERM, self._mark)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _mark(self, number: int, frame: Any) -> None:
        self.has_sigterm = True

    def is_asked_to_end(self) -> bool:
        """Whether any rank has got SIGTERM: the same answer on all of them."""
        return self.max(float(self.has_sigterm)) > 0

    # --- the device ------------------------------------------------------------------------------------

    def synchronize(self) -> None:
        """Wait until the device has done what it was told, so that a clock read now counts it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak_device_memory_gb(self) -> float | None:
        """Most memory that tensors took on the GPU so far, in 1e9 bytes; None on a CPU."""
        if self.device.type != "cuda":
            return None
        return round(torch.cuda.max_memory_allocated(self.device) / 1e9, 3)

    def in_step(self, parts: Sequence[Any], *, filler: Any) -> list[Any]:
        """`parts`, under ZeRO-3 with fillers behind them: ranks fetch weights together, in as many forwards."""
        count = int(self.max(len(parts))) if self.zero_stage == 3 else len(parts)
        return [*parts, *[filler] * (count - len(parts))]

    # --- talking to the other ranks -------------------------------------------------------------------

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over ranks."""
        return self._accelerator.reduce(values.to(self.device), reduction="sum")

    def max(self, value: float) -> float:
        """Largest value over ranks."""
        mine = torch.tensor([value], dtype=torch.float64, device=self.device)
        return float(self._accelerator.gather(mine).max())

    def gather_objects(self, values: list[Any]) -> list[Any]:
        """The ranks' lists joined, in rank order, on every rank."""
        if self.world_size == 1:
            return values
        gathered: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(gathered, values)
        return [value for part in gathered for value in part]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self._accelerator.wait_for_everyone()

    def denominator(self, action_tokens: int) -> float:
        """What a sum of losses over this rank's `action_tokens` of one optimizer step is divided by.

        Ranks average their gradients, and micro-batches add theirs, so dividing by (tokens of all ranks and
        micro-batches) / (number of ranks) makes the gradient the exact global token mean, whatever the split.
        """
        total = self.sum(torch.tensor([float(action_tokens)], dtype=torch.float64))
        return max(1.0, float(total)) / self.world_size


@contextlib.contextmanager
def explaining_memory(phase: str, fix: str) -> Iterator[None]:
    """What to do where torch or Python says that there is no memory left, on the CPU or on a GPU.

    Raises:
        MemoryLimitError: memory ran out in here.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        on_cpu = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
        if not on_cpu and not isinstance(error, torch.OutOfMemoryError):
            raise
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MemoryLimitError(f"out of memory in the phase {phase!r}: {said}", fix=fix) from error


def _timeout() -> timedelta:
    text = os.environ.get("RLHF_TIMEOUT_S", "1800")
    if not text.isdigit() or not int(text):
        raise ConfigError(f"RLHF_TIMEOUT_S is {text!r}, not a number of seconds", fix="unset it, or set e.g. 1800")
    return timedelta(seconds=int(text))


def _wait_no_longer_than(timeout: timedelta) -> None:
    """For groups of ranks that are made without a timeout, too, as DeepSpeed makes its own: torch's is 30 minutes."""
    from torch.distributed import distributed_c10d

    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        setattr(distributed_c10d, name, timeout)


def keep_freed_memory() -> None:
    """Tell glibc to reuse large freed blocks instead of handing them back to the kernel.

    On a CPU every activation and gradient is a fresh `mmap` by default, and the kernel clears each page anew:
    forward and backward of a 135M model on 2 cores take 1.3 times as long. Does nothing on other C libraries.
    """
    import ctypes

    m_trim_threshold, m_mmap_max = -1, -4  # <malloc.h>
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, -1)  # never
