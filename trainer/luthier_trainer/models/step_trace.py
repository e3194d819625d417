"""Runs one step of a training on the meta device and records how much memory it holds at each moment.

Shapes alone are computed: no weights are needed, nothing is allocated, and no constant of an architecture is fitted.
What does not work on the meta device is replaced: autocast, which decides by the type of a device, and the fused
kernels of attention, of which only the tensors that they keep and allocate matter.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

Device = Literal["cpu", "cuda"]
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
        attention: Callable[..., torch.Tensor],
        needs_mask: bool,
    ) -> None:
        """`dtype`: of the products; None: nothing is converted. `attention`: in the place of torch's function.

        `needs_mask`: whether rows are padded or packed. It answers whatever a model asks about values: tensors of the
        meta device have none.
        """
        super().__init__()
        self.device, self.dtype, self.attention, self.needs_mask = device, dtype, attention, needs_mask
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
        """Let `torch.autocast` inside this context switch the mode for tensors of the meta device, which it refuses."""
        original = torch.autocast

        def stand_in(device_type: str, *args: Any, enabled: bool = True, **kwargs: Any) -> Any:
            if device_type == "meta":
                return self.switched(enabled)
            return original(device_type, *args, enabled=enabled, **kwargs)

        torch.autocast = stand_in
        try:
            yield
        finally:
            torch.autocast = original


class FusedAttention(torch.autograd.Function):
    """What a fused kernel of attention (flash, memory-efficient, or that of CPUs) keeps and allocates.

    Inputs have the shape [rows, heads, tokens, width]. Kept are the inputs, the output and one sum in fp32 for each row
    of the scores; the backward pass sums the gradient of the queries in fp32.
    """

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        rows, heads, tokens, _ = q.shape
        # Kernels write the output as [rows, tokens, heads, width], which the model's next step reads without a copy.
        out = q.new_empty((rows, tokens, heads, v.shape[-1])).transpose(1, 2)
        sums = q.new_empty((rows, heads, tokens), dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, sums, mask)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        q, k, v, _, sums, _ = ctx.saved_tensors
        summed = torch.empty_like(q, dtype=torch.float32), torch.empty_like(sums)
        found = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        del summed
        return *found, None


class GroupedProducts(torch.autograd.Function):
    """The products of tokens [tokens, inputs], sorted by experts, with weights [experts, inputs, outputs].

    torch's own function takes bf16 alone on the meta device.
    """

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(tokens, weights)
        return tokens.new_empty((tokens.shape[0], weights.shape[-1]))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        needed = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=True)
        return tuple(torch.empty_like(tensor) if wanted else None for tensor, wanted in needed)


def dropped(
    input: torch.Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> torch.Tensor:
    """Return what dropout makes of `input` by the kernel of CUDA, which keeps one byte an element, and nothing else."""
    if not training or p in (0, 1) or inplace:
        return torch.dropout(input, p, training)
    made: torch.Tensor = torch.native_dropout(input, p, True)[0]
    return made


def attention_of(device: Device) -> Callable[..., torch.Tensor]:
    """Return what stands for torch's `scaled_dot_product_attention` on this device."""

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        shared = enable_gqa and query.shape[1] != key.shape[1]
        learns = attn_mask is not None and attn_mask.requires_grad
        # Only the flash kernel takes fewer heads of keys, and it has no fp32; the one of CPUs has no dropout.
        plain = query.dim() != 4 or learns
        if device == "cuda":
            plain = plain or (shared and (query.dtype == torch.float32 or attn_mask is not None))
        else:
            plain = plain or dropout_p > 0
        if plain:
            if shared:
                groups = query.shape[1] // key.shape[1]
                key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
            return torch.ops.aten._scaled_dot_product_attention_math(
                query, key, value, attn_mask, dropout_p, is_causal
            )[0]
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = attn_mask.to(query.dtype)  # torch does so in each call
        out: torch.Tensor = FusedAttention.apply(query, key, value, attn_mask)
        return out

    return attend


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
        self._of_weights: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        before = len(self.live), self.bytes
        for item in made if isinstance(made, (list, tuple)) else (made,):
            if isinstance(item, torch.Tensor):
                self.add(item)
        if (len(self.live), self.bytes) != before:
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
