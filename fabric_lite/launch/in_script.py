"""Starting ranks from inside a running program.

``fabric.launch()`` turns the program into a supervisor of ranks that run its script from the top
(:func:`supervise_script`); ``fabric.launch(function)`` starts processes that run one function (:func:`run_function`).
"""

from __future__ import annotations

import atexit
import inspect
import os
import sys
import threading
from collections.abc import Sequence
from typing import Any, NoReturn

from fabric_lite.errors import FabricError, FabricTypeError, LaunchError
from fabric_lite.launch.function_ranks import StartMethod, run_function
from fabric_lite.launch.job import print_line
from fabric_lite.launch.plan import LaunchPlan
from fabric_lite.launch.rank import ScriptCall
from fabric_lite.launch.supervisor import launch
from fabric_lite.run_config import RunConfig

__all__ = ["check_function", "choose_start_method", "run_function", "supervise_script"]

_OPTIONS_WITH_VALUE = ("-W", "-X", "--check-hash-based-pycs")


def supervise_script(config: RunConfig) -> NoReturn:
    """Run this program's script from the top in ``config.devices`` ranks and exit with their exit code; never returns.

    This process holds no rank. Exit handlers that the program has registered run; its ``finally`` and ``except``
    blocks do not, because what they belong to happens in the ranks.

    Raises:
        LaunchError: There is no script to run again, or this is not the main thread.
    """
    script = _running_script()
    if threading.current_thread() is not threading.main_thread():
        raise LaunchError(
            "launch() has to be called from the main thread: it waits for signals until the ranks end.",
            given=threading.current_thread().name,
            fix="call it before starting threads, or start the script with fabric-run",
        )
    sys.stdout.flush()
    try:
        code = launch(LaunchPlan(script, config))
    except FabricError as error:
        print_line(f"{type(error).__name__}: {error}")
        code = 1
    except SystemExit as error:  # Ctrl-C or SIGTERM while no rank ran
        code = int(error.code or 0)
    # Threads and frames of this program must not run on: SystemExit could be caught, and would run its finally blocks.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def choose_start_method(asked: StartMethod | None) -> StartMethod:
    """Return how ``launch(function)`` starts processes: as asked, else fork in a notebook and spawn in a script.

    A function that was typed into a notebook cannot be imported by a process that starts afresh.
    """
    return asked or ("fork" if _is_interactive() else "spawn")


def check_function(function: Any) -> None:
    """Raise unless ``function(fabric, ...)`` can be called.

    Raises:
        FabricTypeError: It is not callable, or takes no argument.
    """
    right = "def train(fabric): ...; fabric.launch(train)"
    if not callable(function):
        raise FabricTypeError(
            "launch() takes a function.", given=f"launch({function!r})", fix=f"{right}, without calling it"
        )
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        return  # a builtin without a signature: the call itself will tell
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if not any(p.kind in positional or p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
        name = getattr(function, "__qualname__", repr(function))
        raise FabricTypeError(
            "The function needs a parameter for fabric: launch() passes it first.", given=f"{name}()", fix=right
        )


def _is_interactive() -> bool:
    main_module = sys.modules["__main__"]
    # The file of a script that comes from a pipe is called "<stdin>".
    return hasattr(sys, "ps1") or not os.path.isfile(getattr(main_module, "__file__", None) or "")


def _running_script() -> ScriptCall:
    """Return how this program was started: Python's own command line, as it was before the program could change it."""
    main_module = sys.modules["__main__"]
    if _is_interactive():
        raise LaunchError(
            "launch() would run the script again in every rank, and there is no script here.",
            given="an interactive interpreter, a notebook, python -c, or a script from a pipe",
            fix="fabric.launch(function), with everything the ranks do inside the function",
        )
    spec = getattr(main_module, "__spec__", None)
    arguments = _script_arguments(sys.orig_argv)
    if spec is not None:
        return ScriptCall(spec.name.removesuffix(".__main__"), True, arguments)
    return ScriptCall(os.path.abspath(main_module.__file__ or ""), False, arguments)


def _script_arguments(command: Sequence[str]) -> tuple[str, ...]:
    """Return what follows the script, or the module, in ``python [OPTIONS] SCRIPT|-m MODULE [ARGUMENTS...]``."""
    words = iter(command[1:])
    for word in words:
        if word in _OPTIONS_WITH_VALUE:
            next(words, None)
        elif word == "-m":
            next(words, None)
            break
        elif not word.startswith("-") or word.startswith("-m"):
            break
        elif word.endswith("m"):  # options that need no dash of their own: -um module
            next(words, None)
            break
    return tuple(words)
