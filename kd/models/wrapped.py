"""Classifiers of other libraries as networks of kd. Their taps are their own modules, by name."""

import copy
import difflib
import io
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, redirect_stderr
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kd.core.errors import UserError, first_line
from kd.core.settings import Settings
from kd.models.base import ACTIVATIONS, PRE, ModelOutput, Net, version


class ExternalModelConfig(Settings):
    """A network of another library, by the name that it has there."""

    name: str
    model: str
    pretrained: bool

    @property
    def title(self) -> str:
        return f"{self.name}-{self.model}{'-pretrained' if self.pretrained else ''}"


class Wrapped(Net):
    """Any classifier [B, 3, H, W] -> [B, classes] as a Net.

    A tap is a module that gives one tensor, by its dotted name: "layer1", "layer4.1.conv1". Two more are "pool" [D],
    what the linear layer reads that gives the logits, and "head", the logits. Hooks read them, for one pass.
    `shapes` lists the children of the network and the links of its chains, in the order in which they end.
    "layer1.pre" is what the activation reads whose output is layer1's (layer1 itself where there is none).
    """

    def __init__(self, make: Callable[[], nn.Module], size: int):
        """**Raises:** RuntimeError when the network cannot be made, or not take images of size x size."""
        try:
            super().__init__(net=_can_tap(_construct(make)))
            self.classifier = self._classifier(size)
        except (AssertionError, ArithmeticError, IndexError, TypeError, ValueError) as error:
            raise RuntimeError(first_line(error)) from error

    @property
    def net(self) -> nn.Module:
        return self.stages["net"]

    @property
    def head(self) -> nn.Module:
        """The linear layer that gives the logits. **Raises:** RuntimeError where another module does."""
        if self.classifier is None:
            raise RuntimeError(f"no linear layer ends {type(self.net).__name__}")
        return self.net.get_submodule(self.classifier)

    def tap_module(self, tap: str) -> nn.Module:
        return self.head if tap in ("pool", "head") else self.net.get_submodule(tap)

    def forward_taps(self, x: Tensor, taps: Iterable[str] = ()) -> ModelOutput:
        if not taps:  # nor hooks, through which torch.compile cannot see
            return ModelOutput(self.net(x), {})
        logits, kept = self._read(x, taps)
        for name, tap in kept.items():
            if what := tap.unfit():
                raise RuntimeError(f"tap {name!r} of {type(self.net).__name__} {what}")
        return ModelOutput(logits, {name: tap.value for name, tap in kept.items()})

    def shapes(self, size: int) -> dict[str, tuple[int, ...]]:
        logits, kept = self._forward_meta(size, set(_tap_names(self.net)) - {"pool", "head"})
        found = {
            name: tap.value
            for name, tap in kept.items()
            if not tap.unfit() and tap.value is not logits
        }
        if self.classifier is not None:
            found["pool"] = self._forward_meta(size, ["pool"])[1]["pool"].value
        return {
            name: tuple(tap.shape[1:])
            for name, tap in (found | {"head": logits}).items()
            if tap.ndim > 1
        }

    def _forward_meta(self, size: int, taps: Iterable[str]) -> tuple[Tensor, "dict[str, _Tap]"]:
        """`_read` on the meta device, of a copy."""
        net = copy.deepcopy(self).to("meta").eval()
        with torch.no_grad():
            return net._read(torch.empty(1, 3, size, size, device="meta"), taps)

    def _classifier(self, size: int) -> str | None:
        """The name of the linear layer whose output the logits are."""
        self.classifier = None
        linear = [
            name for name, module in self.net.named_modules() if isinstance(module, nn.Linear)
        ]
        logits, kept = self._forward_meta(size, linear)
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            raise RuntimeError(f"{type(self.net).__name__} does not give logits")
        return next(
            (name for name, tap in kept.items() if tap.value is logits and not tap.unfit()), None
        )

    def _read(self, x: Tensor, taps: Iterable[str]) -> tuple[Tensor, "dict[str, _Tap]"]:
        """The logits and the taps, in the order in which they are known."""
        kept: dict[str, _Tap] = {}
        with ExitStack() as hooks:
            for name in taps:
                where, keep = name.removesuffix(PRE), partial(_record_tap, kept, name)
                if where == "pool" and self.classifier is not None:
                    hooks.enter_context(
                        self.head.register_forward_pre_hook(
                            lambda _, given, keep=keep: keep(given[0])
                        )
                    )
                elif where != "head":
                    for handle in _hooks(self.net.get_submodule(where), name != where, keep):
                        hooks.enter_context(handle)
            logits = self.net(x)
        for name in taps:
            if name.removesuffix(PRE) == "head":
                _record_tap(kept, name, logits)
        return logits, kept


