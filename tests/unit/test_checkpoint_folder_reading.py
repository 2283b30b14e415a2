"""Folders are read as the manifest says, box by box; what is damaged, missing or replaced is said and not loaded."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fabric_lite.checkpoint import CheckpointNotFoundError, load, load_raw, save, stored
from fabric_lite.checkpoint.folder_reading import CheckpointFolder, read_folder, verify_folder
from fabric_lite.checkpoint.manifest import Chunk, Manifest, Part, TensorEntry, encode
from fabric_lite.checkpoint.stored import Located, Piece, Storage, StoredTensor, materialized
from fabric_lite.checkpoint.stored_files import OpenFile
from fabric_lite.errors import CheckpointError, FabricValueError
from fabric_lite.testing import RankPool
from tests.models import mesh_of

Box = tuple[tuple[int, ...], tuple[int, ...]]


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def write_by_hand(folder: Path, content: Any, cuts: Callable[[torch.Tensor], list[Box]], parts: int = 2) -> None:
    """A folder as the format's description has it, the boxes of each tensor dealt out to the parts in turn."""
    folder.mkdir()
    tensors: list[torch.Tensor] = []
    encoded = encode(content, lambda tensor: tensors.append(tensor) or len(tensors) - 1)  # type: ignore[func-returns-value]
    boxes = [(number, box) for number, tensor in enumerate(tensors) for box in cuts(tensor)]
    chunks: dict[int, list[Chunk]] = {number: [] for number in range(len(tensors))}
    described: dict[str, Part] = {}
    for part in range(parts):
        name = f"part-{part:05d}.safetensors"
        mine = [entry for index, entry in enumerate(boxes) if index % parts == part]
        data = [raw(tensors[number][tuple(slice(o, o + s) for o, s in zip(*box, strict=True))]) for number, box in mine]
        header = json.dumps({"__metadata__": {"who": "a test"}}).encode()
        head = len(header).to_bytes(8, "little") + header
        begin = len(head)
        for (number, (offset, shape)), piece in zip(mine, data, strict=True):
            end = begin + len(piece)
            chunks[number].append(Chunk(name, f"tensor{number}", offset, shape, begin, end, zlib.crc32(piece)))
            begin = end
        (folder / name).write_bytes(head + b"".join(data))
        described[name] = Part(begin, zlib.crc32(head))
    entries = tuple(
        TensorEntry(str(tensor.dtype)[6:], tuple(tensor.shape), tuple(chunks[number]))
        for number, tensor in enumerate(tensors)
    )
    Manifest(1, None, torch.__version__, parts, None, None, encoded, entries, described).write(folder)


def whole(tensor: torch.Tensor) -> list[Box]:
    return [((0,) * tensor.dim(), tuple(tensor.shape))] if tensor.numel() else []


def rows(tensor: torch.Tensor) -> list[Box]:
    if tensor.dim() == 0:
        return whole(tensor)
    return [((row, *[0] * (tensor.dim() - 1)), (1, *tensor.shape[1:])) for row in range(len(tensor))]


