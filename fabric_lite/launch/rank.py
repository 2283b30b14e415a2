"""A rank: the user's script, in a process forked from the server, as if started by ``python script.py``.

This is the one place that writes the environment of a running process: the rank's own, before the script's first line.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import faulthandler
import functools
import gc
import importlib.util
import io
import os
import sys
import threading
import time
import types
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import InspectLoader
from importlib.machinery import SourceFileLoader
from typing import NoReturn, TypeVar

from fabric_lite import process_end, run_config
from fabric_lite.errors import LaunchError
from fabric_lite.launch.failure import describe_exception, python_exit_code, user_traceback, write_error_file
from fabric_lite.launch.messages import Channel, FailureNoted, JobHangs, RankFailed, RankLeft, StartRank

__all__ = ["ScriptCall", "become_rank", "load_main", "run_rank", "run_to_end"]

Value = TypeVar("Value")

_NOTED_TIMEOUT_SECONDS = 5.0
# How a script ends that exits by itself with such a code.
_STATUS = {0: "success", run_config.EXIT_PREEMPTED: "aborted"}
_APPENDING = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC


@dataclasses.dataclass(frozen=True)
class ScriptCall:
    """What every rank runs.

    Args:
        target: The path of a script, or the name of a module.
        is_module: Whether it is a module (``-m``).
        arguments: The script's own command line.
    """

    target: str
    is_module: bool
    arguments: tuple[str, ...]


def run_rank(script: ScriptCall, request: StartRank, server: Channel) -> None:
    """Run the script in this freshly forked process; leaves by SystemExit unless the script ran to its end."""
    rank = os.getpid()
    _prepare_process(request, server)
    try:
        main_module, code = load_main(script)
        run_to_end(lambda: exec(code, main_module.__dict__))
    except BaseException as error:
        if os.getpid() != rank:
            _leave_at_once(error)
        # Now, because gloo's connections close when Python ends, and the others fail by that.
        if isinstance(error, SystemExit):
            _announce_exit(error, request, server)
            if process_end.is_quick() and python_exit_code(error) == 0:
                _leave_at_once(error)
            raise
        _report(error, request, server)
        sys.exit(python_exit_code(error))
    else:
        if os.getpid() != rank:
            _leave_at_once(None)
        server.send(RankLeft(request.local_rank, time=time.monotonic()))


def run_to_end(program: Callable[[], Value]) -> Value:
    """Call what a rank runs, and wait for what it has left to do beside it; what goes wrong there is its exception.

    One that exits with a code of its own or raises has failed already.
    """
    try:
        value = program()
    except BaseException as error:
        code = python_exit_code(error)
        is_leaving = isinstance(error, SystemExit) and code in _STATUS
        process_end.note_status(_STATUS[code] if is_leaving else "failed")
        if is_leaving:
            process_end.finish()
        raise
    process_end.finish()
    return value


def _leave_at_once(error: BaseException | None) -> NoReturn:
    """End this process as Python does, but without taking torch apart.

    For a process that the script has forked, whose business it is and not the rank's: taking torch apart would wait for
    gloo's threads, which were not forked. And for ranks that are to be quick.
    """
    if isinstance(error, SystemExit) and not isinstance(error.code, int) and error.code is not None:
        print(error.code, file=sys.stderr)
    elif error is not None and not isinstance(error, SystemExit):
        error.__traceback__ = user_traceback(error.__traceback__)
        sys.excepthook(type(error), error, error.__traceback__)
    # As multiprocessing's processes do: it wakes the workers of executors, which a join alone would wait for for ever.
    threading._shutdown()  # type: ignore[attr-defined]  # it has no public name
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if error is None else python_exit_code(error))


def _announce_exit(error: SystemExit, request: StartRank, server: Channel) -> None:
    details = describe_exception(error)
    code, now = python_exit_code(error), time.monotonic()
    if code == 0:
        location = details["message"]["extraInfo"]["location"]
        server.send(RankLeft(request.local_rank, location, now))
        return
    server.send(RankFailed(request.local_rank, details, code, now, True, process_end.is_pending()))
    _await_noted(server)
    _send_stderr_to_log(request)
    if not isinstance(error.code, int):
        print(error.code, file=sys.stderr)  # the first words of it are in the report
        error.code = code


def _prepare_process(request: StartRank, server: Channel) -> None:
    for descriptor, target in ((request.stdout_fd, 1), (request.stderr_fd, 2)):
        if descriptor is not None:
            os.dup2(descriptor, target)
    become_rank(request.environment, run_config.RunConfig(**request.run_config))
    run_config.install_hang_reporter(functools.partial(_report_hang, request, server))
    # Registered first, hence run last: what hangs in the script's own exit handlers can still be told.
    atexit.register(server.close)
    # A segmentation fault, or an abort inside C++, tells the Python line in the log; the report takes it from there.
    faulthandler.enable(os.open(request.error_log, _APPENDING, 0o666))
    gc.enable()
    if "numpy" in sys.modules:
        # Processes that start afresh do not draw the same numbers; forked ones would. random reseeds itself.
        sys.modules["numpy"].random.seed()
    _use_threads(request.run_config["threads_per_rank"])


def become_rank(environment: Mapping[str, str], config: run_config.RunConfig) -> None:
    """Give this process the place of a rank, before the user's first line."""
    os.environ.update(environment)
    run_config.install(config)


