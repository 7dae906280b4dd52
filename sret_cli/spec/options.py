"""How and where a run is executed; this does not change its results or its id."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RunOptions:
    """Device, processes, checkpoints and measurements of a command.

    Attributes:
        device: auto, cpu, cuda or cuda:N.
        workers: processes that load images; None: one for each core, at most 8.
        gpu_memory: memory budget in bytes, for `recompute = "auto"` and predictions.
        checkpoint_every_steps: also write a checkpoint after this many steps.
        checkpoint_minutes: also write a checkpoint this many minutes after the last one; 0: off.
        tensorboard: also write metrics for TensorBoard.
        shard: whether each of several processes holds only a part of the weights (FSDP).
        measure_batch_size: images of a timed step; None: nothing is timed.
        precision: fp32 or bf16, for what is timed.
        compiles: the mode of `compile_model` for what is timed: off, on or auto.
        full_trace: whether costs are traced over every pass instead of each distinct one.
        retry: which runs of earlier commands are done again: "failed", "lost".
        began_at: when the command began, in UTC; only runs from before it are done again.
        fail_fast: whether the first run that fails ends the command.
    """

    device: str = "auto"
    workers: int | None = None
    gpu_memory: int | None = None
    checkpoint_every_steps: int | None = None
    checkpoint_minutes: float = 10.0
    tensorboard: bool = False
    shard: bool = False
    measure_batch_size: int | None = None
    precision: str = "fp32"
    compiles: str = "off"
    full_trace: bool = False
    retry: tuple[str, ...] = ()
    began_at: str = ""
    fail_fast: bool = False
