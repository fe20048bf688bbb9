"""The KernelNorm layers (Nasirigerdeh et al., TMLR 2024, section 3)."""

from collections.abc import Sequence

from torch import Tensor, fx

from knlightning.nn.functional import EvalStatistics, kernel_norm
from knlightning.nn.module import KernelNormalized
from knlightning.nn.windows import PaddingMode

fx.wrap("kernel_norm")  # a node of its own in graphs, as the functions of torch are


class _KernelNorm(KernelNormalized):
    def __init__(
        self,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dropout_p: float = 0.25,
        eps: float = 1e-5,
        eval_statistics: EvalStatistics = "expected",
        *,
        dilation: int | Sequence[int] = 1,
        padding_mode: PaddingMode = "zeros",
    ) -> None:
        super().__init__(kernel_size, stride, padding, dilation, padding_mode, dropout_p, eps, eval_statistics)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize each window, see `knlightning.nn.kernel_norm`.

        Args:
            input: Floating point tensor (N, C, ...) with a length, height and width, or depth too.

        Returns:
            Tensor (N, C, ...), with the windows beside one another.
        """
        return kernel_norm(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dropout_p,
            self.training,
            self.eval_statistics,
            self.eps,
            dilation=self.dilation,
            padding_mode=self.padding_mode,
        )


class KernelNorm1d(_KernelNorm):
    """Normalize the windows of a sequence [N, C, L]; see `KernelNorm2d`."""

    spatial = 1


class KernelNorm2d(_KernelNorm):
    """Normalize every window of an image by its mean and variance over all channels.

    Maps [N, C, H, W] to [N, C, k_h * p_h, k_w * p_w], where p counts the positions of the window. Without
    parameters. Source: Nasirigerdeh et al. (TMLR 2024), equations 1 to 3.

    Args:
        kernel_size: Window size, one number or one for each dimension.
        stride: Step between windows, one number or one for each dimension.
        padding: As in `knlightning.nn.KNConv2d`.
        dropout_p: Probability in [0, 1) with which an element is left out of the statistics in training. The
            paper's networks use 0.25 in their head for classification and 0.5 for segmentation.
        eps: Added to the variance.
        eval_statistics: The moments used in evaluation: "expected" (averages of what training sees), "clean" (of the
            window itself) or "sampled" (a new mask at each call, as in the published code).
        dilation: As in `knlightning.nn.KNConv2d`.
        padding_mode: As in `knlightning.nn.KNConv2d`.

    Raises:
        ArgumentError: If an argument is out of its range.
    """

    spatial = 2


class KernelNorm3d(_KernelNorm):
    """Normalize the windows of a volume [N, C, D, H, W]; see `KernelNorm2d`."""

    spatial = 3
