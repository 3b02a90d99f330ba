"""Small networks over images, each written the way that its kind is usually written."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DoubleConv(nn.Module):
    """Two convolutions with BatchNorm, the brick of a U-Net."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.double_conv = nn.Sequential(
            nn.Conv2d(n_in, n_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(n_out),
            nn.ReLU(inplace=True),
            nn.Conv2d(n_out, n_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(n_out),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.double_conv(x)


class UNet(nn.Module):
    """Down, up by transposed convolutions, and skips by concatenation, padded where sizes are odd."""

    def __init__(self, n_classes: int = 3, width: int = 8) -> None:
        super().__init__()
        self.inc = DoubleConv(3, width)
        self.down1 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(width, 2 * width))
        self.down2 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(2 * width, 4 * width))
        self.up1 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.conv1 = DoubleConv(4 * width, 2 * width)
        self.up2 = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.conv2 = DoubleConv(2 * width, width)
        self.outc = nn.Conv2d(width, n_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        x = self.conv1(self._joined(self.up1(x3), x2))
        return self.outc(self.conv2(self._joined(self.up2(x), x1)))

    @staticmethod
    def _joined(low: Tensor, skip: Tensor) -> Tensor:
        dy, dx = skip.size(2) - low.size(2), skip.size(3) - low.size(3)
        low = F.pad(low, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])
        return torch.cat([skip, low], dim=1)


class UNetBilinear(nn.Module):
    """The same idea without learned upsampling: interpolation, and a plain list of stages."""

    def __init__(self) -> None:
        super().__init__()
        widths = [6, 10, 14]
        self.encoders = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip([1, *widths], widths, strict=False))
        self.decoders = nn.ModuleList(nn.Conv2d(a + b, b, 3, padding=1) for a, b in [(14, 10), (10, 6)])
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for stage in self.encoders:
            x = F.leaky_relu(stage(x), 0.1)
            kept.append(x)
            x = F.avg_pool2d(x, 2)
        x = kept.pop()
        for stage in self.decoders:
            skip = kept.pop()
            x = F.interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=False)
            x = F.leaky_relu(stage(torch.cat((x, skip), 1)), 0.1)
        return self.head(x)


class SqueezeExcite(nn.Module):
    """Channels weighted by what their means say."""

    def __init__(self, channels: int, reduced: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, reduced)
        self.fc2 = nn.Linear(reduced, channels)

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        y = F.adaptive_avg_pool2d(x, 1).view(b, c)
        y = torch.sigmoid(self.fc2(F.relu(self.fc1(y)))).view(b, c, 1, 1)
        return x * y.expand_as(x)


class SENet(nn.Module):
    """Residual blocks, each with squeeze-and-excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(12)
        self.conv1, self.bn1 = nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.se1 = SqueezeExcite(12, 4)
        self.conv2, self.bn2 = nn.Conv2d(12, 20, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(20)
        self.se2 = SqueezeExcite(20, 5)
        self.fc = nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(x + self.se1(self.bn1(self.conv1(x))))
        x = F.relu(self.se2(self.bn2(self.conv2(x))))
        return self.fc(x.mean(dim=[2, 3]))


class CBAM(nn.Module):
    """Attention over channels from two poolings with one shared MLP, then over places."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.mlp = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 16))
        self.spatial = nn.Conv2d(2, 1, 7, padding=3)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu()
        pooled = self.mlp(F.adaptive_avg_pool2d(x, 1)) + self.mlp(F.adaptive_max_pool2d(x, 1))
        x = x * pooled.sigmoid()[:, :, None, None]
        places = torch.cat((x.max(1, keepdim=True)[0], x.mean(1, keepdim=True)), dim=1)
        x = x * torch.sigmoid(self.spatial(places))
        return self.fc(x.flatten(2).mean(-1))


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).contiguous().view(b, -1, h, w)


