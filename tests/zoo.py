"""The zoo: every architecture that tracing and cutting are held against, with a tiny and where sensible a real size.

``ZOO`` maps names to rows. A row's builder imports the package that the architecture comes from only when it is called;
`missing` says which of these packages this environment lacks.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tests import networks_generative as generative
from tests import networks_other as other
from tests import networks_sequence as sequence
from tests import networks_vision as vision
from tests.networks_timm import TIMM
from tests.networks_torchvision import TORCHVISION
from tests.networks_transformers import TRANSFORMERS
from tests.networks_transformers_media import TRANSFORMERS_MEDIA
from tests.networks_transformers_vision import TRANSFORMERS_VISION
from tests.zoo_row import Built, Row, called, images, tokens
from torch import Tensor, nn

__all__ = ["EXPECTED", "ZOO", "Row", "missing"]

_MATRIX_VECTOR = "the counter leaves out products of a matrix and a vector"


def _own(
    family: str, name: str, build: Callable[[], nn.Module], inputs: Callable[[], tuple[Tensor, ...]], **options: object
) -> Row:
    def tiny() -> Built:
        return build(), called(*inputs())

    return Row(name, family, "own", tiny, **options)


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(24, 4, 40, batch_first=True)
    return nn.Sequential(nn.Linear(8, 24), nn.TransformerEncoder(layer, 2), nn.Linear(24, 4))


class _Translator(nn.Module):
    """`nn.Transformer` between two embeddings and an output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(30, 16), nn.Embedding(31, 16)
        self.transformer = nn.Transformer(16, 2, 1, 1, 28, batch_first=True)
        self.out = nn.Linear(16, 31)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], device=target.device)
        return self.out(self.transformer(self.source(source), self.target(target), tgt_mask=mask.to(self.out.weight)))


