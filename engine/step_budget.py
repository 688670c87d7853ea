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
    result. With several plans in flight each step takes its part of both, so that all stages have work. `load` is what
    was taken.
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
        self._tokens = config.max_num_batched_tokens
        self._prefill = self._tokens
        self._decode_cost = float("inf")
        self._limit_s: float | None = None
        if decoding:
            self._prefill = max(1, int(config.prefill_share * self._tokens))
            if config.inter_token_limit_s is not None:
                self._limit_s = config.inter_token_limit_s / max_in_flight  # every plan in flight delays the others
        if max_in_flight > 1:
            self._decode_cost = decode_cost / max_in_flight * (1 - 1e-9)
            least = max(MIN_SLICE, cost.tokens_worth_a_step())
            self._prefill = min(self._prefill, max(least, -(-outstanding_prefill // (SLICES * max_in_flight))))

    def has_room_for_decode(self) -> bool:
        """Whether the step may take a further decode row."""
        return self._tokens > 0 and self._decode_cost > 0.0

    def chunk(self, num_tokens: int, num_computed: int) -> int:
        """How many of `num_tokens` prompt tokens, the first at position num_computed, the step may take."""
        wanted = min(num_tokens, self._tokens, self._prefill)
        if self._limit_s is None or wanted <= 0:
            return wanted
        taken = self.load.prefill_tokens
        if not self._cost.ready:
            return min(wanted, max(0, PROBE - taken))
        allowed = self._cost.prefill_tokens_within(self._limit_s - self._cost.seconds(self.load), num_computed)
        return min(wanted, max(allowed, MIN_PREFILL - taken))

    def take_decode(self, cost: float, num_computed: int) -> None:
        """Count a decode row with its predicted cost."""
        self._tokens -= 1
        self._decode_cost -= cost
        self.load.decode_rows += 1
        self.load.attended += num_computed + 1

    def take_prefill(self, num_tokens: int, num_computed: int) -> None:
        """Count a prompt chunk."""
        self._tokens -= num_tokens
        self._prefill -= num_tokens
        self.load.add(num_tokens, num_computed)
