"""Sizes, strides and paddings of windows: from what a user may write to one number for each dimension."""

from collections.abc import Sequence

from torch import Tensor


def check_geometry(
    input: Tensor,
    spatial: int,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int],
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Check input and window against each other.

    Returns:
        Kernel size and stride for each spatial dimension, and the padding in the order of
        :func:`torch.nn.functional.pad`.

    Raises:
        TypeError: if the input is not a floating point tensor.
        ValueError: if the shapes do not fit.
    """
    if not input.is_floating_point():
        raise TypeError(f"kernel normalization takes a floating point tensor, got {input.dtype}")
    if not 1 <= spatial <= 3 or input.dim() != spatial + 2:
        raise ValueError(
            "the input must have shape [N, C, *spatial] with one to three spatial dimensions, as many as the "
            f"kernel has, got shape {tuple(input.shape)} for {spatial} dimension(s)"
        )
    kernel_size = per_dimension(kernel_size, spatial, "kernel_size", 1)
    stride = per_dimension(stride, spatial, "stride", 1)
    pads = padding_pairs(padding, spatial)
    for i, (size, k) in enumerate(zip(input.shape[2:], kernel_size, strict=True)):
        before, after = pads[2 * (spatial - 1 - i)], pads[2 * (spatial - 1 - i) + 1]
        if size + before + after < k:
            raise ValueError(
                f"a kernel of size {k} is larger than the padded input in spatial dimension {i}: "
                f"{before} + {size} + {after} = {size + before + after}"
            )
    return kernel_size, stride, pads


def per_dimension(value: int | Sequence[int], spatial: int, name: str, least: int) -> tuple[int, ...]:
    """Expand one number to all spatial dimensions.

    Raises:
        ValueError: if the count is wrong or a number is below `least`.
    """
    values = (value,) * spatial if isinstance(value, int) else tuple(value)
    if len(values) != spatial or any(not isinstance(v, int) or v < least for v in values):
        raise ValueError(
            f"{name} must be an integer of at least {least}, or {spatial} of them (one for each spatial "
            f"dimension), got {value!r}"
        )
    return values


def padding_pairs(padding: int | Sequence[int], spatial: int) -> tuple[int, ...]:
    """Expand padding to the order of :func:`torch.nn.functional.pad`: last dimension first, before and after.

    Raises:
        ValueError: if padding is neither one number, one for each dimension, nor for images four.
    """
    if spatial == 2 and not isinstance(padding, int) and len(padding) == 4:
        return per_dimension(padding, 4, "padding", 0)  # (left, right, top, bottom) is that order already
    try:
        each = per_dimension(padding, spatial, "padding", 0)
    except ValueError as error:
        form = ", or (left, right, top, bottom)" if spatial == 2 else ""
        raise ValueError(f"{error}{form}") from None
    return tuple(p for size in reversed(each) for p in (size, size))
