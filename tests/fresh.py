"""Code in a fresh interpreter, for a third of the price: forked from one that has imported torch, and nothing of ours.

`run` is subprocess.run of `python -c code *arguments`, but for torch and torchvision being imported already, and with
`timm=True` also timm (which reads the Hub's settings in the environment when it is imported). `script` runs one of the
checkout's commands in the same way.
"""

import atexit
import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from helpers import ROOT

FORKING = """
import importlib, json, os, sys, traceback
for name in sys.argv[1:]:
    importlib.import_module(name)
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    for number in (1, 2):
        os.dup2(os.open(job["output"] + str(number), os.O_WRONLY | os.O_CREAT), number)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    sys.path[:] = [""] + [p for p in job["env"].get("PYTHONPATH", "").split(os.pathsep) if p] + sys.path[1:]
    sys.argv = ["-c", *job["arguments"]]
    status = 0
    try:
        exec(compile(job["code"], "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else end.code is not None
        status is True and print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
"""


@cache
def _forking(*imported) -> subprocess.Popen:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process = subprocess.Popen([sys.executable, "-c", FORKING, *imported], env={**env, "OMP_NUM_THREADS": "1"}, **pipes)
    atexit.register(_stop, process)
    return process


def _stop(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def run(code: str, *arguments, cwd, env: dict, timm: bool = False) -> subprocess.CompletedProcess:
    with tempfile.TemporaryDirectory() as folder:
        job = {"code": code, "arguments": list(map(str, arguments)), "cwd": str(cwd), "env": env}
        job["output"] = str(Path(folder) / "output")
        process = _forking("torch", "torchvision", *(["timm"] if timm else []))
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        status = int(process.stdout.readline())
        out, error = (Path(job["output"] + number).read_text() for number in "12")
        return subprocess.CompletedProcess(code, status, out, error)


SCRIPT = """
import runpy, sys
del sys.argv[0]
if sys.argv[0].endswith(".py"):
    runpy.run_path(sys.argv[0], run_name="__main__")
else:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def script(what, *arguments, cwd=ROOT) -> subprocess.CompletedProcess:
    """A program of the checkout as its own process: `what` is a path such as 'training/run.py' or a module's name."""
    what = str(ROOT / what) if str(what).endswith(".py") else what
    return run(SCRIPT, what, *arguments, cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT)}, timm=True)
