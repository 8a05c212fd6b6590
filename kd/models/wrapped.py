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
    """The keys of a network of another library, including its name there."""

    name: str
    model: str
    pretrained: bool

    @property
    def title(self) -> str:
        """Return the display name."""
        return f"{self.name}-{self.model}{'-pretrained' if self.pretrained else ''}"


class Wrapped(Net):
    """Any classifier [B, 3, H, W] -> [B, classes] as a Net.

    A tap is a module that returns one tensor, by its dotted name: "layer1", "layer4.1.conv1". There
    are two more: "pool" [D], the input of the linear layer that computes the logits, and "head",
    the logits. "layer1.pre" is the input of the activation whose output is that of layer1, or equal
    to "layer1" if there is none. Hooks read the taps, for one pass.

    `shapes` lists the children of the network and the links of its chains, in the order in which
    they finish.
    """

    def __init__(self, make: Callable[[], nn.Module], size: int):
        """Build the network and find its linear classifier.

        Args:
            make: Builds the network.
            size: Images are size x size.

        Raises:
            RuntimeError: The network cannot be built, or does not accept images of this size.
        """
        try:
            super().__init__(net=_make_tappable(_construct(make)))
            self.classifier = self._find_classifier(size)
        except (AssertionError, ArithmeticError, IndexError, TypeError, ValueError) as error:
            raise RuntimeError(first_line(error)) from error

    @property
    def net(self) -> nn.Module:
        """Return the network of the other library."""
        return self.stages["net"]

    @property
    def head(self) -> nn.Module:
        """Return the linear layer that computes the logits.

        Raises:
            RuntimeError: The logits are not the output of a linear layer.
        """
        if self.classifier is None:
            raise RuntimeError(f"{type(self.net).__name__} does not end in a linear layer")
        return self.net.get_submodule(self.classifier)

    def tap_module(self, tap: str) -> nn.Module:
        """Return the module of the tap; for "pool" it is the one that reads the tap."""
        return self.head if tap in ("pool", "head") else self.net.get_submodule(tap)

    def forward_taps(self, x: Tensor, taps: Iterable[str] = ()) -> ModelOutput:
        """Compute logits and the named taps in one pass.

        Args:
            x: float32 tensor [B, 3, H, W], normalised images.
            taps: The names of the taps to return.

        Raises:
            RuntimeError: A tap is not a single tensor, or a later module wrote into it.
        """
        if not taps:  # without hooks, which torch.compile cannot trace
            return ModelOutput(self.net(x), {})
        logits, recorded = self._read(x, taps)
        for name, tap in recorded.items():
            if defect := tap.defect():
                raise RuntimeError(f"tap {name!r} of {type(self.net).__name__} {defect}")
        return ModelOutput(logits, {name: tap.value for name, tap in recorded.items()})

    def shapes(self, size: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tap, without the batch axis; that of the head is (classes,)."""
        candidates = set(_tap_names(self.net)) - {"pool", "head"}
        logits, recorded = self._forward_meta(size, candidates)
        values = {
            name: tap.value
            for name, tap in recorded.items()
            if not tap.defect() and tap.value is not logits
        }
        if self.classifier is not None:
            values["pool"] = self._forward_meta(size, ["pool"])[1]["pool"].value
        values |= {"head": logits}
        return {name: tuple(value.shape[1:]) for name, value in values.items() if value.ndim > 1}

    def _forward_meta(self, size: int, taps: Iterable[str]) -> tuple[Tensor, "dict[str, _Tap]"]:
        """Apply `_read` to a copy of the network on the meta device."""
        net = copy.deepcopy(self).to("meta").eval()
        with torch.no_grad():
            return net._read(torch.empty(1, 3, size, size, device="meta"), taps)

    def _find_classifier(self, size: int) -> str | None:
        """Return the name of the linear layer whose output is the logits, if there is one."""
        self.classifier = None
        modules = self.net.named_modules()
        linear_names = [name for name, module in modules if isinstance(module, nn.Linear)]
        logits, recorded = self._forward_meta(size, linear_names)
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            raise RuntimeError(f"{type(self.net).__name__} does not return logits")
        return next(
            (name for name, tap in recorded.items() if tap.value is logits and not tap.defect()),
            None,
        )

    def _read(self, x: Tensor, taps: Iterable[str]) -> tuple[Tensor, "dict[str, _Tap]"]:
        """Return the logits and the taps, in the order in which they are computed."""
        recorded: dict[str, _Tap] = {}
        with ExitStack() as hooks:
            for name in taps:
                module_name = name.removesuffix(PRE)
                record = partial(_record_tap, recorded, name)
                if module_name == "pool" and self.classifier is not None:
                    hooks.enter_context(
                        self.head.register_forward_pre_hook(
                            lambda _, inputs, record=record: record(inputs[0])
                        )
                    )
                elif module_name != "head":
                    module = self.net.get_submodule(module_name)
                    for handle in _add_hooks(module, name != module_name, record):
                        hooks.enter_context(handle)
            logits = self.net(x)
        for name in taps:
            if name.removesuffix(PRE) == "head":
                _record_tap(recorded, name, logits)
        return logits, recorded


CHAINS = nn.Sequential, nn.ModuleList


class _Tap:
    """The output of a module, and whether it can serve as a tap."""

    def __init__(self, value: Any, calls: int):
        self.value = value
        self.calls = calls
        self.version = version(value) if isinstance(value, Tensor) else 0

    def defect(self) -> str:
        """Return why this cannot serve as a tap, or "" if it can."""
        if self.calls > 1:
            return f"is not one tensor: the module runs {self.calls} times in a pass"
        if not isinstance(self.value, Tensor):
            return f"is not one tensor, but a {type(self.value).__name__}"
        if version(self.value) != self.version:
            return "was overwritten in place by a later module"
        return ""


def _tap_names(net: nn.Module) -> Iterator[str]:
    """Yield the names of the children of `net` and of the links of its chains.

    A chain is a Sequential or ModuleList among the children or their children.
    """
    for name, child in net.named_children():
        yield name
        for inner_name, inner in child.named_children():
            if isinstance(child, CHAINS):
                yield f"{name}.{inner_name}"
            elif isinstance(inner, CHAINS):
                yield from (f"{name}.{inner_name}.{link}" for link, _ in inner.named_children())


def _record_tap(recorded: dict[str, _Tap], name: str, value: Any) -> None:
    recorded[name] = _Tap(value, recorded[name].calls + 1 if name in recorded else 1)


def _add_hooks(
    module: nn.Module, before_activation: bool, record: Callable[[Any], None]
) -> Iterator[RemovableHandle]:
    """Call `record` with the output of `module`, and yield the hooks that do so.

    With `before_activation`, if that output comes from an activation inside the module, `record` is
    called with the input of the activation instead.
    """
    last_activation: list[Any] = [None, None]  # its input and output

    def on_activation(_: nn.Module, inputs: Any, output: Any) -> None:
        last_activation[:] = inputs[0], output

    def on_output(_: nn.Module, __: Any, output: Any) -> None:
        activation_input, activation_output = last_activation
        ends_in_activation = output is activation_output
        record(activation_input if before_activation and ends_in_activation else output)

    for inner in module.modules() if before_activation else ():
        if isinstance(inner, ACTIVATIONS):
            yield inner.register_forward_hook(on_activation)
    yield module.register_forward_hook(on_output)


class _ReLU(nn.ReLU):
    """An nn.ReLU that kd's kernels do not fuse with its norm, so that its input can be read."""


def _make_tappable(net: nn.Module) -> nn.Module:
    """Make the activations of `net` leave their input intact."""
    for module in net.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]
        if type(module) is nn.ReLU:
            module.__class__ = _ReLU
    return net


