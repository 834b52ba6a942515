"""Losses over the vocabulary: plain torch and Triton, no model code."""

from remit_megatron.kernels.token_logprob import token_logprob
from remit_megatron.kernels.token_loss import reference_token_loss, token_loss

__all__ = ["reference_token_loss", "token_logprob", "token_loss"]
