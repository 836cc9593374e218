"""How many documents candidates are judged on while a search goes on: few at first, all of them at its end.

schedule ((0.5, 4), (0.75, 8)) of 16 documents and 40 evaluations

evaluations   0 .......... 20 ..... 30 ........ 40
documents     4            8        16
                           ^ the best so far are scored on documents 4 to 7 too, all others forgotten
"""

from collections.abc import Sequence
from dataclasses import dataclass

Stages = Sequence[Sequence[float]]


@dataclass(frozen=True)
class DocumentSchedule:
    """Stages of a search, each on more documents than the one before; the last stage, on all, goes without saying.

    Attributes:
        stages: Share of the evaluations up to which a stage goes, and number of the first documents it is judged on.

    Raises:
        ValueError: If shares or documents do not grow, or a share is not between 0 and 1.
    """

    stages: tuple[tuple[float, int], ...] = ()

    def __post_init__(self) -> None:
        shares, counts = [0.0, *(share for share, _ in self.stages)], [0, *(count for _, count in self.stages)]
        grow = all(earlier < later for row in (shares, counts) for earlier, later in zip(row, row[1:], strict=False))
        if not grow or shares[-1] > 1:
            raise ValueError(
                "`schedule` takes pairs of a share of the evaluations and a number of documents, both growing and the"
                f" shares at most 1, such as [[0.5, 4], [0.75, 8]]; got {[list(stage) for stage in self.stages]}."
            )

    @classmethod
    def of(cls, stages: Stages | None, documents: int, limit: int | None) -> "DocumentSchedule":
        """The schedule of a search, checked against its documents and its budget.

        Raises:
            ValueError: If a stage has all documents or more, or there is no budget to take shares of.
        """
        schedule = cls(tuple((float(share), int(count)) for share, count in stages or ()))
        if schedule.stages and limit is None:
            raise ValueError("`schedule` takes shares of the evaluations: give `max_evaluations`.")
        if schedule.stages and schedule.stages[-1][1] >= documents:
            raise ValueError(
                f"`schedule` ends with {schedule.stages[-1][1]} documents, of {documents} that the search has: it must"
                " leave some for the end."
            )
        return schedule

    def documents(self, evaluations: int, limit: int | None, total: int) -> int:
        """How many of ``total`` documents the next candidates are judged on."""
        return next((count for share, count in self.stages if evaluations < share * (limit or 0)), total)
