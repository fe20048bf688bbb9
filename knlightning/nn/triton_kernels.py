"""The passes over tensors around a kernel normalized convolution, as Triton kernels for GPUs.

Tensors of images are read as [N, channels, pixels], contiguous or with the channels innermost (`channels_last`). A
program works on a block of pixels of one image and on all channels, a tile at a time. Statistics, sums and maps are in
float32 whatever the tensors are in. What is absent is None.

The mask of dropout is never stored: each kernel that needs it draws it again, by the counter-based generator
Philox-4x32-10 (Salmon et al., SC 2011) from a seed of 64 bits and the place of the element alone. Four channels of a
pixel share a call. An element is dropped if its 32 bits are below `threshold`, which is 2^32 times the probability.
"""

import triton
import triton.language as tl


@triton.jit
def _block_of_image(pixels, block: tl.constexpr):
    """Find the image of this program, and its block of pixels."""
    blocks = tl.cdiv(pixels, block)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    return image, tl.program_id(0) % blocks * block + tl.arange(0, block)


@triton.jit
def _offsets(image, pixel, channel, pixels, channels: tl.constexpr, channels_last: tl.constexpr):
    """Find a tile [pixels, channels] in memory; in 64 bits, for large tensors."""
    if channels_last:
        offsets = (image * pixels + pixel)[:, None] * channels + channel[None, :]
    else:
        offsets = (image * channels + channel)[None, :] * pixels + pixel[:, None]
    return offsets


@triton.jit
def _kept(seed, image, pixel, first, pixels, channels: tl.constexpr, block: tl.constexpr, threshold: tl.constexpr):
    """Draw the mask of a tile of `block` channels from the `first` on: true where an element is kept."""
    group = first // 4 + tl.arange(0, block // 4)
    counter = (image * pixels + pixel)[:, None] * tl.cdiv(channels, 4) + group[None, :]
    a, b, c, d = tl.randint4x(seed, counter)
    bits = tl.join(tl.join(a, c), tl.join(b, d))  # [pixels, groups, 2, 2], so that a, b, c, d follow one another
    return tl.reshape(bits, (pixel.shape[0], block)) >= threshold


@triton.jit
def mask_kernel(
    mask,
    seed,
    pixels,
    channels: tl.constexpr,
    channels_last: tl.constexpr,
    threshold: tl.constexpr,
    block_p: tl.constexpr,
    block_c: tl.constexpr,
):
    """Write the mask that the other kernels draw."""
    image, pixel = _block_of_image(pixels, block_p)
    key = tl.load(seed)
    for first in range(0, channels, block_c):
        channel = first + tl.arange(0, block_c)
        offsets = _offsets(image, pixel, channel, pixels, channels, channels_last)
        there = (pixel < pixels)[:, None] & (channel < channels)[None, :]
        kept = _kept(key, image, pixel, first, pixels, channels, block_c, threshold)
        tl.store(mask + offsets, kept, there)


@triton.jit
def pixel_moments_kernel(
    input,
    rectified,
    mean,
    var,
    seed,
    pixels,
    scale,
    channels: tl.constexpr,
    channels_last: tl.constexpr,
    threshold: tl.constexpr,
    block_p: tl.constexpr,
    block_c: tl.constexpr,
):
    """Read the input; write its ReLU, if wanted, and mean and variance over the channels of each dropped out pixel."""
    image, pixel = _block_of_image(pixels, block_p)
    inside = pixel < pixels
    average = tl.zeros((block_p,), tl.float32)
    squares = tl.zeros((block_p,), tl.float32)
    for first in range(0, channels, block_c):
        channel = first + tl.arange(0, block_c)
        offsets = _offsets(image, pixel, channel, pixels, channels, channels_last)
        there = inside[:, None] & (channel < channels)[None, :]
        values = tl.load(input + offsets, there, 0.0)
        if rectified is not None:
            values = tl.where(values < 0, 0.0, values).to(values.dtype)  # leaves what is not a number
            tl.store(rectified + offsets, values, there)
        values = values.to(tl.float32)
        if seed is not None:
            kept = _kept(tl.load(seed), image, pixel, first, pixels, channels, block_c, threshold)
            values = tl.where(kept, values * scale, 0.0)
        count = tl.minimum(block_c, channels - first).to(tl.float32)
        part = tl.sum(values, 1) / count
        deviations = tl.where(there, values - part[:, None], 0.0)
        delta = part - average  # merge the channels before with these (Chan et al., 1979)
        share = count / (first + count)
        average += delta * share
        squares += tl.sum(deviations * deviations, 1) + delta * delta * (first * share)
    tl.store(mean + image * pixels + pixel, average, inside)
    tl.store(var + image * pixels + pixel, squares / channels, inside)


