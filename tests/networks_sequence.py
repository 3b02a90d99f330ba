"""Small networks over sequences: language models, recurrent classifiers, state spaces, mixtures of experts."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CausalSelfAttention(nn.Module):
    """Fused query, key and value; the mask is a buffer."""

    def __init__(self, width: int, heads: int, time: int) -> None:
        super().__init__()
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)
        self.n_head, self.n_embd = heads, width
        self.register_buffer("bias", torch.tril(torch.ones(time, time)).view(1, 1, time, time))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = F.softmax(att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf")), dim=-1)
        y = (att @ v).transpose(1, 2).contiguous().view(B, T, C)
        return self.c_proj(y)


class GPT(nn.Module):
    """A small language model whose output layer is its token embedding."""

    def __init__(self, vocabulary: int = 61, width: int = 32, heads: int = 4, layers: int = 2, time: int = 16) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(time, width)
        self.h = nn.ModuleList(
            nn.ModuleDict(
                {
                    "ln_1": nn.LayerNorm(width),
                    "attn": CausalSelfAttention(width, heads, time),
                    "ln_2": nn.LayerNorm(width),
                    "mlp": nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)),
                }
            )
            for _ in range(layers)
        )
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, idx: Tensor) -> Tensor:
        x = self.wte(idx) + self.wpe(torch.arange(idx.size(1), device=idx.device))
        for block in self.h:
            x = x + block["attn"](block["ln_1"](x))
            x = x + block["mlp"](block["ln_2"](x))
        return self.lm_head(self.ln_f(x))


class EinsumTransformer(nn.Module):
    """Bare parameters and `einsum` alone, with RMS normalisation written out."""

    def __init__(self, vocabulary: int = 50, d: int = 24, h: int = 3, k: int = 8, f: int = 56, layers: int = 2) -> None:
        super().__init__()

        def weights(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape) / math.sqrt(shape[-2]))

        self.embed = weights(vocabulary, d)
        self.w_q = nn.ParameterList(weights(h, d, k) for _ in range(layers))
        self.w_k = nn.ParameterList(weights(h, d, k) for _ in range(layers))
        self.w_v = nn.ParameterList(weights(h, d, k) for _ in range(layers))
        self.w_o = nn.ParameterList(weights(h, k, d) for _ in range(layers))
        self.w_in = nn.ParameterList(weights(d, f) for _ in range(layers))
        self.w_out = nn.ParameterList(weights(f, d) for _ in range(layers))
        self.scale = nn.Parameter(torch.ones(2 * layers, d))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed[tokens]
        mask = torch.full((x.shape[1], x.shape[1]), -1e9, device=x.device).triu(1)
        for layer in range(len(self.w_q)):
            y = self._normed(x, 2 * layer)
            q = torch.einsum("btd,hdk->bhtk", y, self.w_q[layer])
            k = torch.einsum("btd,hdk->bhtk", y, self.w_k[layer])
            v = torch.einsum("btd,hdk->bhtk", y, self.w_v[layer])
            scores = torch.einsum("bhtk,bhsk->bhts", q, k) / 8**0.5 + mask
            y = torch.einsum("bhts,bhsk->bhtk", scores.softmax(-1), v)
            x = x + torch.einsum("bhtk,hkd->btd", y, self.w_o[layer])
            y = self._normed(x, 2 * layer + 1)
            x = x + torch.einsum("btf,fd->btd", torch.relu(y @ self.w_in[layer]) ** 2, self.w_out[layer])
        return torch.einsum("btd,vd->btv", x, self.embed)

    def _normed(self, x: Tensor, number: int) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale[number]


class Recurrent(nn.Module):
    """Embedding, a recurrent layer, the last state, two linear layers."""

    def __init__(self, kind: type[nn.RNNBase], *, bidirectional: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 12)
        self.rnn = kind(12, 20, num_layers=2, batch_first=True, bidirectional=bidirectional)
        self.hidden = nn.Linear(20 * (1 + bidirectional), 14)
        self.out = nn.Linear(14, 4)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(self.embedding(x))
        return self.out(torch.relu(self.hidden(y[:, -1])))


class LSTMByCell(nn.Module):
    """The loop written out over a cell, with attention over the states that it leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 10)
        self.cell = nn.LSTMCell(10, 16)
        self.query = nn.Parameter(torch.randn(16))
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.shape[0], 16, device=x.device, dtype=self.query.dtype)
        c = torch.zeros_like(h)
        states = []
        for word in self.embedding(x).unbind(1):
            h, c = self.cell(word, (h, c))
            states.append(h)
        stacked = torch.stack(states, 1)
        weights = torch.softmax(stacked @ self.query, dim=1)
        return self.fc((weights.unsqueeze(-1) * stacked).sum(1))


