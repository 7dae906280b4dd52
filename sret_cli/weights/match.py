"""Checks that tensors fit a model, and resamples position embeddings for another image size."""

from torch import Tensor, nn

from sret_cli.runtime.errors import CHECKPOINT, SretError
from sret_cli.spec.backbone import Spec
from sret_cli.weights.state_dicts import State

MAX_TABLE_LINES = 20


def load_state(model: nn.Module, tensors: State, where: str) -> None:
    """Loads a complete state dict into a model; `where` names its source in messages.

    Raises:
        SretError: it is of another model, or holds NaN or infinity.
    """
    state = model.state_dict()
    check_shapes(state, tensors, where)
    model.load_state_dict(cast_like(state, tensors, where))


def resample_pos_embed(pos_embed: Tensor, side: int) -> Tensor:
    """Position embeddings `[1, C, Y, X]` for a square of that side, by timm's bicubic function."""
    if pos_embed.shape[-2:] == (side, side):
        return pos_embed
    from timm.layers import resample_abs_pos_embed_nhwc

    resampled = resample_abs_pos_embed_nhwc(pos_embed.permute(0, 2, 3, 1), [side, side])
    return resampled.permute(0, 3, 1, 2).contiguous()


def with_fitted_pos_embed(tensors: dict[str, Tensor], spec: Spec) -> dict[str, Tensor]:
    """The state dict with position embeddings of the spec's image size; a timm model's as it is."""
    if spec.is_timm:
        return tensors
    found = tensors.get("pos_embed")
    if found is None or found.ndim != 4 or found.shape[:2] != (1, spec.embed_dims[0]):
        return tensors  # of another model, which `check_shapes` reports
    return {**tensors, "pos_embed": resample_pos_embed(found, spec.sides[0])}


def check_shapes(expected: State, found: State, where: str) -> None:
    """Refuses a state dict of another model.

    Raises:
        SretError: keys or shapes differ; the error's `table` lists them.
    """
    lines = []
    for key in (*expected, *(k for k in found if k not in expected)):
        needs, has = (tuple(s[key].shape) if key in s else None for s in (expected, found))
        if needs != has:
            what = "missing" if has is None else "unexpected" if needs is None else "misshapen"
            lines.append((key, what, *("–" if s is None else str(s) for s in (has, needs))))
    if not lines:
        return
    kinds = [
        (kind, sum(line[1] == kind for line in lines))
        for kind in ("missing", "unexpected", "misshapen")
    ]
    counts = ", ".join(f"{count:,} {kind}" for kind, count in kinds if count)
    key, _, has_shape, needs_shape = lines[0]
    hint = "; --reset-head gives it a fresh head" * all(
        line[0].startswith("head.") for line in lines
    )
    shown = [("Key", "Is", "Has the shape", "Needs"), *lines[:MAX_TABLE_LINES]]
    if len(lines) > MAX_TABLE_LINES:
        shown.append((f"… and {len(lines) - MAX_TABLE_LINES:,} more", "", "", ""))
    raise SretError(
        f"{where} is of another model: {len(lines):,} tensors differ ({counts}), first {key} "
        f"(has {has_shape}, needs {needs_shape}){hint}",
        CHECKPOINT,
        shown,
    )


def cast_like(state: State, tensors: State, where: str) -> dict[str, Tensor]:
    """The tensors in the types of a model's state dict.

    Raises:
        SretError: a tensor holds NaN or infinity.
    """
    cast = {key: tensor.to(state[key].dtype) for key, tensor in tensors.items()}
    for key, tensor in cast.items():
        if not tensor.isfinite().all():
            bad = int((~tensor.isfinite()).sum())
            raise SretError(
                f"{where}: {key} has {bad:,} values that are NaN or infinite, because the run "
                "diverged or the file is damaged; use another checkpoint",
                CHECKPOINT,
            )
    return cast
