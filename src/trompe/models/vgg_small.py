"""A VGG for small images (Simonyan & Zisserman 2015, with BatchNorm)."""

from torch import Tensor, nn

__all__ = ["vgg_small"]


class VggSmall(nn.Module):
    """Three stages of two 3x3 convolutions with 32, 64, 128 channels, pooling between them.

    The last stage's activations are a quarter of the image's size. The classifier is VGG's way of
    fully connected layers, over 4x4 pooled positions: not global average pooling.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for stage, width in enumerate((32, 64, 128)):
            if stage:
                layers.append(nn.MaxPool2d(2))
            for _ in range(2):
                conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
                nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
                layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                channels = width
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(channels * 16, 256),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(256, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.features(x)))


def vgg_small(num_classes: int) -> VggSmall:
    """A VGG of 8 layers (about 0.8 million parameters) for images of about 32x32 to 64x64."""
    return VggSmall(num_classes)
