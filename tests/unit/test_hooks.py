"""A callback's method gets the arguments that it takes, and no others."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import pytest

from fabric_lite.hooks import call_hook, has_hook


class Records:
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def nothing(self) -> None:
        self.seen.append(())

    def one(self, first: Any) -> None:
        self.seen.append(first)

    def one_by_position(self, first: Any, /) -> None:
        self.seen.append(first)

    def one_and_a_keyword(self, first: Any, *, key: Any = None) -> None:
        self.seen.append((first, key))

    def all_of_them(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append((args, kwargs))

    kept: Any = "no method"


EXPECTED: dict[str, Any] = {
    "nothing": (),
    "one": 1,
    "one_by_position": 1,
    "one_and_a_keyword": (1, 3),
    "all_of_them": ((1, 2), {"key": 3, "other": 4}),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_surplus_arguments_by_position_and_by_keyword_are_left_out(name: str) -> None:
    records = Records()
    call_hook([records], name, 1, 2, key=3, other=4)
    assert records.seen == [EXPECTED[name]]


def test_functions_static_methods_and_builtins_are_counted_without_self() -> None:
    seen: list[Any] = []

    class Holder:
        static = staticmethod(lambda first: seen.append(first))
        builtin = seen.append

        def __init__(self) -> None:
            self.function = lambda first: seen.append(first)

    for name in ("static", "function", "builtin"):
        call_hook([Holder()], name, name, "surplus")
    assert seen == ["static", "function", "builtin"]


def test_an_object_without_a_hash_is_called_too() -> None:
    @dataclass
    class Adds:  # its equality takes its hash away
        to: list[Any]

        def __call__(self, first: Any) -> None:
            self.to.append(first)

    class Holder:
        def __init__(self) -> None:
            self.hook = Adds([])

    holder = Holder()
    for number in range(2):
        call_hook([holder], "hook", number, "surplus")
    assert holder.hook.to == [0, 1]


def test_a_hook_that_was_made_in_place_is_not_kept_with_what_it_holds() -> None:
    class Model:
        pass

    def run() -> weakref.ref[Model]:
        model = Model()
        records = Records()
        records.kept = lambda: model
        call_hook([records], "kept")
        return weakref.ref(model)

    assert run()() is None


def test_a_missing_argument_is_still_the_users_error() -> None:
    with pytest.raises(TypeError, match="first"):
        call_hook([Records()], "one")


def test_callbacks_without_the_method_are_passed_over() -> None:
    call_hook([Records(), object()], "unknown", 1)
    call_hook([Records()], "kept", 1)
    assert has_hook([object(), Records()], "one")
    assert not has_hook([Records()], "kept")


def test_what_came_by_position_does_not_come_by_name_again() -> None:
    class Both:
        def hook(self, trainer: Any, batch_idx: int, *, fabric: Any = None) -> None:
            seen.append((trainer, batch_idx, fabric))

        def only_named(self, *, batch_idx: int) -> None:
            seen.append(batch_idx)

    seen: list[Any] = []
    call_hook([Both()], "hook", "trainer", 3, trainer="named", batch_idx=4, fabric="fabric")
    call_hook([Both()], "only_named", "trainer", 3, trainer="named", batch_idx=4)
    assert seen == [("trainer", 3, "fabric"), 4]
