"""Parameters, gradients and moments spread over processes, each of which holds a part of every tensor.

Accelerate's own way to it becomes plain data parallelism on CPUs without a word, so torch's `fully_shard` is called
directly, and what comes out is looked at.
"""

from typing import TypeVar

from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

Model = TypeVar("Model", bound=nn.Module)


def shard_(model: Model) -> Model:
    """Spreads a model over all processes of the default group, in place; `train` takes it as it takes a whole one.

    The tensors are put together for a pass (`run` or a call) and taken apart after it; the optimiser and the
    projection see parts. Every process has to call it, with equal weights, after the process group was made
    (`accelerate.Accelerator()` does that where several processes were launched).
    """
    fully_shard(model, reshard_after_forward=True)
    if callable(getattr(model, "run", None)):
        register_fsdp_forward_method(model, "run")
    whole = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    assert not whole, f"not spread over processes: {whole}"
    return model