class ShuffleUnit(nn.Module):
    """Grouped convolution, shuffle, depthwise, grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.gconv1 = nn.Conv2d(24, 18, 1, groups=3, bias=False)
        self.bn1 = nn.BatchNorm2d(18)
        self.dw = nn.Conv2d(18, 18, 3, padding=1, groups=18, bias=False)
        self.bn2 = nn.BatchNorm2d(18)
        self.gconv2 = nn.Conv2d(18, 24, 1, groups=3, bias=False)
        self.bn3 = nn.BatchNorm2d(24)
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = channel_shuffle(F.relu(self.bn1(self.gconv1(x))), 3)
        y = self.bn3(self.gconv2(self.bn2(self.dw(y))))
        return self.fc(F.relu(x + y).mean((2, 3)))


class ESPCN(nn.Module):
    """Super-resolution: the last convolution makes all pixels of a block, pixel shuffle puts them in place."""

    def __init__(self, scale: int = 2) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 16, 5, padding=2), nn.Tanh(), nn.Conv2d(16, 12, 3, padding=1), nn.Tanh())
        self.up = nn.Sequential(nn.Conv2d(12, 8 * scale**2, 3, padding=1), nn.PixelShuffle(scale), nn.PReLU(8))
        self.out = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.up(self.body(x)))


class SpaceToDepth(nn.Module):
    """Pixel unshuffle at the door, residual body, pixel shuffle at the exit."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3 * 4, 14, 3, padding=1)
        self.body = nn.ModuleList(
            nn.Sequential(nn.Conv2d(14, 10, 3, padding=1), nn.ReLU(True), nn.Conv2d(10, 14, 3, padding=1))
            for _ in range(2)
        )
        self.tail = nn.Conv2d(14, 3 * 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = first = self.head(F.pixel_unshuffle(x, 2))
        for block in self.body:
            y = y + 0.1 * block(y)
        return F.pixel_shuffle(self.tail(y + first), 2)


class MixerLayer(nn.Module):
    """Mixes tokens, then channels; the LayerNorms stand before."""

    def __init__(self, tokens: int, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mix_tokens = nn.Sequential(nn.Linear(tokens, 20), nn.GELU(), nn.Linear(20, tokens))
        self.mix_channels = nn.Sequential(nn.Linear(dim, 40), nn.GELU(), nn.Linear(40, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.mix_channels(self.norm2(x))


class MLPMixer(nn.Module):
    """Patches by a strided convolution, mixer layers, the mean, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 4, stride=4)
        self.layers = nn.Sequential(*(MixerLayer(16, 24) for _ in range(2)))
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.layers(x)).mean(dim=1))


class PreActBlock(nn.Module):
    """BatchNorm and ReLU before each convolution; the shortcut leaves after the first of them."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(n_in), nn.BatchNorm2d(n_out)
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        if stride != 1 or n_in != n_out:
            self.shortcut = nn.Conv2d(n_in, n_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        return self.conv2(F.relu(self.bn2(self.conv1(out)))) + shortcut


class PreActResNet(nn.Module):
    """A wide residual network in its pre-activation form."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.layers = nn.Sequential(PreActBlock(8, 8, 1), PreActBlock(8, 16, 2), PreActBlock(16, 16, 1))
        self.bn = nn.BatchNorm2d(16)
        self.linear = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn(self.layers(self.conv1(x))))
        out = F.avg_pool2d(out, out.shape[-1])
        return self.linear(out.view(out.size(0), -1))


class Detector(nn.Module):
    """A feature pyramid with one head for all levels; boxes and classes leave as one long list."""

    def __init__(self, n_classes: int = 3, anchors: int = 2) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(3, 8, 3, 2, 1)
        self.c2 = nn.Conv2d(8, 12, 3, 2, 1)
        self.c3 = nn.Conv2d(12, 16, 3, 2, 1)
        self.lateral = nn.ModuleList(nn.Conv2d(n, 10, 1) for n in (12, 16))
        self.smooth = nn.Conv2d(10, 10, 3, padding=1)
        self.head = nn.Conv2d(10, anchors * (5 + n_classes), 1)
        self.n_out = 5 + n_classes

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.c1(x))
        p2 = F.silu(self.c2(x))
        p3 = F.silu(self.c3(p2))
        top = self.lateral[1](p3)
        low = self.lateral[0](p2) + F.interpolate(top, scale_factor=2, mode="nearest")
        found = []
        for level in (low, top):
            y = self.head(F.relu(self.smooth(level)))
            b, _, h, w = y.shape
            y = y.view(b, -1, self.n_out, h, w).permute(0, 1, 3, 4, 2)
            found.append(y.reshape(b, -1, self.n_out).sigmoid())
        return torch.cat(found, 1)


class Hourglass(nn.Module):
    """Recursion instead of a list: down, itself, up, and a residual at every level."""

    def __init__(self, depth: int = 2, width: int = 10) -> None:
        super().__init__()
        self.skip = nn.Sequential(nn.Conv2d(width, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, width, 3, 1, 1))
        self.low = nn.Conv2d(width, width, 3, padding=1)
        self.inner: nn.Module = Hourglass(depth - 1, width) if depth > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        low = self.inner(F.relu(self.low(F.max_pool2d(x, 2))))
        return x + self.skip(x) + F.interpolate(low, scale_factor=2.0)


class Pose(nn.Module):
    """An hourglass between a stem and the heat maps."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.hourglass, self.heat = nn.Conv2d(3, 10, 3, padding=1), Hourglass(), nn.Conv2d(10, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.heat(self.hourglass(self.stem(x)))


class Video(nn.Module):
    """Convolutions in three dimensions, one of them split into space and time."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 6, (1, 3, 3), padding=(0, 1, 1))
        self.time = nn.Conv3d(6, 8, (3, 1, 1), padding=(1, 0, 0), bias=False)
        self.bn = nn.BatchNorm3d(8)
        self.full = nn.Conv3d(8, 12, 3, padding=1)
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool3d(F.relu(self.bn(self.time(F.relu(self.stem(x))))), 2)
        x = F.adaptive_avg_pool3d(F.relu(self.full(x)), 1)
        return self.fc(torch.flatten(x, 1))


class MobileNetV1(nn.Module):
    """Depthwise separable convolutions by a function that returns a `Sequential`."""

    def __init__(self) -> None:
        super().__init__()

        def separable(n_in: int, n_out: int, stride: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(n_in, n_in, 3, stride, 1, groups=n_in, bias=False),
                nn.BatchNorm2d(n_in),
                nn.ReLU6(inplace=True),
                nn.Conv2d(n_in, n_out, 1, bias=False),
                nn.BatchNorm2d(n_out),
                nn.ReLU6(inplace=True),
            )

        self.model = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            separable(8, 16, 1),
            separable(16, 24, 2),
            separable(24, 24, 1),
            nn.AdaptiveAvgPool2d(1),
        )
        self.fc = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.model(x).flatten(1))


class ConvMixer(nn.Sequential):
    """A network in one expression, residual by a small wrapper."""

    def __init__(self, dim: int = 16) -> None:
        class Residual(nn.Sequential):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) + x

        super().__init__(
            nn.Conv2d(3, dim, 4, 4),
            nn.GELU(),
            nn.BatchNorm2d(dim),
            Residual(nn.Conv2d(dim, dim, 3, groups=dim, padding="same"), nn.GELU(), nn.BatchNorm2d(dim)),
            nn.Conv2d(dim, 2 * dim, 1),
            nn.GELU(),
            nn.BatchNorm2d(2 * dim),
            nn.AdaptiveAvgPool2d((1, 1)),
            nn.Flatten(),
            nn.Linear(2 * dim, 10),
        )
