"""The strategy: its options, and the verbs that an engine with a step of its own needs."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fabric_lite import buffers
from fabric_lite.clipping import clip_grad_norm, clip_grad_value
from fabric_lite.errors import FabricImportError, FabricValueError, StrategyError
from fabric_lite.parameters import check_exchangeable
from fabric_lite.precision import Precision
from fabric_lite.strategies.base import Engine, Placement, Strategy
from fabric_lite.strategies.deepspeed.config import check_offloading, engine_config, read_config
from fabric_lite.strategies.deepspeed.handle import handle_of, handles_of
from fabric_lite.strategies.sharding import follow_rank_zero

__all__ = ["DeepSpeedStrategy"]

DATA_AXIS = "data"


@dataclasses.dataclass(frozen=True)
class DeepSpeedStrategy(Strategy):
    """ZeRO by DeepSpeed, which is an extra: ``pip install 'fabric-lite[deepspeed]'``.

    Stage 1 divides the optimizer's state over the ranks, stage 2 the gradients too, stage 3 the parameters too. Each
    model that is trained is set up with the one optimizer over it. The optimizer may be any of torch.optim that works
    element by element; it stays the user's, with its schedulers, and DeepSpeed steps a copy that holds the parts.

    In ``bf16-mixed`` and ``bf16-true`` parameters are in bfloat16, and DeepSpeed keeps their values in float32 beside
    them, which are those of checkpoints. Stage 1 then adds gradients up in bfloat16, stages 2 and 3 in float32 under
    ``bf16-mixed``. Runs on CPU too.

    Args:
        stage: 1, 2 or 3. None: what ``config`` says, else 2.
        offload_optimizer: Whether optimizer state and step are on the CPU; Adam and AdamW are then DeepSpeed's own.
        offload_parameters: Whether the parts of parameters are in the host's memory; with stage 3 alone.
        config: Further settings of DeepSpeed, a dict or the path of a JSON file.
        state_dict_type: ``"sharded"``: checkpoints are folders to which every rank writes its own part; ``"full"``: one
            file.

    Raises:
        FabricImportError: DeepSpeed is not installed.
        FabricValueError: An option is not allowed, or ``config`` says what is said elsewhere.
    """

    stage: int | None = None
    offload_optimizer: bool = False
    offload_parameters: bool = False
    config: Any = dataclasses.field(default=None, hash=False)
    state_dict_type: str = "sharded"

    def __post_init__(self) -> None:
        if importlib.util.find_spec("deepspeed") is None:
            raise FabricImportError(
                "DeepSpeed is not installed.", given="DeepSpeedStrategy()", fix="pip install 'fabric-lite[deepspeed]'"
            )
        config = read_config(self.config)
        told = config.get("zero_optimization", {}).get("stage")
        if self.stage is not None and told not in (None, self.stage):
            raise FabricValueError(
                "The stage of ZeRO is set twice.",
                given=f"stage={self.stage!r}, and {told!r} in the configuration",
                fix="one of the two",
            )
        stage = self.stage if self.stage is not None else 2 if told is None else told
        if isinstance(stage, bool) or stage not in (1, 2, 3):
            raise FabricValueError("This stage of ZeRO does not exist.", given=f"stage={stage!r}", fix="1, 2 or 3")
        check_offloading(
            config,
            stage=stage,
            offload_optimizer=self.offload_optimizer,
            offload_parameters=self.offload_parameters,
        )
        if self.state_dict_type not in ("sharded", "full"):
            raise FabricValueError(
                "This kind of checkpoint does not exist.",
                given=f"state_dict_type={self.state_dict_type!r}",
                fix="'sharded' for a folder, 'full' for one file",
            )
        object.__setattr__(self, "stage", stage)
        object.__setattr__(self, "config", config)

    def with_precision(self, precision: Precision) -> Strategy:
        for dtype in (precision.param_dtype, precision.compute_dtype):
            if dtype not in (None, torch.float32, torch.bfloat16):
                raise StrategyError(
                    "DeepSpeed trains in float32 and bfloat16 here: it keeps no values in float64, and its scale for "
                    "losses in float16 is not this library's.",
                    given=f"DeepSpeedStrategy in precision {precision.name!r}",
                    fix="precision='bf16-mixed', 'bf16-true' or '32-true'",
                )
        return super().with_precision(precision)

    @property
    def hides_gradients(self) -> bool:
        return True

    @property
    def owns_step(self) -> bool:
        return True

    def mesh_axes(self, world_size: int, local_world_size: int) -> Mapping[str, int]:
        return {DATA_AXIS: world_size}

    def wrap(
        self, module: nn.Module, optimizers: Sequence[Optimizer], run: Callable[..., Any], placement: Placement
    ) -> Engine:
        if not any(parameter.requires_grad for parameter in module.parameters()):
            return Engine()  # a frozen teacher has nothing that could be divided but its weights
        self._check(module, optimizers)
        from fabric_lite.strategies.deepspeed.engine import make_handle

        follow_rank_zero(module, placement.device)
        assert self.stage is not None
        config = engine_config(
            self.config,
            stage=self.stage,
            offload_optimizer=self.offload_optimizer,
            offload_parameters=self.offload_parameters,
            precision=placement.precision,
        )
        handle = make_handle(module, optimizers[0], run, config, placement)
        statistics = buffers.keep_statistics_alike(module, None, lambda: not handle.windows)
        handles = () if statistics is None else (statistics,)
        return Engine(handle.shell, reset=handle.recover, handles=handles, gathers=self.stage == 3, is_copyable=False)

    def _check(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Raise StrategyError unless DeepSpeed can train ``module`` with these optimizers."""
        if len(optimizers) != 1:
            raise StrategyError(
                "DeepSpeed lays a model out together with the one optimizer that trains it.",
                given=f"setup({type(module).__name__}) with {len(optimizers)} optimizers",
                fix="model, optimizer = fabric.setup(model, optimizer), with groups of parameters where options differ",
            )
        if handles_of([module]):
            raise StrategyError(
                "Parameters of this model are laid out by DeepSpeed already, as a part of another model.",
                given=type(module).__name__,
                fix="set up the model that holds it, alone",
            )
        own = {id(parameter) for parameter in module.parameters()}
        strange = sum(id(parameter) not in own for group in optimizers[0].param_groups for parameter in group["params"])
        if strange:
            raise StrategyError(
                "The optimizer holds parameters of other models too, and DeepSpeed steps on those of one.",
                given=f"{strange} parameters that are not in {type(module).__name__}",
                fix="an optimizer for each model",
            )
        if not any(parameter.requires_grad for group in optimizers[0].param_groups for parameter in group["params"]):
            raise StrategyError(
                "The optimizer trains nothing, and DeepSpeed lays out what is trained at setup.",
                given=f"{type(module).__name__} with trainable parameters, none of them in the optimizer",
                fix="an optimizer over them; or freeze the whole model before setup, which then needs no optimizer",
            )
        dtypes = {parameter.dtype for parameter in module.parameters() if parameter.requires_grad}
        if dtypes - {torch.float32, torch.bfloat16} or len(dtypes) > 1:
            raise StrategyError(
                "DeepSpeed takes parameters of one dtype, float32 or bfloat16.",
                given=f"{', '.join(sorted(map(str, dtypes)))} in {type(module).__name__}",
                fix="module.float() before setup; precision= says what the forward runs in",
            )
        check_exchangeable(module.named_parameters())

    def unwrap(self, module: nn.Module) -> None:
        for handle in handles_of([module]):
            handle.close()

    @contextlib.contextmanager
    def no_sync(self, module: nn.Module, engine: nn.Module | None) -> Any:
        # Gradients wait for the step in any case: stage 1 reduces them there, 2 and 3 keep parts of their sums.
        handles = handles_of([module])
        for handle in handles:
            handle.windows += 1
        try:
            yield
        finally:
            for handle in handles:
                handle.windows -= 1

    def step(self, optimizer: Optimizer) -> None:
        for handle in handles_of([optimizer]):
            handle.step()

    def clip_grad_norm(
        self, parameters: Iterable[torch.Tensor], max_norm: float, norm_type: float, error_if_nonfinite: bool
    ) -> torch.Tensor:
        return clip_grad_norm(self._gradients(parameters), max_norm, norm_type, error_if_nonfinite)

    def clip_grad_value(self, parameters: Iterable[torch.Tensor], clip_value: float) -> None:
        clip_grad_value(self._gradients(parameters), clip_value)

    def _gradients(self, parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """This rank's parts of all gradients, each the ``grad`` of a stand-in; what nobody has laid out, as it is."""
        found: list[torch.Tensor] = []
        handles: list[Any] = []
        for parameter in parameters:
            handle = handle_of(parameter)
            if handle is None:
                found.append(parameter)
            elif handle not in handles:
                handles.append(handle)
        for handle in handles:
            found += handle.gradients()
        return found

    def forget_unsynchronized(self, module: nn.Module, parameters: Container[int] | None = None) -> None:
        for handle in handles_of([module]):
            if parameters is None or any(id(parameter) in parameters for parameter in handle.parameters):
                handle.forget()

    def holding_state(self, objects: Sequence[Any], changes: bool) -> contextlib.AbstractContextManager[Any]:
        handles = handles_of(objects)
        if not handles:
            return contextlib.nullcontext()
        from fabric_lite.strategies.deepspeed.state import holding_state

        return holding_state(handles, {id(item) for item in objects}, changes)
