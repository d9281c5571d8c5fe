"""The same tables from a real Ray cluster of two workers, also when one of them is killed."""

import os

import pytest
import torch
from torch import nn

from captum_scoremap.audit import audit
from captum_scoremap.audit.schema import TABLES
from captum_scoremap.audit.shards import Shards
from captum_scoremap.models import LoadedModel
from tests.audit_pictures import FatalDigits

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("default")]  # Ray warns of itself

SIZES = {"layers": ["1"], "batch_size": 4, "shard_size": 8, "progress": False}


@pytest.fixture
def cluster():
    """Two processors of this machine."""
    ray = pytest.importorskip("ray", reason="needs pip install captum-scoremap[ray]")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


def test_a_killed_worker_changes_nothing(tmp_path, cluster):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    model = LoadedModel("digits", module.eval())
    grave = tmp_path / "grave"
    data = FatalDigits(0, 40, fatal=29, grave=grave)
    on_cluster = audit(data, model, out=tmp_path / "cluster", ray="auto", workers=2, **SIZES)
    assert int(grave.read_text()) != os.getpid()
    here = audit(data, model, out=tmp_path / "here", **SIZES)
    assert cluster.is_initialized()
    for name in TABLES:
        tables = [Shards(done.folder).table(name) for done in (here, on_cluster)]
        if name == "images":
            tables = [table.drop_columns(["seconds"]) for table in tables]
        assert tables[0].equals(tables[1])
    assert on_cluster.analysis.labels == here.analysis.labels
