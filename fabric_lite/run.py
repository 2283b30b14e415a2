"""From the arguments of ``Fabric``, the command line and the environment to one frozen description of the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fabric_lite.device import Accelerator, check_device, choose_accelerator, parse_devices
from fabric_lite.errors import FabricTypeError, FabricValueError, LaunchError
from fabric_lite.mesh import existing_group
from fabric_lite.precision import AMBIGUOUS_ALIASES, Precision, parse_precision
from fabric_lite.run_config import RUN_ID_PREFIX, RunConfig
from fabric_lite.strategies import Strategy, parse_strategy
from fabric_lite.topology import (
    Topology,
    check_mpi4py,
    is_lone_shell,
    is_node_of_several,
    read_topology,
    topology_of_group,
)

__all__ = ["Arguments", "Run", "resolve"]


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The arguments of ``Fabric``, as given."""

    accelerator: str | Accelerator = "auto"
    strategy: str | Strategy = "auto"
    devices: int | str | Sequence[int] = "auto"
    num_nodes: int = 1
    precision: str | int | Precision | None = None


@dataclasses.dataclass(frozen=True)
class Run:
    """What was asked for, parsed and checked.

    Args:
        accelerator: The kind of device.
        device: This rank's device.
        strategy: With its precision filled in.
        precision: The dtypes of the run.
        topology: This process's place; for a run that is not launched yet, rank 0 of all.
        needs_launch: Whether ``launch()`` has yet to start the processes.
        config: The arguments that the ranks are started with.
        notices: Lines that the user should see once.
    """

    accelerator: Accelerator
    device: torch.device
    strategy: Strategy
    precision: Precision
    topology: Topology
    needs_launch: bool
    config: RunConfig
    notices: tuple[str, ...] = ()


def resolve(arguments: Arguments, plugins: Any, config: RunConfig | None, environ: Mapping[str, str]) -> Run:
    """Return the run that these arguments, ``fabric-run``'s ``config`` and the environment describe.

    Raises:
        FabricValueError: An argument's value is not allowed, or two of them set the same thing.
        FabricTypeError: An argument has the wrong type.
        LaunchError: The processes that a launcher started are not those asked for.
    """
    notices: list[str] = []
    arguments = _with_plugins(_in_lower_case(arguments), plugins)
    arguments = _with_command_line(arguments, config, notices)
    _check_num_nodes(arguments.num_nodes)
    precision = parse_precision(arguments.precision)
    if not isinstance(arguments.precision, Precision) and str(arguments.precision) in AMBIGUOUS_ALIASES:
        notices.append(f"precision={arguments.precision!r} means {precision.name!r}; write it out to silence this line")
    accelerator = choose_accelerator(arguments.accelerator)
    indices = parse_devices(arguments.devices, accelerator)
    topology = _place(_own_variables(environ, config, notices))
    needs_launch = False
    if topology.is_managed:
        indices = _reconcile(arguments, indices, topology, accelerator, config)
    else:
        indices = _by_itself(arguments, indices, accelerator)
        needs_launch = len(indices) > 1
        topology = dataclasses.replace(topology, world_size=len(indices), local_world_size=len(indices))
    is_tpu = arguments.strategy == "auto" and accelerator.device_type == "xla"
    strategy = parse_strategy("xla" if is_tpu else arguments.strategy, topology.world_size)
    _check_fits(strategy, accelerator)
    if strategy.precision is not None:
        own = parse_precision(strategy.precision)
        if arguments.precision is not None and own != precision:
            raise _precision_twice(f"precision={precision.name!r} and {own.name!r} in the strategy")
        precision = own
    device = accelerator.device(indices[topology.local_rank])
    check_device(device, precision, topology.world_size, strategy.is_sharded)
    return Run(
        accelerator,
        device,
        strategy.with_precision(precision),
        precision,
        topology,
        needs_launch,
        _config_of(arguments, indices, config),
        tuple(notices),
    )


