"""Of which modules a network is made, and what one has that another has not."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

_BEFORE = "before"  # as which a module that wraps another keeps it
_SIZES = (("in_features", "out_features"), ("in_channels", "out_channels"))


@dataclass(frozen=True)
class Module:
    """One module, without those in it.

    type: the class, with inputs and outputs if it has such: "Linear 64 -> 43". values: how many
    numbers its parameters and buffers hold. dtype: of these, "" if there are none; of whole numbers
    only where there are no others.
    """

    name: str
    type: str
    values: int
    dtype: str

    def __str__(self) -> str:
        """Such as "Linear 64 -> 43, 2,795 values, float32"; its type if it holds no values."""
        held = "1 value" if self.values == 1 else f"{self.values:,} values"
        return f"{self.type}, {held}, {self.dtype}" if self.values else self.type


def modules(net: nn.Module) -> list[Module]:
    """All that own tensors or hold no other module, in the order in which `net` holds them."""
    return [_described(name, module) for name, module in net.named_modules() if _counts(module)]


Change = Literal["added", "removed", "changed"]


def difference(before: nn.Module, after: nn.Module) -> list[dict[str, str | None]]:
    """Rows of "name", "change" ("added", "removed" or "changed"), "before" and "after".

    The last two are modules in words, None where there is none. Compared are types, numbers of
    values and dtypes, not the values. Where `after` holds a module in a wrapper, as its `before`,
    the wrapper is a change, and what it wraps is none. Added and changed modules come in the order
    of `after`, then removed ones; no row: there is no difference.
    """
    every = dict(before.named_modules())
    wrappers = {
        name for name, module in after.named_modules() if _wraps(module, every.get(name, module))
    }
    missing: dict[str | None, Module] = {module.name: module for module in modules(before)}
    rows = []
    for name, module in after.named_modules():
        if name in wrappers:
            inner = type(every[name]).__name__
            rows.append(_row(name, "changed", inner, f"{type(module).__name__} around {inner}"))
        elif _counts(module):
            new = _described(name, module)
            old = missing.pop(_former_name(name, wrappers), None)
            if old is None:
                rows.append(_row(name, "added", None, str(new)))
            elif not _alike(old, new):
                rows.append(_row(name, "changed", str(old), str(new)))
    return [*rows, *(_row(old.name, "removed", str(old), None) for old in missing.values())]


def _row(name: str, change: Change, before: str | None, after: str | None) -> dict[str, str | None]:
    return {"name": name, "change": change, "before": before, "after": after}


def _wraps(module: nn.Module, old: nn.Module) -> bool:
    """Does another module stand in the place of `old`, and hold it?"""
    inner = getattr(module, _BEFORE, None)
    return type(inner) is type(old) is not type(module)


def _former_name(name: str, wrappers: Collection[str]) -> str | None:
    """The name before anything was wrapped; None for what a wrapper brings along."""
    for wrapper in wrappers:
        if name.startswith(f"{wrapper}."):
            first, _, rest = name.removeprefix(f"{wrapper}.").partition(".")
            if first != _BEFORE:
                return None
            return f"{wrapper}.{rest}" if rest else wrapper
    return name


def _alike(old: Module, new: Module) -> bool:
    # Around an edit, torch.fx leaves plain modules in the place of those that only held others.
    same_type = new.type in (old.type, nn.Module.__name__)
    return same_type and (old.values, old.dtype) == (new.values, new.dtype)


def _counts(module: nn.Module) -> bool:
    return bool(_tensors(module)) or not list(module.children())


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _described(name: str, module: nn.Module) -> Module:
    tensors = _tensors(module)
    kinds = {t.dtype for t in tensors if t.is_floating_point()} or {t.dtype for t in tensors}
    dtype = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
    sizes = [
        f" {getattr(module, inputs)} -> {getattr(module, outputs)}"
        for inputs, outputs in _SIZES
        if hasattr(module, inputs) and hasattr(module, outputs)
    ]
    return Module(
        name, type(module).__name__ + "".join(sizes), sum(t.numel() for t in tensors), dtype
    )
