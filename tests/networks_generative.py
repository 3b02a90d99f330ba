"""Small networks that make something: autoencoders, generators, flows, fields."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Autoencoder(nn.Module):
    """Strided convolutions down, transposed convolutions up."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.ReLU()
        )
        self.code, self.back = nn.Linear(12 * 4 * 4, 9), nn.Linear(9, 12 * 4 * 4)
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(12, 8, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 1, 4, stride=2, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        code = self.code(self.encoder(x).flatten(1))
        return torch.sigmoid(self.decoder(F.relu(self.back(code)).view(-1, 12, 4, 4)))


class TiedAutoencoder(nn.Module):
    """The decoder reads the encoder's weights transposed."""

    def __init__(self, sizes: tuple[int, ...] = (20, 14, 9)) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(n)) for n in reversed(sizes[:-1]))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.encoder:
            x = torch.tanh(layer(x))
        for layer, bias in zip(reversed(self.encoder), self.biases, strict=True):
            x = torch.tanh(F.linear(x, layer.weight.t(), bias))
        return x


class VAE(nn.Module):
    """Mean and variance side by side; noise is drawn in training only, so that evaluation repeats itself."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(30, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU())
        self.fc_mu, self.fc_var = nn.Linear(16, 6), nn.Linear(16, 6)
        self.decoder = nn.Sequential(nn.Linear(6, 18), nn.LeakyReLU(0.2), nn.Linear(18, 30))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.encoder(x)
        mu, log_var = self.fc_mu(hidden), self.fc_var(hidden)
        z = mu + torch.randn_like(mu) * torch.exp(0.5 * log_var) if self.training else mu
        return self.decoder(z), mu, log_var


class Generator(nn.Module):
    """The DCGAN generator: noise of one pixel grows by transposed convolutions."""

    def __init__(self, nz: int = 10, ngf: int = 8, nc: int = 3) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.ConvTranspose2d(nz, ngf * 4, 4, 1, 0, bias=False),
            nn.BatchNorm2d(ngf * 4),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf * 4, ngf * 2, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ngf * 2),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf * 2, nc, 4, 2, 1, bias=False),
            nn.Tanh(),
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.main(z[:, :, None, None])


class Discriminator(nn.Module):
    """Strided convolutions, instance norm, the standard deviation over the batch as one more channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 4, 2, 1)
        self.conv2 = nn.Conv2d(8, 14, 4, 2, 1)
        self.norm = nn.InstanceNorm2d(14, affine=True)
        self.conv3 = nn.Conv2d(15, 10, 3, 1, 1)
        self.out = nn.Conv2d(10, 1, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.conv1(x), 0.2)
        x = F.leaky_relu(self.norm(self.conv2(x)), 0.2)
        spread = x.std(0, unbiased=False).mean().expand(x.shape[0], 1, *x.shape[2:])
        x = F.leaky_relu(self.conv3(torch.cat([x, spread], 1)), 0.2)
        return self.out(x).flatten()


class ModulatedConv(nn.Module):
    """The convolution of StyleGAN 2: each image scales and demodulates the weight for itself."""

    def __init__(self, n_in: int, n_out: int, style: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in, 3, 3) / math.sqrt(9 * n_in))
        self.affine = nn.Linear(style, n_in)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        b, c, h, width = x.shape
        weight = self.weight.unsqueeze(0) * (self.affine(w) + 1).reshape(b, 1, c, 1, 1)
        weight = weight * (weight.square().sum((2, 3, 4)) + 1e-8).rsqrt().reshape(b, -1, 1, 1, 1)
        y = F.conv2d(x.reshape(1, -1, h, width), weight.reshape(-1, c, 3, 3), padding=1, groups=b)
        return y.reshape(b, -1, h, width)


class StyleGenerator(nn.Module):
    """A mapping network and two modulated convolutions over a learned constant."""

    def __init__(self) -> None:
        super().__init__()
        self.mapping = nn.Sequential(nn.Linear(8, 20), nn.LeakyReLU(0.2), nn.Linear(20, 12), nn.LeakyReLU(0.2))
        self.const = nn.Parameter(torch.randn(10, 4, 4))
        self.conv1, self.conv2 = ModulatedConv(10, 14, 12), ModulatedConv(14, 8, 12)
        self.rgb = nn.Conv2d(8, 3, 1)

    def forward(self, z: Tensor) -> Tensor:
        w = self.mapping(z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt())
        x = F.leaky_relu(self.conv1(self.const.expand(z.shape[0], -1, -1, -1), w), 0.2)
        return self.rgb(F.leaky_relu(self.conv2(F.interpolate(x, scale_factor=2), w), 0.2))


