"""The settings that the layers of KernelNorm and of KNConv have in common."""

from collections.abc import Sequence
from typing import ClassVar, get_args

from torch import nn

from knlightning.checks import check_choice
from knlightning.nn.functional import EvalStatistics, check_dropout
from knlightning.nn.windows import PaddingMode, Window


class KernelNormalized(nn.Module):
    """Base of the layers that normalize windows; see `knlightning.nn.KNConv2d` for the arguments."""

    spatial: ClassVar[int]

    def __init__(
        self,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int],
        padding: int | Sequence[int] | str,
        dilation: int | Sequence[int],
        padding_mode: PaddingMode,
        dropout_p: float,
        eps: float,
        eval_statistics: EvalStatistics,
    ) -> None:
        super().__init__()
        check_dropout(dropout_p, eval_statistics)
        check_choice("padding_mode", padding_mode, get_args(PaddingMode))
        window = Window.of(self.spatial, kernel_size, stride, padding, dilation)
        self.kernel_size = window.kernel_size
        self.stride = window.stride
        self.padding = padding if isinstance(padding, int | str) else tuple(padding)
        self.dilation = window.dilation
        self.padding_mode: PaddingMode = padding_mode
        self.dropout_p = dropout_p
        self.eps = eps
        self.eval_statistics: EvalStatistics = eval_statistics

    def extra_repr(self) -> str:
        ones = (1,) * self.spatial
        optional = {"stride": ones, "padding": 0, "dilation": ones, "padding_mode": "zeros"}
        optional |= {"eps": 1e-5, "eval_statistics": "expected"}
        values = {name: getattr(self, name) for name in optional}
        shown = [f"{name}={value!r}" for name, value in values.items() if value != optional[name]]
        return ", ".join((f"kernel_size={self.kernel_size}", *shown, f"dropout_p={self.dropout_p}"))