class GRUByHand(nn.Module):
    """The equations of the paper with separate matrices, as a lecturer writes them."""

    def __init__(self, n_in: int = 7, n: int = 15) -> None:
        super().__init__()
        self.Wz, self.Wr, self.Wh = (nn.Linear(n_in, n) for _ in range(3))
        self.Uz, self.Ur, self.Uh = (nn.Linear(n, n, bias=False) for _ in range(3))
        self.n, self.out = n, nn.Linear(n, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], self.n)
        for t in range(x.shape[1]):
            z = torch.sigmoid(self.Wz(x[:, t]) + self.Uz(h))
            r = torch.sigmoid(self.Wr(x[:, t]) + self.Ur(h))
            h = (1 - z) * h + z * torch.tanh(self.Wh(x[:, t]) + self.Uh(r * h))
        return self.out(h)


class TCN(nn.Module):
    """Causal dilated convolutions; what the padding adds at the end is cut off."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv1d(a, b, 3, padding=2 * 2**i, dilation=2**i)
            for i, (a, b) in enumerate([(5, 12), (12, 12), (12, 18)])
        )
        self.down = nn.Conv1d(12, 18, 1)
        self.fc = nn.Linear(18, 4)

    def forward(self, x: Tensor) -> Tensor:
        for i, conv in enumerate(self.convs):
            y = F.relu(conv(x)[:, :, : x.shape[2]])
            x = y if i == 0 else F.relu(y + (x if y.shape[1] == x.shape[1] else self.down(x)))
        return self.fc(x[:, :, -1])


class WaveNet(nn.Module):
    """Gated residual blocks with skips that are summed up."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Conv1d(1, 10, 1)
        self.filters = nn.ModuleList(nn.Conv1d(10, 24, 2, dilation=2**i, padding=2**i) for i in range(3))
        self.residual = nn.ModuleList(nn.Conv1d(12, 10, 1) for _ in range(3))
        self.skip = nn.ModuleList(nn.Conv1d(12, 14, 1) for _ in range(3))
        self.end = nn.Sequential(nn.ReLU(), nn.Conv1d(14, 9, 1), nn.ReLU(), nn.Conv1d(9, 6, 1))

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.front(x), 0
        for both, back, aside in zip(self.filters, self.residual, self.skip, strict=True):
            tanh, gate = both(x)[..., : x.size(-1)].chunk(2, dim=1)
            y = torch.tanh(tanh) * torch.sigmoid(gate)
            x = x + back(y)
            total = total + aside(y)
        return self.end(total)


class MambaLike(nn.Module):
    """A selective state space, scanned step by step: chunked projection, depthwise convolution, softplus, exp."""

    def __init__(self, d: int = 16, inner: int = 28, n: int = 4, rank: int = 3) -> None:
        super().__init__()
        self.inner, self.n, self.rank = inner, n, rank
        self.embed, self.norm = nn.Embedding(40, d), nn.LayerNorm(d)
        self.in_proj = nn.Linear(d, 2 * inner, bias=False)
        self.conv = nn.Conv1d(inner, inner, 4, groups=inner, padding=3)
        self.x_proj = nn.Linear(inner, rank + 2 * n, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.log(torch.arange(1, n + 1).float()).repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj, self.head = nn.Linear(inner, d, bias=False), nn.Linear(d, 40)

    def forward(self, tokens: Tensor) -> Tensor:
        skip = self.embed(tokens)
        x, z = self.in_proj(self.norm(skip)).chunk(2, dim=-1)
        x = F.silu(self.conv(x.transpose(1, 2))[..., : tokens.shape[1]].transpose(1, 2))
        dt, b, c = self.x_proj(x).split([self.rank, self.n, self.n], dim=-1)
        dt, a = F.softplus(self.dt_proj(dt)), -torch.exp(self.A_log)
        h = torch.zeros(x.shape[0], x.shape[2], self.n, dtype=x.dtype, device=x.device)
        ys = []
        for t in range(x.shape[1]):
            h = torch.exp(dt[:, t, :, None] * a) * h + (dt[:, t] * x[:, t])[..., None] * b[:, t, None]
            ys.append((h * c[:, t, None]).sum(-1))
        y = (torch.stack(ys, 1) + x * self.D) * F.silu(z)
        return self.head(skip + self.out_proj(y))


class DenseMoE(nn.Module):
    """Every expert sees every token; the router weighs them. Experts are slices of stacked parameters."""

    def __init__(self, d: int = 14, f: int = 22, experts: int = 4) -> None:
        super().__init__()
        self.inp = nn.Linear(6, d)
        self.router = nn.Linear(d, experts)
        self.w1 = nn.Parameter(torch.randn(experts, d, f) / d**0.5)
        self.b1 = nn.Parameter(torch.randn(experts, f))
        self.w2 = nn.Parameter(torch.randn(experts, f, d) / f**0.5)
        self.out = nn.Linear(d, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.inp(x))
        share = self.router(x).softmax(-1)
        hidden = F.gelu(torch.einsum("btd,edf->betf", x, self.w1) + self.b1[None, :, None])
        made = torch.einsum("betf,efd->betd", hidden, self.w2)
        return self.out(x + torch.einsum("bte,betd->btd", share, made))


class SparseMoE(nn.Module):
    """The two best experts of each token, found by value: no two inputs take the same path."""

    def __init__(self, d: int = 12, experts: int = 3) -> None:
        super().__init__()
        self.gate = nn.Linear(d, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(d, 20), nn.SiLU(), nn.Linear(20, d)) for _ in range(experts)
        )
        self.head = nn.Linear(d, 4)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = self.gate(flat).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(chosen == number)
            out.index_add_(0, token, expert(flat[token]) * weights[token, place, None])
        return self.head(out).view(*x.shape[:-1], -1)


