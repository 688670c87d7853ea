"""CostModel: predicts the seconds of a step from what it holds, learned while the engine runs.

seconds = base + decode_rows * a + prefill_tokens * b + attended * c, with no negative coefficient: non-negative least
squares over exponentially fading observations, solved by coordinate descent (Franc, Hlavac, Navara 2005), a few sweeps
from the last solution per step.
"""

import math
from operator import mul

import msgspec

FADING = 0.98  # an observation's weight after one further step: about the last 50 steps count
SWEEPS = 2
MIN_OBSERVATIONS = 8
OUTLIER = 3.0  # an observation counts as at most so many times its prediction: compilation is not the step's cost
UNITS = (1.0, 32.0, 256.0, 65536.0)  # of the features, so that they are of one size


class StepLoad(msgspec.Struct):
    """What a step holds. attended: key-value positions read, summed over all its tokens."""

    decode_rows: int = 0
    prefill_tokens: int = 0
    attended: float = 0.0

    def add(self, num_tokens: int, num_computed: int) -> None:
        """Count one row. A row of one token costs what decoding costs."""
        if num_tokens == 1:
            self.decode_rows += 1
        else:
            self.prefill_tokens += num_tokens
        self.attended += num_tokens * (num_computed + (num_tokens + 1) / 2)


class CostModel:
    """Learns step times. Before MIN_OBSERVATIONS steps it is not `ready`; callers then take small, safe steps."""

    def __init__(self) -> None:
        size = len(UNITS)
        self._gram = [[0.0] * size for _ in range(size)]
        self._moment = [0.0] * size
        self._weights = [0.0] * size
        self._observations = 0

    @property
    def ready(self) -> bool:
        """Whether there is enough data to predict from."""
        return self._observations >= MIN_OBSERVATIONS

    def observe(self, load: StepLoad, seconds: float) -> None:
        """Learn that a step with this load took so long."""
        if self.ready:
            seconds = min(seconds, OUTLIER * max(self.seconds(load), 1e-9))
        self._observations += 1
        features = self._features(load)
        for row, (gram, feature) in enumerate(zip(self._gram, features)):
            gram[:] = [FADING * old + feature * other for old, other in zip(gram, features)]
            self._moment[row] = FADING * self._moment[row] + feature * seconds
        weights = self._weights
        for _ in range(SWEEPS):
            for row, gram in enumerate(self._gram):
                if gram[row] > 0.0:
                    gradient = sum(map(mul, gram, weights)) - self._moment[row]
                    weights[row] = max(0.0, weights[row] - gradient / gram[row])

    def seconds(self, load: StepLoad) -> float:
        """Predicted time of a step."""
        return sum(map(mul, self._weights, self._features(load)))

    def row_cost(self, num_tokens: int, num_computed: int) -> float:
        """What one more row adds: seconds when ready, else tokens.

        To be compared only with other results of the same step.
        """
        if not self.ready:
            return float(num_tokens)
        load = StepLoad()
        load.add(num_tokens, num_computed)
        return self.seconds(load) - self._weights[0] + 1e-9

    def tokens_worth_a_step(self) -> int:
        """Prompt tokens that take as long as a step takes anyhow; 0 before it is ready."""
        per_token = self._weights[2] / UNITS[2]
        return int(min(self._weights[0] / per_token, 2**31)) if self.ready and per_token > 0.0 else 0

    def prefill_tokens_within(self, seconds: float, num_computed: int) -> int:
        """Most prompt tokens, the first at position num_computed, whose predicted time stays within `seconds`."""
        if seconds <= 0.0:
            return 0
        per_token = self._weights[2] / UNITS[2] + self._weights[3] / UNITS[3] * (num_computed + 0.5)
        half = self._weights[3] / UNITS[3] / 2  # half * n**2 + per_token * n = seconds
        divisor = per_token + math.sqrt(per_token**2 + 4 * half * seconds)
        return int(min(2 * seconds / divisor, 2**31)) if divisor > 0.0 else 2**31

    @staticmethod
    def _features(load: StepLoad) -> tuple[float, ...]:
        return (1.0, load.decode_rows / UNITS[1], load.prefill_tokens / UNITS[2], load.attended / UNITS[3])
