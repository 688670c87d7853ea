"""check_result: whether what the ranks sent answers the plan they were given; nothing else may touch a sequence."""

from shoal.engine.executor import ExecutorFailed
from shoal.engine.messages import PlanRow, RowResult, StepPlan, StepResult
from shoal.engine.sequence import Sequence


def check_result(plan: StepPlan, sequences: list[Sequence], result: StepResult, vocab_size: int) -> None:
    """Raise ExecutorFailed when the result is another step's, or a row of it does not answer the plan's."""
    if (result.epoch, result.step, len(result.rows)) != (plan.epoch, plan.step, len(plan.rows)):
        raise ExecutorFailed(
            f"the result of epoch {result.epoch}, step {result.step} with {len(result.rows)} rows came, "
            f"expected was epoch {plan.epoch}, step {plan.step} with {len(plan.rows)} rows"
        )
    for seq, row, given in zip(sequences, plan.rows, result.rows):
        token_ids = given.token_ids
        fits = len(token_ids) == row.sample and (not token_ids or 0 <= token_ids[0] < vocab_size)
        if seq.scores or given.logprobs is not None or given.prompt_logprobs is not None:
            fits = fits and _has_scores(row, given, seq)
        if not (fits or given.error) or given.request_id != row.request_id:
            raise ExecutorFailed(f"step {plan.step}: the result {given} does not answer the row {row} ({seq.sampling})")


def _has_scores(row: PlanRow, given: RowResult, seq: Sequence) -> bool:
    """Whether the log-probabilities are those that were asked for."""
    sampling, num_prompt_logprobs = seq.sampling, 0
    if sampling.prompt_logprobs is not None:
        num_prompt_logprobs = max(0, min(row.num_tokens, seq.num_prompt_tokens - 1 - row.num_computed_tokens))
    num_logprobs = 0 if sampling.logprobs is None else len(given.token_ids)
    return len(given.logprobs or ()) == num_logprobs and len(given.prompt_logprobs or ()) == num_prompt_logprobs