def _place(environ: Mapping[str, str]) -> Topology:
    """This process's place; in a process group that exists already, that of the group.

    Ray's workers, say, have the Slurm variables of the daemon that started them.
    """
    group = existing_group()
    if group is None:
        topology = read_topology(environ)
        check_mpi4py(topology)
        return topology
    try:
        topology = read_topology(environ)
    except LaunchError:
        return topology_of_group(environ, *group)
    # RANK and WORLD_SIZE are for those who make a group: one of another size is a mistake, see join().
    if (topology.rank, topology.world_size) == group or "RANK" in environ:
        return topology
    return topology_of_group(environ, *group)


def _own_variables(environ: Mapping[str, str], config: RunConfig | None, notices: list[str]) -> Mapping[str, str]:
    """The environment; without the variables of a rank whose subprocess this is.

    A rank that fabric_lite started has a run config in its memory, its subprocess only inherits the variables. Taken
    for a rank, it would wait for ever in the store of its parent's job.
    """
    if config is not None or not environ.get("TORCHELASTIC_RUN_ID", "").startswith(RUN_ID_PREFIX):
        return environ
    notices.append("this is a subprocess of a rank, and runs by itself")
    own = {name: value for name, value in environ.items() if name not in ("RANK", "WORLD_SIZE")}
    # What fabric-run was started in has no ranks of its own, so neither is this one.
    return {} if is_lone_shell(own) or is_node_of_several(own) else own


def _plain(value: Any) -> Any:
    return value.strip().lower() if isinstance(value, str) else value


def _in_lower_case(arguments: Arguments) -> Arguments:
    """All names as the rest of this file, and every parser, compares them."""
    return Arguments(*(_plain(getattr(arguments, field.name)) for field in dataclasses.fields(arguments)))


def _with_command_line(arguments: Arguments, config: RunConfig | None, notices: list[str]) -> Arguments:
    """The command line wins over an argument in the script, and one line says so."""
    if config is None:
        return arguments
    defaults = Arguments()
    for name in ("accelerator", "strategy", "devices", "num_nodes", "precision"):
        told, written = _plain(getattr(config, name)), getattr(arguments, name)
        if told is None:
            continue
        if written != getattr(defaults, name) and str(written) != str(told):
            notices.append(
                f"the command line's --{name.replace('_', '-')} {told} wins over {name}={written!r} in the script"
            )
        arguments = dataclasses.replace(arguments, **{name: told})
    return arguments if config.only_accelerator is None else _with_the_only(arguments, config.only_accelerator)


def _with_the_only(arguments: Arguments, only: str) -> Arguments:
    """The one kind of device that the rank was given; another one that is asked for by its name is an error."""
    wanted = arguments.accelerator
    if (wanted.device_type if isinstance(wanted, Accelerator) else wanted) not in ("auto", only):
        raise FabricValueError(
            "This rank was given none of the devices that are asked for.",
            given=f"accelerator={wanted!r}, and resources for {only!r} alone",
            fix="a GPU for each rank (resources_per_rank, --gpus-per-rank), or accelerator='auto'",
        )
    return dataclasses.replace(arguments, accelerator=only)


def _with_plugins(arguments: Arguments, plugins: Any) -> Arguments:
    given = [] if plugins is None else list(plugins) if isinstance(plugins, (list, tuple)) else [plugins]
    seen: Precision | None = None
    for plugin in given:
        if isinstance(plugin, str):
            plugin = parse_precision(plugin)
        if not isinstance(plugin, Precision):
            raise FabricTypeError(
                "This plugin is of no known kind.", given=f"plugins={plugin!r}", fix="a Precision (or its name)"
            )
        if seen is not None or arguments.precision is not None:
            raise _precision_twice(f"precision={arguments.precision or seen!s} and plugins={plugin.name!r}")
        seen = plugin
    return arguments if seen is None else dataclasses.replace(arguments, precision=seen)


def _precision_twice(given: str) -> FabricValueError:
    return FabricValueError(
        "The precision is set twice: choose one.",
        given=given,
        fix="one of precision=, a Precision in plugins=, and the strategy's own",
    )


def _check_num_nodes(num_nodes: Any) -> None:
    if isinstance(num_nodes, bool) or not isinstance(num_nodes, int):
        raise FabricTypeError("num_nodes must be an int.", given=f"num_nodes={num_nodes!r}", fix="num_nodes=1")
    if num_nodes < 1:
        raise FabricValueError("There is at least one node.", given=f"num_nodes={num_nodes}", fix="num_nodes=1")


