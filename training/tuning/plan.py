"""What fits into the minutes, decided once and written down: a run that goes on, or is repeated, decides alike."""

import json
from pathlib import Path

from training.tuning.recipes import EPOCHS
from uscl_hub.errors import UserError
from uscl_hub.files import write_whole

ENOUGH = 12  # epochs: rather one training that is long enough than all of them short
SLACK = 0.1  # of the minutes: a training under way may take so much more


class Plan:
    """Decisions of one run, kept in a JSON file.

    Args:
        path: of the file; what it holds already is followed.
        key: of data and settings; a file of another key is refused.
        minutes: for all of the run.
        follow: another run's file, whose decisions are taken as they are; None to decide by the clock.

    Raises:
        UserError: the file belongs to another run or cannot be read.
    """

    def __init__(self, path: Path, key: str, minutes: float, follow: Path | None = None):
        self.path, self.minutes, self.follows = path, minutes, follow is not None
        self.key, self.decisions, self.spent = key, {}, {}
        if follow is not None:
            self.decisions = self._read(follow)["decisions"]
        if path.exists():
            saved = self._read(path)
            self.decisions, self.spent = saved["decisions"], saved["spent"]
            if minutes > saved["minutes"] and not self.follows:  # what was left out may fit now
                self.decisions = {name: d for name, d in self.decisions.items() if d["epochs"]}

    def _read(self, path: Path) -> dict:
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            if saved["key"] != self.key:
                raise UserError(
                    f"{path}: belongs to a run with other data or settings; choose another --out, or give the same ones"
                )
            return saved
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: is no plan of a run ({type(error).__name__}); name a run's plan.json") from error

    def remaining(self) -> float:
        """Seconds left, negative when the time is over."""
        return 60 * self.minutes - sum(self.spent.values())

    def decide(self, name: str, cost: dict[str, dict[int, tuple[float, float]]], needed: bool = False) -> dict:
        """Epochs of a training, and why.

        Args:
            name: the training.
            cost: of it (first) and of all that follow: epochs -> seconds of all folds, and of the training on all.
            needed: there is no result without it: it is never left out, and not given up.

        Returns:
            {'epochs', 'seconds', ...}: epochs: the most, from ENOUGH on, that leave the fewest to all that follow, else
            the most that fit; 0 if it is left out. seconds: expected, of its folds.
        """
        if name in self.decisions:
            return self.decisions[name]
        if self.follows:
            raise UserError(f"plan: says nothing of {name!r}: it is of an unfinished run; finish that one first")
        left, own = self.remaining(), cost[name]
        decision, fewest = None, min(EPOCHS)
        others = [c[fewest] for n, c in cost.items() if n != name]
        rest = sum(folds for folds, _ in others)
        last = max([d["last"] for d in self.decisions.values()], default=0.0)  # whichever is chosen in the end
        for epochs in EPOCHS:
            folds, everything = own[epochs]
            if epochs >= ENOUGH and folds + rest + max([everything, last, *(e for _, e in others)]) <= left:
                decision = self._decision(epochs, own, "what follows fits as well")
                break
            if decision is None and folds + max(everything, last) <= left:
                decision = self._decision(epochs, own, "not all that follow will fit")
        if decision is None and needed:
            decision = self._decision(fewest, own, "the least that gives a result")
        if decision is None:
            needs = own[fewest][0] + max(own[fewest][1], last)
            why = (
                f"left out: with the last training it needs {needs / 60:.1f} min, {max(left, 0) / 60:.1f} min are left"
            )
            decision = self._decision(0, {0: (0.0, 0.0)}, why)
        self.decisions[name] = decision | {"needed": needed}
        self.write()
        return decision

    @staticmethod
    def _decision(epochs: int, cost: dict[int, tuple[float, float]], why: str) -> dict:
        """seconds: of the folds; last: of the training on everything."""
        folds, everything = cost[epochs]
        return {"epochs": epochs, "seconds": round(folds, 1), "last": round(everything, 1), "why": why}

    def too_slow(self, name: str, used: float, needed: float, anew: float) -> bool:
        """Whether a training under way needs more than is left; then it is decided anew: fewer epochs, or none.

        Args:
            used: seconds so far.
            needed: to its end, and for the training on all.
            anew: for all of it from the beginning.
        """
        left, own = max(self.remaining() - used, 0), self.decisions[name]
        if self.follows or own["needed"] or needed <= left + SLACK * 60 * self.minutes:
            return False
        fewer = [e for e in EPOCHS if e < own["epochs"] and anew * e / own["epochs"] <= left]
        share = fewer[0] / own["epochs"] if fewer else 0.0
        why = "slower than expected, begun again with fewer epochs"
        if not fewer:
            why = f"given up: slower than expected, it needs {needed / 60:.1f} min more, {left / 60:.1f} min are left"
        own |= {"epochs": fewer[0] if fewer else 0, "seconds": round(anew * share, 1), "why": why}
        own["last"] = round(own["last"] * share, 1)
        return True

    def give_up(self, name: str, why: str) -> None:
        """Leave a training out that has begun."""
        self.decisions[name] |= {"epochs": 0, "seconds": 0.0, "last": 0.0, "why": why}
        self.write()

    def spend(self, name: str, seconds: float) -> None:
        """Note what was used; a part that was interrupted and goes on adds up."""
        self.spent[name] = round(self.spent.get(name, 0.0) + seconds, 1)
        self.write()

    def write(self) -> None:
        content = {"key": self.key, "minutes": self.minutes, "decisions": self.decisions, "spent": self.spent}
        write_whole(self.path, lambda path: path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8"))
