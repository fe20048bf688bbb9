"""Windows of convolutions and of kernel normalization: their elements, and their positions on an input."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from knlightning.checks import ArgumentError, check, check_choice

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


@dataclass(frozen=True)
class Window:
    """Windows of one size at regular positions on a padded input, with one value for each spatial dimension.

    Make it with `of` from what a user may write.

    Args:
        kernel_size: Number of elements of a window.
        stride: Step between the positions of the windows.
        padding: Number of elements before and after the input.
        dilation: Step between the elements of a window.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]

    @classmethod
    def of(
        cls,
        spatial: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
    ) -> "Window":
        """Check the settings of a convolution, and expand them to all spatial dimensions.

        Args:
            spatial: Number of spatial dimensions.
            kernel_size: Window size, one number or one for each dimension.
            stride: Step between windows, one number or one for each dimension.
            padding: One number, one for each dimension, for images (left, right, top, bottom), "same" (the output has
                the size of the input; needs a stride of 1) or "valid" (none).
            dilation: Step between the elements of a window, one number or one for each dimension.

        Raises:
            ArgumentError: If one of them is out of its range.
        """
        kernel_size = per_dimension(kernel_size, spatial, "kernel_size", 1)
        stride = per_dimension(stride, spatial, "stride", 1)
        dilation = per_dimension(dilation, spatial, "dilation", 1)
        if padding == "same":
            check(set(stride) == {1}, "stride", stride, '1 in each dimension with padding="same"')
            around = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]
            pairs = tuple((total // 2, total - total // 2) for total in around)  # as torch pads even windows
        elif padding == "valid":
            pairs = ((0, 0),) * spatial
        elif spatial == 2 and isinstance(padding, Sequence) and len(padding) == 4:
            left, right, top, bottom = per_dimension(padding, 4, "padding", 0)
            pairs = (top, bottom), (left, right)
        else:
            others = (", (left, right, top, bottom)" if spatial == 2 else "") + ', "same" or "valid"'
            pairs = tuple((p, p) for p in per_dimension(padding, spatial, "padding", 0, others))
        return cls(kernel_size, stride, pairs, dilation)

    @functools.cached_property
    def of_pixels(self) -> bool:
        """Whether the windows are the single pixels of the input."""
        return max(self.kernel_size + self.stride) == 1 and not any(self.pads)

    @property
    def span(self) -> tuple[int, ...]:
        """Number of elements from the first to the last one of a window, with those between that are left out."""
        return tuple(d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True))

    @property
    def pads(self) -> tuple[int, ...]:
        """The padding in the order of `torch.nn.functional.pad`: the last dimension first."""
        return tuple(p for pair in reversed(self.padding) for p in pair)

    def positions(self, size: Sequence[int]) -> tuple[int, ...]:
        """Count the positions of the windows on an input of a size."""
        each = zip(size, self.padding, self.span, self.stride, strict=True)
        return tuple((n + before + after - span) // step + 1 for n, (before, after), span, step in each)

    def elements(self, dim: int, length: int) -> list[slice]:
        """Find in one spatial dimension the first elements of all windows, their second ones, and so on.

        Args:
            dim: The spatial dimension, counted from 0.
            length: Size of the padded input in it.

        Returns:
            A slice of the padded input for each element of a window; all have as many elements as there are positions.
        """
        span = self.span[dim]
        return [slice(i, i + length - span + 1, self.stride[dim]) for i in range(0, span, self.dilation[dim])]

    def unfold(self, input: Tensor) -> Tensor:
        """Cut an input, padded with zeros, into its windows.

        Args:
            input: Tensor [N, C, *spatial].

        Returns:
            View [N, C, *positions, *kernel_size] of the padded input.
        """
        windows = F.pad(input, self.pads) if any(self.pads) else input
        for i, (span, step, dilation) in enumerate(zip(self.span, self.stride, self.dilation, strict=True)):
            windows = windows.unfold(2 + i, span, step)[..., ::dilation]
        return windows

    def pad(self, input: Tensor, padding_mode: str) -> tuple[Tensor, "Window"]:
        """Pad an input, unless it is with zeros, which convolutions and statistics add themselves.

        Args:
            input: Tensor [N, C, *spatial].
            padding_mode: What stands around the input; one of `PaddingMode`.

        Returns:
            The input, and its windows, which are padded with zeros or not at all.

        Raises:
            ArgumentError: If `check` raises it.
        """
        self.check(input.shape[2:], padding_mode)
        if padding_mode == "zeros" or not any(self.pads):
            return input, self
        return F.pad(input, self.pads, padding_mode), self.without_padding()

    def without_padding(self) -> "Window":
        """Return the windows of an input that is padded already."""
        return replace(self, padding=((0, 0),) * len(self.padding))

    def check(self, size: Sequence[int], padding_mode: str) -> None:
        """Check that an input of a size can be padded and has a window.

        Args:
            size: Size of the input in each spatial dimension.
            padding_mode: What stands around the input; one of `PaddingMode`.

        Raises:
            ArgumentError: If a window does not fit into the padded input, or the padding mode is unknown or does not
                allow a padding of that size.
        """
        check_choice("padding_mode", padding_mode, get_args(PaddingMode))
        for i, (length, (before, after), span) in enumerate(zip(size, self.padding, self.span, strict=True)):
            if before + length + after < span:
                raise ArgumentError(
                    "kernel_size", self.kernel_size, "small enough for a window to fit into the padded input",
                    f"In spatial dimension {i} the window spans {span} elements, and the input has "
                    f"{before} + {length} + {after} = {before + length + after}",
                )  # fmt: skip
            most = {"reflect": length - 1, "circular": length}.get(padding_mode)
            if most is not None and max(before, after) > most:
                allowed = f'at most {most} with padding_mode="{padding_mode}" on an input of size {length}'
                raise ArgumentError("padding", max(before, after), allowed)


def per_dimension(
    value: int | Sequence[int] | str, spatial: int, name: str, at_least: int, others: str = ""
) -> tuple[int, ...]:
    """Expand one number to all spatial dimensions.

    Args:
        value: One number, or one for each dimension.
        spatial: Number of spatial dimensions.
        name: Name of the argument.
        at_least: Lower bound of the numbers.
        others: What else the argument may be, for the message of the error.

    Raises:
        ArgumentError: If the count is wrong or a number is too small.
    """
    values = tuple(value) if isinstance(value, Sequence) else (value,) * spatial
    ok = len(values) == spatial and all(isinstance(v, int) and v >= at_least for v in values)
    each = f", or {spatial} of them (one for each spatial dimension)" if spatial > 1 else ""
    check(ok, name, value, f"a whole number at least {at_least}{each}{others}")
    return values  # type: ignore[return-value] # checked above


def check_input(shape: Sequence[int], dtype: torch.dtype, spatial: int) -> None:
    """Check that kernel normalization can take an input of a shape and a dtype.

    Raises:
        TypeError: If it is not a floating point tensor.
        ArgumentError: If it has not one to three spatial dimensions, as many as the windows have.
    """
    if not dtype.is_floating_point:
        raise TypeError(f"input must be a floating point tensor, got {dtype}")
    if not 1 <= spatial <= 3 or len(shape) != spatial + 2:
        raise ArgumentError(
            "input",
            tuple(shape),
            "a tensor [N, C, *spatial] with one to three spatial dimensions, as many as the windows have",
            f"The windows have {spatial}",
        )
