"""What a combination spends its time on, and which knob to turn next."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from fabric_lite.bench.results import Row

__all__ = ["Limit", "limit_of"]

# From these shares of a step on a part is worth a change. Saves are cheap to move, so less of them counts.
_WORTH_A_CHANGE = {"data": 0.15, "communication": 0.15, "optimizer": 0.15, "save": 0.05, "other": 0.15}
_WORDS = {
    "data": "waiting for data",
    "communication": "communication that nothing hides",
    "optimizer": "the optimizer",
    "save": "saving checkpoints",
    "other": "what lies between the phases: logging, metrics, the loop itself",
    "compute": "forward and backward",
}


@dataclasses.dataclass(frozen=True)
class Limit:
    """The largest cost of a step that is worth a change, or "compute" where there is none.

    Args:
        part: ``"data"``, ``"communication"``, ``"optimizer"``, ``"save"``, ``"other"`` or ``"compute"``.
        share: Of the time of a step.
        sentences: That in words, and what to try.
    """

    part: str
    share: float
    sentences: Sequence[str]


def limit_of(row: Row, rows: Sequence[Row], memory_limit: int | None = None) -> Limit | None:
    """What limits the row; None where its phases were not measured.

    Args:
        row: The winner.
        rows: All of them, to know what was already tried.
        memory_limit: Bytes of one accelerator, or on a CPU of the machine; None where they are not known.
    """
    whole = sum(row.phases.values())
    if whole <= 0:
        return None
    shares = {part: seconds / whole for part, seconds in _parts(row).items()}
    worth = {part: share for part, share in shares.items() if share >= _WORTH_A_CHANGE.get(part, 2.0)}
    part = max(worth, key=lambda name: worth[name], default="compute")
    sentences = [
        f"{row.combination.name} spends {shares[part]:.0%} of a step on {_WORDS[part]}. {_knob(part, row, rows)}"
    ]
    room = None if memory_limit is None else _said_of_room(row, memory_limit)
    return Limit(part, shares[part], [*sentences, *([] if room is None else [room])])


def _parts(row: Row) -> dict[str, float]:
    """Seconds of a step by part. What is exposed of the communication lies in the phases around it, backward first."""
    parts = {part: row.phases.get(part, 0.0) for part in ("data", "optimizer", "save", "other")}
    exposed = row.exposed_communication or 0.0
    compute = row.phases.get("forward", 0.0) + row.phases.get("backward", 0.0)
    return {**parts, "communication": exposed, "compute": max(0.0, compute - exposed)}


def _knob(part: str, row: Row, rows: Sequence[Row]) -> str:
    combination = row.combination
    is_sharded = combination.strategy.startswith(("fsdp", "hsdp"))
    beside = [other.combination for other in rows if other.combination.devices == combination.devices]
    strategies, precisions = {one.strategy for one in beside}, {one.precision for one in beside}
    if part == "data":
        return "Try: more workers, DataLoader(num_workers=4, persistent_workers=True), or cheaper transforms."
    if part == "save":
        return "Try: fabric.save(..., async_=True), or fewer saves."
    if part == "other":
        return "Try: log every 50 steps rather than each, and call .item() as seldom."
    if part == "communication":
        if is_sharded and "ddp" not in strategies:
            return "Try: --strategy ddp, which sends less, if a whole model fits on each device."
        return "Try: a larger batch, or gradient accumulation under fabric.no_backward_sync, so that fewer steps send."
    if part == "optimizer":
        if combination.strategy == "fsdp_cpu_offload":
            return "Try: --strategy fsdp, whose optimizer runs on the device, if its states fit there."
        may_shard = combination.devices > 1 and not is_sharded and "fsdp" not in strategies
        sharded = ", or --strategy fsdp, where each rank updates its part" if may_shard else ""
        return f"Try: torch.optim.AdamW(..., fused=True), one kernel rather than one a tensor{sharded}."
    knobs = ["torch.compile(model) before setup"]
    if combination.precision.startswith("32") and not any("16" in precision for precision in precisions):
        knobs.insert(0, "--precision bf16-mixed")
    # With more ranks than cores it is not known how long they wait for each other.
    measured = "" if combination.devices == 1 or row.exposed_communication is not None else " that was measured"
    return f"Nothing else{measured} is worth a change. Try: {', or '.join(knobs)}."


def _said_of_room(row: Row, memory_limit: int) -> str | None:
    """Say so where not even half of the memory is used. Ranks on a CPU share the machine's."""
    if row.memory is None:
        return None
    used = row.memory.device_reserved
    used = row.memory.resident * row.combination.devices if used is None else used
    if used > memory_limit / 2:
        return None
    return (
        f"It uses {used / 2**30:.2g} of {memory_limit / 2**30:.2g} GiB of memory, so there is room. "
        "Try: a larger batch, with the learning rate fitted to it."
    )
