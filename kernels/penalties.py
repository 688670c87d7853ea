"""Repetition (arXiv:1909.05858), presence and frequency penalties on logits, from the tokens seen so far.

repetition: seen in prompt or output: logit / r when positive, logit * r otherwise
frequency:  logit - f * (times in the output)        presence: logit - p * (in the output at all)
"""

import torch


def apply_penalties_(
    logits_RV: torch.Tensor,
    prompt_seen_RV: torch.Tensor,
    output_counts_RV: torch.Tensor,
    presence_R: torch.Tensor,
    frequency_R: torch.Tensor,
    repetition_R: torch.Tensor,
) -> torch.Tensor:
    """Apply all three in place and return the tensor.

    logits_RV: [num_rows, vocab_size] float32. prompt_seen_RV: bool. output_counts_RV: int32, occurrences in the output.
    The penalties: [num_rows] float32; 0, 0 and 1 change nothing.
    """
    in_output = output_counts_RV > 0
    factor = torch.where(prompt_seen_RV | in_output, repetition_R.unsqueeze(1), 1.0)
    logits_RV.copy_(torch.where(logits_RV > 0, logits_RV / factor, logits_RV * factor))
    logits_RV.sub_(frequency_R.unsqueeze(1) * output_counts_RV)
    return logits_RV.sub_(presence_R.unsqueeze(1) * in_output)
