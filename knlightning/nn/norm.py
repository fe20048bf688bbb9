"""The KernelNorm layers (Nasirigerdeh et al., TMLR 2024, section 3)."""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from knlightning.nn import functional as KF
from knlightning.nn.functional import EvalStatistics
from knlightning.nn.geometry import padding_pairs, per_dimension


class _KernelNorm(nn.Module):
    spatial: ClassVar[int]

    def __init__(
        self,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dropout_p: float = 0.25,
        eps: float = 1e-5,
        eval_statistics: EvalStatistics = "clean",
    ) -> None:
        super().__init__()
        KF.check_dropout(dropout_p, eval_statistics)
        padding_pairs(padding, self.spatial)
        self.kernel_size = per_dimension(kernel_size, self.spatial, "kernel_size", 1)
        self.stride = per_dimension(stride, self.spatial, "stride", 1)
        self.padding = padding if isinstance(padding, int) else tuple(padding)
        self.dropout_p = dropout_p
        self.eps = eps
        self.eval_statistics: EvalStatistics = eval_statistics

    def forward(self, input: Tensor) -> Tensor:
        return KF.kernel_norm(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dropout_p,
            self.training,
            self.eval_statistics,
            self.eps,
        )

    def extra_repr(self) -> str:
        return (
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"dropout_p={self.dropout_p}, eps={self.eps}, eval_statistics={self.eval_statistics!r}"
        )


class KernelNorm1d(_KernelNorm):
    """Normalize the windows of a sequence [N, C, L]; see :class:`KernelNorm2d`."""

    spatial = 1


class KernelNorm2d(_KernelNorm):
    """Normalize every window of an image by its mean and variance over all channels.

    Maps [N, C, H, W] to [N, C, k_h * p_h, k_w * p_w], where p counts the positions of the window. Without
    parameters. Source: Nasirigerdeh et al. (TMLR 2024), equations 1 to 3.

    Args:
        kernel_size: window size, one number or one for each dimension.
        stride: step between windows, likewise.
        padding: zeros around the input: one number, one for each dimension, or (left, right, top, bottom).
        dropout_p: probability in [0, 1) with which an element is left out of the statistics in training. The
            paper's networks use 0.25 in their head for classification and 0.5 for segmentation.
        eps: added to the variance.
        eval_statistics: the moments used in evaluation: "clean" (of the window itself), "expected" (averages of
            what training sees) or "sampled" (a fresh mask at each call, as in the published code).

    Raises:
        ValueError: if an argument is out of its range.
    """

    spatial = 2


class KernelNorm3d(_KernelNorm):
    """Normalize the windows of a volume [N, C, D, H, W]; see :class:`KernelNorm2d`."""

    spatial = 3
