"""Train Meta-USCL: `python training/run.py [--config FILE.yaml] [--dotted.override VALUE ...]`.

Clips -> frame cache -> groups and splits -> training -> export -> check of the export. Without --config and
data.roots it runs the demo on simulated clips (training/configs/demo.yaml).
"""

import contextlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training import config as configs  # noqa: E402
from training import distributed  # noqa: E402
from training.data.dataset import prepare  # noqa: E402
from training.engine.checks import check  # noqa: E402
from training.engine.finish import finish  # noqa: E402
from training.engine.state import checkpoint_bytes, find_checkpoint, restore  # noqa: E402
from training.engine.train import build, start, train  # noqa: E402
from training.messages import command, going_on_unread, user_errors_end  # noqa: E402
from uscl_hub import files  # noqa: E402
from uscl_hub.errors import UserError  # noqa: E402

DEMO = Path(__file__).parent / "configs" / "demo.yaml"


def main(config: configs.Config) -> None:
    """Train, or go on, until the end or a signal. A user's mistake ends the program with one line (SystemExit)."""
    with user_errors_end(), going_on_unread():
        device = distributed.setup(config.device)
        check(config)
        out = Path(config.out)
        with locked(out):
            checkpoint = find_checkpoint(config, out)
            clips = prepare(config, out)
            state = build(config, clips, device)
            distillation = start(state, config, clips, device)
            if checkpoint:
                restore(state, checkpoint)
            elif distillation:
                distillation.fit()
            if distributed.rank() == 0:
                configs.dump(config, out / "config.yaml")
            files.check_room(out, checkpoint_bytes(state))
            with distributed.losses_named():
                ended = train(state, config, clips, out, device, distillation)
            distributed.finished.set()
            if ended and distributed.rank() == 0:
                finish(state, config, clips, out, device)


@contextlib.contextmanager
def locked(out: Path):
    """Make the output folder and hold it: a second run in it is refused."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out: {out} cannot be made a folder ({error.strerror})") from None
    if distributed.rank() != 0:
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            files.check_room(out)
            stack.enter_context(files.locked(out))
        except files.InUse as error:
            raise UserError(f"out: {error}") from None
        except OSError as error:
            raise UserError(f"out: {out} cannot be written to ({error.strerror}); choose another") from None
        for stale in out.glob(".checkpoint.*.tmp.pt"):  # of a run that was killed while it wrote
            stale.unlink(missing_ok=True)
        yield


if __name__ == "__main__":
    own_clips = any(arg.partition("=")[0] == "--data.roots" for arg in sys.argv)
    settings = configs.cli(configs.Config, __doc__, fallback=None if own_clips else DEMO)
    command(lambda: main(settings), interrupted="interrupted; go on with --resume")
