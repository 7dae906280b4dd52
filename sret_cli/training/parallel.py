"""One model on several ranks: common batch statistics, averaged gradients, sharded weights."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from sret_cli.model.kinds import sret_stages
from sret_cli.runtime.errors import SretError
from sret_cli.spec.train import TrainSpec
from sret_cli.training.ranks import Ranks


class _BatchNormOfAll(torch.autograd.Function):
    """Batch normalisation with the statistics of the images of all ranks, and its gradient.

    It differs from that of one process only by rounding. `SyncBatchNorm` of torch has no CPU
    kernels. The gradient is in "Batch Normalization", Ioffe and Szegedy, 2015, section 3.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The normalised `x` (`[B, C, ...]`); mean, biased variance and count of each channel."""
        dims = [0, *range(2, x.ndim)]
        var_C, mean_C = torch.var_mean(_wide(x), dims, correction=0)
        count_1 = mean_C.new_tensor([x.numel() // x.shape[1]])
        own = torch.cat((mean_C, var_C, count_1))
        every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(every, own)
        means, variances, counts = torch.stack(every).split((len(mean_C), len(var_C), 1), 1)
        count_1 = counts.sum(0)
        mean_C = (counts * means).sum(0) / count_1
        var_C = (counts * (variances + (means - mean_C).square())).sum(0) / count_1
        ctx.save_for_backward(x, weight, mean_C, (var_C + eps).rsqrt(), count_1)
        ctx.mark_non_differentiable(mean_C, var_C, count_1)
        y = F.batch_norm(x, mean_C, var_C, weight, bias, training=False, eps=eps)
        return y, mean_C, var_C, count_1

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """The gradients of `x`, and of weight and bias for the images of this rank."""
        x, weight, mean_C, inverse_C, count_1 = ctx.saved_tensors
        dims, shape = [0, *range(2, x.ndim)], (-1, *(1,) * (x.ndim - 2))
        normal = (_wide(x) - mean_C.view(shape)) * inverse_C.view(shape)
        dy = _wide(dy)
        bias_C, weight_C = dy.sum(dims), (dy * normal).sum(dims)
        of_all = torch.cat((bias_C, weight_C))
        dist.all_reduce(of_all)
        by_mean_C, by_variance_C = (of_all / count_1).chunk(2)
        dx = dy - by_mean_C.view(shape) - normal * by_variance_C.view(shape)
        dx = dx * (weight * inverse_C).view(shape)
        return dx.to(x.dtype), weight_C, bias_C, None


def _wide(x: Tensor) -> Tensor:
    """The tensor in at least float32, to sum its values."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class SyncBatchNorm(_BatchNorm):
    """BatchNorm with the images of all ranks in training; evaluation needs no other rank."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalises, and updates the running statistics."""
        if not self.training:
            return super().forward(x)
        y, mean_C, var_C, count_1 = _BatchNormOfAll.apply(x, self.weight, self.bias, self.eps)
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean_C, self.momentum)
            self.running_var.lerp_(var_C * (count_1 / (count_1 - 1)), self.momentum)
        return y

    def _check_input_dim(self, input: Tensor) -> None:
        """Accepts tensors of any number of dimensions."""


def synchronise_norms(model: nn.Module) -> None:
    """Replaces every BatchNorm by a `SyncBatchNorm` with the same tensors.

    Raises:
        SretError: a timm model has BatchNorm of another kind.
    """
    for name, module in list(model.named_modules()):
        if not isinstance(module, _BatchNorm):
            continue
        if type(module) not in (nn.BatchNorm1d, nn.BatchNorm2d) or not module.affine:
            kind = type(module).__name__
            raise SretError(f"{name} is a {kind}, which works in one process only; use one process")
        synchronised = SyncBatchNorm(module.num_features, module.eps, module.momentum)
        synchronised._parameters, synchronised._buffers = module._parameters, module._buffers
        model.set_submodule(name, synchronised.train(module.training))


def replicate(model: Any, spec: TrainSpec, ranks: Ranks) -> nn.Module:
    """The model, with gradients that are averaged over the ranks in the backward pass.

    The gradient of a tensor that several passes use is averaged once, after all passes have added
    to it. If the number of recursions is drawn and each pass has its own NLL, the weights that a
    step uses change; weights that no rank uses get no gradient, as in one process.
    """
    varies = spec.recursions_range is not None
    changing = model.spec.is_timm or (varies and model.spec.nll == "per_pass")
    assert ranks.device is not None
    # The gradient of a depthwise convolution may have other strides than its weights; torch copies
    # it and warns.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
        return DistributedDataParallel(
            model,
            device_ids=[ranks.device] if ranks.device.type == "cuda" else None,
            broadcast_buffers=False,  # the statistics are the same on all ranks
            find_unused_parameters=changing,
        )


def shard(model: nn.Module, ranks: Ranks) -> None:
    """Splits the weights among the ranks, in place; a stage is gathered while it runs.

    A stage is gathered once in a forward pass and once in a backward pass, also if its blocks run
    several times. Sharding by blocks would gather a block again for each of its passes.

    Raises:
        SretError: the model is a timm model.
    """
    stages = sret_stages(model)
    if not stages:
        raise SretError("timm models cannot be sharded; leave out --shard")
    assert ranks.device is not None
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    for stage in stages:
        fully_shard(stage, mesh=mesh)
    fully_shard(model, mesh=mesh)


@contextmanager
def gathered_weights(model: nn.Module) -> Iterator[None]:
    """Gathers sharded weights for the block, so that each rank may call the model on its own.

    All ranks have to call this.
    """
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    yield
    for module in sharded:
        module.set_reshard_after_forward(True, recurse=False)
        module.reshard()


def full_tensor(value: Tensor) -> Tensor:
    """The complete tensor of a sharded one; all ranks have to call this."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def full_state(tree: Any) -> Any:
    """A tree with every sharded tensor gathered on the CPU; all ranks have to call this."""
    return tree_map(lambda v: full_tensor(v).cpu() if isinstance(v, DTensor) else v, tree)


def load_full_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Loads a state dict of `full_state`; a sharded model takes this rank's shards of it."""
    own = model.state_dict()
    model.load_state_dict({k: _sharded_as(v, own[k]) if k in own else v for k, v in state.items()})


def load_full_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads a state dict of `full_state` into an optimizer."""
    parameters = [q for group in optimizer.param_groups for q in group["params"]]
    sharded = {
        index: {
            name: _sharded_as(v, parameters[index]) if isinstance(v, Tensor) and v.ndim else v
            for name, v in values.items()
        }
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": sharded})


def _sharded_as(value: Tensor, like: Tensor) -> Tensor:
    """A complete tensor, which all ranks have, sharded as `like` if `like` is sharded."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(
        value.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )
