"""The kernel normalized convolutional layers (Nasirigerdeh et al., TMLR 2024, Algorithm 1)."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from knlightning.checks import check, check_number
from knlightning.nn.functional import EvalStatistics, kn_conv
from knlightning.nn.module import KernelNormalized
from knlightning.nn.windows import PaddingMode

fx.wrap("kn_conv")  # a node of its own in graphs, as the functions of torch are


class _KNConv(KernelNormalized):
    bias: nn.Parameter | None
    by_group: ClassVar[bool] = False
    transposed: ClassVar[bool] = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        groups: int = 1,
        bias: bool = True,
        dropout_p: float = 0.05,
        eps: float = 1e-5,
        eval_statistics: EvalStatistics = "expected",
        *,
        dilation: int | Sequence[int] = 1,
        padding_mode: PaddingMode = "zeros",
        relu_output: bool = False,
    ) -> None:
        super().__init__(kernel_size, stride, padding, dilation, padding_mode, dropout_p, eps, eval_statistics)
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            check_number(name, channels, at_least=1, integer=True)
            check(groups >= 1 and channels % groups == 0, "groups", groups, f"a divisor of {name}={channels}")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.groups = groups
        self.relu_output = relu_output
        outer, inner = (in_channels, out_channels) if self.transposed else (out_channels, in_channels)
        self.weight = nn.Parameter(torch.empty(outer, inner // groups, *self.kernel_size))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight as the published networks do: Kaiming normal, fan-out, ReLU gain; zero the bias."""
        # of transposed filters torch calls the fan-out fan-in
        nn.init.kaiming_normal_(self.weight, mode="fan_in" if self.transposed else "fan_out", nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def filters(self) -> Tensor:
        """What the windows are convolved with."""
        return self.weight

    def forward(
        self,
        input: Tensor,
        relu_input: bool = False,
        relu_output: bool = False,
        residual: Tensor | None = None,
        keep_output: bool = False,
    ) -> Tensor:
        """Normalize and convolve, see `knlightning.nn.kn_conv`.

        Args:
            input: Floating point tensor (N, in_channels, ...) with a length, height and width, or depth too.
            relu_input: Whether to take the ReLU of the input first.
            relu_output: Whether to take the ReLU of the result; not with a residual.
            residual: Tensor of the shape of the result that is added to it; None for none.
            keep_output: Whether backward keeps the result, which the next layer may keep anyway.

        Returns:
            Tensor (N, out_channels, ...).
        """
        return kn_conv(
            input,
            self.filters,
            self.bias,
            self.stride,
            self.padding,
            self.groups,
            self.dropout_p,
            self.training,
            self.eval_statistics,
            self.eps,
            dilation=self.dilation,
            padding_mode=self.padding_mode,
            relu_input=relu_input,
            relu_output=relu_output or self.relu_output,
            residual=residual,
            keep_output=keep_output,
            by_group=self.by_group,
        )

    def extra_repr(self) -> str:
        groups = f", groups={self.groups}" if self.groups > 1 else ""
        bias = ", bias=False" if self.bias is None else ""
        relu = ", relu_output=True" if self.relu_output else ""
        return f"{self.in_channels}, {self.out_channels}, {super().extra_repr()}{groups}{bias}{relu}"


class KNConv1d(_KNConv):
    """Kernel normalized convolution of sequences [N, C, L]; see `KNConv2d`."""

    spatial = 1


class KNConv2d(_KNConv):
    """Convolve an image whose windows are first normalized by their own mean and variance over all channels.

    Maps [N, in_channels, H, W] to [N, out_channels, p_h, p_w], where
    p = floor((size + padding - dilation * (k - 1) - 1) / stride + 1). It replaces a convolution and its normalization,
    needs no batch, and its state dict is that of `torch.nn.Conv2d`. Source: Nasirigerdeh et al. (TMLR 2024),
    equation 5 and Algorithm 1.

    Args:
        in_channels: Number of channels of the input.
        out_channels: Number of filters.
        kernel_size: Window size, one number or one for each dimension.
        stride: Step between windows, one number or one for each dimension.
        padding: Elements around the input: one number, one for each dimension, (left, right, top, bottom), "same" (the
            output has the size of the input; needs a stride of 1) or "valid" (none).
        groups: Number of blocked connections between channels; the statistics are over all channels anyway.
        bias: Whether to add a bias.
        dropout_p: Probability in [0, 1) with which an element is left out of the statistics in training; one mask
            is drawn at each call and shared by overlapping windows. Where padding copies elements of the input, the
            copies are dropped on their own.
        eps: Added to the variance.
        eval_statistics: The moments used in evaluation: "expected" (averages of what training sees), "clean" (of the
            window itself) or "sampled" (a new mask at each call, as in the published code).
        dilation: Step between the elements of a window, one number or one for each dimension.
        padding_mode: What stands around the input: "zeros", "reflect", "replicate" or "circular", as in
            `torch.nn.Conv2d`. It is part of the windows.
        relu_output: Whether to return the ReLU of the output. Then the layer keeps nothing but its input and that for
            backward; so it does with a `torch.nn.ReLU` and another layer behind it, and else keeps one more tensor.

    Raises:
        ArgumentError: If an argument is out of its range.
    """

    spatial = 2


class KNConv3d(_KNConv):
    """Kernel normalized convolution of volumes [N, C, D, H, W]; see `KNConv2d`."""

    spatial = 3
