"""One run on several processes, as ``torchrun`` or ``accelerate launch`` start it, on one machine or more.

Every process holds the same adapter and takes its share of each step's images; their gradients are added up by hand
and not by DDP: adapters are small, and no process can hang another by having no image, or nothing at all, in a step.
The base is whole in each process, or, where accelerate's settings ask for FSDP2, its layers are kept in pieces.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs

from vlm_lora.errors import ConfigError, TrainingError, VlmLoraError

T = TypeVar("T")

LOADING = timedelta(hours=2)
"""How long processes wait for each other until the first step: machines may download the base at different speed."""

STEP = timedelta(minutes=5)
"""How long from then on. A process that dies is noticed at once; this is for a machine that is gone without a word."""


def require_possible(method: str, settings: Mapping[str, str]) -> bool:
    """Whether the base is to be sharded, by accelerate's environment variables.

    Raises:
        ConfigError: they ask for what is not done here; going on would be something else than was asked for.
    """

    def on(name: str) -> bool:
        return settings.get(name, "false").lower() in ("true", "1")

    def given(name: str, neutral: str) -> str | None:
        value = settings.get(name, "").lower()
        return value if value not in ("", neutral) else None

    for engine in ("DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if on(f"ACCELERATE_USE_{engine}"):
            raise ConfigError(
                f"accelerate is set to {engine.lower()}, which is not used here. Take plain multi-GPU, or, where the "
                "base is larger than a GPU, FSDP2: accelerate launch --use_fsdp --fsdp_version 2."
            )
    if given("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1"):
        raise ConfigError(
            "accelerate is set to accumulate gradients; here a step is --batch-size answers over all processes, in "
            "as many passes of --micro-batch-tokens as it takes. Leave accelerate's setting at 1."
        )
    if precision := given("ACCELERATE_MIXED_PRECISION", "no"):
        raise ConfigError(
            f"accelerate is set to {precision}; give the number format with --dtype "
            "(bfloat16, float16 or float32), and leave accelerate's mixed precision at no."
        )
    if compiler := given("ACCELERATE_DYNAMO_BACKEND", "no"):
        raise ConfigError(
            f"accelerate is set to compile with {compiler}, which is not done here: leave its dynamo backend at no. "
            "What makes steps faster is --dtype bfloat16 and a larger --micro-batch-tokens."
        )
    if not on("ACCELERATE_USE_FSDP"):
        return False
    if settings.get("FSDP_VERSION", "1") != "2":
        raise ConfigError("accelerate is set to FSDP version 1; give --fsdp_version 2.")
    if on("FSDP_OFFLOAD_PARAMS"):
        raise ConfigError("accelerate is set to offload weights to main memory, which is not done here: leave it off.")
    if on("FSDP_ACTIVATION_CHECKPOINTING"):
        raise ConfigError(
            "accelerate is set to FSDP's activation checkpointing; give --gradient-checkpointing instead, and leave "
            "accelerate's setting off."
        )
    if given("FSDP_RESHARD_AFTER_FORWARD", "true"):
        raise ConfigError(
            "accelerate is set to keep layers whole after the forward pass, which is not done here: leave "
            "--fsdp_reshard_after_forward at true. Where the base fits on each GPU, leave out FSDP: that is faster."
        )
    require_shardable(method)
    return True


def require_shardable(method: str) -> None:
    """Raises `ConfigError` if FSDP2 cannot keep this method's base in pieces."""
    if method == "qlora":
        raise ConfigError(
            "--method qlora does not go with FSDP2: four-bit weights cannot be sharded. Leave out FSDP (each GPU then "
            "holds the four-bit base whole), or take --method lora."
        )