def _construct(make: Callable[[], nn.Module]) -> nn.Module:
    """Return `make()`, on the default device."""
    try:
        return make()
    except NotImplementedError:
        # it reads values from tensors, and those of the default device, meta, have none
        with torch.device("cpu"):
            net = make()
        return net.to(torch.get_default_device())


def pretrained_state(make: Callable[[], nn.Module], model: str) -> Callable[[], nn.Module]:
    """Wrap a function that builds a network and downloads its weights.

    The wrapper runs `make` on the CPU and suppresses its output. Then it moves the network to the
    default device, which is the meta device if only shapes are needed.

    Args:
        make: Builds the network.
        model: The name of the network for error messages.

    Returns:
        A function that raises UserError if `make` fails.
    """

    def build() -> nn.Module:
        previous_level = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            with torch.device("cpu"), redirect_stderr(io.StringIO()):
                net = make()
        except UserError:
            raise
        except Exception as error:  # the connection, the disk or the file may fail
            raise UserError(
                f"pretrained: cannot load the weights of {model} ({first_line(error)})"
            ) from error
        finally:
            logging.disable(previous_level)
        return net.to(torch.get_default_device())

    return build


def check_known_name(name: str, names: Iterable[str]) -> str:
    """Return `name` if it is one of `names`.

    Raises:
        ValueError: It is not; the message lists the nearest names.
    """
    names = list(names)
    if name not in names:
        near = difflib.get_close_matches(name, names, 3) or sorted(names)[:3]
        raise ValueError(f"{name!r} is not known; did you mean {' or '.join(near)}?")
    return name
