"""A training that was stopped and resumed equals one that was not, bit for bit."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import ROOT

from training import config as configs
from training import run
from training.engine import train as loop
from training.method.networks import Encoder
from uscl_hub import files

TIMINGS = ("images_per_s", "wait_share")
STEPS = {"steps": 8}


@pytest.fixture(autouse=True)
def one_thread():
    """Sums in the same order here and in the processes started here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rows(out):
    lines = (Path(out) / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines]


def flat(value, name=""):
    """Every tensor and number of a checkpoint by its path in it."""
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, part in items for k, v in flat(part, f"{name}/{key}").items()}
    return {name: value}


def same_training(a, b):
    """Weights, CMW-Net, both optimisers and the log of two output folders are equal, bit for bit."""
    a, b = Path(a), Path(b)
    one, two = (flat(torch.load(out / "checkpoint.pt", weights_only=True)) for out in (a, b))
    assert one.keys() == two.keys()
    for part in ("/encoder/", "/cmw/", "/optimizer/state/", "/cmw_optimizer/state/", "/step"):
        assert any(k.startswith(part) for k in one), part
    for key, value in one.items():
        assert torch.equal(value, two[key]) if isinstance(value, torch.Tensor) else value == two[key], key
    assert rows(a) == rows(b)
    return True


@pytest.fixture
def whole(tiny, tmp_path):
    """The output folder of an uninterrupted training."""
    run.main(tiny(out=str(tmp_path / "whole"), optim=STEPS))
    return tmp_path / "whole"


def stop_at(step, monkeypatch, number=signal.SIGTERM):
    """This process gets a signal in the middle of the training."""
    log_step = loop.Log.step

    def log_and_stop(self, at, *args):
        log_step(self, at, *args)
        if at == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(loop.Log, "step", log_and_stop)
    return lambda: monkeypatch.setattr(loop.Log, "step", log_step)


@pytest.mark.parametrize("step, number", [(1, signal.SIGTERM), (4, signal.SIGINT), (6, signal.SIGTERM)])
def test_signal_then_resume_equals_an_uninterrupted_run(tiny, tmp_path, monkeypatch, capsys, whole, step, number):
    config = tiny(optim=STEPS)  # 3 steps are an epoch
    go_on = stop_at(step, monkeypatch, number)
    before = signal.getsignal(number)
    assert run.main(config) is None  # status 0
    assert f"stopped by a signal at step {step} of 8; go on with --resume" in capsys.readouterr().out
    assert signal.getsignal(number) is before
    assert not (tmp_path / "run" / "export").exists()
    go_on()
    run.main(replace(config, resume=True))
    assert f"resumed at step {step}" in capsys.readouterr().out
    assert same_training(whole, tmp_path / "run")
    weights = [(out / "export" / "model.safetensors").read_bytes() for out in (whole, tmp_path / "run")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"meta": {"input": "statistics", "by_source": True, "warmup": 0.5}},
        {"method": "uscl", "loss": {"weights": "distance"}},
    ],
)
def test_variants_with_wrong_pairs_resume_too(tiny, tmp_path, monkeypatch, changes):
    config = tiny(**changes, pairs={"corrupt": 0.5, "corrupt_often": 0.5}, optim={"steps": 6})
    run.main(replace(config, out=str(tmp_path / "whole")))
    go_on = stop_at(2, monkeypatch)  # within the plain steps
    run.main(config)
    go_on()
    run.main(replace(config, resume=True))
    one, two = rows(tmp_path / "whole"), rows(tmp_path / "run")
    assert one == two and {kind for row in one for kind in row.get("faults", ())} > {""}
    weighted = ["weights" in row for row in one if "loss" in row]
    assert weighted == ([False] * 3 + [True] * 3 if "meta" in changes else [True] * 6)
    a, b = ((tmp_path / name / "export" / "model.safetensors").read_bytes() for name in ("whole", "run"))
    assert a == b
    with pytest.raises(SystemExit, match="pairs.corrupt_often: 0.5 there, 0.6 here"):
        run.main(replace(config, resume=True, pairs=replace(config.pairs, corrupt_often=0.6)))


def test_random_layers_resume_too(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "Encoder", partial(Encoder, drop_rate=0.3))
    config = tiny(method="uscl", optim={"steps": 4})
    run.main(replace(config, out=str(tmp_path / "whole")))
    go_on = stop_at(2, monkeypatch)
    run.main(config)
    go_on()
    run.main(replace(config, resume=True))
    assert rows(tmp_path / "whole") == rows(tmp_path / "run")
    monkeypatch.setattr(loop, "Encoder", Encoder)
    run.main(replace(config, out=str(tmp_path / "plain")))
    assert rows(tmp_path / "plain") != rows(tmp_path / "whole")  # there was dropout


CHILD = """
import signal, sys, threading
from training import config, run
from training.engine import train as loop

log_step = loop.Log.step

def slowly(self, number, *args):
    log_step(self, number, *args)
    if number == 5:  # with a checkpoint of step 4
        self.flush()
        asked, handler = threading.Event(), signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, lambda *about: (asked.set(), handler(*about)))
        open(sys.argv[2], "w").close()
        asked.wait(600)

loop.Log.step = slowly
run.main(config.load(config.Config, sys.argv[1]))
"""