@triton.jit
def window_moments_kernel(
    pixel_mean,
    pixel_var,
    mean,
    rstd,
    depth,
    height,
    width,
    depths,
    heights,
    widths,
    inflation,
    eps,
    kernel_size: tl.constexpr,
    stride: tl.constexpr,
    padding: tl.constexpr,
    dilation: tl.constexpr,
    block: tl.constexpr,
    elements: tl.constexpr,
):
    """Merge the moments of pixels into mean and 1 / sqrt(var + eps) of the windows at all positions."""
    image, position = _block_of_image(depths * heights * widths, block)
    inside = position < depths * heights * widths
    element = tl.arange(0, elements)
    size = kernel_size[0] * kernel_size[1] * kernel_size[2]
    d = (position // (heights * widths) * stride[0] - padding[0])[:, None]
    h = (position // widths % heights * stride[1] - padding[1])[:, None]
    w = (position % widths * stride[2] - padding[2])[:, None]
    d += (element // (kernel_size[1] * kernel_size[2]) * dilation[0])[None, :]
    h += (element // kernel_size[2] % kernel_size[1] * dilation[1])[None, :]
    w += (element % kernel_size[2] * dilation[2])[None, :]
    known = inside[:, None] & (element < size)[None, :]
    there = known & (d >= 0) & (d < depth) & (h >= 0) & (h < height) & (w >= 0) & (w < width)
    pixel = image * depth * height * width + (d * height + h) * width + w
    means = tl.load(pixel_mean + pixel, there, 0.0)
    average = tl.sum(means, 1) / size
    deviations = tl.where(known, means - average[:, None], 0.0)
    spread = tl.sum(tl.load(pixel_var + pixel, there, 0.0) + deviations * deviations, 1) / size
    spread = inflation * spread + (inflation - 1.0) * average * average
    row = image * depths * heights * widths + position
    tl.store(mean + row, average, inside)
    tl.store(rstd + row, tl.rsqrt(spread + eps), inside)


@triton.jit
def normalize_kernel(
    convolved,
    output,
    mean,
    rstd,
    sums,
    bias,
    residual,
    pixels,
    channels: tl.constexpr,
    channels_last: tl.constexpr,
    relu: tl.constexpr,
    block_p: tl.constexpr,
    block_c: tl.constexpr,
):
    """Turn the result of the convolution into the output, which may be the same tensor."""
    image, pixel = _block_of_image(pixels, block_p)
    inside = pixel < pixels
    mu = tl.load(mean + image * pixels + pixel, inside, 0.0)[:, None]
    r = tl.load(rstd + image * pixels + pixel, inside, 0.0)[:, None]
    for first in range(0, channels, block_c):
        channel = first + tl.arange(0, block_c)
        known = channel < channels
        offsets = _offsets(image, pixel, channel, pixels, channels, channels_last)
        there = inside[:, None] & known[None, :]
        values = tl.load(convolved + offsets, there, 0.0).to(tl.float32)
        values = (values - mu * tl.load(sums + channel, known, 0.0)[None, :]) * r
        if bias is not None:
            values += tl.load(bias + channel, known, 0.0).to(tl.float32)[None, :]
        if residual is not None:
            values += tl.load(residual + offsets, there, 0.0).to(tl.float32)
        if relu:
            values = tl.where(values < 0, 0.0, values)
        tl.store(output + offsets, values, there)


@triton.jit
def scale_gradient_kernel(
    grad,
    kept,
    residual,
    mean,
    rstd,
    sums,
    bias,
    scaled,
    maps,
    partial,
    pixels,
    inflation,
    constant_scale,
    slope_scale,
    channels: tl.constexpr,
    channels_last: tl.constexpr,
    kept_output: tl.constexpr,
    relu: tl.constexpr,
    block_p: tl.constexpr,
    block_c: tl.constexpr,
):
    """Read the gradient and the output, or the result of the convolution; write the scaled gradient and all sums of it.

    `scaled` is the gradient at the result of the convolution. `partial` [programs, 2, channels] has its sums over
    positions: of the gradient, and of the scaled one times the mean. `maps` [N, 2, pixels] are what all pixels of a
    window get through its moments: a constant, and a slope of the pixel's value.
    """
    image, pixel = _block_of_image(pixels, block_p)
    inside = pixel < pixels
    mu = tl.load(mean + image * pixels + pixel, inside, 0.0)
    r = tl.load(rstd + image * pixels + pixel, inside, 0.0)
    with_kept = tl.zeros((block_p,), tl.float32)
    with_sums = tl.zeros((block_p,), tl.float32)
    for first in range(0, channels, block_c):
        channel = first + tl.arange(0, block_c)
        known = channel < channels
        offsets = _offsets(image, pixel, channel, pixels, channels, channels_last)
        there = inside[:, None] & known[None, :]
        values = tl.load(grad + offsets, there, 0.0).to(tl.float32)
        if relu:
            values = tl.where(tl.load(kept + offsets, there, 0.0) <= 0, 0.0, values)
        row = tl.program_id(0).to(tl.int64) * 2 * channels + channel
        tl.store(partial + row, tl.sum(values, 0), known)
        scaled_values = values * r[:, None]
        tl.store(scaled + offsets, scaled_values, there)
        tl.store(partial + row + channels, tl.sum(scaled_values * mu[:, None], 0), known)
        if maps is not None:
            normalized = tl.load(kept + offsets, there, 0.0).to(tl.float32)
            if kept_output and bias is not None:
                normalized -= tl.load(bias + channel, known, 0.0).to(tl.float32)[None, :]
            if residual is not None:
                normalized -= tl.load(residual + offsets, there, 0.0).to(tl.float32)
            with_kept += tl.sum(values * normalized, 1)
            with_sums += tl.sum(values * tl.load(sums + channel, known, 0.0)[None, :], 1)
    if maps is not None:
        d_var = -0.5 * r * r * (with_kept if kept_output else r * (with_kept - mu * with_sums))
        d_mean = 2.0 * (inflation - 1.0) * d_var * mu - with_sums * r
        d_var *= inflation
        row = image * 2 * pixels + pixel
        tl.store(maps + row, (d_mean - 2.0 * d_var * mu) * constant_scale, inside)
        tl.store(maps + row + pixels, 2.0 * d_var * slope_scale, inside)


@triton.jit
def windows_transposed_kernel(
    maps,
    pixel_maps,
    depth,
    height,
    width,
    depths,
    heights,
    widths,
    kernel_size: tl.constexpr,
    stride: tl.constexpr,
    padding: tl.constexpr,
    dilation: tl.constexpr,
    block: tl.constexpr,
    elements: tl.constexpr,
):
    """Add up at each pixel what its windows hand on: two maps, [N, 2, positions] to [N, 2, pixels]."""
    pixels, positions = depth * height * width, depths * heights * widths
    image, pixel = _block_of_image(pixels, block)
    element = tl.arange(0, elements)
    d = (pixel // (height * width) + padding[0])[:, None]
    h = (pixel // width % height + padding[1])[:, None]
    w = (pixel % width + padding[2])[:, None]
    d -= (element // (kernel_size[1] * kernel_size[2]) * dilation[0])[None, :]
    h -= (element // kernel_size[2] % kernel_size[1] * dilation[1])[None, :]
    w -= (element % kernel_size[2] * dilation[2])[None, :]
    there = (element < kernel_size[0] * kernel_size[1] * kernel_size[2])[None, :] & (pixel < pixels)[:, None]
    there &= (d >= 0) & (h >= 0) & (w >= 0) & (d % stride[0] == 0) & (h % stride[1] == 0) & (w % stride[2] == 0)
    d, h, w = d // stride[0], h // stride[1], w // stride[2]
    there &= (d < depths) & (h < heights) & (w < widths)
    position = image * 2 * positions + (d * heights + h) * widths + w
    row = image * 2 * pixels + pixel
    tl.store(pixel_maps + row, tl.sum(tl.load(maps + position, there, 0.0), 1), pixel < pixels)
    tl.store(pixel_maps + row + pixels, tl.sum(tl.load(maps + position + positions, there, 0.0), 1), pixel < pixels)


@triton.jit
def finish_gradient_kernel(
    d_input,
    input,
    pixel_maps,
    seed,
    pixels,
    channels: tl.constexpr,
    channels_last: tl.constexpr,
    threshold: tl.constexpr,
    relu: tl.constexpr,
    block_p: tl.constexpr,
    block_c: tl.constexpr,
):
    """Add the gradient through the statistics to that through the convolution, in place; then pass the ReLU."""
    image, pixel = _block_of_image(pixels, block_p)
    inside = pixel < pixels
    constant = tl.load(pixel_maps + image * 2 * pixels + pixel, inside, 0.0)[:, None]
    slope = tl.load(pixel_maps + (image * 2 + 1) * pixels + pixel, inside, 0.0)[:, None]
    for first in range(0, channels, block_c):
        channel = first + tl.arange(0, block_c)
        offsets = _offsets(image, pixel, channel, pixels, channels, channels_last)
        there = inside[:, None] & (channel < channels)[None, :]
        values = tl.load(input + offsets, there, 0.0).to(tl.float32)
        if relu:
            values = tl.where(values < 0, 0.0, values)
        change = constant + slope * values
        if seed is not None:
            kept = _kept(tl.load(seed), image, pixel, first, pixels, channels, block_c, threshold)
            change = tl.where(kept, change, 0.0)
        change += tl.load(d_input + offsets, there, 0.0).to(tl.float32)
        if relu:
            change = tl.where(values <= 0, 0.0, change)
        tl.store(d_input + offsets, change, there)
