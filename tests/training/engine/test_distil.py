import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch

from training import distributed, run
from training.data import batches
from training.data.dataset import prepare
from training.engine import sources
from training.engine.checks import check
from training.engine.sources import Pretrained, initialise
from training.engine.train import build, start
from training.method.loss import info_nce
from training.method.networks import Encoder
from uscl_hub.checkpoints import CheckpointError
from uscl_hub.errors import UserError


@pytest.fixture
def teacher(monkeypatch):
    """Stands in for ImageNet's network: a small one with weights of its own."""

    def load(spec):
        torch.manual_seed(sum(map(ord, spec)))
        model = timm.create_model("test_efficientnet", num_classes=0).eval()
        return Pretrained(model, 0.5, 0.5, {"name": spec, "licence": "apache-2.0", "data": "none"})

    monkeypatch.setattr(sources, "load", load)
    monkeypatch.setattr("training.engine.distil.FIT", 512)


SMALL = {"size": 32, "components": 8, "batch": 8}


def checkpoint(out):
    return torch.load(f"{out}/checkpoint.pt", weights_only=True)


def leaves(tree):
    if not isinstance(tree, (dict, list, tuple)):
        return [tree]
    return [leaf for part in (tree.values() if isinstance(tree, dict) else tree) for leaf in leaves(part)]


def equal(a, b):
    flat = [leaves({k: v for k, v in c.items() if k != "fixed"}) for c in (a, b)]
    return all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(*flat, strict=True))


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "distil", "distil": SMALL},
        {"method": "distil", "distil": {**SMALL, "round": 24, "passes": 2, "dense": 0.5}},
        {"method": "simclr", "distil": {**SMALL, "weight": 1.0}},
        {"method": "meta_uscl", "distil": {**SMALL, "weight": 1.0, "dense": 0.5}, "loss": {"decoupled": True}},
    ],
    ids=["distil", "rounds", "simclr", "meta_uscl"],
)
def test_resumed_bit_for_bit_and_exported_with_its_parents(tiny, teacher, tmp_path, monkeypatch, settings):
    config = tiny(**settings, optim={"steps": 6, "lr": 1e-3}, save_every=1)
    whole = replace(config, out=str(tmp_path / "whole"))
    run.main(whole)
    train, stop = run.train, RuntimeError("stopped")

    def until_three(state, *args):
        from training.engine import train as module

        step = module.step

        def three(state, *args):
            if state.step == 3:
                raise stop
            return step(state, *args)

        monkeypatch.setattr(module, "step", three)
        try:
            return train(state, *args)
        finally:
            monkeypatch.setattr(module, "step", step)

    part = replace(config, out=str(tmp_path / "part"))
    monkeypatch.setattr(run, "train", until_three)
    with pytest.raises(RuntimeError, match="stopped"):
        run.main(part)
    monkeypatch.setattr(run, "train", train)
    assert checkpoint(part.out)["step"] == 3
    run.main(replace(part, resume=True))
    assert equal(checkpoint(whole.out), checkpoint(part.out))
    provenance = json.loads((tmp_path / "whole" / "export" / "config.json").read_text())["uscl_hub"]
    assert [(p["role"], p["name"]) for p in provenance["parents"]] == [("teacher", "imagenet")]


@pytest.mark.slow
def test_distillation_learns(tiny, teacher, tmp_path):
    config = tiny(method="distil", distil=SMALL, optim={"steps": 60, "lr": 3e-3}, out=str(tmp_path / "run"))
    run.main(config)
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])


def test_crops_a_second_are_logged(tiny, teacher, tmp_path, monkeypatch):
    clock = itertools.count()  # a second from look to look: two a step, of its batch and of all
    monkeypatch.setattr("training.engine.train.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    for method, distil in (("distil", {**SMALL, "batch": 24}), ("simclr", {})):
        run.main(tiny(method=method, distil=distil, optim={"steps": 1}, out=str(tmp_path / method)))
        row = json.loads((tmp_path / method / "log.jsonl").read_text().splitlines()[0])
        assert row["images_per_s"] == {"distil": 24 / 2, "simclr": 2 * 4 / 2}[method]


def test_ranks_share_the_crops_of_a_step(tiny, teacher, tmp_path, monkeypatch):
    config = tiny(method="distil", distil={**SMALL, "batch": 24, "round": 48}, optim={"weight_decay": 0.3})
    clips, device = prepare(config, tmp_path), torch.device("cpu")
    for ranks in (1, 2, 3):
        monkeypatch.setattr("training.engine.distil.distributed", SimpleNamespace(world=lambda: ranks))
        state = build(config, clips, device)
        distillation = start(state, config, clips, device)
        assert (ranks * distillation.batch, ranks * distillation.round) == (24, 48)
        assert state.optimizer.param_groups[-1]["weight_decay"] == 0.3  # the head's
    monkeypatch.setattr(distributed, "world", lambda: 5)  # for check alone: there is no group of processes
    with pytest.raises(UserError, match="distil.batch = 24 must be a multiple of the 5 processes"):
        check(replace(config, optim=replace(config.optim, batch=5)))


def test_weights_to_start_from(tiny, tmp_path):
    first = tiny(method="simclr", out=str(tmp_path / "first"))
    run.main(first)
    config = tiny(model={"init": str(tmp_path / "first" / "export")}, optim={"steps": 1, "lr": 0.0})
    run.main(config)
    before, after = (
        timm.create_model(f"local-dir:{out}/export", pretrained=True).state_dict() for out in (first.out, config.out)
    )
    assert all(torch.equal(before[k], after[k]) for k in before if "running" not in k and "num_batches" not in k)
    text = (tmp_path / "run" / "export" / "config.json").read_text()
    assert str(tmp_path) not in text  # of paths only the last name leaves
    assert json.loads(text)["uscl_hub"]["config"]["model.init"] == ".../export"
    parent = json.loads(text)["uscl_hub"]["parents"][0]
    assert parent["role"] == "init" and parent["method"] == "simclr" and len(parent["groups"]) == 5


@pytest.mark.parametrize("spec, said", [("no_such_thing", "no_such_thing"), ("timm:no_such_model", "no_such_model")])
def test_what_cannot_be_loaded_is_named(spec, said):
    with pytest.raises((UserError, CheckpointError), match=said):
        sources.load(spec)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"architecture": null}', '{"architecture": "resnet18"}', None])