@pytest.mark.slow
def test_killed_processes(tiny, tmp_path, whole):
    """Real processes, ended from outside by SIGTERM and SIGKILL at step 5."""
    children = {}
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name in ("SIGTERM", "SIGKILL"):
        config = tiny(out=str(tmp_path / name), optim=STEPS, save_every=4)
        configs.dump(config, tmp_path / f"{name}.yaml")
        command = [sys.executable, "-c", CHILD, str(tmp_path / f"{name}.yaml"), str(tmp_path / f"{name}.now")]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        children[name] = subprocess.Popen(command, cwd=tmp_path, env=env, **pipes)
    try:
        for name, child in children.items():
            end = time.monotonic() + 600
            while not (tmp_path / f"{name}.now").exists():
                assert child.poll() is None, child.stderr.read()
                assert time.monotonic() < end
                time.sleep(0.02)
            child.send_signal(getattr(signal, name))
        said = {name: child.communicate(timeout=600) for name, child in children.items()}
    finally:
        for child in children.values():
            child.kill()
            child.wait()
    assert children["SIGTERM"].returncode == 0, said["SIGTERM"][1]
    assert "stopped by a signal at step 5 of 8" in said["SIGTERM"][0]
    assert "Traceback" not in said["SIGTERM"][1]
    assert children["SIGKILL"].returncode == -signal.SIGKILL
    for name, step in (("SIGTERM", 5), ("SIGKILL", 4)):
        assert torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["step"] == step
        assert rows(tmp_path / name)[-1]["step"] == 5
        run.main(tiny(out=str(tmp_path / name), optim=STEPS, save_every=4, resume=True))
        assert same_training(whole, tmp_path / name)


def test_resume_after_completion_does_the_end_again(tiny, tmp_path, whole, capsys):
    before = (whole / "checkpoint.pt").read_bytes(), rows(whole)
    card = whole / "export" / "README.md"
    card.unlink()
    (whole / "figures" / "loss.png").unlink()
    capsys.readouterr()
    run.main(tiny(out=str(whole), optim=STEPS, resume=True))
    said = capsys.readouterr().out
    assert "resumed at step 8" in said and "largest difference of the features: 0\n" in said
    assert ((whole / "checkpoint.pt").read_bytes(), rows(whole)) == before
    assert card.exists() and (whole / "figures" / "loss.png").exists()


def test_resume_of_nothing_starts_at_the_beginning(tiny, tmp_path, whole, capsys):
    run.main(tiny(optim=STEPS, resume=True))
    assert "does not exist yet: starting from the beginning" in capsys.readouterr().out
    assert same_training(whole, tmp_path / "run")


def refusal(config):
    with pytest.raises(SystemExit) as error:
        run.main(config)
    assert isinstance(error.value.code, str) and "\n" not in error.value.code
    return error.value.code


def test_other_settings_are_refused(tiny, whole, demo, tmp_path):
    before = {p: p.read_bytes() for p in whole.rglob("*") if p.is_file() and p.name != ".lock"}

    def resume(**changes):
        return tiny(**{"out": str(whole), "resume": True, "optim": STEPS, **changes})

    said = refusal(resume(optim={"steps": 9, "lr": 0.01}))
    assert "optim.steps: 8 there, 9 here; optim.lr: 0.05 there, 0.01 here" in said
    assert "method: 'meta_uscl' there, 'uscl' here" in refusal(resume(method="uscl"))
    assert "seed: 0 there, 1 here" in refusal(resume(seed=1))
    assert "model.dim: 16 there, 8 here" in refusal(resume(model={"dim": 8}))
    # other clips, other splits, other frames: meta and validation clips must not become training clips
    some = tuple(str(demo / "clips" / kind) for kind in ("cyst", "lung", "muscle", "vessel"))
    for data in ({"val_fraction": 0.3}, {"group": r"(clip\d+)"}, {"roots": some, "group": r"(clip\d+)"}):
        assert "data (clips, splits, frames)" in refusal(resume(data=data))
    cache = (str(tmp_path / "cache"),)
    assert "data (clips, splits, frames)" in refusal(resume(data={"crop": "none", "cache": cache, "workers": 1}))
    after = {p: p.read_bytes() for p in whole.rglob("*") if p.is_file() and p.name != ".lock"}
    assert after == before  # config.yaml, too
    assert "holds a training already" in refusal(tiny(out=str(whole), optim=STEPS))


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "another file", "no settings"])
def test_a_damaged_checkpoint_is_said(tiny, tmp_path, damage):
    config = tiny(optim={"steps": 1})
    run.main(config)
    path = tmp_path / "run" / "checkpoint.pt"
    whole = path.read_bytes()
    if damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "flipped":
        weights = torch.load(path, weights_only=True)["encoder"]["projector.0.weight"]
        at = whole.index(weights.numpy().tobytes()[:64])
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
    elif damage == "another file":
        path.write_text("hello " * 99)
    else:
        torch.save({"step": 3}, path)
    damaged = path.read_bytes()
    assert refusal(replace(config, resume=True)).startswith(f"{path}: damaged or not a checkpoint of ours")
    assert path.read_bytes() == damaged


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda c: c["optimizer"]["param_groups"][0].update(momentum=0.5), "optimizer has other options"),
        (lambda c: c["cmw_optimizer"]["param_groups"][0].update(amsgrad=True), "cmw_optimizer has other options"),
        (lambda c: c["cmw_optimizer"]["param_groups"][0].update(lr="x"), "cmw_optimizer has no learning rate"),
        (lambda c: c["cmw_optimizer"]["state"][0].pop("exp_avg"), "cmw_optimizer remembers"),
        (lambda c: c["optimizer"]["state"][0].update(momentum_buffer=torch.zeros(2)), "not have the shape"),
        (lambda c: c.update(step=-1), "step -1"),
    ],
)
def test_a_checkpoint_of_other_optimizers_is_refused(tiny, tmp_path, change, said):
    config = tiny(optim={"steps": 1})
    run.main(config)
    path = tmp_path / "run" / "checkpoint.pt"
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    assert said in refusal(replace(config, resume=True))


