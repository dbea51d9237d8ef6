"""TRL: GRPO with the fused loss and AER, in the place of `GRPOTrainer` and `GRPOConfig`.

    from aer_fast.integrations.trl import AERGRPOConfig, AERGRPOTrainer

The command line is that of ``trl grpo``: ``python -m aer_fast.integrations.trl --model_name_or_path ...``
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from torch import Tensor

from aer_fast import AdaptiveEntropy
from aer_fast.integrations._grpo_losses import GRPOLoss
from aer_fast.integrations._versions import require
from aer_fast.integrations.aer import DEFAULTS, THRESHOLD, Bookkeeping, accuracy_metrics
from aer_fast.integrations.transformers import (
    LossInputs,
    causal_lm,
    fuse_lm_head,
    is_fused,
    unfuse_lm_head,
)
from aer_fast.reference import IGNORE

require("trl")

from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402
from trl.trainer import grpo_trainer  # noqa: E402

__all__ = ["AERGRPOConfig", "AERGRPOTrainer", "main"]


def _setting(name: str, text: str) -> Any:
    return field(default=DEFAULTS[name], metadata={"help": text})


@dataclass
class AERGRPOConfig(GRPOConfig):
    """TRL's `GRPOConfig`, with settings for Adaptive Entropy Regularization (after arXiv 2510.10959).

    The fields ``aer_<name>`` are the arguments of `aer_fast.AdaptiveEntropy`, whose documentation says what
    each does. In a script ``aer_difficulty`` and ``aer_law`` may be functions; checkpoints pickle them with
    the other arguments.

    Args:
        use_aer: add AER's entropy bonus. False trains with the fused loss and TRL's own settings only; TRL's
            ``entropy_coef`` and ``use_adaptive_entropy`` are for that case.
        aer_reward: name of the reward function that says whether a completion is right: a weighted sum of
            rewards is no accuracy. None if there is only one reward function, or with
            ``aer_difficulty="uniform"``.
        aer_threshold: a completion is right if that reward is at least this. Where the reward is None the
            completion does not count.
        aer_target_ratio: target entropy as a share of the initial entropy.
        aer_target: target entropy in nats, instead of that share; None for the share.
        aer_difficulty: weight of a prompt by its accuracy: a name of `AdaptiveEntropy`, or a function.
        aer_rho: accuracy up to which ``linear`` and ``gate`` give weight.
        aer_normalize: divide the weights by their mean over the prompts.
        aer_law: how the global coefficient α moves: a name of `AdaptiveEntropy`, or a function.
        aer_eta: step of α; None for the law's own.
        aer_gain: proportional part of the law ``pi``.
        aer_alpha_init: α before the first optimizer step.
        aer_alpha_min: the least α.
        aer_alpha_max: the largest α.
        aer_gate_above_target: no bonus while the entropy of the last step is above the target.

    Raises:
        ValueError: if a setting of AER is out of range, or TRL's own entropy bonus is on together with
            use_aer.
    """

    use_aer: bool = field(
        default=True, metadata={"help": "Add the entropy bonus of Adaptive Entropy Regularization."}
    )
    aer_reward: str | None = field(
        default=None,
        metadata={"help": "Name of the reward function that says whether a completion is right."},
    )
    aer_threshold: float = field(
        default=THRESHOLD, metadata={"help": "A completion is right if that reward is at least this."}
    )
    aer_target_ratio: float = _setting("target_ratio", "Target entropy as a share of the initial entropy.")
    aer_target: float | None = _setting("target", "Target entropy in nats, instead of that share.")
    aer_difficulty: str = _setting(
        "difficulty", f"Weight of a prompt by its accuracy: one of {', '.join(AdaptiveEntropy.difficulties)}."
    )
    aer_rho: float = _setting("rho", "Accuracy up to which linear and gate give weight.")
    aer_normalize: bool = _setting("normalize", "Divide the weights by their mean over the prompts.")
    aer_law: str = _setting(
        "law", f"How the global coefficient moves: one of {', '.join(AdaptiveEntropy.laws)}."
    )
    aer_eta: float | None = _setting("eta", "Step of the global coefficient; None: the law's own.")
    aer_gain: float = _setting("gain", "Proportional part of the law pi.")
    aer_alpha_init: float = _setting("alpha_init", "Global coefficient before the first optimizer step.")
    aer_alpha_min: float = _setting("alpha_min", "Least global coefficient.")
    aer_alpha_max: float = _setting("alpha_max", "Largest global coefficient.")
    aer_gate_above_target: bool = _setting(
        "gate_above_target", "No bonus while the entropy of the last step is above the target."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.use_aer:
            return
        controller = self.controller()  # raises ValueError for settings that are none
        try:
            Bookkeeping(controller, self.aer_threshold)
        except ValueError as error:
            raise ValueError(f"aer_{error}") from error
        for name, off in (("entropy_coef", 0.0), ("use_adaptive_entropy", False)):
            if getattr(self, name) != off:
                raise ValueError(
                    f"{name}={getattr(self, name)} is TRL's own entropy bonus, and use_aer=True adds AER's: "
                    f"set use_aer=False, or {name}={off}"
                )

    def controller(self) -> AdaptiveEntropy:
        """A new `AdaptiveEntropy` with these settings."""
        return AdaptiveEntropy(**{name: getattr(self, f"aer_{name}") for name in DEFAULTS})

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON has them, for the loggers: a function by its name."""
        fields: dict[str, Any] = super().to_dict()
        own = {name: repr(fields[name]) for name in ("aer_difficulty", "aer_law") if callable(fields[name])}
        return fields | own


