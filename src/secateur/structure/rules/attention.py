"""Scaled-dot-product attention in all the forms that torch dispatches it to.

Index conventions: queries ``(B, H, T, D)``, keys and values ``(B, H / R, S, D)`` with ``R`` query heads for each.
"""

from __future__ import annotations

import numpy as np

from secateur.structure.coupling import Coupling
from secateur.structure.ids import Factor, Label, make_factor
from secateur.structure.rules.contraction import TWO_ACTIVATIONS, count_macs
from secateur.structure.rules.pointwise import meet
from secateur.structure.rules.reduction import given_up
from secateur.structure.rules.registry import Call, Uncovered, rule, set_factors

__all__: list[str] = []

_TIME = "is the time of an attention"


@rule(
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_attention_math",
    "_scaled_dot_product_attention_math_for_mps",
    sizes=True,
)
def attention(c: Coupling, call: Call) -> list[Label]:
    """``softmax(q k^T) v``: heads go together, value features pass, those of queries and keys are contracted."""
    q, k, v = (call.label(key) for key in ("query", "key", "value"))
    batch, heads, t, s = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    if len(q.shape) != 4:
        raise Uncovered("query")
    if 3 in q.uniform and 3 in k.uniform:
        call.counts(q.shape[3])
    q, k = (given_up(c, given_up(c, side, [3], TWO_ACTIVATIONS), [2], _TIME) for side in (q, k))
    v = given_up(c, v, [2], _TIME)
    k, v = _repeat_heads(k, heads), _repeat_heads(v, heads)
    head_shape = (batch, heads, 1, 1)
    operands = [Label(head_shape, q.factors, q.uniform), Label((k.shape[0], heads, 1, 1), k.factors, k.uniform)]
    operands.extend(_mask(c, call.label(key)) for key in ("attn_mask", "attn_bias") if call.has(key))
    score = Label(head_shape, meet(c, operands, head_shape))
    for factor in score.factors:
        c.batch(factor.ids)
    count_macs(c, (q, [0, 1]), times=float(t * s * q.shape[3]))
    count_macs(c, (v, [0, 1, 3]), times=float(t * s))
    value = Label((v.shape[0], heads, 1, v.shape[3]), v.factors, v.uniform)
    out = Label((batch, heads, t, v.shape[3]), meet(c, [score, value], (batch, heads, 1, v.shape[3]), coarse=True))
    return [out, *(_side(score, tuple(tensor.shape)) for tensor in call.outputs[1:])]


def _mask(c: Coupling, mask: Label) -> Label:
    """A mask or bias of the scores; its last two dimensions are times."""
    n = len(mask.shape)
    times = range(max(n - 2, 0), n)
    mask = given_up(c, mask, times, _TIME)
    lined_up = tuple(1 if dim in times else size for dim, size in enumerate(mask.shape))
    return Label(lined_up, mask.factors, mask.uniform)


def _side(score: Label, shape: tuple[int, ...]) -> Label:
    """What an attention returns besides: sums over keys, weights, or states of random numbers."""
    heads = [f for f in score.factors if f.dims == (1,)]
    has_heads = len(shape) > 1 and shape[:2] == score.shape[:2]
    return Label(shape, tuple(heads) if has_heads else ())


def _repeat_heads(label: Label, heads: int) -> Label:
    """Keys or values, once for each query head that reads them."""
    times = heads // label.shape[1]
    if times == 1:
        return label
    shape = (label.shape[0], heads, *label.shape[2:])
    factors: list[Factor | None] = [
        make_factor(f.dims, np.repeat(f.ids, times, axis=f.dims.index(1)) if 1 in f.dims else f.ids)
        for f in label.factors
    ]
    return set_factors(label, shape, factors, label.uniform)
