"""The contestants beside each other, and who is left out because something of theirs failed."""

import collections.abc
import contextlib

from benchmarks import arena, contestants, progress, results, rounds

Action = collections.abc.Callable[["Field", contestants.Contestant], str]


class Field:
    """The contestants on their sites, and where what is found goes."""

    def __init__(
        self, at: arena.Arena, who: collections.abc.Sequence[contestants.Contestant], into: results.Results
    ) -> None:
        self.at, self.who, self.into = at, who, into
        self._out: set[str] = set()

    @property
    def present(self) -> list[contestants.Contestant]:
        """Who is measured at the present size: those of whom nothing failed there yet."""
        return [each for each in self.who if each.name not in self._out]

    @property
    def names(self) -> list[str]:
        """The names of those."""
        return [each.name for each in self.present]

    def begin(self, of: contestants.Contestant, services: int) -> str:
        """Fill the cluster of somebody, who may have failed at the size before."""
        self._out.discard(of.name)

        def fill(_field: "Field", of: contestants.Contestant) -> str:
            of.fill(services)
            return "done"

        return self.attempt(of, fill)

    def attempt(self, of: contestants.Contestant, action: Action) -> str:
        """Take a contestant's step, unless one before has failed: others go on without whom one fails."""
        if of.name in self._out:
            return "left out"
        try:
            return action(self, of)
        except progress.FAILURES:
            self.give_up(of)
            raise

    def give_up(self, of: contestants.Contestant) -> None:
        """Leave somebody out until the next size, with nothing running: others are measured meanwhile."""
        self._out.add(of.name)
        with contextlib.suppress(*progress.FAILURES):
            of.take_down()

    def forget_connections(self) -> None:
        """Empty the connection trackers: they have room for a round's connections, but not for a step's."""
        for of in self.present:
            of.forget_connections()

    def together(
        self, label: str, measure: collections.abc.Callable[[list[str]], list[results.Round]]
    ) -> list[results.Round]:
        """Measure rounds of everybody; where somebody fails, all again without."""
        while True:
            try:
                return measure(self.names)
            except rounds.VariantError as error:
                failed = next((each for each in self.present if each.name == error.name), None)
                if failed is None:
                    raise
                self.give_up(failed)
                self.into.failed.append(results.Failed(label, str(error)))
