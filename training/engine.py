"""vLLM in this process, one engine a rank, fed with the policy's weights each step."""

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from training.batch import Rollout, cut
from training.config import Config
from training.distributed import World, whole
from training.models import end_tokens
from training.policy import Policy
from training.processes import naming

FAULT = "rollout 'vllm': its engine does not take the policy's weights"


class VLLM:
    """Samples, and reports log-probabilities. Whether they are the policy's is for `agreement` to ask."""

    def __init__(self, policy: Policy, path: str, tokenizer: Any, config: Config, here: World) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the weights are handed over in memory
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it warns of each reload
        try:
            import vllm
        except ImportError as error:
            raise ValueError("rollout 'vllm' needs vLLM: pip install vllm, or use rollout 'hf'") from error
        self.policy, self.vllm = policy, vllm
        self.ends = end_tokens(policy.causal_lm, tokenizer)
        self.config = config
        with naming(f"rollout 'vllm': its engine does not take model {path}"):
            self.engine = vllm.LLM(
                model=path,
                dtype=config.dtype,
                gpu_memory_utilization=config.vllm_memory,
                enforce_eager=here.device.type == "cpu",  # compiling takes minutes there
                logprobs_mode="processed_logprobs",  # at the sampling temperature
                generation_config="vllm",  # not the model's defaults
                distributed_executor_backend="external_launcher" if here.size > 1 else None,
                seed=config.seed % 2**32,
            )

    @torch.no_grad()
    def sync(self) -> None:
        named = self._named()
        with naming(FAULT):
            try:
                self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": named})
            finally:
                for _ in named:  # all ranks must ask for all
                    pass
            self.engine.apply_model(pack_tied)
            if not self.engine.reset_prefix_cache():
                raise ValueError("its prefix cache keeps what other weights computed")

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        """The weights, one whole tensor at a time."""
        for name, parameter in self.policy.model.named_parameters():
            yield name, whole(parameter)

    def sample(self, prompts: list[list[int]], seed: int, *, most: int | None = None) -> list[Rollout]:
        settings = [
            self.vllm.SamplingParams(
                temperature=self.config.temperature,
                top_k=0,
                top_p=1.0,
                min_p=0.0,
                repetition_penalty=1.0,
                max_tokens=most or self.config.max_new_tokens,
                stop_token_ids=self.ends,
                ignore_eos=True,  # of the model's config, which may name others
                logprobs=0,
                seed=(seed + k) % 2**31,
            )
            for k in range(len(prompts))
        ]
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        with naming("rollout 'vllm': its engine does not sample"):
            outputs = self.engine.generate(requests, settings, use_tqdm=False)
        rollouts = []
        for prompt, output in zip(prompts, outputs):
            sampled = output.outputs[0]
            tokens = list(sampled.token_ids)
            logprob = [entry[token].logprob for entry, token in zip(sampled.logprobs, tokens)]
            rollout = cut(prompt, tokens, self.ends)
            rollouts.append(rollout._replace(logprob=logprob[: len(rollout.response)]))
        return rollouts


def pack_tied(model: Any) -> None:
    """Let the engine's layers that share another one's weight prepare it again.

    On a CPU vLLM multiplies by a packed copy of the head's weight. A reload packs what it has loaded; a tied
    head loads nothing of its own, and would go on with its copy of the old weight.
    """
    first: dict[int, Any] = {}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and first.setdefault(id(weight), module) is not module:
            module.quant_method.process_weights_after_loading(module)