class AERGRPOTrainer(GRPOTrainer):
    """TRL's `GRPOTrainer` with the fused loss, and an entropy bonus after AER (arXiv 2510.10959).

    A script needs its two names changed. Dataset, rewards, arguments and metrics stay TRL's. What differs:

    - Logits never exist in training. Log-probabilities of the old and of the reference policy come from the
      same code as the loss.
    - The bonus is Σ c(q) H / tokens, over the tokens of an optimizer step of all processes, whatever the loss
      type. c(q) is α · w(accuracy of the prompt). The bonus belongs to training: evaluation leaves it out and
      never moves α.
    - α moves once per optimizer step, by the mean entropy over all tokens of the step that count in the loss.
      It is used from the next step on. The first step anchors the target.
    - There are more metrics: aer/entropy, aer/target, aer/alpha (after the step), aer/accuracy, and
      aer/coefficient/{hard,medium,easy}: the mean coefficient used for completions of prompts whose accuracy
      is below 1/3, below 2/3, or above.
    - A checkpoint has the controller's state in aer.json.

    Which function computes the loss depends on TRL's settings. The first two take three products with the LM
    head. The last takes four: its settings judge all tokens before there is a loss.

        linear_ppo_loss      loss types dapo, grpo, bnpo, dr_grpo and luspo
        linear_token_loss    loss types cispo, sapo and vespo; sequence-level ratios; use_bias_correction_kl
        linear_token_stats   top_entropy_quantile < 1; off_policy_mask_threshold

    Args:
        model: as in `GRPOTrainer`: a causal LM, or its name.
        reward_funcs: as in `GRPOTrainer`.
        args: an `AERGRPOConfig`. None: one with the defaults.
        *rest: further arguments of `GRPOTrainer`.
        **kwargs: further arguments of `GRPOTrainer`, by name.

    Raises:
        ValueError: for what is not served, by name: an unknown loss type, DeepSpeed ZeRO-3, a head that
            `fuse_lm_head` refuses, prompt learning, a reward function that is not there.
    """

    _tag_names: ClassVar[list[str]] = ["trl", "grpo", "aer"]
    _name = "GRPO with AER"
    args: AERGRPOConfig
    model: Any

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: Any = None, *rest: Any, **kwargs: Any
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path or "model"
            args = AERGRPOConfig(f"{name.split('/')[-1]}-AER-GRPO")
        if not isinstance(args, AERGRPOConfig):
            raise ValueError(f"args must be an AERGRPOConfig, got {type(args).__name__}")
        self._grpo = _loss_settings(args)
        if is_deepspeed_zero3_enabled():
            raise ValueError("DeepSpeed ZeRO-3 is not supported; use FSDP2, or ZeRO-2")
        if is_fused(model):  # a trainer before this one has done it
            unfuse_lm_head(model)
        # TRL's own fused head is needed nowhere, and a model with it cannot be pickled
        with patch.object(grpo_trainer, "add_fused_lm_head", lambda *_, **__: None):
            super().__init__(model, reward_funcs, args, *rest, **kwargs)
        dtype = torch.float32 if args.cast_lm_head_to_fp32 else None
        for one in (self.model, self.ref_model):
            if dtype is not None and one is not None:
                _cast_by_hooks(causal_lm(one))
        fuse_lm_head(self.model, head_dtype=dtype)
        # A reference model is of the same kind; accelerate has prepared it, and TRL calls it in autocast.
        if self.ref_model is not None:
            fuse_lm_head(self.accelerator.unwrap_model(self.ref_model), head_dtype=dtype, check=False)
        self.controller = args.controller() if args.use_aer else None
        self._aer = Bookkeeping(self.controller, args.aer_threshold) if self.controller else None
        self._judge = self._find_judge(args)
        self._loss_inputs: dict[str, Any] | None = None  # of the loss being computed
        self._last: Any = None  # the FusedOutput of the last call of the model
        self._rewards: Tensor | None = None  # [completions of all processes, reward functions]

    def _find_judge(self, args: AERGRPOConfig) -> int | None:
        """The reward function that means right, by its number."""
        names = self.reward_func_names
        if not args.use_aer:
            return None
        if args.aer_reward is None and len(names) == 1:
            return 0
        if args.aer_reward is None and args.aer_difficulty == "uniform":
            return None
        if names.count(args.aer_reward) != 1:
            raise ValueError(
                f"aer_reward={args.aer_reward!r} must name the reward function that says which completions "
                f"are right: one of {', '.join(names)}"
            )
        return int(names.index(args.aer_reward))

    # rollouts: the accuracy of each prompt

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        self._rewards = super()._calculate_rewards(*args, **kwargs)
        return self._rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if self._aer is None or not self.model.training:
            return output
        device = output["advantages"].device
        if self._judge is None:
            accuracy = torch.zeros(len(inputs), device=device)
        else:
            assert self._rewards is not None
            score = self._rewards[:, self._judge].view(-1, self.num_generations)  # of a prompt: neighbours
            accuracy = self._aer.accuracy(score).repeat_interleave(self.num_generations)
            for name, value in accuracy_metrics(accuracy).items():
                self._metrics["train"][name].append(value)
            mine = self.accelerator.process_index * len(inputs)
            accuracy = accuracy[mine : mine + len(inputs)]
        return output | {"accuracy": accuracy}

    # the loss

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        loss: Tensor
        mode = "train" if self.model.training else "eval"
        window = self.current_gradient_accumulation_steps if mode == "train" else 1.0
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if mode == "train":
            tokens = tokens * window / self.args.steps_per_generation
        coefficient = None
        if self._aer is not None and mode == "train":
            coefficient = self._aer.coefficient(inputs["accuracy"]).unsqueeze(1)  # [B, 1]

        if self.top_entropy_quantile < 1.0 or self.off_policy_mask_threshold is not None:
            loss = super()._compute_loss(model, inputs)  # TRL's own, of our log-probabilities and entropies
            logged = self._last
            if coefficient is not None:
                loss = loss - (coefficient * logged.entropy * mask).sum() / tokens
        else:
            weight, denominator = self._grpo.aggregation(
                mask, window=window, tokens=tokens, max_length=self.max_completion_length
            )
            entropy_coef = self._trl_entropy_coef() / mask.sum().clamp(min=1.0) / window
            if coefficient is not None:
                entropy_coef = entropy_coef + coefficient / tokens
            # the bonus is a mean over tokens whatever weight and denominator are: out of it with both
            entropy_coef = entropy_coef * denominator * (mask / weight).nan_to_num(0.0)
            self._loss_inputs = self._fused_inputs(inputs, mask, weight, denominator, entropy_coef)
            try:
                super()._compute_loss(model, inputs)  # makes TRL's metrics; it has no gradient
            finally:
                self._loss_inputs = None
            logged = self._last
            loss = logged.loss
            if self.aux_loss_enabled:
                loss = loss + self.router_aux_loss_coef * logged.aux_loss / window
        if coefficient is not None:
            self._observe(logged.entropy.detach(), mask, coefficient, inputs["accuracy"])
        return loss

    def _trl_entropy_coef(self) -> float:
        """The coefficient that TRL's own settings ask for, in this optimizer step."""
        if not self._entropy_bonus_enabled:
            return 0.0
        gated = self.use_adaptive_entropy and self._last_world_entropy > self.args.entropy_target
        return 0.0 if gated else float(self.entropy_coef)

    def _fused_inputs(
        self,
        inputs: dict[str, Any],
        mask: Tensor,
        weight: Tensor,
        denominator: Tensor | float,
        entropy_coef: Tensor,
    ) -> dict[str, Any]:
        """What the model is called with, besides its own inputs; per-token tensors are [B, completion]."""
        advantage = inputs["advantages"]
        tensors = {
            "advantage": advantage.unsqueeze(1) if advantage.dim() == 1 else advantage,
            "entropy_coef": entropy_coef,
            "old_logprob": inputs.get("old_per_token_logps"),
        }
        if self.use_vllm and self.vllm_importance_sampling_correction:
            tensors["importance_weight"] = inputs["importance_sampling_ratio"]
        if self.beta != 0.0:
            tensors["ref_logprob"] = inputs["ref_per_token_logps"]
        common = {
            "target": inputs["completion_ids"].where(mask != 0, IGNORE),
            "mask": weight,
            "denominator": denominator,
            "temperature": self.temperature,
        }
        loss = self._grpo
        if loss.is_ppo:
            return common | tensors | {"clip": loss.clip, "dual_clip": loss.delta, "kl_coef": loss.kl_coef}
        if loss.whole_sequences:
            B, T = mask.shape
            tensors["sequence"] = torch.arange(B, device=mask.device).unsqueeze(1)
            common["cu_seqlens"] = torch.arange(0, B * T + 1, T)
        given = {name: x for name, x in tensors.items() if x is not None}
        return common | {"objective": loss.objective(list(given)), "token_tensors": list(given.values())}

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        call = partial(self._call, model, logits_to_keep)
        return super()._get_per_token_logps_and_entropies(
            call, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )

    def _call(
        self, model: Any, keep: int, *, labels: Tensor, fused_lm_head: bool, **inputs: Any
    ) -> SimpleNamespace:
        """The model as TRL calls it; returns what TRL reads, as it was computed (see `LossInputs`)."""
        given = self._loss_inputs or {"target": labels[:, -keep:], "temperature": self.temperature}
        request = LossInputs(**given)
        model(**inputs, loss_inputs=request, logits_to_keep=slice(-keep - 1, -1))
        self._last = out = request.result
        assert out is not None
        return SimpleNamespace(log_probs=out.logprob, entropy=out.entropy, aux_loss=out.aux_loss)

    # the controller

    def _observe(self, entropy: Tensor, mask: Tensor, coefficient: Tensor, accuracy: Tensor) -> None:
        """Add a micro-batch to the optimizer step; at its end move α and log."""
        assert self._aer is not None
        used = None if self._judge is None else coefficient[:, 0]  # without a judge there is no difficulty
        self._aer.observe((entropy * mask).sum().float(), mask.sum(), accuracy, used)
        if self.accelerator.sync_gradients:
            for name, value in self._aer.update(partial(self.accelerator.reduce, reduction="sum")).items():
                self._metrics["train"][name].append(value)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._aer is not None and self.args.should_save:
            self._aer.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._aer is not None and checkpoint is not None:
            self._aer.load(checkpoint, "the settings aer_...")


