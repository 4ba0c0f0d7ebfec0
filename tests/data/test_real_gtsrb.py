"""The real GTSRB, where it is at hand: `../shared/data` beside the repository."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from trompe.data.gtsrb import Gtsrb

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="session")
def real_root() -> Path:
    """Unpacked once on this machine; a rename makes it safe under several workers."""
    if not (SHARED / "unpack.py").is_file():
        message = f"the real data are not at {SHARED}"
        pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)
    cache = Path(tempfile.gettempdir()) / "trompe-test-data"
    if not (cache / "gtsrb").is_dir():
        cache.mkdir(exist_ok=True)
        own = Path(tempfile.mkdtemp(dir=cache, prefix="unpacking-"))
        try:
            command = [sys.executable, str(SHARED / "unpack.py"), str(own), "gtsrb"]
            subprocess.run(command, check=True, capture_output=True)
            try:
                (own / "gtsrb").rename(cache / "gtsrb")
            except OSError:
                assert (cache / "gtsrb").is_dir()  # another worker was faster
        finally:
            shutil.rmtree(own, ignore_errors=True)
    return cache


def test_the_real_gtsrb_is_what_the_papers_use(real_root: Path) -> None:
    source = Gtsrb(str(real_root))
    train, test = source.train(), source.test()
    assert len(train) == 26_640
    assert len(test) == 12_630
    for data in (train, test):
        assert data.images.shape[1:] == (3, 40, 40)
        assert data.skipped == ()
        counts = torch.bincount(data.labels, minlength=43)
        assert len(counts) == len(data.class_names) == 43
        # The rarest sign is "speed limit 20", the commonest "speed limit 30" or "50".
        assert counts.min() >= 60
        assert counts[0] == counts.min()
        assert int(counts.argmax()) in (1, 2)
        assert 9 < counts.max() / counts.min() < 15
        assert 20 < data.images.float().mean() < 130
    assert train.groups is not None
    tracks, frames = train.groups.unique(return_counts=True)
    assert len(tracks) == 26_640 // 30
    assert (frames == 30).all()
    for track in tracks[::50]:
        assert len(train.labels[train.groups == track].unique()) == 1
