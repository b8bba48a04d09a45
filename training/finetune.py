"""Own labelled images to a tested model: `python training/finetune.py --data FOLDER_OR_TABLE --out runs/mine`.

Tries frozen features, the last stages and the whole network by folds that share no group (patient), within --minutes;
says what each reached, chooses, trains on everything, and writes OUT/export (a folder for timm and `uscl-hub predict`)
and OUT/report.html. Interrupted, the same command goes on from what is finished.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro  # noqa: E402

from training.messages import command  # noqa: E402
from training.tuning.run import FinetuneConfig, run  # noqa: E402
from uscl_hub import files  # noqa: E402
from uscl_hub.errors import UserError  # noqa: E402


def main(config: FinetuneConfig) -> dict:
    """Run within the output folder, which is locked. Raises UserError."""
    out = Path(config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with files.locked(out):
            return run(config)
    except files.InUse as error:
        raise UserError(f"out: {error}") from None
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"out: {out} cannot be made a folder ({error.strerror})") from None


if __name__ == "__main__":
    settings = tyro.cli(FinetuneConfig, description=__doc__)
    command(lambda: main(settings) and None, "finetune.py: ", "interrupted; the same command goes on")
