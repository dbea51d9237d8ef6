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

    With z = softcap · tanh(logits / softcap) / τ (softcap optional) and p = softmax(z), for every token

        logprob = z[target] - logsumexp(z)
        entropy = -Σᵥ pᵥ log pᵥ                    of the whole vocabulary, in nats

    Both carry gradients:

        ∂ logprob / ∂zᵥ = [v = target] - pᵥ
        ∂ entropy / ∂zᵥ = -pᵥ (log pᵥ + entropy)

    Nothing of the size of the logits is held besides them and, after a backward, their gradient. A token
    with p[target] near 1 keeps the relative accuracy of logprob and of 1 - p[target].

    Args:
        logits: [..., V], float32, bfloat16 or float16 (float64 for "torch" and "reference"). Entries may be
            -inf: banned tokens contribute 0 and receive 0. A [B, T, V] view such as ``logits[:, :-1]`` is
            read by its strides.
        target: [...], int64, in [0, V), or -100: such a row is never read, its outputs and its gradient
            are 0.
        temperature: τ > 0, the temperature the tokens were sampled at: a number, a 0-d tensor, or one per
            token (sizes 1 or equal to those of target). No gradient.
        softcap: positive, or None.
        impl: "triton"; "torch", a few rows at a time on any device; "reference", the plain whole-matrix
            specification; or "auto", triton on a GPU and torch elsewhere. An explicit choice never falls
            back.
        group: process group of torch.distributed whose ranks hold the vocabulary in slices, in rank order:
            logits [..., V_r] are this rank's, of any size, 0 included; all else is whole and the same on all
            ranks, ids are global. All ranks must call. One exchange of four numbers a token.
        vocab_size: words of a vocabulary that the logits are padded beyond: what follows has probability 0
            and gradient 0. None: all.

    Returns:
        TokenStats(logprob, entropy), each [...] float32 (float64 for float64 logits). Sums run in float32
        whatever the dtype of the logits; grad_logits comes back in the dtype of the logits.

    Raises:
        ValueError: if a shape, dtype, device or value is not as above. On a GPU the values of target and of
            a temperature tensor are not read, nor are they anywhere under torch.compile: a bad one makes its
            row NaN.

    torch.compile: one node of the graph forward and one backward, with ``fullgraph=True`` and for sizes and
    temperatures that change from call to call. Another softcap is compiled anew.

    Example:
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