def _loss_settings(args: AERGRPOConfig) -> GRPOLoss:
    if args.importance_sampling_level not in ("token", "sequence"):
        raise ValueError(
            f"importance_sampling_level must be 'token' or 'sequence', got {args.importance_sampling_level!r}"
        )
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    return GRPOLoss(
        loss_type=args.loss_type,
        clip=(args.epsilon, high),
        delta=args.delta,
        sequence_ratio=args.importance_sampling_level == "sequence",
        kl_coef=args.beta,
        kl_ratio=args.use_bias_correction_kl,
        sapo_temperature=(args.sapo_temperature_pos, args.sapo_temperature_neg),
        vespo=((args.vespo_k_pos, args.vespo_lambda_pos), (args.vespo_k_neg, args.vespo_lambda_neg)),
    )


def _cast_by_hooks(causal: Any) -> None:
    """TRL's cast_lm_head_to_fp32 by hooks of our own, which are told their module and can be pickled.

    TRL's are functions within a function; that on the head holds the head, so a copy would use its weights.
    """
    if causal.lm_head.__dict__.pop("forward", None) is not None:
        causal.lm_head.register_forward_pre_hook(_inputs_as_weight)
    hooks = causal.get_input_embeddings()._forward_hooks
    for number, hook in hooks.items():
        if getattr(hook, "__name__", "") == "cast_outputs_to_original_dtype":
            hooks[number] = partial(
                _outputs_to, inspect.getclosurevars(hook).nonlocals["original_dtype_local"]
            )


def _inputs_as_weight(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return args[0].to(module.weight.dtype), *args[1:]


def _outputs_to(dtype: torch.dtype, module: Any, args: Any, output: Tensor) -> Tensor:
    return output.to(dtype)


@contextmanager
def _in_place_of_trl() -> Iterator[None]:
    """TRL's script with our trainer and configuration, while it runs."""
    import trl

    with patch.object(trl, "GRPOTrainer", AERGRPOTrainer), patch.object(trl, "GRPOConfig", AERGRPOConfig):
        yield


def main() -> None:
    """Run ``trl grpo`` with AER: the same arguments, and those of `AERGRPOConfig`."""
    from trl.scripts import grpo

    with _in_place_of_trl():
        parser = grpo.make_parser(prog="python -m aer_fast.integrations.trl")
        grpo.main(*parser.parse_args_and_config(fail_with_unknown_args=False))


if __name__ == "__main__":
    from aer_fast.integrations import trl as _module  # not as __main__, whose classes cannot be loaded again

    _module.main()