def quarters(tensor: torch.Tensor) -> list[Box]:
    if tensor.dim() != 2 or not tensor.numel():
        return whole(tensor)
    (height, width), found = tensor.shape, []
    for top, bottom in ((0, height // 3), (height // 3, height)):
        found += [((top, left), (bottom - top, right - left)) for left, right in ((0, 2), (2, width))]
    return found


def a_state() -> dict[str, Any]:
    big = torch.arange(7 * 5.0).reshape(7, 5)
    return {
        "weight": big, "half": big.to(torch.bfloat16), "flags": big > 9, "wave": big.to(torch.cfloat),
        "small": torch.tensor(3), "empty": torch.empty(0, 4), "step": 3, "nested": [{"pair": (big[2], "text")}],
    }  # fmt: skip


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


@pytest.mark.parametrize("cuts", [whole, rows, quarters])
def test_a_folder_written_by_hand_loads_however_its_tensors_are_cut(tmp_path: Path, cuts: Any) -> None:
    write_by_hand(tmp_path / "a", a_state(), cuts, parts=3)
    assert same(load(tmp_path / "a"), a_state())


def test_any_box_of_a_tensor_is_read_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way of reading: straight, row by row, through the buffer, in steps; the sizes are made small for it."""
    monkeypatch.setattr(stored, "_STAGING_BYTES", 64)
    monkeypatch.setattr(stored, "_LONG_ROW_BYTES", 24)
    draw = torch.Generator().manual_seed(0)

    def below(limit: int) -> int:
        return int(torch.randint(limit, (), generator=draw))

    for _ in range(300):
        shape = [1 + below(6) for _ in range(below(5))]
        order = torch.randperm(len(shape), generator=draw).tolist()
        back = sorted(range(len(order)), key=order.__getitem__)
        tensor = torch.randn(shape, generator=draw).permute(order).contiguous().permute(back)
        path = tmp_path / "data"
        path.write_bytes(b"before" + raw(tensor.as_strided((tensor.numel(),), (1,))))
        with path.open("rb") as opened:
            file = OpenFile(path, opened)
        piece = Piece.at((0,) * len(shape), shape, Located(file, 6, tensor.stride()))
        storage = Storage(file, 6, tensor.numel() * 4, 0)
        lazy = StoredTensor(tensor.dtype, tensor.shape, [piece], tensor.stride(), storage)
        offset = [below(size + 1) for size in shape]
        box = [below(size - start + 1) for size, start in zip(shape, offset, strict=True)]
        expected = tensor[tuple(slice(start, start + size) for start, size in zip(offset, box, strict=True))]
        assert torch.equal(lazy.read(offset, box), expected)
        turned = torch.empty(box[::-1], dtype=torch.float64).permute(list(range(len(box)))[::-1])
        assert torch.equal(lazy.read(offset, box, turned), expected.double())
        assert torch.equal(lazy.full(), tensor)
        assert torch.equal(lazy.full({}), tensor)
        assert all(
            one == two for one, two, size in zip(lazy.full().stride(), tensor.stride(), shape, strict=True) if size > 1
        )


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_a_buffer_that_shows_its_memory_changed_takes_on_the_saved_values(tmp_path: Path, kind: str) -> None:
    class Model(nn.Module):
        def __init__(self, conjugated: torch.Tensor, negative: torch.Tensor) -> None:
            super().__init__()
            self.register_buffer("conjugated", conjugated)
            self.register_buffer("negative", negative)

    saved = {"conjugated": torch.tensor([1 + 2j, 3 - 4j]), "negative": torch.tensor([5.0])}
    save(tmp_path / "a", {"model": Model(**saved)}, state_dict_type=kind)
    model = Model(torch.zeros(2, dtype=torch.complex64).conj(), torch.zeros(1, dtype=torch.complex64).conj().imag)
    assert model.conjugated.is_conj()
    assert model.negative.is_neg()
    load(tmp_path / "a", {"model": model})
    for name, value in saved.items():
        assert torch.equal(getattr(model, name), value), name


def test_reading_into_a_tensor_is_noticed_by_backward(tmp_path: Path) -> None:
    write_by_hand(tmp_path / "a", {"model": {"weight": torch.ones(2, 2), "bias": torch.ones(2)}}, whole)
    model = nn.Linear(2, 2)
    loss = model(torch.ones(2, 2, requires_grad=True)).sum()
    load(tmp_path / "a", {"model": model})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tied_weights_are_one_tensor_after_loading(tmp_path: Path) -> None:
    weight = torch.ones(3, 3)
    save(tmp_path / "a", {"one": weight, "other": {"two": weight}}, state_dict_type="sharded")
    back = load(tmp_path / "a")
    assert back["one"].data_ptr() == back["other"]["two"].data_ptr()


def layouts() -> list[list[Any]]:
    from torch.distributed.tensor import Replicate, Shard

    return [[Shard(0), Shard(1)], [Shard(1), Shard(0)], [Replicate(), Shard(0)], [Shard(0), Shard(0)],
            [Replicate(), Replicate()], [Shard(1), Replicate()]]  # fmt: skip


def distributed(seed: int) -> dict[str, Any]:
    """Tensors of uneven shapes, some with empty shards, in every layout of a mesh of two by two; a model in 2-D."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.manual_seed(seed)
    mesh = mesh_of((2, 2), ("data", "model"))
    tensors = [torch.randn(shape) for shape in ((7, 5), (1, 3), (4, 4), (3, 1))]
    model = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 6))
    parallelize_module(model, mesh["model"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = parameter.detach() * 2
    optimizer.step()
    return {
        "values": [distribute_tensor(tensor, mesh, layout) for tensor in tensors for layout in layouts()],
        "parameters": [nn.Parameter(distribute_tensor(tensors[0], mesh, layout)) for layout in layouts()],
        "model": model,
        "optimizer": optimizer,
    }


def full_values(state: dict[str, Any]) -> list[list[float]]:
    moments = [state["optimizer"].state[parameter]["momentum_buffer"] for parameter in state["model"].parameters()]
    found = [*state["values"], *state["parameters"], *state["model"].parameters(), *moments]
    return [tensor.detach().full_tensor().flatten().tolist() for tensor in found]


def placements(state: dict[str, Any]) -> list[str]:
    return [str(tensor.placements) for tensor in [*state["values"], *state["parameters"], *state["model"].parameters()]]


def save_and_load_in_two_dims(folder: Path) -> tuple[bool, bool, bool]:
    saved = distributed(0)
    save(folder / "sharded", saved, state_dict_type="sharded")
    save(folder / "full", saved)
    expected = full_values(saved)
    found = []
    for name in ("sharded", "full"):
        other = distributed(1)
        before, layout = full_values(other), placements(other)
        load(folder / name, other)
        found.append(full_values(other) == expected and placements(other) == layout and before != expected)
    # What was loaded is what is computed with: FSDP did not keep other memory.
    batch = torch.ones(2, 6)
    return found[0], found[1], torch.equal(saved["model"](batch), other["model"](batch))


def test_every_layout_of_a_mesh_in_two_dims_comes_back_from_a_folder_and_a_file(
    ranks: RankPool, tmp_path: Path
) -> None:
    assert ranks.run(save_and_load_in_two_dims, tmp_path, ranks=4) == [(True, True, True)] * 4
    alone, full = load(tmp_path / "sharded"), load(tmp_path / "full")
    assert same(alone["values"], full["values"])
    assert same(dict(alone["model"]), dict(full["model"]))


def hand_made(tmp_path: Path) -> Path:
    write_by_hand(tmp_path / "a", {"model": dict(nn.Linear(4, 3).state_dict()), "step": 3}, rows)
    return tmp_path / "a"


def test_a_flipped_bit_anywhere_is_reported_with_its_file_and_its_tensor(tmp_path: Path) -> None:
    folder = hand_made(tmp_path)
    model = nn.Linear(4, 3)
    before = model.weight.detach().clone()
    for path in sorted(folder.iterdir()):
        good = path.read_bytes()
        in_data = 0
        for position in range(0, len(good), 1 if path.suffix == ".safetensors" else 7):
            path.write_bytes(good[:position] + bytes([good[position] ^ 16]) + good[position + 1 :])
            with pytest.raises(CheckpointError, match=path.name) as caught:
                load(folder, {"model": model, "step": 0})
            in_data += "tensor0" in str(caught.value) or "tensor1" in str(caught.value)
        path.write_bytes(good)
        assert (in_data > 0) == (path.suffix == ".safetensors")
    assert torch.equal(model.weight, before)
    load(folder, {"model": model, "step": 0})


def finders(folder: Path, ranks: int) -> list[int]:
    """The ranks that see that something is wrong when they share the work."""
    found = []
    for rank in range(ranks):
        with contextlib.suppress(CheckpointError):
            verify_folder(folder, (rank, ranks))
            continue
        found.append(rank)
    return found


def test_each_byte_is_checked_by_one_of_the_ranks(tmp_path: Path) -> None:
    folder = hand_made(tmp_path)
    assert finders(folder, 3) == []
    busy = set()
    for path in folder.glob("part-*"):
        good = path.read_bytes()
        for position in range(len(good)):
            path.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
            found = finders(folder, 3)
            assert len(found) == 1, (path.name, position)
            busy.update(found)
        path.write_bytes(good)
    assert busy == {0, 1, 2}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "part-00001.safetensors").unlink(), r"is missing(?s:.)*part-00001"),
        (lambda folder: os.truncate(folder / "part-00001.safetensors", 60), r"part-00001.*60 bytes, and"),
        (lambda folder: shutil.copy(folder / "part-00001.safetensors", folder / "part-00007.safetensors"),
         r"part-00007.*does not list"),
        (lambda folder: (folder / "manifest.json").unlink(), "saving did not end"),
        (lambda folder: os.truncate(folder / "manifest.json", 100), "manifest is damaged"),
        (lambda folder: (folder / "manifest.json").write_text("{}"), "manifest is damaged"),
    ],
)  # fmt: skip
def test_a_folder_that_is_not_whole_is_a_clear_error_and_nothing_changes(
    tmp_path: Path, damage: Any, message: str
) -> None:
    folder = hand_made(tmp_path)
    damage(folder)
    state = {"model": nn.Linear(4, 3), "step": 0}
    before = state["model"].weight.detach().clone()
    with pytest.raises(CheckpointError, match=message):
        load(folder, state)
    assert torch.equal(state["model"].weight, before)
    assert state["step"] == 0