def _by_itself(arguments: Arguments, indices: tuple[int, ...], accelerator: Accelerator) -> tuple[int, ...]:
    """The devices of a script that no launcher started."""
    if arguments.num_nodes > 1:
        raise LaunchError(
            "Several nodes cannot be started from one script.",
            given=f"num_nodes={arguments.num_nodes} and 1 process, which no launcher has started",
            fix="fabric-run --num-nodes, torchrun or srun on every node",
        )
    takes_one = arguments.strategy == "single_device" and arguments.devices == "auto"
    return indices[:1] if takes_one and accelerator.device_type != "cpu" else indices


def _reconcile(
    arguments: Arguments,
    indices: tuple[int, ...],
    topology: Topology,
    accelerator: Accelerator,
    config: RunConfig | None,
) -> tuple[int, ...]:
    """Hold what was asked for against the processes that are there."""
    asked = None if arguments.devices in ("auto", -1, "-1") else len(indices)
    # fabric-run's may be the greatest number of nodes.
    nodes = topology.num_nodes if config is not None and config.num_nodes is not None else arguments.num_nodes
    if asked is not None:
        _check_devices(arguments, asked, max(nodes, topology.num_nodes), topology)
    if nodes not in (1, topology.num_nodes):
        raise LaunchError(
            "The number of nodes asked for is not the number started.",
            given=f"num_nodes={arguments.num_nodes} and {topology.num_nodes} by {topology.source}",
            fix="leave num_nodes out: it comes from the launcher",
        )
    if asked is not None:
        return indices
    if accelerator.device_type == "cpu":
        return tuple(range(topology.local_world_size))
    if len(indices) < topology.local_world_size:
        raise LaunchError(
            "More processes were started on this node than it has devices.",
            given=f"{topology.local_world_size} processes, {len(indices)} devices of type {accelerator.device_type}",
            fix="start one process per device, or accelerator='cpu'",
        )
    return indices[: topology.local_world_size]


def _check_devices(arguments: Arguments, asked: int, nodes: int, topology: Topology) -> None:
    """Raise unless every node has as many processes as devices were asked for; on all ranks, or those that are left
    would wait for them."""
    if asked == topology.local_world_size and asked * nodes == topology.world_size:
        return
    raise LaunchError(
        "The number of devices asked for is not the number of processes started on this node, or on another.",
        given=f"devices={arguments.devices!r} on {_counted(nodes, 'node')}, so {_counted(asked * nodes, 'process')}, "
        f"and {topology.world_size} started by {topology.source} on {_counted(topology.num_nodes, 'node')}, "
        f"{topology.local_world_size} of them here",
        fix=f"{_command(topology, asked, nodes)}, or devices='auto' in the script",
    )


def _counted(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}{'es' if word.endswith('s') else 's'}"


def _command(topology: Topology, devices: int, nodes: int) -> str:
    if topology.source.startswith("Slurm"):
        return f"srun --nodes={nodes} --ntasks-per-node={devices}"
    if "mpirun" in topology.source:
        return f"mpirun -n {devices * nodes}"
    if "jsrun" in topology.source:
        return f"jsrun --nrs {devices * nodes} --rs_per_host {devices}"
    return f"fabric-run --devices {devices}"


def _check_fits(strategy: Strategy, accelerator: Accelerator) -> None:
    kind, needed = accelerator.device_type, strategy.device_type
    # On XLA a strategy has to say when what was collected runs.
    if needed not in (None, kind) or (needed is None and kind == "xla"):
        raise FabricValueError(
            "This strategy and this accelerator do not go together.",
            given=f"{type(strategy).__name__} is for {needed or 'all devices but xla'}, accelerator {kind!r}",
            fix="accelerator='tpu', strategy='auto' for a TPU; else another strategy",
        )


def _config_of(arguments: Arguments, indices: tuple[int, ...], config: RunConfig | None) -> RunConfig:
    """What the ranks of an in-script launch are told: how many they are; all else stands in the script."""
    base = config or RunConfig()
    if arguments.accelerator in ("auto", "cpu") and indices == tuple(range(len(indices))):
        return dataclasses.replace(base, devices=str(len(indices)))
    return dataclasses.replace(base, devices=",".join(map(str, indices)))
