"""Functions of torch that were given stand-ins for parameters: what to compute, and the gradients of single samples.

Each takes the place of a function; see `knlightning.privacy.stand_ins`. A new one is added to `RULES`.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from knlightning.nn.windows import Window, per_dimension
from knlightning.privacy.embedding import Embedded
from knlightning.privacy.product import Product
from knlightning.privacy.rules import Parts, affine_parts, conv_parts, linear_parts
from knlightning.privacy.stand_ins import Meeting, StandIn, plain


def _fixed(parameter: Any) -> Any:
    """Take a parameter without its graph; what is no stand-in keeps its own."""
    return parameter.plain.detach() if isinstance(parameter, StandIn) else parameter


def _wanted(parameter: Tensor | None) -> Tensor | None:
    return parameter.plain if isinstance(parameter, StandIn) else None


def _linear(meeting: Meeting, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    output = F.linear(input, weight=_fixed(weight), bias=_fixed(bias))
    rule = partial(linear_parts, weight=_wanted(weight), bias=_wanted(bias))
    return meeting.watch("linear", input, output, (weight, bias), rule)


def _matmul(meeting: Meeting, input: Tensor, other: Tensor) -> Tensor:
    if not isinstance(other, StandIn) or other.plain.dim() != 2:
        raise ValueError("in a product of matrices, a parameter must be the second factor, and have two dimensions")
    return _linear(meeting, input, other.t())


def _conv(
    meeting: Meeting,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    function: Callable[..., Tensor],
) -> Tensor:
    output = function(input, _fixed(weight), _fixed(bias), stride, padding, dilation, groups)
    window = Window.of(input.dim() - 2, plain(weight).shape[2:], stride, padding, dilation)
    rule = partial(conv_parts, weight=_wanted(weight), bias=_wanted(bias), window=window, groups=groups)
    return meeting.watch("convolution", input, output, (weight, bias), rule)


def _conv_transpose(
    meeting: Meeting,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    *,
    function: Callable[..., Tensor],
) -> Tensor:
    output = function(input, _fixed(weight), _fixed(bias), stride, padding, output_padding, groups, dilation)
    spatial = input.dim() - 2
    window = Window.of(spatial, plain(weight).shape[2:], stride, 0, dilation)
    before = per_dimension(padding, spatial, "padding", 0)
    more = per_dimension(output_padding, spatial, "output_padding", 0)
    pads = [pad for p, extra in zip(reversed(before), reversed(more), strict=True) for pad in (p, p - extra)]

    def rule(x: Tensor, grad: Tensor) -> Parts:
        """The gradient of its weight is that of the convolution that goes from the output to the input."""
        vectors, _ = conv_parts(x, grad, None, _wanted(bias), window, groups)
        kernel = _wanted(weight)
        return vectors, [] if kernel is None else [Product(kernel, F.pad(grad, pads), x, window, groups)]

    return meeting.watch("transposed convolution", input, output, (weight, bias), rule)


def _layer_norm(
    meeting: Meeting,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    output = F.layer_norm(input, normalized_shape, _fixed(weight), _fixed(bias), eps)

    def rule(x: Tensor, grad: Tensor) -> Parts:
        positions = tuple(range(1, x.dim() - len(normalized_shape)))
        normalize = partial(F.layer_norm, normalized_shape=normalized_shape, eps=eps)
        return affine_parts(normalize, positions, x, grad, _wanted(weight), _wanted(bias)), []

    return meeting.watch("layer_norm", input, output, (weight, bias), rule)


def _rms_norm(
    meeting: Meeting,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    output = F.rms_norm(input, normalized_shape, _fixed(weight), eps)
    precision = torch.finfo(input.dtype).eps if eps is None else eps  # as torch chooses it

    def rule(x: Tensor, grad: Tensor) -> Parts:
        positions = tuple(range(1, x.dim() - len(normalized_shape)))
        normalize = partial(F.rms_norm, normalized_shape=normalized_shape, eps=precision)
        return affine_parts(normalize, positions, x, grad, _wanted(weight), None), []

    return meeting.watch("rms_norm", input, output, (weight,), rule)


def _group_norm(
    meeting: Meeting,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    output = F.group_norm(input, num_groups, _fixed(weight), _fixed(bias), eps)

    def rule(x: Tensor, grad: Tensor) -> Parts:
        normalize = partial(F.group_norm, num_groups=num_groups, eps=eps)
        return affine_parts(normalize, tuple(range(2, x.dim())), x, grad, _wanted(weight), _wanted(bias)), []

    return meeting.watch("group_norm", input, output, (weight, bias), rule)


def _prelu(meeting: Meeting, input: Tensor, weight: Tensor) -> Tensor:
    slopes = weight.view(-1, *(1,) * (input.dim() - 2)) if plain(weight).numel() > 1 else weight
    return torch.where(input > 0, input, input * slopes)


def _embedding(
    meeting: Meeting, input: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    output = F.embedding(input, plain(weight).detach(), padding_idx)
    unused = -1 if padding_idx is None else padding_idx % len(plain(weight))

    def rule(x: Tensor, grad: Tensor) -> Parts:
        return {}, [Embedded(plain(weight), x, grad.masked_fill((x == unused).unsqueeze(-1), 0.0))]

    return meeting.watch("embedding", input, output, (weight,), rule)


def _scaled_dot_product_attention(
    meeting: Meeting, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Add a table of relative positions to the products of queries and keys."""
    shape = *query.shape[:-1], key.shape[-2]
    mask = torch.zeros(shape, dtype=query.dtype, device=query.device).requires_grad_() + attn_mask
    return F.scaled_dot_product_attention(query, key, value, mask, *args, **kwargs)