class TimeBlock(nn.Module):
    """A residual block of a diffusion network: GroupNorm, SiLU, and the time added between two convolutions."""

    def __init__(self, n_in: int, n_out: int, emb: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, n_in), nn.GroupNorm(4, n_out)
        self.conv1, self.conv2 = nn.Conv2d(n_in, n_out, 3, padding=1), nn.Conv2d(n_out, n_out, 3, padding=1)
        self.time = nn.Linear(emb, n_out)
        self.skip = nn.Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(t))[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class DiffusionUNet(nn.Module):
    """Noise prediction with sinusoidal time, attention in the middle and a skip by concatenation."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, 28), nn.SiLU(), nn.Linear(28, 28))
        self.conv_in = nn.Conv2d(3, width, 3, padding=1)
        self.down, self.pool = TimeBlock(width, width, 28), nn.Conv2d(width, width, 3, 2, 1)
        self.mid, self.norm = TimeBlock(width, 2 * width, 28), nn.GroupNorm(4, 2 * width)
        self.to_qkv, self.to_out = nn.Conv1d(2 * width, 6 * width, 1), nn.Conv1d(2 * width, 2 * width, 1)
        self.up = TimeBlock(3 * width, width, 28)
        self.out = nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        half = self.width // 2
        angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(half, device=t.device, dtype=t.dtype) / half)
        t = self.time(torch.cat([angles.sin(), angles.cos()], dim=-1))
        skip = self.down(self.conv_in(x), t)
        h = self.mid(self.pool(skip), t)
        h = h + self._attention(h)
        return self.out(self.up(torch.cat([F.interpolate(h, scale_factor=2), skip], 1), t))

    def _attention(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.to_qkv(self.norm(x).reshape(b, c, -1)).reshape(b * 4, -1, h * w).chunk(3, dim=1)
        weight = torch.einsum("bct,bcs->bts", q, k) * q.shape[1] ** -0.5
        y = torch.einsum("bts,bcs->bct", weight.softmax(-1), v).reshape(b, -1, h * w)
        return self.to_out(y).reshape(b, c, h, w)


class Coupling(nn.Module):
    """Half of the numbers scale and shift the other half, then the halves change places."""

    def __init__(self, n: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(n // 2, hidden), nn.ReLU(), nn.Linear(hidden, n))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, dim=-1)
        log_s, t = self.net(a).chunk(2, dim=-1)
        log_s = torch.tanh(log_s)
        return torch.cat([b * log_s.exp() + t, a], -1), log_s.sum(-1)


class RealNVP(nn.Module):
    """A flow: invertible couplings, and the logarithm of the volume that they change."""

    def __init__(self) -> None:
        super().__init__()
        self.couplings = nn.ModuleList(Coupling(6, hidden) for hidden in (16, 18, 20))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        volume = torch.zeros(x.shape[0], dtype=x.dtype, device=x.device)
        for coupling in self.couplings:
            x, change = coupling(x)
            volume = volume + change
        return x, volume


class NeRF(nn.Module):
    """A field with encoded positions, a skip in the middle, and a second head that also sees the direction."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(27, 24), nn.Linear(24, 22), nn.Linear(22 + 27, 20), nn.Linear(20, 20)])
        self.sigma, self.feature = nn.Linear(20, 1), nn.Linear(20, 16)
        self.colour = nn.Sequential(nn.Linear(16 + 15, 12), nn.ReLU(), nn.Linear(12, 3), nn.Sigmoid())

    @staticmethod
    def encoded(x: Tensor, octaves: int) -> Tensor:
        return torch.cat([x, *(f(2.0**i * x) for i in range(octaves) for f in (torch.sin, torch.cos))], dim=-1)

    def forward(self, position: Tensor, direction: Tensor) -> Tensor:
        h = x = self.encoded(position, 4)
        for number, layer in enumerate(self.layers):
            h = F.relu(layer(torch.cat([h, x], -1) if number == 2 else h))
        seen = torch.cat([self.feature(h), self.encoded(direction, 2)], -1)
        return torch.cat([self.colour(seen), F.softplus(self.sigma(h))], -1)


class Siren(nn.Module):
    """Sines between linear layers; f(0) = 0, but a bias comes before each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleList(nn.Linear(a, b) for a, b in [(2, 18), (18, 20), (20, 14), (14, 3)])

    def forward(self, x: Tensor) -> Tensor:
        *hidden, last = self.net
        for layer in hidden:
            x = torch.sin(30.0 * layer(x))
        return last(x)


class VectorQuantised(nn.Module):
    """Codes are the nearest entries of a codebook, found by distance and passed straight through."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 12, 4, 2, 1), nn.ReLU(), nn.Conv2d(12, 8, 3, 1, 1))
        self.codebook = nn.Embedding(16, 8)
        self.decoder = nn.Sequential(nn.Conv2d(8, 10, 3, 1, 1), nn.ReLU(), nn.ConvTranspose2d(10, 3, 4, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        z = self.encoder(x).permute(0, 2, 3, 1)
        flat = z.reshape(-1, z.shape[-1])
        distance = flat.pow(2).sum(1, keepdim=True) - 2 * flat @ self.codebook.weight.t()
        codes = (distance + self.codebook.weight.pow(2).sum(1)).argmin(1)
        quantised = self.codebook(codes).view_as(z)
        return self.decoder((z + (quantised - z).detach()).permute(0, 3, 1, 2).contiguous())