full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")


def temporary(path):
    return path.with_name(f".{path.stem}.temporary{path.suffix}")


@pytest.fixture
def known_names(monkeypatch):
    """The names of temporary files are those of `temporary`."""
    monkeypatch.setattr(files, "temporary", temporary)


@full
def test_a_full_disk_leaves_the_previous_checkpoint(tiny, tmp_path, monkeypatch, known_names):
    config = tiny(optim=STEPS, save_every=3)
    save = loop.save

    def on_a_full_disk(state, path):
        if state.step > 3:
            temporary(path).symlink_to("/dev/full")  # every write fails as on a full disk
        save(state, path)

    monkeypatch.setattr(loop, "save", on_a_full_disk)
    said = refusal(config)
    path = tmp_path / "run" / "checkpoint.pt"
    assert said.startswith(f"{path}: cannot write the checkpoint") and "the previous one, if any, is intact" in said
    assert torch.load(path, weights_only=True)["step"] == 3
    assert not temporary(path).is_symlink()
    monkeypatch.setattr(loop, "save", save)
    run.main(replace(config, resume=True))  # with room again
    run.main(replace(config, out=str(tmp_path / "whole")))
    assert same_training(tmp_path / "whole", tmp_path / "run")


@full
def test_a_full_disk_under_the_log_is_one_line(tiny, tmp_path, whole, known_names):
    log = (whole / "log.jsonl").read_bytes()
    temporary(whole / "log.jsonl").symlink_to("/dev/full")
    said = refusal(tiny(out=str(whole), optim=STEPS, resume=True))
    assert "No space left on device" in said and "checkpoint, if any, is intact" in said
    assert (whole / "log.jsonl").read_bytes() == log


# ------------------------------------------------------------------------------------- numbers that are not finite


def poison(state, where):
    """Make one number of the state infinite, as a training that diverges does before its loss does."""
    values, bad = {
        "weight": (next(state.encoder.parameters()).data, "nan"),
        "statistic": (next(b for b in state.encoder.buffers() if b.is_floating_point()), "inf"),
        "momentum": (next(iter(state.optimizer.state.values()))["momentum_buffer"], "inf"),
        "Adam's average": (next(iter(state.cmw_optimizer.state.values()))["exp_avg_sq"], "nan"),
    }[where]
    values[(0,) * values.ndim] = float(bad)


@pytest.mark.parametrize("where", ["weight", "statistic", "momentum", "Adam's average"])
def test_the_checkpoint_is_never_replaced_by_one_that_is_not_finite(tiny, tmp_path, monkeypatch, whole, where):
    config = tiny(optim=STEPS, save_every=1, eval_epochs=99)
    step, seen = loop.step, []

    def poisoned(state, *args):
        result = step(state, *args)
        seen.append(state)
        if len(seen) == 5:
            poison(state, where)
        return result

    monkeypatch.setattr(loop, "step", poisoned)
    said = refusal(config)
    assert re.match(r"step 5: (encoder|(cmw_)?optimizer)\.\S+ is not finite any more; lower optim.lr", said), said
    assert "the checkpoint of step 4 is kept" in said
    content = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert content["step"] == 4
    monkeypatch.undo()
    run.main(replace(config, resume=True, eval_epochs=1))
    one, two = (torch.load(out / "checkpoint.pt", weights_only=True)["encoder"] for out in (whole, tmp_path / "run"))
    assert all(torch.equal(value, two[key]) for key, value in one.items())


def test_a_checkpoint_that_is_not_finite_is_not_resumed(tiny, tmp_path):
    config = tiny(optim={"steps": 1})
    run.main(config)
    path = tmp_path / "run" / "checkpoint.pt"
    content = torch.load(path, weights_only=True)
    content["encoder"]["projector.0.bias"][0] = float("nan")
    torch.save(content, path)
    assert f"{path}: encoder.projector.0.bias is not finite" in refusal(replace(config, resume=True))
