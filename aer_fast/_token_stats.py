"""Public operation: token log-probability and policy entropy, from logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aer_fast import _split, reference
from aer_fast._autograd import first_order
from aer_fast._rows import as_rows, compiled, row_ops
from aer_fast._validation import Impl, check_logits, check_softcap, check_tokens, resolve_impl, unpadded
from aer_fast.reference import TokenStats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def token_stats(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    impl: Impl = "auto",
    group: ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> TokenStats:
    """Log-probability of the taken token and entropy of the policy, in one pass over the logits.

        z = softcap · tanh(logits / softcap) / temperature
        p = softmax(z)
        logprob = log p[target] = z[target] - logsumexp(z)
        entropy = -Σᵥ pᵥ log pᵥ

    Without a softcap z = logits / temperature. The entropy is that of the whole vocabulary, in nats. Both
    carry gradients:

        ∂ logprob / ∂zᵥ = [v = target] - pᵥ
        ∂ entropy / ∂zᵥ = -pᵥ (log pᵥ + entropy)

    Besides the logits nothing of their size is held, until a backward makes their gradient. Sums run in
    float32 whatever the dtype of the logits. A token with p[target] near 1 keeps the relative accuracy of
    logprob and of 1 - p[target].

    Shapes: V is the size of the vocabulary, [...] the shape of target, for example [B, T].

    Args:
        logits: [..., V], float32, bfloat16 or float16; with impl "torch" or "reference" also float64. A token
            whose logit is -inf is banned: it contributes 0 and its gradient is 0. A view such as
            ``logits[:, :-1]`` of a [B, T, V] tensor is read by its strides, without a copy.
        target: [...], int64: the taken tokens, in [0, V). A row with target -100 is never read; its outputs
            and its gradient are 0.
        temperature: the temperature > 0 that the tokens were sampled at: a number, a 0-d tensor, or a tensor
            of target's rank whose sizes are 1 or target's. No gradient.
        softcap: positive; None for no softcap.
        impl: "triton" runs the Triton kernels; "torch" takes a few rows at a time, on any device; "reference"
            is the plain specification on whole matrices; "auto" is "triton" on a GPU and "torch" elsewhere.
            An explicit choice never falls back to another.
        group: process group of torch.distributed whose ranks hold the vocabulary in slices, in rank order.
            Then logits [..., V_r] are this rank's slice, of any size, 0 included. All other arguments are
            whole and the same on all ranks, and token ids are global. All ranks must call. They exchange four
            numbers a token, once.
        vocab_size: size of the vocabulary, where the logits are padded beyond it. The entries that follow
            have probability 0 and gradient 0. None: there is no padding.

    Returns:
        A `TokenStats`: logprob and entropy, each [...], float32 (float64 for float64 logits). The gradient of
        the logits has their dtype.

    Raises:
        ValueError: if a shape, dtype, device or value is not as above. The values of target and of a
            temperature tensor are not read on a GPU, nor anywhere under torch.compile: there a bad one makes
            its row NaN.

    torch.compile: one node of the graph in the forward and one in the backward, with ``fullgraph=True`` too.
    Sizes and temperatures may change from call to call; another softcap is compiled anew.

    Examples:
        >>> uniform = torch.zeros(2, 3, 50)  # B=2, T=3, V=50
        >>> stats = token_stats(uniform, torch.ones(2, 3, dtype=torch.long))
        >>> round(stats.entropy[0, 0].item(), 4)  # log 50
        3.912
    """
    if group is not None:
        return _split.token_stats(
            logits,
            target,
            temperature=temperature,
            softcap=softcap,
            impl=impl,
            group=group,
            vocab_size=vocab_size,
        )
    check_logits(logits, target)
    logits = unpadded(logits, vocab_size)
    softcap = check_softcap(softcap)
    impl_name = resolve_impl(impl, logits)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    kernel = impl_name == "triton"
    tokens = check_tokens(target, temperature, None, logits.shape[-1], dtype, kernel=kernel)
    if impl_name == "reference":
        target, temperature = (x.view(target.shape) for x in (tokens.target, tokens.temperature))
        return reference.token_stats(logits, target, temperature=temperature, softcap=softcap)
    constants = tokens.target, tokens.temperature, softcap, impl_name
    if torch.compiler.is_compiling():
        logprob, entropy = compiled.token_stats(logits, *constants)
    else:
        logprob, entropy = _TokenStats.apply(as_rows(logits), *constants)
    return TokenStats(logprob.view(target.shape), entropy.view(target.shape))


class _TokenStats(torch.autograd.Function):
    """Saves the logits and a few numbers a row; the backward computes the softmax anew."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,  # [O, I, V]
        target: Tensor,  # [N]
        temperature: Tensor,  # [N]
        softcap: float | None,
        impl: str,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.softcap, ctx.impl = softcap, impl
        with torch.autocast(logits.device.type, enabled=False):  # sums stay float32
            logprob, entropy, state = row_ops(impl).token_stats_fwd(logits, target, temperature, softcap)
        ctx.save_for_backward(logits, target, temperature, state)
        return logprob, entropy

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, target, temperature, state = ctx.saved_tensors
        if not ctx.needs_input_grad[0] or all(g is None for g in grads):
            return None, None, None, None, None
        zeros = torch.zeros_like(temperature)
        grad_logprob, grad_entropy = (zeros if g is None else g.contiguous() for g in grads)
        grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        with torch.autocast(logits.device.type, enabled=False):
            row_ops(ctx.impl).token_stats_bwd(
                logits, target, temperature, ctx.softcap, state, grad_logprob, grad_entropy, grad
            )
        return grad, None, None, None, None
