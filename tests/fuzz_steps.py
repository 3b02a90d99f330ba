"""The steps that random networks are made of, one builder for each family of operators."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from tests.fuzz import BATCH, IMAGE, MOST_CHANNELS, ROWS, Draw, Layout, Run, Step, builds, divisor, pick, width
from torch import Tensor, nn

ACTIVATIONS: dict[str, Run] = {
    "relu": lambda m, x: x.relu(),
    "relu in place": lambda m, x: F.relu(x * 1, inplace=True),
    "tanh": lambda m, x: x.tanh(),
    "gelu": lambda m, x: F.gelu(x),
    "softplus": lambda m, x: F.softplus(x),
    "cosine": lambda m, x: x.cos(),
    "add in place": lambda m, x: (x * 1).add_(0.5),
}


@builds(ROWS, IMAGE)
def activation(draw: Draw, s: Layout) -> Step:
    name = pick(draw, *ACTIVATIONS)
    return Step(name, ACTIVATIONS[name], s)


@builds(ROWS)
def linear(draw: Draw, s: Layout) -> Step:
    c, bias = width(draw), pick(draw, True, False)
    return Step(f"linear {c}", lambda m, x: m.layer(x), replace(s, c=c), layer=nn.Linear(s.c, c, bias=bias))


@builds(ROWS)
def norm(draw: Draw, s: Layout) -> Step:
    kind = pick(draw, "layer", "rms", "batch", "heads", "prelu", "scale")
    if kind in ("batch", "prelu"):
        layer = nn.BatchNorm1d(s.c) if kind == "batch" else nn.PReLU(s.c)
        return Step(f"{kind} of rows", lambda m, x: m.layer(x.transpose(1, 2)).transpose(1, 2), s, layer=layer)
    if kind == "heads":
        k = divisor(draw, s.c) or s.c
        run: Run = lambda m, x: m.layer(x.unflatten(-1, (-1, k))).flatten(-2)  # noqa: E731
        return Step(f"layer norm of {k}", run, s, layer=nn.LayerNorm(k))
    if kind == "scale":
        parts = {"scale": torch.randn(s.c), "shift": torch.randn(s.c)}
        return Step("scale and shift", lambda m, x: x * m.scale + m.shift, s, **parts)
    layer = nn.LayerNorm(s.c) if kind == "layer" else nn.RMSNorm(s.c, eps=1e-5)
    return Step(f"{kind} norm", lambda m, x: m.layer(x), s, layer=layer)


@builds(ROWS)
def halves(draw: Draw, s: Layout) -> Step | None:
    if s.c % 2 or s.c < 4:
        return None
    how = pick(draw, "glu", "chunk", "slices", "tensor_split", "sizes", "swap", "written", "parts")
    half = s.c // 2

    def run(m: Any, x: Tensor) -> Tensor:
        n = x.shape[-1] // 2
        if how == "glu":
            return F.glu(x)
        if how == "swap":
            return torch.cat([x[..., n:], x[..., :n]], -1)
        if how == "written":
            return torch.cat([x[..., half:], x[..., :half]], -1)
        a, b = {
            "chunk": lambda: x.chunk(2, -1),
            "slices": lambda: (x[..., :n], x[..., n:]),
            "tensor_split": lambda: x.tensor_split(2, -1),
            "sizes": lambda: x.split([n, n], -1),
            "parts": lambda: x.unflatten(-1, (2, -1)).unbind(-2),
        }[how]()
        return a * b.sigmoid()

    return Step(f"halves: {how}", run, s if how in ("swap", "written") else replace(s, c=half))


@builds(ROWS)
def reshape(draw: Draw, s: Layout) -> Step | None:
    k = divisor(draw, s.c)
    if k is None:
        return None
    fewer = replace(s, c=s.c // k)
    ways: dict[str, tuple[Run, Layout]] = {
        "shuffle k, -1": (lambda m, x: x.unflatten(-1, (k, -1)).transpose(-1, -2).flatten(-2), s),
        "shuffle -1, k": (lambda m, x: x.unflatten(-1, (-1, k)).transpose(-1, -2).flatten(-2), s),
        "sum of parts": (lambda m, x: x.unflatten(-1, (k, -1)).sum(-2), fewer),
        "max in a row": (lambda m, x: x.unflatten(-1, (-1, k)).amax(-1), fewer),
        "parts as rows": (lambda m, x: x.unflatten(-1, (k, -1)).flatten(1, 2), replace(fewer, t=s.t * k)),
        "first part": (lambda m, x: x.unflatten(-1, (k, -1))[..., 0, :], fewer),
        "softmax in a row": (lambda m, x: x.unflatten(-1, (-1, k)).softmax(-1).flatten(-2), s),
    }
    name = pick(draw, *ways)
    run, after = ways[name]
    return Step(f"{name} ({k})", run, after)


@builds(ROWS)
def more(draw: Draw, s: Layout) -> Step | None:
    if 2 * s.c > MOST_CHANNELS:
        return None
    ways: dict[str, Run] = {
        "repeat": lambda m, x: x.repeat(1, 1, 2),
        "interleave": lambda m, x: x.repeat_interleave(2, -1),
        "with itself": lambda m, x: torch.cat([x, -x], -1),
        "with zeros": lambda m, x: torch.cat([torch.zeros_like(x), x], -1),
        "stack": lambda m, x: torch.stack([x, x.tanh()], -1).flatten(-2),
    }
    name = pick(draw, *ways, "pad")
    if name == "pad":
        before, after = pick(draw, 0, 1, 2), pick(draw, 0, 1)
        return Step(
            f"pad {before}, {after}", lambda m, x: F.pad(x, (before, after)), replace(s, c=s.c + before + after)
        )
    return Step(name, ways[name], replace(s, c=2 * s.c))


@builds(ROWS)
def along_rows(draw: Draw, s: Layout) -> Step:
    t = s.t
    index = torch.arange(t).flip(0)

    def write(m: Any, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for k in range(t):
            out[:, k] = x[:, t - 1 - k] * (k + 1)
        return out

    def put(m: Any, x: Tensor) -> Tensor:
        out = x.new_zeros(x.shape[0], t, x.shape[2])
        out[:, index] = x
        return out + x

    ways: dict[str, Run] = {
        "roll": lambda m, x: x.roll(1, 1),
        "flip": lambda m, x: x.flip((1, 2)),
        "cumsum": lambda m, x: x.cumsum(1),
        "softmax": lambda m, x: x.softmax(1),
        "gate": lambda m, x: x * x.mean(1, keepdim=True).sigmoid(),
        "gather": lambda m, x: x[:, index] + x.gather(1, index[None, :, None].expand(BATCH, -1, x.shape[-1])),
        "index_add": lambda m, x: torch.zeros_like(x).index_add_(1, index, x),
        "write": write,
        "put": put,
        "sort": lambda m, x: x.sort(1).values,
        "topk": lambda m, x: x.topk(1, 1).values + x,
        "norm": lambda m, x: F.normalize(x, dim=1),
        "mean": lambda m, x: x.mean(1, keepdim=True),
        "mix": lambda m, x: torch.einsum("btc,ts->bsc", x, m.w),
        "conv": lambda m, x: m.layer(x.transpose(1, 2)).transpose(1, 2),
    }
    name = pick(draw, *ways)
    parts: dict[str, Any] = {}
    if name == "mix":
        parts["w"] = torch.randn(t, t)
    if name == "conv":
        parts["layer"] = nn.Conv1d(s.c, s.c, 3, padding=1, groups=s.c)
    return Step(f"rows: {name}", ways[name], replace(s, t=1) if name == "mean" else s, **parts)


@builds(ROWS)
def freezing(draw: Draw, s: Layout) -> Step:
    ways: dict[str, Run] = {
        "mean": lambda m, x: x - x.mean(-1, keepdim=True),
        "norm": lambda m, x: F.normalize(x, dim=-1),
        "sqrt": lambda m, x: x / x.shape[-1] ** 0.5,
        "softmax": lambda m, x: x.softmax(-1),
        "cumsum": lambda m, x: x.cumsum(-1),
        "roll": lambda m, x: x.roll(1, -1),
        "select": lambda m, x: x * x[..., :1],
        "product": lambda m, x: (x @ x.mT).softmax(-1) @ x,
        "ones": lambda m, x: x / torch.ones_like(x).sum(-1, keepdim=True),
        "number of ones": lambda m, x: x / x.new_ones(x.shape).sum(-1, keepdim=True),
        "steps": lambda m, x: x * torch.arange(x.shape[-1]),
        "some": lambda m, x: x + F.pad(x[..., 1:], (0, 1)),
    }
    name = pick(draw, *ways)
    return Step(f"freezing: {name}", ways[name], s)


@builds(ROWS)
def bare(draw: Draw, s: Layout) -> Step:
    c = width(draw)
    wider = replace(s, c=c)
    w, v = torch.randn(c, s.c), torch.randn(c, s.c)
    ways: dict[str, tuple[Run, Layout, dict[str, Any]]] = {
        "einsum": (lambda m, x: torch.einsum("btc,oc->bto", x, m.w), wider, {"w": w}),
        "low rank": (
            lambda m, x: F.linear(x, m.w + m.up @ m.down),
            wider,
            {"w": w, "up": torch.randn(c, 2), "down": torch.randn(2, s.c)},
        ),
        "tied": (lambda m, x: F.linear(F.linear(x, m.w).relu(), m.w.t()), s, {"w": w}),
        "shared twice": (lambda m, x: m.layer(m.layer(x).relu()), s, {"layer": nn.Linear(s.c, s.c)}),
        "two weights": (lambda m, x: F.linear(x, torch.cat([m.w, m.v])), replace(s, c=2 * c), {"w": w, "v": v}),
        "stacked weights": (
            lambda m, x: torch.einsum("btc,koc->btko", x, torch.stack([m.w, m.v])).sum(2), wider, {"w": w, "v": v}
        ),
        "scaled weight": (
            lambda m, x: F.linear(x, m.w * m.v.tanh()), wider, {"w": w, "v": torch.randn(s.c)}
        ),
        "masked weight": (lambda m, x: F.linear(x, m.w * (m.w.abs() > 0.1)), wider, {"w": w}),
        "positive weight": (lambda m, x: F.linear(x, F.softplus(m.w)), wider, {"w": w}),
        "normalised weight": (lambda m, x: F.linear(x, F.normalize(m.w, dim=1)), wider, {"w": w}),
        "halves of a weight": (
            lambda m, x: F.linear(x, m.w.chunk(2)[0]) * F.linear(x, m.w.chunk(2)[1]), wider, {"w": torch.cat([w, v])}
        ),
        "experts": (
            lambda m, x: torch.einsum("btc,eco->beto", x, m.w).amax(1), wider, {"w": torch.randn(3, s.c, c)}
        ),
        "gate": (lambda m, x: x * m.gate(x).sigmoid(), s, {"gate": nn.Linear(s.c, 1)}),
        "expanded gate": (lambda m, x: x * m.gate(x).expand(-1, -1, x.shape[-1]), s, {"gate": nn.Linear(s.c, 1)}),
        "table": (lambda m, x: x + m.table(torch.arange(x.shape[1])), s, {"table": nn.Embedding(s.t, s.c)}),
    }  # fmt: skip
    if 2 * s.c <= MOST_CHANNELS:
        ways["outer"] = (
            lambda m, x: (x[..., None] * m.gate(x)[..., None, :]).flatten(-2),
            replace(s, c=2 * s.c),
            {"gate": nn.Linear(s.c, 2)},
        )
    name = pick(draw, *ways)
    run, after, parts = ways[name]
    return Step(f"{name} {c}", run, after, **parts)


@builds(ROWS)
def attention(draw: Draw, s: Layout) -> Step:  # noqa: C901 - every way to lay heads out
    groups, times, size = pick(draw, 1, 2, 3), pick(draw, 1, 2), pick(draw, 2, 4)
    layout = pick(draw, "size", "heads", "three", "interleaved", "einsum")
    how = pick(draw, "plain", "causal", "by hand", "bias", "rotary", "norm", "gqa", "linear")
    heads = groups * times
    if layout in ("three", "interleaved"):
        groups = heads

    def split(x: Tensor, n: int) -> Tensor:
        return x.unflatten(-1, (n, -1) if layout == "heads" else (-1, size)).transpose(1, 2)

    def project(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        if layout == "three":
            return m.qkv(x).unflatten(-1, (3, -1, size)).permute(2, 0, 3, 1, 4).unbind(0)
        if layout == "interleaved":
            return m.qkv(x).unflatten(-1, (-1, 3, size)).permute(3, 0, 2, 1, 4).unbind(0)
        if layout == "einsum":
            return tuple(torch.einsum("btc,chd->bhtd", x, w) for w in (m.wq, m.wk, m.wv))
        return split(m.q(x), heads), split(m.k(x), groups), split(m.v(x), groups)

    def attend(m: Any, x: Tensor) -> Tensor:
        q, k, v = project(m, x)
        if how == "rotary":
            q, k = (torch.cat([-y[..., size // 2 :], y[..., : size // 2]], -1) * 0.3 + y for y in (q, k))
        if how == "norm":
            q, k = m.norm(q), m.norm(k)
        r = q.shape[1] // k.shape[1]
        if how != "gqa":
            k, v = (y[:, :, None].expand(-1, -1, r, -1, -1).flatten(1, 2) for y in (k, v))
        if how == "by hand":
            out = ((q @ k.mT) / size**0.5).softmax(-1) @ v
        elif how == "linear":
            out = q.softmax(-1) @ (k.softmax(2).mT @ v)
        else:
            bias = m.bias if how == "bias" else None
            out = F.scaled_dot_product_attention(q, k, v, bias, is_causal=how == "causal", enable_gqa=how == "gqa")
        return m.out(out.transpose(1, 2).flatten(2))

    parts: dict[str, Any] = {"out": nn.Linear(heads * size, s.c)}
    if how == "norm":
        parts["norm"] = nn.LayerNorm(size)
    if how == "bias":
        parts["bias"] = torch.randn(heads, s.t, s.t)
    if layout in ("three", "interleaved"):
        parts["qkv"] = nn.Linear(s.c, 3 * heads * size)
    elif layout == "einsum":
        parts.update(
            {f"w{name}": torch.randn(s.c, n, size) for name, n in zip("qkv", (heads, groups, groups), strict=True)}
        )
    else:
        parts.update({name: nn.Linear(s.c, n * size) for name, n in zip("qkv", (heads, groups, groups), strict=True)})
    return Step(f"attention {heads}/{groups} x {size}, {layout}, {how}", attend, s, **parts)


@builds(ROWS)
def recurrent(draw: Draw, s: Layout) -> Step:
    kind, c = pick(draw, "rnn", "lstm", "gru"), width(draw)
    cell = {"rnn": nn.RNNCell, "lstm": nn.LSTMCell, "gru": nn.GRUCell}[kind](s.c, c)

    def run(m: Any, x: Tensor) -> Tensor:
        state, outputs = None, []
        for row in x.unbind(1)[:3]:
            state = m.cell(row, state)
            outputs.append(state[0] if kind == "lstm" else state)
        return torch.stack(outputs, 1)

    return Step(f"{kind} {c}", run, replace(s, c=c, t=min(s.t, 3)), cell=cell)


@builds(ROWS)
def to_image(draw: Draw, s: Layout) -> Step | None:
    if s.t != 4:
        return None
    return Step("to image", lambda m, x: x.transpose(1, 2).unflatten(-1, (2, 2)), Layout(IMAGE, s.c, 2))


@builds(IMAGE)
def conv(draw: Draw, s: Layout) -> Step:
    c, transposed = width(draw), pick(draw, False, False, True)
    groups = pick(draw, *(g for g in (1, 1, 2, 3, 4) if s.c % g == 0 and c % g == 0))
    kernel, mode = pick(draw, 1, 3), "zeros" if transposed else pick(draw, "zeros", "zeros", "circular", "replicate")
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    bias = pick(draw, True, False)
    layer = kind(s.c, c, kernel, padding=kernel // 2, groups=groups, padding_mode=mode, bias=bias)
    name = f"{'transposed ' if transposed else ''}conv {c}, {kernel}, groups {groups}, {mode}"
    return Step(name, lambda m, x: m.layer(x), replace(s, c=c), layer=layer)


@builds(IMAGE)
def depthwise(draw: Draw, s: Layout) -> Step:
    times, transposed = pick(draw, 1, 2), pick(draw, False, True)
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer = kind(s.c, times * s.c, 3, padding=1, groups=s.c)
    name = f"depthwise x {times}{', transposed' if transposed else ''}"
    return Step(name, lambda m, x: m.layer(x), replace(s, c=times * s.c), layer=layer)


@builds(IMAGE)
def image_norm(draw: Draw, s: Layout) -> Step:
    # One position alone has no variance of its own, which torch refuses.
    kind = pick(draw, "batch", "group", "one group", "last", *(["instance"] if s.t > 1 else []))
    if kind == "last":
        run: Run = lambda m, x: m.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # noqa: E731
        return Step("layer norm, channels last", run, s, layer=nn.LayerNorm(s.c))
    groups = divisor(draw, s.c) or 1
    layer = {
        "batch": lambda: nn.BatchNorm2d(s.c),
        "instance": lambda: nn.InstanceNorm2d(s.c, affine=True),
        "group": lambda: nn.GroupNorm(groups, s.c),
        "one group": lambda: nn.GroupNorm(1, s.c),
    }[kind]()
    return Step(f"{kind} norm ({groups})", lambda m, x: m.layer(x), s, layer=layer)


@builds(IMAGE)
def places(draw: Draw, s: Layout) -> Step:
    def blur(m: Any, x: Tensor) -> Tensor:
        kernel = torch.ones(1, 1, 3, 3, dtype=x.dtype).expand(x.shape[1], -1, -1, -1)
        return F.conv2d(x, kernel, padding=1, groups=x.shape[1])

    def grid(m: Any, x: Tensor) -> Tensor:
        return F.grid_sample(x, torch.full((BATCH, s.t, s.t, 2), 0.2, dtype=x.dtype), align_corners=False)

    ways: dict[str, tuple[Run, Layout]] = {
        "mean": (lambda m, x: F.adaptive_avg_pool2d(x, 1), replace(s, t=1)),
        "blur": (blur, s),
        "spatial gate": (lambda m, x: x * m.gate(x).sigmoid().expand_as(x), s),
        "grid": (grid, s),
    }
    if s.t >= 2:
        ways["pool"] = (lambda m, x: F.max_pool2d(x, 2), replace(s, t=s.t // 2))
        if 4 * s.c <= MOST_CHANNELS:
            windows: Run = lambda m, x: F.unfold(x, 2, stride=2).unflatten(-1, (x.shape[2] // 2, -1))  # noqa: E731
            ways["windows"] = (windows, Layout(IMAGE, 4 * s.c, s.t // 2))
    if s.t <= 4:
        ways["up"] = (lambda m, x: F.interpolate(x, scale_factor=2.0), replace(s, t=2 * s.t))
        bilinear: Run = lambda m, x: F.interpolate(x, scale_factor=2.0, mode="bilinear")  # noqa: E731
        ways["bilinear"] = (bilinear, replace(s, t=2 * s.t))
    name = pick(draw, *ways)
    run, after = ways[name]
    return Step(name, run, after, **({"gate": nn.Conv2d(s.c, 1, 1)} if name == "spatial gate" else {}))


@builds(IMAGE)
def shuffles(draw: Draw, s: Layout) -> Step:
    k = divisor(draw, s.c)
    ways: dict[str, tuple[Run, Layout]] = {
        "flip": (lambda m, x: x.flip(1), s),
        "flip places": (lambda m, x: x.flip(2), s),
    }
    if s.c % 4 == 0 and s.c >= 8 and s.t <= 4:
        ways["pixel shuffle"] = (lambda m, x: F.pixel_shuffle(x, 2), Layout(IMAGE, s.c // 4, 2 * s.t))
    if s.t % 2 == 0 and 4 * s.c <= MOST_CHANNELS:
        ways["pixel unshuffle"] = (lambda m, x: F.pixel_unshuffle(x, 2), Layout(IMAGE, 4 * s.c, s.t // 2))
    if k is not None:
        ways["channel shuffle"] = (lambda m, x: F.channel_shuffle(x, k), s)
        ways["channel shuffle by views"] = (
            lambda m, x: x.unflatten(1, (k, -1)).transpose(1, 2).flatten(1, 2), s
        )  # fmt: skip
    name = pick(draw, *ways)
    run, after = ways[name]
    return Step(f"{name} ({k})", run, after)


@builds(IMAGE)
def squeeze_and_excite(draw: Draw, s: Layout) -> Step:
    c, how = width(draw), pick(draw, "conv", "linear", "squeeze")

    def run(m: Any, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3), keepdim=True)
        if how == "conv":
            return x * m.b(m.a(pooled).relu()).sigmoid()
        flat = pooled.squeeze() if how == "squeeze" else pooled.flatten(1)
        return x * m.b(m.a(flat).relu()).sigmoid()[:, :, None, None]

    a, b = (nn.Conv2d(s.c, c, 1), nn.Conv2d(c, s.c, 1)) if how == "conv" else (nn.Linear(s.c, c), nn.Linear(c, s.c))
    return Step(f"squeeze and excite {c}, {how}", run, s, a=a, b=b)


@builds(IMAGE)
def to_rows(draw: Draw, s: Layout) -> Step:
    if s.c * s.t * s.t <= 4 * MOST_CHANNELS and pick(draw, True, False):
        return Step("flatten", lambda m, x: x.flatten(1)[:, None], Layout(ROWS, s.c * s.t * s.t, 1))
    return Step("pixels as rows", lambda m, x: x.flatten(2).transpose(1, 2), Layout(ROWS, s.c, s.t * s.t))
