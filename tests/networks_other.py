"""Small networks over graphs, sets, tables and pairs, and layers that their authors wrote without `torch.nn`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GatherGraphNet(nn.Module):
    """Messages along edges: gather at both ends, a small network, sum where they arrive."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(5, 14)
        self.message = nn.ModuleList(nn.Sequential(nn.Linear(28, 18), nn.ReLU(), nn.Linear(18, 14)) for _ in range(2))
        self.update = nn.ModuleList(nn.Linear(28, 14) for _ in range(2))
        self.readout = nn.Linear(14, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges[0], edges[1]
        h = torch.relu(self.encode(x))
        for message, update in zip(self.message, self.update, strict=True):
            m = message(torch.cat([h[source], h[target]], dim=-1))
            arrived = torch.zeros_like(h).index_add(0, target, m)
            h = torch.relu(h + update(torch.cat([h, arrived], dim=-1)))
        return self.readout(h.mean(dim=0))


class GCN(nn.Module):
    """Graph convolution with a normalised adjacency matrix: two products of matrices a layer."""

    def __init__(self, n_nodes: int = 9) -> None:
        super().__init__()
        self.weight1, self.weight2 = nn.Parameter(torch.randn(6, 16)), nn.Parameter(torch.randn(16, 4))
        self.bias1 = nn.Parameter(torch.zeros(16))
        adjacency = torch.eye(n_nodes) + torch.eye(n_nodes).roll(1, 0)
        self.register_buffer("adjacency", adjacency / adjacency.sum(1, keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.adjacency @ (x @ self.weight1) + self.bias1)
        return F.log_softmax(self.adjacency @ (F.dropout(h, 0.5, self.training) @ self.weight2), dim=-1)


class GAT(nn.Module):
    """Graph attention over all pairs of nodes, several heads, the mask by adjacency."""

    def __init__(self, heads: int = 3, d: int = 7) -> None:
        super().__init__()
        self.heads, self.d = heads, d
        self.lin = nn.Linear(6, heads * d, bias=False)
        self.att_src, self.att_dst = nn.Parameter(torch.randn(heads, d)), nn.Parameter(torch.randn(heads, d))
        self.out = nn.Linear(heads * d, 4)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        h = self.lin(x).view(-1, self.heads, self.d)
        score = (h * self.att_src).sum(-1)[:, None] + (h * self.att_dst).sum(-1)[None, :]
        score = F.leaky_relu(score, 0.2).masked_fill(adjacency[..., None] == 0, float("-inf"))
        mixed = torch.einsum("ijh,jhd->ihd", score.softmax(dim=1), h)
        return self.out(F.elu(mixed.flatten(1)))


class PointNet(nn.Module):
    """Points as a batch of one-dimensional convolutions, a learned 3x3 transform, the maximum over points."""

    def __init__(self) -> None:
        super().__init__()
        self.t_conv, self.t_fc = nn.Conv1d(3, 10, 1), nn.Linear(10, 9)
        self.conv1, self.conv2 = nn.Conv1d(3, 12, 1), nn.Conv1d(12, 20, 1)
        self.bn1, self.bn2 = nn.BatchNorm1d(12), nn.BatchNorm1d(20)
        self.fc1, self.fc2 = nn.Linear(20, 14), nn.Linear(14, 5)

    def forward(self, points: Tensor) -> Tensor:
        turn = self.t_fc(F.relu(self.t_conv(points)).max(2)[0]).view(-1, 3, 3)
        turn = turn + torch.eye(3, dtype=points.dtype, device=points.device)
        x = torch.bmm(points.transpose(2, 1), turn).transpose(2, 1)
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        x = torch.max(x, 2, keepdim=True)[0].view(-1, x.shape[1])
        return F.log_softmax(self.fc2(F.relu(self.fc1(x))), dim=1)


class DeepSets(nn.Module):
    """One network for each element, a sum, another network."""

    def __init__(self) -> None:
        super().__init__()
        self.phi = nn.Sequential(nn.Linear(4, 16), nn.ELU(), nn.Linear(16, 12), nn.ELU())
        self.rho = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.rho(self.phi(x).sum(dim=-2)).squeeze(-1)


class Perceiver(nn.Module):
    """A few learned latents read a long input by cross-attention."""

    def __init__(self, d: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(5, d))
        self.heads = heads
        self.q, self.kv, self.proj = nn.Linear(d, d), nn.Linear(6, 2 * d), nn.Linear(d, d)
        self.norm, self.mlp = nn.LayerNorm(d), nn.Sequential(nn.Linear(d, 30), nn.GELU(), nn.Linear(30, d))
        self.head = nn.Linear(d, 4)

    def forward(self, x: Tensor) -> Tensor:
        latents = self.latents.expand(x.shape[0], -1, -1)
        q = self.q(latents).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        latents = latents + self.proj(y)
        latents = latents + self.mlp(self.norm(latents))
        return self.head(latents.mean(1))


class DLRM(nn.Module):
    """A recommender: bags of categories and a dense tower meet in all their scalar products."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(n, 8, mode="sum") for n in (20, 30))
        self.bottom = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(8 + 3, 14), nn.ReLU(), nn.Linear(14, 1))

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        x = self.bottom(dense)
        vectors = torch.stack([x, *(bag(sparse[:, i]) for i, bag in enumerate(self.bags))], dim=1)
        products = torch.bmm(vectors, vectors.transpose(1, 2))
        i, j = torch.tril_indices(3, 3, offset=-1)
        return torch.sigmoid(self.top(torch.cat([x, products[:, i, j]], dim=1))).flatten()


class DeepFM(nn.Module):
    """A factorisation machine beside a deep tower, over one table of all fields."""

    def __init__(self, fields: int = 4, k: int = 6) -> None:
        super().__init__()
        self.first, self.second = nn.Embedding(40, 1), nn.Embedding(40, k)
        self.deep = nn.Sequential(
            nn.Linear(fields * k, 18), nn.BatchNorm1d(18), nn.ReLU(), nn.Dropout(0.2), nn.Linear(18, 10), nn.ReLU()
        )
        self.last = nn.Linear(10, 1)

    def forward(self, x: Tensor) -> Tensor:
        v = self.second(x)
        pairs = 0.5 * (v.sum(1).pow(2) - v.pow(2).sum(1)).sum(1)
        return self.first(x).sum((1, 2)) + pairs + self.last(self.deep(v.flatten(1))).squeeze(1)


class Siamese(nn.Module):
    """One tower for two inputs; the distance of what it makes of them."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2)
        )
        self.fc, self.out = nn.Linear(48, 16), nn.Linear(16, 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = (self.fc(self.tower(x).flatten(1)) for x in (a, b))
        return torch.sigmoid(self.out(torch.abs(a - b)))


class TwoTower(nn.Module):
    """Two towers with one shared layer, compared by cosine."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(9, 20), nn.Linear(7, 20)
        self.shared = nn.Linear(20, 12)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = self.shared(F.gelu(self.left(a))), self.shared(F.gelu(self.right(b)))
        return self.scale.exp() * F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T


class GatedUnits(nn.Module):
    """Four ways to write a gated linear unit: `F.glu`, chunks, two layers, a slice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.a_out = nn.Linear(6, 2 * 11), nn.Linear(11, 9)
        self.b, self.b_out = nn.Linear(9, 2 * 12), nn.Linear(12, 9)
        self.gate, self.up, self.down = nn.Linear(9, 13), nn.Linear(9, 13), nn.Linear(13, 8)
        self.d, self.d_out = nn.Linear(8, 2 * 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a_out(F.glu(self.a(x), dim=-1))
        value, gate = self.b(x).chunk(2, dim=-1)
        x = x + self.b_out(value * F.gelu(gate))
        x = self.down(F.silu(self.gate(x)) * self.up(x))
        y = self.d(x)
        half = y.shape[-1] // 2
        return self.d_out(y[..., :half] * torch.sigmoid(y[..., half:]))


class BareEinsum(nn.Module):
    """No layer of `torch.nn` at all: parameters, `einsum`, and a bilinear form."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.randn(7, 15)), nn.Parameter(torch.randn(15))
        self.core = nn.Parameter(torch.randn(15, 3, 9))
        self.w2 = nn.Parameter(torch.randn(4, 9))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.einsum("bi,ij->bj", x, self.w1).add(self.b1).relu()
        h = torch.einsum("bj,jhk->bhk", h, self.core).tanh()
        return torch.einsum("bhk,ok->bo", h, self.w2)


class Duelling(nn.Module):
    """Value and advantage over one trunk, as in Q-learning."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(4, 8, 4, 2), nn.ReLU(), nn.Conv2d(8, 10, 3), nn.ReLU())
        self.value = nn.Sequential(nn.Linear(250, 12), nn.ReLU(), nn.Linear(12, 1))
        self.advantage = nn.Sequential(nn.Linear(250, 16), nn.ReLU(), nn.Linear(16, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x / 255.0).view(x.size(0), -1)
        advantage = self.advantage(x)
        return self.value(x) + advantage - advantage.mean(1, keepdim=True)


class Highway(nn.Module):
    """Gates decide how much of each layer's input is carried on."""

    def __init__(self, n: int = 16) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(5, n), nn.Linear(n, 3)
        self.plain = nn.ModuleList(nn.Linear(n, n) for _ in range(2))
        self.gates = nn.ModuleList(nn.Linear(n, n) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.inp(x))
        for plain, gate in zip(self.plain, self.gates, strict=True):
            t = torch.sigmoid(gate(x))
            x = torch.lerp(x, F.relu(plain(x)), t)
        return self.out(x)


class Maxout(nn.Module):
    """Each unit is the largest of three linear pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 12 * 3), nn.Linear(12, 10 * 3), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).view(-1, 12, 3).amax(-1)
        x = self.b(x).view(x.shape[0], -1, 3).max(dim=2).values
        return self.out(x)


class FiLM(nn.Module):
    """A condition scales and shifts the channels of a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 14, 3, padding=1)
        self.film, self.fc = nn.Linear(6, 24), nn.Linear(14, 4)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        gamma, beta = self.film(condition).view(-1, 2, 12, 1, 1).unbind(1)
        x = F.relu((1 + gamma) * self.conv1(x) + beta)
        return self.fc(F.relu(self.conv2(x)).amax((-2, -1)))


class HyperNetwork(nn.Module):
    """The weights of one layer are the output of another network."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.make = nn.Linear(4, 12), nn.Linear(12, 6 * 5)
        self.inp, self.out = nn.Linear(7, 5), nn.Linear(6, 2)

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        weight = self.make(torch.relu(self.trunk(task))).view(6, 5)
        return self.out(torch.relu(F.linear(torch.relu(self.inp(x)), weight)))


class Forecaster(nn.Module):
    """Blocks that each explain a part of a series and hand on the rest: backcast and forecast."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(12, w), nn.ReLU(), nn.Linear(w, w), nn.ReLU()),
                           "theta": nn.Linear(w, 12 + 5, bias=False)})
            for w in (16, 18)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        forecast = 0
        for block in self.blocks:
            back, ahead = torch.split(block["theta"](block["mlp"](x)), [12, 5], dim=-1)
            x = x - back
            forecast = forecast + ahead
        return forecast
