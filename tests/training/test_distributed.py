"""Several processes (gloo, CPU) are one training: the same gradients, the same schedule."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import fresh
import pytest
import torch
import torch.distributed as dist
from helpers import ROOT

from training import config as configs
from training import distributed, run
from training.engine import checks
from training.engine import train as loop
from training.method import forward_mode, step
from training.method.networks import CMWNet, Encoder
from uscl_hub.errors import UserError

WORLD, CLIPS, PX = 2, 6, 32
KINDS = {"exact": step.exact_step, "delayed": step.delayed_step, "plain": None}


def problem(name):
    """Networks in the middle of a training (momentum buffers), and a global batch: float64 (2, N, C, H, W)."""
    torch.manual_seed(0)
    encoder = Encoder(name, dim=16).double().train()
    with torch.no_grad():  # away from the special points of the initialisation
        for p in encoder.parameters():
            p += 0.02 * torch.randn_like(p)
    cmw = CMWNet(encoder.num_features).double()
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    for p in encoder.parameters():
        p.grad = 0.05 * torch.randn_like(p)
    optimizer.step()
    optimizer.zero_grad()
    batches = [torch.randn(2, CLIPS, 3, PX, PX, dtype=torch.float64) for _ in range(2)]
    return encoder, cmw, optimizer, batches


def one_step(name, kind, part=slice(None)):
    """A step on this part of the clips; everything that it changed or found."""
    encoder, cmw, optimizer, batches = problem(name)
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    views, clean = (batch[:, part].flatten(0, 1) for batch in batches)
    if KINDS[kind] is None:
        result = step.contrastive_step(step.Learner(encoder, optimizer), views)
        cmw_grads = []
    else:
        cmw_optimizer = torch.optim.Adam(cmw.parameters(), lr=1e-3)
        result = KINDS[kind](step.Learner(encoder, optimizer, cmw, cmw_optimizer), views, clean)
        cmw_grads = [p.grad for p in cmw.parameters()]
    distributed.average_buffers(encoder)
    moved = {k: v - before[k] for k, v in encoder.state_dict().items() if v.is_floating_point()}
    return {
        "encoder": torch.cat([moved[k].flatten() for k, _ in encoder.named_parameters()]),
        "buffers": torch.cat([torch.zeros(1), *(moved[k].flatten() for k, _ in encoder.named_buffers() if k in moved)]),
        "cmw": torch.cat([torch.zeros(1), *(g.flatten() for g in cmw_grads)]),
        "loss": result.loss[None],
        "weights": torch.zeros(1) if result.weights is None else result.weights,
    }


def worker(rank, folder, names):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", WORLD_SIZE=str(WORLD), RANK=str(rank), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    mine = distributed.share(CLIPS)
    results = {f"{name} {kind}": one_step(name, kind, mine) for name in names for kind in KINDS}
    results["broadcast"] = distributed.broadcast({"rank": rank})
    results["any"] = [distributed.any_(flag, torch.device("cpu")) for flag in (rank == 1, False)]
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


NAMES = ("test_convnext", "test_resnet")  # LayerNorm; BatchNorm, with each rank's own statistics


RANKS = """
import os, sys
sys.path[:0] = sys.argv[1:3]
import test_distributed as tests
child = os.fork()
tests.worker(int(child == 0), sys.argv[3], tests.NAMES)
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    paths = Path(__file__).parent, ROOT / "tests"
    done = fresh.run(RANKS, *paths, folder, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, timm=True)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_have_the_gradients_of_one(ranks, monkeypatch, name, kind):
    # One process stands for both if its batch norms see the views' halves that the ranks see.
    monkeypatch.setattr(forward_mode, "VIEWS", 2 * WORLD)
    expected = one_step(name, kind)
    assert expected["encoder"].norm() > 0 and (kind == "plain" or expected["cmw"].norm() > 0)
    assert name == "test_convnext" or expected["buffers"].norm() > 0
    for rank in range(WORLD):
        for key, value in expected.items():
            got = ranks[rank][f"{name} {kind}"][key]
            assert (got - value).norm() <= 1e-9 * value.norm(), (rank, key)


def test_without_batch_norm_the_number_of_processes_does_not_matter(ranks):
    expected = one_step("test_convnext", "exact")
    for key in ("encoder", "cmw", "loss"):
        got = ranks[0]["test_convnext exact"][key]
        assert (got - expected[key]).norm() <= 1e-9 * expected[key].norm()


def test_small_operations(ranks):
    assert [r["broadcast"] for r in ranks] == [{"rank": 0}] * WORLD
    assert [r["any"] for r in ranks] == [[True, False]] * WORLD
    x = torch.ones(2, 3, 4)  # a single process: each is the identity
    assert distributed.gather(x) is x and distributed.sum_([x])[0] is x and distributed.broadcast(x) is x
    assert (distributed.rank(), distributed.world()) == (0, 1)


def torchrun(config, file):
    """`torchrun --nproc-per-node 2 training/run.py` with these settings."""
    configs.dump(config, file)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=127.0.0.1:0", str(ROOT / "training" / "run.py"), "--config", str(file)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, cwd=file.parent, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes)