class TextCNN(nn.Module):
    """Filters of three widths over words, the maximum of each over time."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(60, 11, padding_idx=0)
        self.convs = nn.ModuleList(nn.Conv2d(1, 9, (k, 11)) for k in (2, 3, 4))
        self.dropout, self.fc1 = nn.Dropout(0.5), nn.Linear(27, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).unsqueeze(1)
        xs = [F.relu(conv(x)).squeeze(3) for conv in self.convs]
        xs = [F.max_pool1d(i, i.size(2)).squeeze(2) for i in xs]
        return self.fc1(self.dropout(torch.cat(xs, 1)))


class CRNN(nn.Module):
    """Convolutions read a line of text, a recurrent layer reads their columns."""

    def __init__(self) -> None:
        super().__init__()
        self.cnn = nn.Sequential(
            nn.Conv2d(1, 8, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 12, 3, 1, 1), nn.BatchNorm2d(12)
        )
        self.rnn = nn.LSTM(12 * 8, 10, bidirectional=True)
        self.embedding = nn.Linear(20, 7)

    def forward(self, x: Tensor) -> Tensor:
        conv = F.relu(self.cnn(x))
        b, c, h, w = conv.size()
        conv = conv.permute(3, 0, 1, 2).reshape(w, b, c * h)
        recurrent, _ = self.rnn(conv)
        t, b, h = recurrent.size()
        return F.log_softmax(self.embedding(recurrent.view(t * b, h)).view(t, b, -1), dim=2)


class Seq2Seq(nn.Module):
    """An encoder and a decoder of GRU cells with additive attention between them."""

    def __init__(self, n: int = 14) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(30, 9), nn.Embedding(31, 8)
        self.encoder = nn.GRU(9, n, batch_first=True)
        self.decoder = nn.GRUCell(8 + n, n)
        self.w_memory, self.w_state, self.v = nn.Linear(n, 10), nn.Linear(n, 10), nn.Linear(10, 1, bias=False)
        self.out = nn.Linear(2 * n, 31)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory, last = self.encoder(self.source(source))
        state, keys, outputs = last[0], self.w_memory(memory), []
        for word in self.target(target).transpose(0, 1):
            score = self.v(torch.tanh(keys + self.w_state(state).unsqueeze(1)))
            context = (F.softmax(score, dim=1) * memory).sum(dim=1)
            state = self.decoder(torch.cat((word, context), dim=-1), state)
            outputs.append(self.out(torch.cat((state, context), dim=-1)))
        return torch.stack(outputs, dim=1)


class LinearAttention(nn.Module):
    """Attention without softmax: keys and values are summed first, several heads side by side."""

    def __init__(self, d: int = 18, h: int = 3, k: int = 7) -> None:
        super().__init__()
        self.h, self.k = h, k
        self.inp = nn.Linear(5, d)
        self.qkv, self.out = nn.Linear(d, 3 * h * k), nn.Linear(h * k, d)
        self.head = nn.Linear(d, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        b, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.h, self.k).permute(2, 0, 3, 1, 4)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        context = torch.einsum("bhtk,bhtv->bhkv", k, v)
        y = torch.einsum("bhtk,bhkv->bhtv", q, context) / (torch.einsum("bhtk,bhk->bht", q, k.sum(2))[..., None] + 1e-6)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return self.head(x.mean(1))