class Processes:
    """The processes of this run; a run of one has no partner, and nothing here then costs anything.

    Attributes:
        index, count: this process among all, from 0.
        device: where this process computes.
        sharded: whether the base's layers are kept in pieces, so that all must make the same passes.
    """

    def __init__(self, method: str, **settings: Any):
        """``settings`` are further ones of `Accelerator`."""
        wants_shards = require_possible(method, os.environ)
        launched, here = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        machine = torch.accelerator.current_accelerator(check_available=True)
        on_cpu = launched > 1 and (machine is None or machine.type == "mps")  # accelerate would start strangers
        if launched > 1 and not on_cpu and here > torch.accelerator.device_count():
            raise ConfigError(
                f"{here} processes were started on a machine with {torch.accelerator.device_count()} GPUs; start one "
                "for each: torchrun --nproc-per-node."
            )
        timeout = InitProcessGroupKwargs(timeout=LOADING)
        self.accelerator = Accelerator(cpu=on_cpu, kwargs_handlers=[timeout], **settings)
        self.index: int = self.accelerator.process_index
        self.count: int = self.accelerator.num_processes
        self.device = self.accelerator.device
        self.sharded = wants_shards and self.count > 1
        group = dist.new_group(timeout=STEP) if self.count > 1 else None
        self.group = group if isinstance(group, dist.ProcessGroup) else None
        self._loading = True

    @property
    def is_main(self) -> bool:
        """This is the one that writes."""
        return self.index == 0

    def begin_steps(self) -> None:
        """From here on none waits for another longer than `STEP`: all have loaded what they need."""
        self._loading = False

    def end_steps(self) -> None:
        """From here on they wait for each other as long as before the steps: their answers may take unlike time."""
        self._loading = True

    def on_main(self, work: Callable[[], T]) -> T:
        """What ``work`` gives in the main process, in all of them; its `VlmLoraError` is raised in all too."""
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = work()
            except VlmLoraError as error:
                outcome[1] = error
        if self.count > 1:
            self._together(dist.broadcast_object_list, outcome, src=0, group=self._patient_group)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def gather(self, part: T) -> list[T]:
        """Every process's ``part``, in their order."""
        parts = [part] * self.count
        if self.count > 1:
            self._together(dist.all_gather_object, parts, part, group=self._patient_group)
        return parts

    def require_same(self, what: dict[str, Any]) -> None:
        """Raises `TrainingError` unless all processes have the same: one with other data would learn in silence."""
        for index, other in enumerate(self.gather(what)):
            different = [key for key in what if what[key] != other[key]]
            if different:
                key = different[0]
                raise TrainingError(
                    f"Process {index} has {key} {other[key]!r}, process {self.index} {what[key]!r}. All machines of a "
                    "run need the same data, settings and base."
                )

    def add_up(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The sum of each tensor over all processes, in one message."""
        if self.count == 1:
            return list(tensors)
        wide = torch.promote_types(torch.float32, max((t.dtype for t in tensors), key=lambda d: d.itemsize))
        flat = torch.cat([tensor.detach().to(wide).flatten() for tensor in tensors])
        self._together(dist.all_reduce, flat, group=self.group)
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [p.view(t.shape).to(t.dtype) for p, t in zip(parts, tensors, strict=True)]

    def highest(self, number: int) -> int:
        """The highest of all processes' numbers."""
        if self.count == 1:
            return int(number)
        shared = torch.tensor(int(number), device=self.device)
        self._together(dist.all_reduce, shared, op=dist.ReduceOp.MAX, group=self.group)
        return int(shared)

    def copy_from_main(self, tensors: Sequence[torch.Tensor]) -> None:
        """Give every tensor the main process's values, in place."""
        for tensor in tensors if self.count > 1 else ():
            self._together(dist.broadcast, tensor.detach(), src=0, group=self.group)

    def leave(self) -> None:
        """Part from the others; the run's last word to them."""
        if dist.is_initialized():
            dist.destroy_process_group()

    @property
    def _patient_group(self) -> dist.ProcessGroup | None:
        return None if self._loading else self.group  # None is the one of all that accelerate made

    def _together(self, exchange: Callable, *arguments: Any, **options: Any) -> None:
        with self.connected():
            exchange(*arguments, **options)

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Inside, what goes wrong between processes is one clear line; any other error stays what it is."""
        try:
            yield
        except RuntimeError as error:
            if not (isinstance(error, dist.DistError) or "gloo" in str(error).lower()):
                raise  # gloo's errors have no class of their own, but name its source file
            raise TrainingError(
                f"Process {self.index} of {self.count} lost the others: one has ended, and its own message says why "
                f"({' '.join(str(error).split())[:160]}). Start again, a training with --resume."
            ) from error