def test_a_folder_that_is_replaced_while_it_is_read_never_gives_two_checkpoints_in_one(tmp_path: Path) -> None:
    old, new = {"a": torch.zeros(4), "b": torch.zeros(4)}, {"a": torch.ones(4), "b": torch.ones(4)}
    save(tmp_path / "a", old, state_dict_type="sharded")
    folder = CheckpointFolder(tmp_path / "a")
    folder.verify()
    content = folder.content()
    first = content["a"].full()
    save(tmp_path / "a", new, state_dict_type="sharded")
    assert first.eq(0).all()
    with pytest.raises(CheckpointError, match="is missing"):
        content["b"].full()
    assert load(tmp_path / "a")["a"].eq(1).all()


def test_a_file_that_is_replaced_while_it_is_read_stays_the_old_one(tmp_path: Path) -> None:
    from fabric_lite.checkpoint.archive_reading import read_archive

    save(tmp_path / "a", {"a": torch.zeros(4)})
    content = read_archive(tmp_path / "a")
    save(tmp_path / "a", {"a": torch.ones(4)})
    assert materialized(content)["a"].eq(0).all()


def test_a_folder_is_found_after_a_crash_between_two_renames(tmp_path: Path) -> None:
    save(tmp_path / "a", {"step": 3}, state_dict_type="sharded")
    (tmp_path / "a").rename(tmp_path / ".fabric-old-a")
    assert load(tmp_path / "a") == {"step": 3}


