"""torchao's float8 layer for any number of rows and in inference mode; imported only where torchao is installed."""

from __future__ import annotations

import torch
from torch.nn import functional
from torchao.float8 import float8_linear

__all__ = ["SIDE", "Float8Linear"]

# The kernels take matrices of which both sides are a multiple of it.
SIDE = 16


class Float8Linear(float8_linear.Float8Linear):
    """torchao's layer, whose parameters are those of the ``nn.Linear`` that it was made of."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``(..., in_features)`` to ``(..., out_features)``."""
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            # There autocast asks torchao's tensor for an operation (aten.to) that it does not have.
            with torch.inference_mode(False), torch.no_grad():
                return self._multiplied(input)
        return self._multiplied(input)

    def _multiplied(self, input: torch.Tensor) -> torch.Tensor:
        rows = input.shape[:-1].numel()
        result: torch.Tensor
        # Rows are the inner side in the weight's gradient. Zeros change neither it nor the scale, which is that of the
        # largest value; of no rows at all there is none.
        if rows == 0 or (rows % SIDE and torch.is_grad_enabled()):
            padded = functional.pad(input.reshape(rows, self.in_features), (0, 0, 0, SIDE - rows % SIDE))
            result = super().forward(padded)[:rows].reshape(*input.shape[:-1], self.out_features)
        else:
            result = super().forward(input)
        return result
