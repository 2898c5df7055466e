"""Counts the calls at which Python would wait for a GPU, on any device.

On a CPU nothing waits, but the calls are the same: a number that is asked for (`float(norm)`,
`bool(flag)`, `.item()`, `.tolist()`, `.numpy()`), a result whose shape depends on values
(`nonzero`, a mask as index), a copy that is not `non_blocking` (`.cpu()`, `.to(device)`), and a
tensor made of Python's numbers, which is such a copy.
"""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_TORCH = str(Path(torch.__file__).parent)
_CALLS = {"tolist", "numpy", "__array__", "cpu", "tensor", "as_tensor", "asarray"}
_aten: Any = torch.ops.aten
_OPERATIONS = {
    *(_aten._local_scalar_dense, _aten.nonzero, _aten.masked_select, _aten.equal),
    *(_aten._unique2, _aten.unique_dim, _aten.unique_consecutive, _aten.bincount),
}


class Syncs(TorchDispatchMode):
    """While it is entered and `is_counting`, `places` grows by one for each such call."""

    def __init__(self, *, is_counting: bool = True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_counting = is_counting
        self.places: list[str] = []
        self._calls = _Calls(self.note)

    def __enter__(self) -> "Syncs":
        self._calls.__enter__()  # type: ignore[no-untyped-call]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._calls.__exit__(*error)  # type: ignore[no-untyped-call]

    def note(self, what: str) -> None:
        """Add the place of the code outside of torch that led here."""
        if not self.is_counting:
            return
        frame: Any = sys._getframe(1)
        while frame.f_code.co_filename in (__file__,) or _is_of_torch(frame):
            frame = frame.f_back
        self.places.append(f"{what} at {Path(frame.f_code.co_filename).name}:{frame.f_lineno}")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        packet = func.overloadpacket
        if packet in _OPERATIONS or (packet in (_aten.index, _aten.index_put_) and _has_mask(args)):
            self.note(str(packet))
        return func(*args, **(kwargs or {}))


class _Calls(TorchFunctionMode):
    """What reaches no operation on a CPU."""

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        is_ours = not _is_of_torch(sys._getframe(1))  # torch itself copies only within a device
        if is_ours and (name in _CALLS or (name == "to" and _names_device(args[1:], kwargs))):
            self._note(name)
        return func(*args, **kwargs)


def _is_of_torch(frame: Any) -> bool:
    return bool(frame.f_code.co_filename.startswith(_TORCH))


def _names_device(args: Iterable[Any], kwargs: dict[str, Any]) -> bool:
    """Whether arguments of `Tensor.to` ask for a copy between devices that Python waits for."""
    asked = any(isinstance(each, torch.device | str | Tensor) for each in args)
    return (asked or "device" in kwargs) and not kwargs.get("non_blocking", False)


def _has_mask(args: tuple[Any, ...]) -> bool:
    return any(each is not None and each.dtype is torch.bool for each in args[1])
