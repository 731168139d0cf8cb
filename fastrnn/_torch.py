"""All that fastrnn uses of torch's private parts, each with its reason, and what stands in where a
version lacks it.

None of these is documented, so a new version of torch may drop one: this is where to look first.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import _C, Tensor
from torch._C import _functorch
from torch._C._dynamo import eval_frame

# Which CompileContext is open: whether Dynamo traces, asked by code that Dynamo would not inline.
from torch._guards import CompileContext as CompileContext
from torch.autograd import forward_ad

# A Function for one level of torch.func's nesting, as functorch itself makes of every Function.
from torch.autograd.function import _SingleLevelFunction
from torch.nn.modules import module as _module

# Whether anybody has to see a call: kernels read memory, and modes, tracers and transforms do not
# see that. The documented functions answer for one kind of watcher, or import Dynamo to answer.
transforms_active = _C._are_functorch_transforms_active
tracing_state = _C._get_tracing_state
dispatch_modes = _C._len_torch_dispatch_stack
function_modes = _C._len_torch_function_stack
function_mode_at = _C._get_function_stack_at
pop_function_mode = _C._pop_torch_function_stack
push_function_mode = _C._push_on_torch_function_stack
# Whether make_fx or export records what comes before autograd: by a mode in a stack of its own,
# which this key tells of, and `dispatch_modes` does not.
records_above_autograd = partial(
    _C._dispatch_tls_is_dispatch_key_included, _C.DispatchKey.PreDispatch
)

# Autocast of any device in one call, where torch.is_autocast_enabled asks about one.
autocast_active = _C._is_any_autocast_enabled
# torch.autocast(enabled=False) for all devices, and without its ten microseconds.
DisableAutocast = _C._DisableAutocast
# Torch's functions as if no mode and no subclass watched them, where all tensors are plain: see
# fastrnn.plain.put_aside_default_device.
DisableTorchFunction = _C.DisableTorchFunction

# Whether a __torch_function__ of any of these is asked, and the one that is switched off: the
# documented torch.overrides.has_torch_function is the first, under a longer path.
any_overrides = _C._has_torch_function
disabled_override = _C._disabled_torch_function_impl

# In an operator's own Autograd kernel: calling it again without arriving there again.
BelowAutograd = _C._AutoDispatchBelowAutograd
# In an operator's kernel, which runs with autograd out of its way: recording all the same.
set_excluded_key = _C._SetExcludeDispatchKeyGuard
DispatchKey = _C.DispatchKey

# The hooks of all modules, which a stream's prepared step would pass over.
global_hooks = (_module._global_forward_pre_hooks, _module._global_forward_hooks)

# torch.func's nesting as it is now, and what it wraps tensors in. Its documented part transforms
# functions; a kernel needs to know which levels there are, and what lies below them.
CInterpreter = _functorch.CInterpreter
CVmapInterpreterPtr = _functorch.CVmapInterpreterPtr
TransformType = _functorch.TransformType
interpreters = _functorch.get_interpreter_stack
peek_interpreter = _functorch.peek_interpreter_stack
push_interpreter = _functorch.push_dynamic_layer_stack
pop_interpreter = _functorch.pop_dynamic_layer_stack
single_level_allowed = _functorch.get_single_level_autograd_function_allowed
allow_single_level = _functorch.set_single_level_autograd_function_allowed
SingleLevelFunction = _SingleLevelFunction
is_wrapped = _functorch.is_functorch_wrapped_tensor
is_legacy_batched = _functorch.is_legacy_batchedtensor
level_of = _functorch.maybe_get_level
unwrapped = _functorch.get_unwrapped
unwrap_batched = _functorch._unwrap_batched
wrap_batched = _functorch._add_batch_dim
unwrap_tracked = _functorch._unwrap_for_grad
wrap_tracked = _functorch._wrap_for_grad


def is_forward_differentiated() -> bool:
    """Whether a level of forward-mode differentiation is open."""
    return forward_ad._current_level >= 0


def saves_elsewhere() -> bool:
    """Whether hooks see what autograd saves (``torch.autograd.graph.saved_tensors_hooks``).
    Torch 2.6 does not tell, and they are assumed: every call goes the longer way there."""
    return _top_hooks is None or _top_hooks(True) is not None


_top_hooks: Any = getattr(_C._autograd, "_top_saved_tensors_default_hooks", None)


def wants_operators_alone() -> bool:
    """Whether what is traced is to have the operator without an autograd.Function around it: in
    exported programs (``torch.compiler.is_exporting``). Before torch 2.7, which does not tell
    exporting from compiling, and whose Dynamo fails on a Function that returns None, always."""
    if _asks_for_export is not None:
        return bool(_asks_for_export())
    return torch.compiler.is_compiling()


_asks_for_export: Any = getattr(torch.compiler, "is_exporting", None)


def has_autocast(device_type: str) -> bool:
    """:func:`torch.amp.is_autocast_available`."""
    return torch.amp.is_autocast_available(device_type)


# As torch.compiler.assume_constant_result marks it, which would import Dynamo. Dynamo of torch 2.9
# and before knows nothing of torch's function, and breaks the graph.
has_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]


def to_list(tensor: Tensor) -> list[Any]:
    """``tensor.tolist()``, under torch.func's transforms too, of which none may hide an axis of the
    tensor. In torch 2.9 and before it wraps a tensor itself where a transform differentiates, and
    reads the memory of the wrapper, which has none: it is called below all transforms."""
    while is_wrapped(tensor):
        tensor = unwrapped(tensor)
    levels = []
    while peek_interpreter() is not None:
        levels.append(pop_interpreter())
    try:
        return tensor.tolist()
    finally:
        for level in reversed(levels):
            push_interpreter(level)


def cudnn_mode(cell: str) -> int:
    """cuDNN's number for a kind of layer, such as "LSTM". In torch 2.9 and before, the module
    that knows it is no attribute of its package until somebody imports it."""
    rnn = importlib.import_module("torch.backends.cudnn.rnn")
    return int(rnn.get_cudnn_mode(cell))


def cudnn_allows_tf32() -> bool:
    """Whether cuDNN's recurrent layers may use TF32. Before torch 2.9 there is one flag for all of
    cuDNN. In 2.9 the settings of recurrent layers are an attribute of the class of
    ``torch.backends.cudnn``, which a module of the same name hides once it is imported."""
    cudnn = torch.backends.cudnn
    for owner in (cudnn, type(cudnn)):
        settings = getattr(owner, "rnn", None)
        if hasattr(settings, "fp32_precision"):
            return allows_tf32(settings)
    return allows_tf32(cudnn)


def leave_uncompiled(function: Callable[..., Any]) -> None:
    """Keep Dynamo from compiling a function that runs between compiled ones. Dynamo of torch 2.6
    runs code in which it has found no operator as it was written, and compiles what that calls.
    Later ones do not, and have no such function; torch.compiler.disable would import Dynamo."""
    skip_code = getattr(eval_frame, "skip_code", None)
    if skip_code is not None:
        skip_code(function.__code__)


def allows_tf32(settings: Any) -> bool:
    """Whether settings of a library, such as ``torch.backends.cuda.matmul``, let float32 products
    use TF32. Before torch 2.9 they are a flag."""
    if hasattr(settings, "fp32_precision"):
        return bool(settings.fp32_precision == "tf32")
    return bool(settings.allow_tf32)
