"""StepBudget: how much the step being made may still take, by tokens, by its share of a pipeline, and by time."""

from shoal.configs.schema import SchedulerConfig
from shoal.engine.cost_model import CostModel, StepLoad

SLICES = 4  # steps per stage that what is left of the prompts is divided into: a pipeline fills and drains by slices
MIN_SLICE = 64  # prompt tokens below which slicing for a pipeline costs more than its stages gain
MIN_PREFILL = (
    16  # prompt tokens a step may take even when decoding alone exceeds the inter-token limit: prompts must not starve
)
PROBE = 64  # prompt tokens beside decoding before the cost model is ready


class StepBudget:
    """One token budget for decode rows and prompt chunks alike.

    decode_cost: predicted cost of every decoding row, in flight or not. outstanding_prefill: prompt tokens without a
    result. With several plans in flight each step takes its part of both, so that all stages have work. tokens: what is
    left of the budget; share: of the step's part of decode_cost, for decode rows to take of. `load` is what was taken.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        cost: CostModel,
        max_in_flight: int,
        *,
        decoding: bool,
        decode_cost: float,
        outstanding_prefill: int,
    ) -> None:
        self.load = StepLoad()
        self._cost = cost
        self.tokens = config.max_num_batched_tokens
        self._prefill = self.tokens
        self.share = float("inf")
        self._limit_s: float | None = None
        if decoding:
            self._prefill = max(1, int(config.prefill_share * self.tokens))
            if config.inter_token_limit_s is not None:
                self._limit_s = config.inter_token_limit_s / max_in_flight  # every plan in flight delays the others
        if max_in_flight > 1:
            self.share = decode_cost / max_in_flight * (1 - 1e-9)
            least = max(MIN_SLICE, cost.tokens_worth_a_step())
            self._prefill = min(self._prefill, max(least, -(-outstanding_prefill // (SLICES * max_in_flight))))

    def chunk(self, num_tokens: int, num_computed: int) -> int:
        """How many of `num_tokens` prompt tokens, the first at position num_computed, the step may take."""
        wanted = min(num_tokens, self.tokens, self._prefill)
        if self._limit_s is None or wanted <= 0:
            return wanted
        taken = self.load.prefill_tokens
        if not self._cost.ready:
            return min(wanted, max(0, PROBE - taken))
        allowed = self._cost.prefill_tokens_within(self._limit_s - self._cost.seconds(self.load), num_computed)
        return min(wanted, max(allowed, MIN_PREFILL - taken))

    def take_decode(self, rows: int, attended: int) -> None:
        """Count decode rows, which read so many key-value positions together."""
        self.tokens -= rows
        self.load.decode_rows += rows
        self.load.attended += attended

    def take_prefill(self, num_tokens: int, num_computed: int) -> None:
        """Count a prompt chunk."""
        self.tokens -= num_tokens
        self._prefill -= num_tokens
        self.load.add(num_tokens, num_computed)