def test_a_folder_without_a_config_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=str(tmp_path / "config.json")):
        sources.load(str(tmp_path))


def test_a_start_that_does_not_fit_is_refused():
    other = Pretrained(timm.create_model("test_efficientnet", num_classes=0), 0.18, 0.24, {"name": "other"})
    with pytest.raises(CheckpointError, match="model.init: other does not fit"):
        initialise(timm.create_model("test_resnet", num_classes=0), other)


def test_our_normalisation_goes_into_the_first_layers():
    torch.manual_seed(0)
    source = Pretrained(timm.create_model("test_efficientnet", num_classes=0).eval(), 0.5, 0.4, {"name": "x"})
    for module in source.model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(), module.running_var.uniform_(0.5, 2)
    model = timm.create_model("test_efficientnet", num_classes=0).eval()
    initialise(model, source)
    grey = torch.rand(2, 1, 64, 64)
    stems = []
    for network, mean, std in ((source.model, 0.5, 0.4), (model, 0.18, 0.24)):
        x = ((grey - mean) / std).expand(-1, 3, -1, -1)
        stems.append(network.bn1(network.conv_stem(x))[..., 1:-1, 1:-1])  # the edge sees the padding
    assert torch.allclose(*stems, atol=1e-4)


def test_held_stages_stay(tiny, tmp_path):
    for hold in (0, 2):
        config = tiny(method="simclr", model={"hold": hold}, out=str(tmp_path / str(hold)), optim={"steps": 5})
        run.main(config)
        log = (tmp_path / str(hold) / "log.jsonl").read_text()
        assert log.count("val_loss") == 2  # there are steps after a validation
    torch.manual_seed(0)
    start = Encoder("test_resnet", 16).backbone.state_dict()
    free, held = (
        timm.create_model(f"local-dir:{tmp_path / str(h)}/export", pretrained=True).state_dict() for h in (0, 2)
    )
    kept = [k for k in start if k.startswith(("conv1", "bn1", "layer1")) and "num_batches" not in k]
    assert len(kept) > 10
    assert all(torch.equal(start[k], held[k]) for k in kept) and not all(torch.equal(start[k], free[k]) for k in kept)
    assert not torch.equal(start["layer4.0.conv1.weight"], held["layer4.0.conv1.weight"])


def test_too_many_stages_are_refused(tiny):
    vit = Encoder("test_vit")
    vit.hold(1)  # its class token and positions belong to the backbone itself
    vit.train()
    assert vit.backbone.training and all(block.training for block in vit.backbone.blocks)
    with pytest.raises(SystemExit, match="model.hold 40: it has 5 stages"):
        run.main(tiny(model={"hold": 40}))


def test_decoupled_loss_is_its_definition():
    torch.manual_seed(0)
    z = torch.randn(2, 5, 7, dtype=torch.float64)
    flat = torch.nn.functional.normalize(z, dim=-1).flatten(0, 1)
    losses = []
    for i in range(10):
        others = [flat[i] @ flat[j] / 0.5 for j in range(10) if j not in (i, (i + 5) % 10)]
        losses.append(torch.stack(others).logsumexp(0) - flat[i] @ flat[(i + 5) % 10] / 0.5)
    assert torch.allclose(info_nce(z, None, 0.5, decoupled=True), torch.stack(losses).mean())
    weights = torch.rand(5, dtype=torch.float64)
    expected = (torch.stack(losses).view(2, 5).mean(0) * weights).sum() / weights.sum()
    assert torch.allclose(info_nce(z, weights, 0.5, decoupled=True), expected)


@pytest.mark.parametrize("balance, share", [(0.0, 0.1), (0.5, 0.25), (1.0, 0.5)])
def test_balanced_clips(balance, share):
    clips, names = np.arange(100, 200), np.repeat(["a", "b"], [10, 90])
    drawn = [batches.balanced_clips(clips, names, balance, step, 4, 0) for step in range(3000)]
    assert all(len(set(batch)) == 4 for batch in drawn)
    assert np.mean(np.concatenate(drawn) < 110) == pytest.approx(share, abs=0.05)
    assert np.array_equal(drawn[7], batches.balanced_clips(clips, names, balance, 7, 4, 0))


def test_pairs_are_near_in_time(demo):
    from training.config import Pairs
    from training.data.cache import FrameCache

    (folder,) = (demo / "cache").glob("40px-*")
    cache = FrameCache.open(folder)
    cache.fps = np.full(len(cache), 2.0)
    rng = np.random.default_rng(0)
    near = batches.choose(cache, np.arange(8), Pairs(max_seconds=1.0), rng)[0]
    far = batches.choose(cache, np.arange(8), Pairs(), rng)[0]
    assert (near.max(1) - near.min(1)).max() <= 2 < (far.max(1) - far.min(1)).max()
    cache.fps = np.full(len(cache), np.nan)
    unknown = batches.choose(cache, np.arange(8), Pairs(max_seconds=1.0), rng)[0]
    assert (unknown.max(1) - unknown.min(1)).max() > 2
