"""SIGKILL at random moments of a small training on simulated clips, from the first clip's decoding to the export.

Each is resumed: the weights and all else in the checkpoint, the manifest and the exported weights must equal an
undisturbed run's bit for bit. USCL_KILLS is the number of kills (docs/trust.md has the figures of 50):

    USCL_KILLS=50 pytest -s -m slow tests/test_fault_injection.py
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

KILLS = int(os.environ.get("USCL_KILLS", 1))
ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(KILLS), str(tmp_path)]
    result = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
    print(result.stdout)
    assert result.returncode == 0 and f"{KILLS} of {KILLS} equal" in result.stdout


def main(kills, folder):
    from training import run
    from training.config import Config, Data, Model, Optim
    from training.data import dataset
    from training.data.simulate import write_demo

    write_demo(folder / "clips", clips=20, frames=6, size=32, seed=0)
    config = Config(
        device="cpu",
        save_every=2,
        data=Data(roots=(str(folder / "clips"),), group=r"/(\w+/subj\d+)_", meta_fraction=0.2, val_fraction=0.2),
        model=Model(name="test_resnet", size=32, dim=16),
        optim=Optim(batch=4, steps=24, lr=0.05),
    )
    ingest = dataset.ingest
    # in this process: a kill then meets a decoder at work, and no time goes by with starting workers
    dataset.ingest = lambda *args, **kwargs: ingest(*args, **{**kwargs, "workers": 0})

    def start(out, resume=False):
        """Fork: a process that is killed must be a new one, and this one has imported everything already."""
        child = os.fork()
        if child:
            return child
        log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        config.out, config.resume = str(out), resume
        try:
            run.main(config)
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)

    began = time.perf_counter()
    assert os.waitpid(start(folder / "whole"), 0)[1] == 0, (folder / "log.txt").read_text()
    seconds = time.perf_counter() - began
    whole, rng, equal, found = result(folder / "whole"), random.Random(0), 0, []
    for i in range(kills):
        out = folder / f"killed{i}"
        while True:
            child, wait = start(out, resume=True), rng.uniform(0, seconds)
            time.sleep(wait)
            os.kill(child, signal.SIGKILL)  # a zombie, if it has come to its end before
            if os.waitpid(child, 0)[1] == signal.SIGKILL:
                break
        log = (out / "log.jsonl").read_text() if (out / "log.jsonl").exists() else ""
        found.append(max([0] + [json.loads(line)["step"] for line in log.splitlines() if line.endswith("}")]))
        assert os.waitpid(start(out, resume=True), 0)[1] == 0, (folder / "log.txt").read_text()
        equal += result(out) == whole
    print(f"undisturbed: {seconds:.1f} s; {equal} of {kills} equal to it, killed after step {sorted(found)}")


def result(out):
    """What must not depend on interruptions, as bytes: checkpoint and exported weights."""
    import torch

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(v) for key, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return (value.dtype, value.shape, value.numpy().tobytes()) if isinstance(value, torch.Tensor) else value

    checkpoint = plain(torch.load(out / "checkpoint.pt", weights_only=True))
    return checkpoint, (out / "export" / "model.safetensors").read_bytes(), (out / "manifest.json").read_bytes()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
