"""`linear_token_stats` behind verl's switch `use_fused_kernels`."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor
from verl.utils.experimental import torch_functional

from aer_fast import linear_token_stats

# by name: where a package exports a function called like its module, `import ... as` would find the function
triton_backend = importlib.import_module("verl.utils.kernel.linear_cross_entropy")


class KernelSwitch:
    """What `use_aer_kernel` returns. Call `undo`, or leave the ``with`` block, to have verl's own back."""

    def __init__(self) -> None:
        self._replaced = (
            (triton_backend, "linear_cross_entropy", triton_backend.linear_cross_entropy),
            (torch_functional, "FusedLinearForPPO", torch_functional.FusedLinearForPPO),
        )
        triton_backend.linear_cross_entropy = _linear_cross_entropy  # type: ignore[attr-defined, unused-ignore]
        torch_functional.FusedLinearForPPO = _FusedLinearForPPO

    def undo(self) -> None:
        """Put verl's own objects back. A second call does nothing."""
        global _switch
        if _switch is self:
            for module, name, original in self._replaced:
                setattr(module, name, original)
            _switch = None

    def __enter__(self) -> KernelSwitch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()


_switch: KernelSwitch | None = None


def use_aer_kernel() -> KernelSwitch:
    """Compute verl's fused log-probabilities and entropies with `linear_token_stats`, in this process.

    verl asks for them where ``actor_rollout_ref.model.use_fused_kernels`` is true, from the backend that
    ``fused_kernel_options.impl_backend`` names. Both "triton" and "torch" are replaced; "liger" stays Liger.
    Models look the backend up in each forward, so the call may come before or after they are built. Logits
    are float32 whatever the dtype of the model, and the entropy comes back in float32.

    With a process group, which Megatron's vocabulary-parallel head gives, the weight is this rank's slice.
    The gradient of hidden is then this rank's part of the sum, as verl's own backend leaves it: Megatron sums
    it where it gathers the hidden states.

    Returns:
        A `KernelSwitch`. A second call returns the same one.

    Examples:
        >>> with use_aer_kernel():
        ...     pass  # verl's models; outside, verl's own backends are back
    """
    global _switch
    if _switch is None:
        _switch = KernelSwitch()
    return _switch


def _linear_cross_entropy(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [...]
    temperature: Tensor | float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    if reduction.lower() != "none":
        raise ValueError(f"reduction must be 'none' for aer_fast's kernel, got {reduction!r}")
    return _token_stats(hidden, weight, labels, temperature, dist_process_group)


class _FusedLinearForPPO(torch_functional.FusedLinearForPPO):
    def forward(
        self,
        hidden_states: Tensor,  # [..., D]
        vocab_weights: Tensor,  # [V, D]
        input_ids: Tensor,  # [...]
        temperature: Tensor | float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        if self.impl_backend != "torch":
            outputs: tuple[Tensor, Tensor] = super().forward(
                hidden_states, vocab_weights, input_ids, temperature
            )
            return outputs
        return _token_stats(hidden_states, vocab_weights, input_ids, temperature)


def _token_stats(
    hidden: Tensor, weight: Tensor, target: Tensor, temperature: Tensor | float, group: Any = None
) -> tuple[Tensor, Tensor]:
    if isinstance(temperature, Tensor):
        if temperature.numel() == 1:
            temperature = temperature.reshape(())
        elif temperature.numel() == target.numel():  # verl packs sequences: [T] beside [1, T]
            temperature = temperature.reshape(target.shape)
    target = target.to(torch.int64)
    stats = linear_token_stats(
        hidden, weight, target, temperature=temperature, group=group, reduce_hidden=group is None
    )
    return stats.logprob, stats.entropy
