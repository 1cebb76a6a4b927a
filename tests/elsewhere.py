"""A second device without having one: tensors that say they are elsewhere and compute on the CPU.

    with elsewhere():
        model.to(DEVICE)                   # its tensors are Elsewhere, of DEVICE
        model(ids)                         # RuntimeError if ids stayed on the CPU

torch's FakeTensorMode knows no values, and a step, an answer and a checkpoint read some (.item(),
.tolist()); so each tensor here wraps one of the CPU. The rules are CUDA's: an operation takes
tensors of one device; from the CPU it also takes numbers without dimensions, and indices. DEVICE is
one that torch knows by name alone.
"""

import contextlib

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("lazy", 0)
CROSS = {"copy_", "_to_copy", "index", "index_put_", "index_put", "_index_put_impl_", "detach",
         "set_data"}


class Elsewhere(torch.Tensor):
    """A tensor of DEVICE; inner has its numbers."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=DEVICE, requires_grad=inner.requires_grad)

    def __init__(self, inner):
        self.inner = inner.detach()

    def untyped_storage(self):
        return self.inner.untyped_storage()

    def tolist(self):
        return self.inner.tolist()

    def __repr__(self):
        return f"Elsewhere({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def compute(func, args, kwargs):
    """Run func on the inner tensors; refuse a mix of devices; wrap what belongs elsewhere."""
    name = func.overloadpacket.__name__
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    here = [x for x in tensors if not isinstance(x, Elsewhere) and x.dim()]
    there = [x for x in tensors if isinstance(x, Elsewhere)]
    if here and there and name not in CROSS:
        raise RuntimeError(f"{name}: expected all tensors to be on one device, found {DEVICE} and "
                           f"{here[0].device} {tuple(here[0].shape)}")
    asked = kwargs.get("device")
    to_there = bool(there) if asked is None else torch.device(asked).type == DEVICE.type
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if name == "copy_":                                       # the result is where it is copied to
        to_there = isinstance(args[0], Elsewhere)
    out = func(*tree_map(lambda x: x.inner if isinstance(x, Elsewhere) else x, args),
               **tree_map(lambda x: x.inner if isinstance(x, Elsewhere) else x, kwargs))
    if func._schema.is_mutable:                               # in place: the tensor that was given
        given = [(x.inner if isinstance(x, Elsewhere) else x, x) for x in tensors]
        return tree_map(lambda y: next((x for inner, x in given if inner is y), y), out)
    return tree_map(lambda y: Elsewhere(y) if isinstance(y, torch.Tensor) and to_there else y, out)


class _Factories(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


class _Constants(TorchFunctionMode):
    """torch.tensor makes its result below the dispatcher: here on the CPU first, then moved."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


@contextlib.contextmanager
def elsewhere():
    """DEVICE can be used inside the block."""
    with _Constants(), _Factories():
        yield DEVICE