def _use_threads(threads: int | None) -> None:
    # OMP_NUM_THREADS was read when the server loaded OpenMP; it differs where devices had to be counted first.
    if threads is not None:
        import torch

        os.environ["OMP_NUM_THREADS"] = str(threads)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def load_main(script: ScriptCall) -> tuple[types.ModuleType, types.CodeType]:
    """Make the module ``__main__`` what Python makes it; pickle, spawned processes and tracebacks look there.

    runpy is no help: it puts the old ``__main__`` back when the script ends, before exit handlers and threads do.
    """
    main_module = types.ModuleType("__main__")
    main_module.__dict__["__builtins__"] = __builtins__
    # multiprocessing, which torch imports, keeps this alias: classes of the script come back from spawned processes so.
    sys.modules["__main__"] = sys.modules["__mp_main__"] = main_module
    load = _load_module if script.is_module else _load_script
    return main_module, load(script, main_module)


def _load_script(script: ScriptCall, main_module: types.ModuleType) -> types.CodeType:
    path = os.path.abspath(script.target)
    main_module.__file__ = path
    main_module.__loader__ = SourceFileLoader("__main__", path)
    main_module.__dict__["__cached__"] = None
    sys.argv = [script.target, *script.arguments]
    sys.orig_argv = [sys.executable, *sys.argv]
    # Links are followed, as Python does.
    _set_first_path(os.path.dirname(os.path.realpath(path)))
    with io.open_code(path) as file:
        return compile(file.read(), path, "exec")


def _load_module(script: ScriptCall, main_module: types.ModuleType) -> types.CodeType:
    sys.argv = ["-m", *script.arguments]
    sys.orig_argv = [sys.executable, "-m", script.target, *script.arguments]
    _set_first_path(os.getcwd())
    spec = importlib.util.find_spec(script.target)
    if spec is not None and spec.submodule_search_locations is not None:
        spec = importlib.util.find_spec(f"{script.target}.__main__")
    loader = None if spec is None else spec.loader
    code = loader.get_code(spec.name) if spec is not None and isinstance(loader, InspectLoader) else None
    if spec is None or code is None:
        raise LaunchError(
            "The module to run was not found, or is a package without __main__.",
            given=f"-m {script.target}, searched from {os.getcwd()}",
            fix="name a module that Python can import, or give the script's path without -m",
        )
    main_module.__file__ = spec.origin
    main_module.__loader__ = spec.loader
    main_module.__package__ = spec.parent
    main_module.__spec__ = spec
    sys.argv[0] = spec.origin or "-m"
    return code


def _set_first_path(folder: str) -> None:
    if not getattr(sys.flags, "safe_path", False):
        sys.path.insert(0, folder)


def _report(error: BaseException, request: StartRank, server: Channel) -> None:
    """Tell error file, server and log about the exception."""
    now = time.monotonic()
    trace = user_traceback(error.__traceback__)
    error.__traceback__ = trace
    details = describe_exception(error)
    write_error_file(os.environ["TORCHELASTIC_ERROR_FILE"], details)
    is_saving = process_end.is_pending()
    server.send(RankFailed(request.local_rank, details, python_exit_code(error), now, is_saving=is_saving))
    _await_noted(server)
    _send_stderr_to_log(request)
    with open(request.error_log, "a") as log, contextlib.redirect_stderr(log):
        sys.excepthook(type(error), error, trace)


def _await_noted(server: Channel) -> None:
    server.connection.settimeout(_NOTED_TIMEOUT_SECONDS)
    with contextlib.suppress(TimeoutError):  # the failure is reported all the same
        answers = server.receive()
        assert all(answer == FailureNoted() for answer in answers), answers


def _send_stderr_to_log(request: StartRank) -> None:
    """From here on; on the terminal the traceback, and what torch says on its way out, would bury the report."""
    sys.stderr.flush()
    log = os.open(request.error_log, _APPENDING, 0o666)
    os.dup2(log, 2)
    os.close(log)


def _report_hang(request: StartRank, server: Channel, lines: Sequence[str]) -> None:
    if not server.is_closed:
        server.send(JobHangs(request.local_rank, list(lines), time.monotonic()))
