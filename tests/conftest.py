import os
from dataclasses import replace

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach a real hub


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """A folder of 20 simulated clips of 5 subjects, and the folder of their frame cache."""
    from training.cache import ingest
    from training.simulate import write_demo

    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder / "clips", clips=20, frames=6, size=32, seed=0)
    ingest([folder / "clips"], folder / "cache", size=40, crop="crop", max_frames=400, workers=0, progress=False)
    return folder


@pytest.fixture
def tiny(demo, tmp_path):
    """Makes the settings of a training of seconds: `tiny(method='uscl', optim={'steps': 3})`."""
    from training.config import Config, Data, Model, Optim

    base = Config(
        out=str(tmp_path / "run"),
        device="cpu",
        data=Data(
            roots=(str(demo / "clips"),),
            cache=str(demo / "cache"),
            group=r"/(\w+/subj\d+)_",
            meta_fraction=0.2,
            val_fraction=0.2,
        ),
        model=Model(name="test_resnet", size=32, dim=16),
        optim=Optim(batch=4, steps=4, lr=0.05),
    )

    def make(**changes):
        groups = {k: replace(getattr(base, k), **v) if isinstance(v, dict) else v for k, v in changes.items()}
        return replace(base, **groups)

    return make


@pytest.fixture(scope="session")
def tiny_export(tmp_path_factory):
    """Folder of a very small network (timm's test_resnet, 32 px): quick to load and to run."""
    import timm
    import torch

    from uscl_hub import checkpoints, models

    torch.manual_seed(0)
    state = timm.create_model("test_resnet", num_classes=0).state_dict()
    cfg = models.make_cfg(32, first_conv="conv1.0")
    config = {"architecture": "test_resnet", "num_classes": 0, "pretrained_cfg": cfg, "uscl_hub": {"method": "test"}}
    return checkpoints.save_folder(tmp_path_factory.mktemp("tiny") / "export", state, config, "# card\n")
