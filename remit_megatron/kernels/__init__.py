"""Losses over the vocabulary, and norms of vectors that ranks share: plain torch and Triton, no model code."""

from remit_megatron.kernels.kl_divergence import distillation_loss
from remit_megatron.kernels.linear_token_loss import linear_token_loss
from remit_megatron.kernels.rms_norm import rms_norms
from remit_megatron.kernels.token_logprob import token_logprob
from remit_megatron.kernels.token_loss import reference_token_loss, token_loss

__all__ = ["distillation_loss", "linear_token_loss", "reference_token_loss", "rms_norms", "token_logprob", "token_loss"]
