"""While a block records: what torch is asked to do goes to the meta device, and reads of values are answered."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves, tree_map

from fabric_lite.deferred.log import Constant, Piece, facts_of, named_arguments
from fabric_lite.deferred.randomness import default_generator
from fabric_lite.deferred.recording import Recording, refuse_if_sparse
from fabric_lite.errors import StrategyError

__all__ = ["record"]

_META = torch.device("meta")


@contextlib.contextmanager
def record(device: torch.device | None = None) -> Iterator[Recording]:
    """A context in which tensors are made on the meta device, and what is done with them is written down.

    Of this thread only. To the code inside, its tensors are on ``device``; where it reads values (``tolist``, ``item``,
    a mask), those are computed at once, and thrown away. Inside another such block it is that one that goes on.

    Args:
        device: Where a plain construction would make its tensors; None is the CPU. Tensors that are made elsewhere
            on purpose are real.

    Raises:
        StrategyError: Inside, for a tensor without values that was made elsewhere.
    """
    outer = next((mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, _Operations)), None)
    if outer is not None:
        yield outer.recording
        return
    recording = Recording(torch.device("cpu") if device is None else device)
    with _Operations(recording), recording.device, _Reads(recording):
        yield recording
    recording.close()


class _Operations(TorchDispatchMode):
    """Runs each operation on the meta device instead, and logs it."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Else the first operation imports the compiler, to keep it out of here.
        return False

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():  # else _Reads would answer here too
            return self._run(func, args, kwargs or {})

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        facts, home = facts_of(func), self.recording.device.type
        tensors, target = _tensors(args, kwargs), kwargs.get("device")
        goes_home = target is None or torch.device(target).type in (home, "meta")
        if not any(tensor.is_meta for tensor in tensors):
            if func is torch.ops.aten.lift_fresh.default and args[0].device.type == home:
                # torch.tensor(data): its values are there already. They stay, so that it is one of ours.
                return self._made_of(args[0])
            makes = not tensors and facts.takes_device and goes_home and (target is not None or home == "cpu")
            if not makes and (target is None or torch.device(target).type != "meta"):
                self._prepare_real_draw(func, args, kwargs)
                return func(*args, **kwargs)
        self._check_origin(func, tensors)
        writes_real = any(not tensor.is_meta for tensor in self._written(func, args, kwargs))
        if facts.data_dependent or writes_real or not goes_home:
            self._prepare_real_draw(func, args, kwargs)
            return func(*tree_map(self._real, args), **tree_map(self._real, kwargs))
        return self._on_meta(func, args, kwargs)

    def _on_meta(self, func: Any, args: Any, kwargs: Any) -> Any:
        # Before the call: operations may change the geometry of what they are given.
        logged = tree_map(self._logged, (tuple(args), dict(kwargs)))
        options = tree_map(self._twin, dict(kwargs))
        if kwargs.get("device") is not None or not _tensors(args, kwargs):
            options["device"] = _META
            # Said always: the process's default device may be another one by then.
            logged[1]["device"] = self.recording.device
        if kwargs.get("generator") is not None:
            options["generator"] = None  # the meta device has no generators
        try:
            # Some of torch's meta kernels for draws are Python, and import the compiler.
            in_place = facts_of(func).draws_in_place
            result = args[0] if in_place else func(*tree_map(self._twin, args), **options)
        except NotImplementedError:
            # The shape of the result depends on values, or the operation has no meta kernel.
            result = self._shaped_by_values(func, args, kwargs)
        draw = None
        if facts_of(func).random:
            draw = self.recording.stream_of(self._generator(args, kwargs)).note()
        self.recording.add(func, logged[0], logged[1], tree_leaves(result), draw)
        return result

    def _shaped_by_values(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What the operation would return on the meta device, by a trial on real tensors."""
        written = self._written(func, args, kwargs)
        if written:
            return written[0]
        generator = self._generator(args, kwargs)
        state = generator.get_state()
        try:
            made = func(*tree_map(self._real, args), **tree_map(self._real, kwargs))
        finally:
            generator.set_state(state)
        for tensor in _tensors(made):
            refuse_if_sparse(func, tensor)
        return tree_map(_shell_of, made)

    def _written(self, func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
        named = named_arguments(func, args, kwargs).items()
        return _tensors([value for name, value in named if name in facts_of(func).written])

    def _logged(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return Piece.of(value) if value.is_meta else Constant(value)

    def _twin(self, value: Any) -> Any:
        """A meta tensor for a real one; those without dims stay, they go with any device."""
        is_twin = isinstance(value, torch.Tensor) and not value.is_meta and value.dim() > 0
        return torch.empty_like(value, device=_META) if is_twin else value

    def _made_of(self, real: torch.Tensor) -> torch.Tensor:
        """A meta tensor of the log whose values are those of a real one."""
        copy = torch.ops.aten.clone.default
        result = copy(torch.empty_like(real, device=_META))
        self.recording.add(copy, (Constant(real),), {}, [result], None)
        return result

    def _real(self, value: Any) -> Any:
        is_ours = isinstance(value, torch.Tensor) and value.is_meta
        return self.recording.value(value) if is_ours else value

    def _generator(self, args: Any, kwargs: Any) -> torch.Generator:
        given = kwargs.get("generator")
        if given is not None:
            return given
        tensors = [tensor for tensor in _tensors(args, kwargs) if not tensor.is_meta]
        place = kwargs.get("device") or (tensors[0].device if tensors else self.recording.device)
        return default_generator(torch.device(place))

    def _check_origin(self, func: Any, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            if tensor.is_meta and not self.recording.stands_for_real(tensor):
                raise StrategyError(
                    f"{func} was given a tensor without values that this block of "
                    "fabric.init_module(empty_init=True) did not make.",
                    given=f"meta tensor of shape {tuple(tensor.shape)}",
                    fix="make all parts of a model in one block",
                )

    def _prepare_real_draw(self, func: Any, args: Any, kwargs: Any) -> None:
        if facts_of(func).random:
            stream = self.recording.streams.get(self._generator(args, kwargs))
            if stream is not None:
                self.recording.catch_up(stream)


def _shell_of(value: Any) -> Any:
    """A meta tensor that looks like a real one."""
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=_META)


def _tensors(*values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


class _Reads(TorchFunctionMode):
    """Lets recorded tensors look as if they were on the device, and answers reads that no operation stands for."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        answer, kwargs = _answers().get(func), kwargs or {}
        out = kwargs.get("out")
        if isinstance(out, torch.Tensor) and self.recording.stands_for_real(out):
            # ``torch.eye(out=...)`` refuses the device that the outer context would add.
            with _META:
                return func(*args, **kwargs)
        if answer is not None and isinstance(args[0], torch.Tensor) and self.recording.stands_for_real(args[0]):
            return answer(self.recording, func, args, kwargs)
        return func(*args, **kwargs)


# The ways in which a recorded tensor answers: each is given the recording, the function and its arguments.


def _read(recording: Recording, func: Any, args: Any, kwargs: Any) -> Any:
    return func(recording.value(args[0]), *args[1:], **kwargs)


def _to(recording: Recording, func: Any, args: Any, kwargs: Any) -> Any:
    """A move to where the tensor is said to be gives the tensor itself, as in a plain construction."""

    def stays(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value if value.is_meta or value.device.type != home else torch.empty_like(value, device=_META)
        is_place = isinstance(value, (str, torch.device))
        return _META if is_place and torch.device(value).type == home else value

    home = recording.device.type
    return func(args[0], *map(stays, args[1:]), **{name: stays(value) for name, value in kwargs.items()})


def _to_kind(kind: str) -> Callable[..., Any]:
    def move(recording: Recording, func: Any, args: Any, kwargs: Any) -> Any:
        return args[0] if recording.device.type == kind else func(*args, **kwargs)

    return move


def _tells(fact: Callable[[torch.device], Any]) -> Callable[..., Any]:
    return lambda recording, *_: fact(recording.device)


@functools.cache
def _answers() -> dict[Any, Callable[..., Any]]:
    tensor: Any = torch.Tensor
    return {
        tensor.device.__get__: _tells(lambda device: device),
        # torch.nn.init leaves tensors alone that say that they are on the meta device; so may models.
        tensor.is_meta.__get__: _tells(lambda _: False),
        tensor.is_cpu.__get__: _tells(lambda device: device.type == "cpu"),
        tensor.is_cuda.__get__: _tells(lambda device: device.type == "cuda"),
        **dict.fromkeys((tensor.tolist, tensor.numpy, tensor.__array__), _read),
        tensor.to: _to,
        tensor.cpu: _to_kind("cpu"),
        tensor.cuda: _to_kind("cuda"),
    }
