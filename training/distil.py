"""Distil a teacher into a backbone: `python training/distil.py --data.roots ... [--dotted.override VALUE ...]`.

The backbone learns to give the features of frozen networks (distil.teachers) for strongly varied crops of the clips, of
simulated clips (data.simulated) and of natural pictures (distil.pictures), which all look at the same crop. It is
training/run.py with method 'distil': same settings, logs, resume and export. Without --config it takes
training/configs/distil.yaml. `training/run.py --model.init OUT/export` goes on from the result.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training import config as configs  # noqa: E402
from training import run  # noqa: E402
from training.messages import command  # noqa: E402

DEFAULTS = Path(__file__).parent / "configs" / "distil.yaml"


def main(config: configs.Config) -> None:
    """Distil, or go on, until the end or a signal."""
    run.main(replace(config, method="distil"))


if __name__ == "__main__":
    settings = configs.cli(configs.Config, __doc__, fallback=DEFAULTS)
    command(lambda: main(settings), interrupted="interrupted; go on with --resume True")
