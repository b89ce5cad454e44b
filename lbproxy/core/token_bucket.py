"""How often something may be said: a burst, then a steady rate."""


class TokenBucket:
    """Admits a burst, then so many a second. Times are seconds of a clock that never goes back."""

    def __init__(self, burst: int, refill_per_s: float, now_s: float) -> None:
        self._burst = float(burst)
        self._refill_per_s = refill_per_s
        self._tokens = self._burst
        self._at_s = now_s

    def take(self, now_s: float) -> bool:
        """Whether one more is admitted at this time."""
        self._tokens = min(self._burst, self._tokens + (now_s - self._at_s) * self._refill_per_s)
        self._at_s = now_s
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True