class _SetPredictor(nn.Module):
    """Convolutions, a transformer over pixels and learned queries, boxes and classes: detection as sets."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 12, 3, 2, 1), nn.ReLU(), nn.Conv2d(12, 14, 3, 2, 1), nn.ReLU())
        self.conv = nn.Conv2d(14, 16, 1)
        self.transformer = nn.Transformer(16, 2, 1, 1, 24)
        self.linear_class, self.linear_bbox = nn.Linear(16, 6), nn.Linear(16, 4)
        self.query_pos = nn.Parameter(torch.rand(5, 16))
        self.row_embed, self.col_embed = nn.Parameter(torch.rand(10, 8)), nn.Parameter(torch.rand(10, 8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.conv(self.backbone(x))
        height, width = h.shape[-2:]
        pos = torch.cat(
            [
                self.col_embed[:width].unsqueeze(0).repeat(height, 1, 1),
                self.row_embed[:height].unsqueeze(1).repeat(1, width, 1),
            ],
            dim=-1,
        )
        pos = pos.flatten(0, 1).unsqueeze(1)
        queries = self.query_pos.unsqueeze(1).repeat(1, x.shape[0], 1)
        h = self.transformer(pos + h.flatten(2).permute(2, 0, 1), queries).transpose(0, 1)
        return self.linear_class(h), self.linear_bbox(h).sigmoid()


def _graph() -> tuple[Tensor, ...]:
    return torch.randn(9, 5), torch.stack([torch.arange(9), (torch.arange(9) * 2 + 1) % 9])


def _adjacency() -> Tensor:
    return torch.eye(9) + torch.eye(9).roll(1, 0) + torch.eye(9).roll(3, 1)


_OWN = (
    _own("U-Net", "unet", vision.UNet, lambda: (images(16),), quick=True),
    _own("U-Net", "unet-bilinear", vision.UNetBilinear, lambda: (images(20, 1),)),
    _own("squeeze-and-excitation", "senet", vision.SENet, lambda: (images(8),)),
    _own("squeeze-and-excitation", "cbam", vision.CBAM, lambda: (images(8),)),
    _own("ShuffleNet", "shuffle-unit", vision.ShuffleUnit, lambda: (images(8),), quick=True),
    _own("super-resolution", "espcn", vision.ESPCN, lambda: (images(8, 1),)),
    _own("super-resolution", "space-to-depth", vision.SpaceToDepth, lambda: (images(8),)),
    _own("MLP-Mixer", "mlp-mixer", vision.MLPMixer, lambda: (images(16),)),
    _own("ConvMixer", "convmixer", vision.ConvMixer, lambda: (images(16),)),
    _own("residual CNN", "preact-resnet", vision.PreActResNet, lambda: (images(8),)),
    _own("detection", "pyramid-detector", vision.Detector, lambda: (images(32),)),
    _own("detection", "detr-by-hand", _SetPredictor, lambda: (images(16),)),
    _own("pose", "hourglass", vision.Pose, lambda: (images(16),)),
    _own("video", "video-3d", vision.Video, lambda: (torch.randn(2, 3, 4, 8, 8),)),
    _own("MobileNet", "mobilenet-v1", vision.MobileNetV1, lambda: (images(16),)),
    _own("GPT", "nano-gpt", sequence.GPT, lambda: (tokens(61, 10),), quick=True),
    _own("bare parameters", "einsum-transformer", sequence.EinsumTransformer, lambda: (tokens(50, 7),)),
    _own("recurrent", "lstm", partial(sequence.Recurrent, nn.LSTM), lambda: (tokens(40, 9),)),
    _own("recurrent", "gru", partial(sequence.Recurrent, nn.GRU), lambda: (tokens(40, 9),)),
    _own(
        "recurrent",
        "lstm-bidirectional",
        partial(sequence.Recurrent, nn.LSTM, bidirectional=True),
        lambda: (tokens(40, 9),),
    ),
    _own("recurrent", "lstm-by-cell", sequence.LSTMByCell, lambda: (tokens(40, 5),), uncounted=_MATRIX_VECTOR),
    _own("recurrent", "gru-by-hand", sequence.GRUByHand, lambda: (torch.randn(2, 5, 7),)),
    _own("recurrent", "crnn", sequence.CRNN, lambda: (images(16, 1),)),
    _own("recurrent", "seq2seq", sequence.Seq2Seq, lambda: (tokens(30, 6), tokens(31, 4))),
    _own("temporal convolution", "tcn", sequence.TCN, lambda: (torch.randn(2, 5, 16),)),
    _own("temporal convolution", "wavenet", sequence.WaveNet, lambda: (torch.randn(2, 1, 20),)),
    _own("temporal convolution", "text-cnn", sequence.TextCNN, lambda: (tokens(60, 9),)),
    _own("state space", "mamba-like", sequence.MambaLike, lambda: (tokens(40, 6),)),
    _own("mixture of experts", "moe-dense", sequence.DenseMoE, lambda: (torch.randn(2, 5, 6),), quick=True),
    _own("mixture of experts", "moe-sparse", sequence.SparseMoE, lambda: (torch.randn(2, 5, 12),)),
    _own("linear attention", "linear-attention", sequence.LinearAttention, lambda: (torch.randn(2, 6, 5),)),
    _own("transformer of torch", "transformer-encoder", _encoder, lambda: (torch.randn(2, 5, 8),)),
    _own("transformer of torch", "transformer-translator", _Translator, lambda: (tokens(30, 6), tokens(31, 5))),
    _own("autoencoder", "autoencoder", generative.Autoencoder, lambda: (images(16, 1),)),
    _own("autoencoder", "autoencoder-tied", generative.TiedAutoencoder, lambda: (torch.randn(3, 20),), quick=True),
    _own("autoencoder", "vae", generative.VAE, lambda: (torch.randn(3, 30),)),
    _own("autoencoder", "vq-vae", generative.VectorQuantised, lambda: (images(8),)),
    _own("GAN", "dcgan-generator", generative.Generator, lambda: (torch.randn(2, 10),)),
    _own("GAN", "discriminator", generative.Discriminator, lambda: (images(16),)),
    _own("GAN", "style-generator", generative.StyleGenerator, lambda: (torch.randn(2, 8),)),
    _own("diffusion", "diffusion-unet", generative.DiffusionUNet, lambda: (images(8), torch.rand(2))),
    _own("flow", "real-nvp", generative.RealNVP, lambda: (torch.randn(3, 6),)),
    _own("neural field", "nerf", generative.NeRF, lambda: (torch.randn(3, 3), torch.randn(3, 3))),
    _own("neural field", "siren", generative.Siren, lambda: (torch.randn(4, 2),)),
    _own("graph network", "gather-graph", other.GatherGraphNet, _graph, quick=True),
    _own("graph network", "gcn", other.GCN, lambda: (torch.randn(9, 6),)),
    _own("graph network", "gat", other.GAT, lambda: (torch.randn(9, 6), _adjacency())),
    _own("sets and points", "pointnet", other.PointNet, lambda: (torch.randn(2, 3, 11),)),
    _own("sets and points", "deep-sets", other.DeepSets, lambda: (torch.randn(2, 5, 4),)),
    _own("sets and points", "perceiver", other.Perceiver, lambda: (torch.randn(2, 9, 6),)),
    _own("recommender", "dlrm", other.DLRM, lambda: (torch.randn(3, 5), torch.randint(0, 20, (3, 2, 4)))),
    _own("recommender", "deep-fm", other.DeepFM, lambda: (torch.randint(0, 40, (3, 4)),)),
    _own("shared modules", "siamese", other.Siamese, lambda: (images(16, 1), images(16, 1)), quick=True),
    _own("shared modules", "two-tower", other.TwoTower, lambda: (torch.randn(3, 9), torch.randn(3, 7))),
    _own("gated units", "gated-units", other.GatedUnits, lambda: (torch.randn(3, 6),), quick=True),
    _own("bare parameters", "bare-einsum", other.BareEinsum, lambda: (torch.randn(3, 7),), quick=True),
    _own("reinforcement learning", "duelling", other.Duelling, lambda: (images(16, 4) * 50,)),
    _own("plain MLP", "highway", other.Highway, lambda: (torch.randn(3, 5),)),
    _own("plain MLP", "maxout", other.Maxout, lambda: (torch.randn(3, 6),)),
    _own("conditioned", "film", other.FiLM, lambda: (images(8), torch.randn(2, 6))),
    _own("conditioned", "hypernetwork", other.HyperNetwork, lambda: (torch.randn(3, 7), torch.randn(4))),
    _own("forecasting", "n-beats", other.Forecaster, lambda: (torch.randn(3, 12),)),
)

ZOO: dict[str, Row] = {
    row.name: row for row in (*_OWN, *TORCHVISION, *TIMM, *TRANSFORMERS, *TRANSFORMERS_VISION, *TRANSFORMERS_MEDIA)
}

#: What at least can go from each tiny network: groups, units, and the share of its parameters at one unit a group.
EXPECTED: dict[str, dict[str, float]] = json.loads(Path(__file__).with_name("zoo_expected.json").read_text())

_NEEDS = {
    "own": (),
    "torchvision": ("torchvision",),
    "timm": ("timm", "torchvision"),
    "transformers": ("transformers",),
}


def missing(row: Row) -> list[str]:
    """Packages that the row needs and this environment lacks."""
    return [package for package in _NEEDS[row.origin] if importlib.util.find_spec(package) is None]
