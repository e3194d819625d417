"""Runs one step of a training on the meta device and records how much memory it holds at each moment.

Shapes alone are computed: no weights are needed, nothing is allocated, and no constant of an architecture is fitted.
What does not work on the meta device is replaced: autocast, which decides by the type of a device, and the kernels of
`meta_kernels`, of which only the tensors that they keep and allocate matter.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from luthier_trainer.models.meta_kernels import Device, GroupedProducts, attention_of, dropped, in_place_of_trl

ALIGNMENT: dict[str, int] = {"cuda": 512, "cpu": 1}
"""What an allocation is rounded up to: torch's allocator for CUDA hands out multiples of 512 bytes."""

# What torch's autocast converts (aten/src/ATen/autocast_mode.h of torch 2.13), by names of Python's functions.
LOWER = {
    *("linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "addmm", "addbmm", "baddbmm", "einsum"),
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "prelu"),
    "scaled_dot_product_attention",
}
HIGHER: dict[Device, set[str]] = {
    "cuda": {
        *("softmax", "log_softmax", "layer_norm", "group_norm", "cross_entropy", "nll_loss", "mse_loss", "l1_loss"),
        *(
            "binary_cross_entropy_with_logits",
            "pow",
            "__pow__",
            "rsqrt",
            "exp",
            "log",
            "cumsum",
            "cumprod",
            "prod",
            "sum",
        ),
        *("norm", "softplus", "logsumexp", "cdist", "smooth_l1_loss", "kl_div"),
    },
    "cpu": {"mse_loss", "cdist"},
}


class Autocast(TorchFunctionMode):
    """torch.autocast for tensors of the meta device, by the rules of another device.

    A weight that is converted is kept until `forget`, as torch keeps it until the outermost context ends.
    """

    def __init__(
        self,
        device: Device,
        dtype: torch.dtype | None,
        needs_mask: bool,
    ) -> None:
        """`dtype`: of the products; None: nothing is converted.

        `needs_mask`: whether rows are padded or packed. It answers whatever a model asks about values: tensors of the
        meta device have none.
        """
        super().__init__()
        self.device, self.dtype, self.needs_mask = device, dtype, needs_mask
        self.attention = attention_of(device)
        self.enabled = self.keeps = False
        self.kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__bool__" and args[0].is_meta:
            return not self.needs_mask  # models ask whether no token is padding, or whether all are of one document
        if name == "__contains__" and args[0].is_meta:
            return False  # for warnings
        if self.enabled and self.dtype is not None:
            if name in LOWER:
                args, kwargs = self._converted(args, kwargs, self.dtype)
            elif name in HIGHER[self.device]:
                args, kwargs = self._converted(args, kwargs, torch.float32)
        if name == "scaled_dot_product_attention":
            return self.attention(*args, **kwargs)
        if name == "dropout" and self.device == "cuda":
            return dropped(*args, **kwargs)
        if name in ("grouped_mm", "_grouped_mm"):
            product: torch.Tensor = GroupedProducts.apply(args[0], args[1])
            return product
        return func(*args, **kwargs)

    def _converted(self, args: Any, kwargs: Any, dtype: torch.dtype) -> tuple[Any, Any]:
        def convert(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return type(value)(map(convert, value))
            return self._cast(value, dtype) if isinstance(value, torch.Tensor) else value

        return tuple(map(convert, args)), {key: convert(value) for key, value in kwargs.items()}

    def _cast(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if tensor.dtype == dtype or tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return tensor
        if not (self.keeps and tensor.requires_grad and tensor.is_leaf and tensor.dtype == torch.float32):
            return tensor.to(dtype)
        if id(tensor) not in self.kept:
            with torch.enable_grad():
                self.kept[id(tensor)] = (tensor, tensor.to(dtype))
        return self.kept[id(tensor)][1]

    def forget(self) -> None:
        """End the context: weights that were converted are kept no longer."""
        self.kept.clear()

    @contextmanager
    def switched(self, enabled: bool) -> Iterator[None]:
        before, self.enabled = self.enabled, enabled
        try:
            yield
        finally:
            self.enabled = before

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let torch's functions of autocast inside this context answer for this mode where they are asked about the
        meta device, which they do not know.
        """
        switch, is_enabled, dtype_of = torch.autocast, torch.is_autocast_enabled, torch.get_autocast_dtype

        def autocast(device_type: str, *args: Any, enabled: bool = True, **kwargs: Any) -> Any:
            if device_type == "meta":
                return self.switched(enabled)
            return switch(device_type, *args, enabled=enabled, **kwargs)

        def is_autocast_enabled(*device_type: str) -> bool:
            return self.enabled and self.dtype is not None if device_type == ("meta",) else is_enabled(*device_type)

        def get_autocast_dtype(device_type: str) -> Any:
            return self.dtype if device_type == "meta" else dtype_of(device_type)

        torch.autocast = autocast
        torch.is_autocast_enabled, torch.get_autocast_dtype = is_autocast_enabled, get_autocast_dtype
        try:
            with in_place_of_trl(self.device):
                yield
        finally:
            torch.autocast, torch.is_autocast_enabled, torch.get_autocast_dtype = switch, is_enabled, dtype_of


class Ledger(TorchDispatchMode):
    """Records the bytes of all tensors that operations make, at each moment: after each operation that makes one."""

    def __init__(self, known: Iterable[torch.Tensor], alignment: int) -> None:
        """`known`: tensors that exist anyway, such as weights."""
        super().__init__()
        self.alignment = alignment
        self.live: dict[int, tuple[Any, int]] = {}
        self.bytes = self.gradients = 0
        self.moments: list[tuple[int, int]] = []
        """Bytes of all but gradients of weights, and of these."""
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.kept: dict[int, int] = {}
        """Bytes of the storages that autograd keeps, which `keep` has seen."""
        self.kernels = self.moved = 0
        """Operations that compute something, and the bytes that they read and write."""
        self._of_weights: set[int] = set()
        self._added = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        before = self._added
        results = tensors_in(made)
        for item in results:
            self.add(item)
        if not func.is_view:
            self.kernels += 1
            self.moved += sum(item.nbytes for item in (*tensors_in(args), *results))
        if self._added != before:
            self.moments.append((self.bytes, self.gradients))
        return made

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.live or key in self.known:
            return
        size = -(-storage.nbytes() // self.alignment) * self.alignment
        self.live[key] = (weakref.ref(storage, lambda _: self._free(key)), size)
        self.bytes += size
        self._added += 1

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """Count a tensor that autograd saves; return it."""
        key = tensor.untyped_storage()._cdata
        if key not in self.known:
            self.kept[key] = tensor.untyped_storage().nbytes()
        return tensor

    def _free(self, key: int) -> None:
        _, size = self.live.pop(key)
        if key in self._of_weights:
            self._of_weights.remove(key)
            self.gradients -= size
        else:
            self.bytes -= size

    def is_gradient(self, weight: torch.Tensor) -> None:
        """Count the gradient of `weight` as one from here on."""
        assert weight.grad is not None
        key = weight.grad.untyped_storage()._cdata
        if key in self._of_weights:
            return
        self.add(weight.grad)
        if key in self.known:
            return
        size = self.live[key][1]
        self._of_weights.add(key)
        self.bytes, self.gradients = self.bytes - size, self.gradients + size


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Return the tensors of a value, or of a sequence of values."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [item for item in value if isinstance(item, torch.Tensor)] if isinstance(value, (list, tuple)) else []
