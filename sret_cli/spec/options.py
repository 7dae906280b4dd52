"""How and where a run is done, which does not change its results and is no part of its id."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RunOptions:
    """Device, processes, checkpoints and measurements of a command.

    Attributes:
        device: auto, cpu, cuda or cuda:N.
        workers: processes that load images; one a core (at most 8) if None.
        gpu_memory: memory budget in bytes, for `recompute = "auto"` and predictions.
        checkpoint_every_steps: also write a checkpoint after this many steps.
        checkpoint_minutes: also write a checkpoint this many minutes after the last one; 0: never.
        tensorboard: also write metrics for TensorBoard.
        shard: whether each of several processes holds a shard of the weights (FSDP).
        measure_batch_size: images of a timed step; None where nothing is timed.
        precision: of what is timed: fp32 or bf16.
        compiles: whether passes are compiled for timing, as in `compile_model`.
        full_trace: whether costs are traced over every pass instead of each distinct one.
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