def _multi_head_attention(
    meeting: Meeting,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute what `torch.nn.MultiheadAttention` asks for, with samples in the second dimension."""
    if query.dim() != 3 or any(extra is not None for extra in (bias_k, static_k, static_v)) or add_zero_attn:
        raise ValueError("attention needs a batch of samples, without bias_kv, zero_attn or static keys and values")
    if use_separate_proj_weight:
        matrices = q_proj_weight, k_proj_weight, v_proj_weight
        biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
        given = (each.transpose(0, 1) for each in (query, key, value))
        q, k, v = (_linear(meeting, *each) for each in zip(given, matrices, biases, strict=True))  # type: ignore[arg-type] # torch has checked them
    else:
        assert in_proj_weight is not None
        q, k, v = _packed(meeting, query, key, value, in_proj_weight, in_proj_bias)
    q, k, v = (each.unflatten(2, (num_heads, -1)).transpose(1, 2) for each in (q, k, v))
    mask = _additive(attn_mask, q)
    if mask is not None and mask.dim() == 3:
        mask = mask.unflatten(0, (-1, num_heads))
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, q)[:, None, None]  # type: ignore[index] # it is not None
        mask = padding if mask is None else mask + padding
    dropout_p = dropout_p if training else 0.0
    weights: Tensor | None = None
    if need_weights:
        products = (q / math.sqrt(q.shape[-1])) @ k.transpose(2, 3)
        weights = (products if mask is None else products + mask).softmax(-1)
        weights = F.dropout(weights, dropout_p) if dropout_p else weights
        output, weights = weights @ v, weights.mean(1) if average_attn_weights else weights
    else:
        output = F.scaled_dot_product_attention(q, k, v, mask, dropout_p)
    output = _linear(meeting, output.transpose(1, 2).flatten(2), out_proj_weight, out_proj_bias)
    return output.transpose(0, 1).contiguous(), weights  # by its layout dropout would draw other masks


def _packed(
    meeting: Meeting, query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None
) -> Sequence[Tensor]:
    """Project queries, keys and values by one weight; [N, positions, channels] each."""
    if query is key and key is value:
        return _linear(meeting, query.transpose(0, 1), weight, bias).chunk(3, -1)
    lengths, channels = [len(each) for each in (query, key, value)], query.shape[-1]
    projected = _linear(meeting, torch.cat([query, key, value]).transpose(0, 1), weight, bias)
    parts = projected.split(lengths, 1)
    return [part[..., number * channels : (number + 1) * channels] for number, part in enumerate(parts)]


def _additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -torch.inf)


RULES: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), _matmul),
    **{each: partial(_conv, function=each) for each in (F.conv1d, F.conv2d, F.conv3d)},
    **{
        each: partial(_conv_transpose, function=each)
        for each in (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
    },
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    F.prelu: _prelu,
    F.embedding: _embedding,
    F.scaled_dot_product_attention: _scaled_dot_product_attention,
    F.multi_head_attention_forward: _multi_head_attention,
}
"""Functions, and what is called in their place; the parameters have the names of theirs."""