CHAINS = nn.Sequential, nn.ModuleList


class _Tap:
    """What a module gave, and whether it can serve as a tap."""

    def __init__(self, value: Any, calls: int):
        self.value, self.calls = value, calls
        self.version = version(value) if isinstance(value, Tensor) else 0

    def unfit(self) -> str:
        """Why not; "" when it can."""
        if self.calls > 1:
            return f"is not one tensor: the module runs {self.calls} times in a pass"
        if not isinstance(self.value, Tensor):
            return f"is not one tensor, but a {type(self.value).__name__}"
        return (
            "was overwritten in place by a later module"
            if version(self.value) != self.version
            else ""
        )


def _tap_names(net: nn.Module) -> Iterator[str]:
    """The names of the children of `net`, and of the links of what among them, or just below, is a chain."""
    for name, child in net.named_children():
        yield name
        for inner, part in child.named_children():
            if isinstance(child, CHAINS):
                yield f"{name}.{inner}"
            elif isinstance(part, CHAINS):
                yield from (f"{name}.{inner}.{link}" for link, _ in part.named_children())


def _record_tap(kept: dict[str, _Tap], name: str, value: Any) -> None:
    kept[name] = _Tap(value, kept[name].calls + 1 if name in kept else 1)


def _hooks(
    module: nn.Module, before: bool, keep: Callable[[Any], None]
) -> Iterator[RemovableHandle]:
    """Hand `keep` what `module` gives; or `before` the activation inside it whose output that is, what that reads."""
    last: list[Any] = [None, None]  # what the last activation read and gave

    def note(_: nn.Module, given: Any, found: Any) -> None:
        last[:] = given[0], found

    def end(_: nn.Module, __: Any, found: Any) -> None:
        keep(last[0] if before and found is last[1] else found)

    for inner in module.modules() if before else ():
        if isinstance(inner, ACTIVATIONS):
            yield inner.register_forward_hook(note)
    yield module.register_forward_hook(end)


class _ReLU(nn.ReLU):
    """nn.ReLU, but kd's kernels leave it alone: once it is fused with its norm, nobody knows what it read."""


def _can_tap(net: nn.Module) -> nn.Module:
    """`net` with activations that do not write into what they read."""
    for module in net.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]
        if type(module) is nn.ReLU:
            module.__class__ = _ReLU
    return net


def _construct(make: Callable[[], nn.Module]) -> nn.Module:
    """`make()`, on the default device."""
    try:
        return make()
    except (
        NotImplementedError
    ):  # it reads numbers from tensors, and the default device, meta, has none
        with torch.device("cpu"):
            net = make()
        return net.to(torch.get_default_device())


def pretrained_state(make: Callable[[], nn.Module], what: str) -> Callable[[], nn.Module]:
    """`make`, which downloads weights, in silence, on the CPU; the network is then moved to the default device (the
    meta device, when only shapes are asked for). **Raises:** UserError when `make` fails."""

    def made() -> nn.Module:
        was = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            with torch.device("cpu"), redirect_stderr(io.StringIO()):
                net = make()
        except UserError:
            raise
        except Exception as error:  # of the network, the disk, the file
            raise UserError(
                f"pretrained: no weights of {what} can be had ({first_line(error)})"
            ) from error
        finally:
            logging.disable(was)
        return net.to(torch.get_default_device())

    return made


def check_known_name(name: str, names: Iterable[str]) -> str:
    """`name`, if it is one of `names`. **Raises:** ValueError that says which are near."""
    if name not in (names := list(names)):
        near = difflib.get_close_matches(name, names, 3) or sorted(names)[:3]
        raise ValueError(f"{name!r} is not known; did you mean {' or '.join(near)}?")
    return name