@pytest.mark.slow
def test_torchrun_to_the_end_and_one_process_after_a_signal(tiny, tmp_path):
    """Two processes run to the export; two others are stopped by SIGTERM, and one process continues their training."""
    network = {"name": "test_convnext"}  # without batch norm: two processes train as one does
    short = tiny(out=str(tmp_path / "short"), model=network)
    long = dict(model=network, optim={"steps": 400}, eval_epochs=2, save_every=10)
    children = [
        torchrun(short, tmp_path / "short.yaml"),
        torchrun(tiny(out=str(tmp_path / "long"), **long), tmp_path / "long.yaml"),
    ]
    try:
        end = time.monotonic() + 600
        while not (tmp_path / "long" / "checkpoint.pt").exists():
            assert children[1].poll() is None, children[1].stdout.read()
            assert time.monotonic() < end
            time.sleep(0.02)
        children[1].send_signal(signal.SIGTERM)
        to_the_end, stopped = (child.communicate(timeout=600)[0] for child in children)
    finally:
        for child in children:
            child.kill()
            child.wait()

    assert children[0].returncode == 0, to_the_end
    assert to_the_end.count("largest difference of the features: 0\n") == 1  # said by one rank
    same_as_alone(tmp_path / "short", tiny(out=str(tmp_path / "alone"), model=network))

    done = torch.load(tmp_path / "long" / "checkpoint.pt", weights_only=True)["step"]
    assert 10 <= done < 400 and stopped.count(f"stopped by a signal at step {done} of 400") == 1, stopped
    log_step = loop.Log.step

    def log_and_stop(self, number, *args):
        log_step(self, number, *args)
        if number == done + 7:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Log, "step", log_and_stop)
        run.main(tiny(out=str(tmp_path / "long"), resume=True, **long))
        same_as_alone(tmp_path / "long", tiny(out=str(tmp_path / "long alone"), **long))


def same_as_alone(out, config):
    """The log in `out` is that of one process with these settings: the same schedule, clips and losses."""
    run.main(config)
    both, alone = (
        [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
        for folder in (out, config.out)
    )
    assert [r["step"] for r in both] == [r["step"] for r in alone]
    for row, expected in zip(both, alone):
        assert row.keys() == expected.keys() and row.get("lr") == expected.get("lr")
        assert row.get("clips") == expected.get("clips")
        for key in ("loss", "meta_loss", "val_loss"):
            if key in row:
                assert row[key] == pytest.approx(expected[key], rel=2e-3), (row["step"], key)  # float32
        if "weights" in row:  # each beside its clip
            assert row["weights"] == pytest.approx(expected["weights"], abs=1e-4), row["step"]


def test_a_batch_that_the_processes_cannot_share(tiny, monkeypatch):
    monkeypatch.setattr(distributed, "world", lambda: 3)
    with pytest.raises(UserError, match="optim.batch = 4 must be a multiple of the 3 processes"):
        checks.check(tiny())
    with pytest.raises(UserError, match="meta.batch = 4 must be a multiple of the 3 processes"):
        checks.check(tiny(optim={"batch": 6}, meta={"batch": 4}))


def rank_of(file, number):
    """The process of a rank of the training with these settings, found by what the system says of all processes."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = ((folder / name).read_bytes() for name in ("cmdline", "environ"))
        except OSError:
            continue
        mine = str(file).encode() in command and b"torch.distributed.run" not in command
        if mine and f"\0RANK={number}\0".encode() in b"\0" + environment:
            return int(folder.name)
    return None


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def without_a_launcher(file):
    """Two ranks that know of each other by the environment alone, as under SLURM's srun. Returns rank 0's process."""
    port = str(random.Random(os.getpid()).randrange(20000, 30000))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, str(ROOT / "training" / "run.py"), "--config", str(file)]
    outputs = (dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True), dict(stdout=subprocess.DEVNULL))
    ranks = [
        subprocess.Popen(command, env={**env, "RANK": str(r), "LOCAL_RANK": str(r)}, **output)
        for r, output in enumerate(outputs)
    ]
    return ranks[0]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes by /proc")
@pytest.mark.parametrize("who", ["rank 1", "rank 0", "launcher", "rank 1 without a launcher"])
def test_when_one_dies_the_others_end_and_name_it(tiny, tmp_path, who):
    """SIGKILL of a rank or of the launcher during a training by two: within a minute nothing of it is left."""
    config = tiny(out=str(tmp_path / "run"), optim={"steps": 3000}, save_every=10, eval_epochs=10**6)
    file = tmp_path / "c.yaml"
    configs.dump(config, file)
    child = without_a_launcher(file) if "without" in who else torchrun(config, file)
    try:
        end = time.monotonic() + 600
        while not (tmp_path / "run" / "checkpoint.pt").exists():
            assert child.poll() is None, child.stdout.read()
            assert time.monotonic() < end
            time.sleep(0.1)
        pids = [rank_of(file, number) for number in range(2)]
        assert all(pids)
        killed = {"launcher": child.pid, "rank 0": pids[0]}.get(who, pids[1])
        os.kill(killed, signal.SIGKILL)
        start = time.monotonic()
        while any(alive(pid) for pid in pids if pid != killed) and time.monotonic() - start < 200:
            time.sleep(0.1)
        assert time.monotonic() - start < 180  # a minute, on a machine with nothing else to do
        said = child.communicate(timeout=600)[0]
    finally:
        for pid in filter(None, (rank_of(file, number) for number in range(2))):
            os.kill(pid, signal.SIGKILL)
        child.kill()
        child.wait()
    name = who.removesuffix(" without a launcher")
    by_us = re.search(rf"{name}( or rank 0)?( \(.*\))? has died", said)
    by_torchrun = re.search(rf"Root Cause.*rank +: {name[-1]} .*SIGKILL", said, re.DOTALL)
    assert by_us or by_torchrun, said
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] >= 10