def test_what_is_not_there_is_also_the_builtin_error(tmp_path: Path) -> None:
    for reader in (load, read_folder, verify_folder):
        with pytest.raises(CheckpointNotFoundError, match="none"):
            reader(tmp_path / "none")  # type: ignore[operator]


def test_weights_only_false_is_for_one_file(tmp_path: Path) -> None:
    folder = hand_made(tmp_path)
    with pytest.raises(FabricValueError, match=r"one file of torch\.save"):
        load(folder, weights_only=False)


def safetensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    """As the format's description has it."""
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for name, tensor in tensors.items():
        piece = raw(tensor)
        offsets = [len(data), len(data) + len(piece)]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        data += piece
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_bare_weights_in_a_safetensors_file_load(tmp_path: Path) -> None:
    model, other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    path = safetensors(tmp_path / "model.safetensors", model.state_dict(), {"format": "pt"})
    load_raw(path, other)
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    assert same(load(path), dict(model.state_dict()))
    safetensors(path, {key: value.to(torch.bfloat16) for key, value in model.state_dict().items() if value.dim()})
    load_raw(path, other, strict=False)
    assert torch.equal(other[0].weight, model[0].weight.to(torch.bfloat16).float())


def dcp_state(sharded: bool, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))
    if sharded:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    # The second group first: by name, or nothing fits.
    optimizer = torch.optim.AdamW([{"params": model[2].parameters(), "lr": 0.5}, {"params": model[:2].parameters()}])
    for _ in range(2):
        model(torch.arange(10.0).reshape(2, 5)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def values(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[float]]:
    moments = [optimizer.state[one][name] for one in model.parameters() for name in ("exp_avg", "exp_avg_sq", "step")]
    return [
        (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().flatten().tolist()
        for tensor in [*model.parameters(), *moments]
    ]


def save_by_dcp(folder: Path, sharded: bool) -> list[list[float]]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model, optimizer = dcp_state(sharded, 0)
    weights, moments = get_state_dict(model, optimizer)
    content = {"model": weights, "optimizer": moments, "plain": optimizer.state_dict(), "step": 3, "log": [1, "a", 2.5]}
    dcp.save(content, checkpoint_id=folder, no_dist=not dist.is_initialized())
    return values(model, optimizer)


def load_of_dcp(folder: Path, sharded: bool) -> tuple[list[list[float]], list[list[float]], dict[str, Any]]:
    model, optimizer = dcp_state(sharded, 1)
    state = {"model": model, "optimizer": optimizer, "step": 0}
    rest = load(folder, state)
    found = values(model, optimizer)
    assert state["step"] == 3
    rest.pop("plain")
    other, by_number = dcp_state(sharded, 2)
    load(folder, {"model": other, "plain": by_number})
    return found, values(other, by_number), rest


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("saved", "loaded"), [(True, False), (True, True), (False, True), (False, False)])
def test_a_folder_of_torchs_own_checkpoints_loads_under_any_layout(
    ranks: RankPool, tmp_path: Path, saved: bool, loaded: bool
) -> None:
    folder = tmp_path / "dcp"
    expected = ranks.run(save_by_dcp, folder, True)[0] if saved else save_by_dcp(folder, False)
    found = ranks.run(load_of_dcp, folder, True)[1] if loaded else load_of_dcp(folder, False)
    by_name, by_number, rest = found
    assert by_name == expected
    assert by_number == expected
    assert rest == {"log": [1, "a", 2.5]}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_a_folder_of_torchs_own_that_is_cut_short_or_unfinished_is_a_clear_error(tmp_path: Path) -> None:
    folder = tmp_path / "dcp"
    save_by_dcp(folder, False)
    part = next(path for path in folder.iterdir() if path.suffix == ".distcp")
    os.truncate(part, part.stat().st_size - 1000)
    with pytest.raises(CheckpointError, match=part.name):
        load(folder)
    part.unlink()
    with pytest.raises(CheckpointError, match=rf"is missing(?s:.)*{part.name}"):
        load(folder)
    (folder / ".metadata").unlink()
    with pytest.raises(CheckpointError, match="saving did not end"):
        load(folder)


def test_names_of_parameters_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    group = {**optimizer.state_dict()["param_groups"][0], "params": ["weight", "other"]}
    torch.save({"model": model.state_dict(), "optimizer": {"state": {}, "param_groups": [group]}}, tmp_path / "a.pt")
    with pytest.raises(FabricValueError, match="no state of bias"):
        load(tmp_path / "a.pt", {"model": model, "optimizer": optimizer})


def load_damaged(folder: Path) -> tuple[str, bool, int]:
    model, optimizer = dcp_state(True, 1)
    state = {"model": model, "optimizer": optimizer, "step": 0}
    before = values(model, optimizer)
    try:
        load(folder, state)
    except CheckpointError as error:
        return str(error), values(model, optimizer) == before, state["step"]
    return "nothing", False, state["step"]


def test_damage_that_one_rank_finds_is_an_error_on_all_and_changes_nothing(ranks: RankPool, tmp_path: Path) -> None:
    model, optimizer = dcp_state(False, 0)
    folder = tmp_path / "a"
    save(folder, {"model": model, "optimizer": optimizer, "step": 3}, state_dict_type="sharded")
    part = folder / "part-00000.safetensors"
    good = part.read_bytes()
    finders = set()
    for end in range(-5, -200, -40):
        part.write_bytes(good[:end] + bytes([good[end] ^ 1]) + good[end + 1 :])
        found = ranks.run(load_damaged, folder)
        assert [unchanged for _, unchanged, _ in found] == [True, True]
        assert [step for _, _, step in found] == [0, 0]
        assert all(part.name in message for message, _, _ in found)
        finders.add(next(rank for rank, (message, _, _) in enumerate(found) if "failed on rank" not in message))
    assert finders == {0, 1}


def load_after_evaluation(folder: Path) -> list[float]:
    """FSDP keeps the root's parameters whole after a forward pass without gradients."""
    model, optimizer = dcp_state(True, 1)
    batch = torch.arange(10.0).reshape(2, 5)
    with torch.no_grad():
        model(batch)
        load(folder, {"model": model, "optimizer": optimizer})
        return list(model(batch).flatten().tolist())


def test_a_sharded_model_that_was_just_evaluated_takes_on_what_is_loaded(ranks: RankPool, tmp_path: Path) -> None:
    model, optimizer = dcp_state(False, 0)
    save(tmp_path / "a", {"model": model, "optimizer": optimizer})
    expected = model(torch.arange(10.0).reshape(2, 5)).flatten()
    for found in ranks.run(load_after_evaluation, tmp_path / "a"):
        # Another order of additions than in one process, nothing more.
        assert torch.allclose(torch.tensor(found), expected, rtol=1e-6, atol=1e-6)
