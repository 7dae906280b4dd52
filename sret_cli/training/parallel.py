"""One model on several ranks: batch statistics of all of them, and averaged or sharded weights."""

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
    """Batch normalisation by the statistics of all ranks' images, and its gradient.

    Differs from that of one process by rounding. torch's own `SyncBatchNorm` has no CPU kernels.
    "Batch Normalization", Ioffe and Szegedy, 2015, section 3, has the gradient.
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
        """Gradients of `x`, and this rank's own of weight and bias."""
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
    """In the precision of sums: at least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class SyncBatchNorm(_BatchNorm):
    """BatchNorm in training by the images of all ranks; in evaluation it asks none of them."""

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
        """Takes any."""


def synchronise_norms(model: nn.Module) -> None:
    """Puts `SyncBatchNorm`, with the same tensors, in the place of every BatchNorm.

    Raises:
        SretError: a model of timm's has BatchNorm of another kind.
    """
    for name, module in list(model.named_modules()):
        if not isinstance(module, _BatchNorm):
            continue
        if type(module) not in (nn.BatchNorm1d, nn.BatchNorm2d) or not module.affine:
            kind = type(module).__name__
            raise SretError(f"{name} is a {kind}, which knows one process alone; use one process")
        synchronised = SyncBatchNorm(module.num_features, module.eps, module.momentum)
        synchronised._parameters, synchronised._buffers = module._parameters, module._buffers
        model.set_submodule(name, synchronised.train(module.training))


def replicate(model: Any, spec: TrainSpec, ranks: Ranks) -> nn.Module:
    """The model, with gradients that are averaged over the ranks in the backward pass.

    Shared weights are reduced once, when all their passes have added to their gradient. Which
    weights a step uses changes where passes with NLLs of their own are drawn; those of no rank
    keep no gradient, as in one process.
    """
    varies = spec.recursions_range is not None
    changing = model.spec.is_timm or (varies and model.spec.nll == "per_pass")
    assert ranks.device is not None
    # A depthwise convolution's gradient may lie in another order than its weights; it is copied.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
        return DistributedDataParallel(
            model,
            device_ids=[ranks.device] if ranks.device.type == "cuda" else None,
            broadcast_buffers=False,  # the ranks' statistics are the same
            find_unused_parameters=changing,
        )


def shard(model: nn.Module, ranks: Ranks) -> None:
    """Leaves each rank its share of the weights, in place: a stage is whole while it works.

    A stage is whole once a forward pass and once a backward pass, however often its blocks recur;
    sharding by block would gather a block anew for each of its passes.

    Raises:
        SretError: the model is timm's.
    """
    stages = sret_stages(model)
    if not stages:
        raise SretError("models of timm's are not sharded; leave out --shard")
    assert ranks.device is not None
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    for stage in stages:
        fully_shard(stage, mesh=mesh)
    fully_shard(model, mesh=mesh)


@contextmanager
def gathered_weights(model: nn.Module) -> Iterator[None]:
    """Sharded weights are whole within: ranks that call the model differently often need not meet.

    All ranks have to ask.
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
    """A tensor with what other ranks have of it; all have to ask."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def full_state(tree: Any) -> Any:
    """A tree of values with every sharded tensor gathered, on the CPU; all ranks have to ask."""
    return tree_map(lambda v: full_tensor(v).cpu() if isinstance(v, DTensor) else v, tree)


def load_full_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Loads a state dict that `full_state` gave, of which a sharded model takes its shares."""
    own = model.state_dict()
    model.load_state_dict({k: _share_of(v, own[k]) if k in own else v for k, v in state.items()})


def load_full_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads an optimizer's state dict that `full_state` gave."""
    parameters = [q for group in optimizer.param_groups for q in group["params"]]
    shares = {
        index: {
            name: _share_of(v, parameters[index]) if isinstance(v, Tensor) and v.ndim else v
            for name, v in values.items()
        }
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": shares})


def _share_of(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which all ranks have, sharded as another one is, if that is."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(
        value.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )
