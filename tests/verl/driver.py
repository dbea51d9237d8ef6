"""A driver for verl's real trainer and worker in this process: a tiny model, and rollouts written by hand."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transfer_queue as tq
from hydra import compose, initialize_config_module
from omegaconf import DictConfig
from torch import Tensor
from transfer_queue import KVBatchMeta
from transformers import Qwen2Config, Qwen2ForCausalLM
from verl.trainer.ppo.v1 import PPOTrainer
from verl.utils.tensordict_utils import list_of_dict_to_tensordict
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.engine_workers import ActorRolloutRefWorker

EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device="cpu")(
    FSDPEngineWithLMHead
)

V = 61


def configuration(
    *overrides: str, model: Path | str = "nowhere", name: str = "aer_ppo_trainer"
) -> DictConfig:
    """The fragment with what a CPU and a tiny model need, in float32."""
    tiny = (
        f"actor_rollout_ref.model.path={model}",
        "+actor_rollout_ref.model.load_tokenizer=false",
        "actor_rollout_ref.model.use_remove_padding=false",
        "+actor_rollout_ref.model.override_config.attn_implementation=eager",
        "actor_rollout_ref.model.enable_gradient_checkpointing=false",
        "actor_rollout_ref.actor.strategy=fsdp2",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2",
        "actor_rollout_ref.actor.fsdp_config.use_torch_compile=false",
        "+actor_rollout_ref.actor.fsdp_config.mixed_precision="
        "{param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}",
        "actor_rollout_ref.actor.optim.lr=1e-2",
        "actor_rollout_ref.actor.optim.total_training_steps=10",
        "actor_rollout_ref.rollout.name=vllm",
        "actor_rollout_ref.rollout.n=2",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=4",
        "algorithm.adv_estimator=grpo",
        "data.train_batch_size=4",
        "trainer.device=cpu",
    )
    with initialize_config_module("aer_fast.integrations.verl", version_base=None):
        return compose(name, overrides=[*tiny, *overrides])


def save_model(path: Path, tied: bool = False) -> Path:
    """A random Qwen2, whose entropy is visibly below log V."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=tied,
    )
    Qwen2ForCausalLM(config).save_pretrained(path)
    return path


@dataclass
class Rollout:
    """One row of the queue, as an agent loop writes it."""

    key: str  # {uid}_{session}_{index}
    score: float
    prompt: int  # lengths
    response: int
    masked: int = 0  # tokens at the start of the response that a tool wrote
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def uid(self) -> str:
        return self.key.rsplit("_", 2)[0]

    def ids(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(sum(map(ord, self.key)))
        ids = torch.randint(1, V, (self.prompt + self.response,), generator=generator)
        return ids[: self.prompt], ids[self.prompt :]

    def mask(self) -> Tensor:
        return (torch.arange(self.response) >= self.masked).long()

    def fields(self) -> dict[str, Any]:
        prompt, response = self.ids()
        ids, scores = torch.cat([prompt, response]), torch.zeros(self.response)
        scores[-1] = self.score
        return {
            "uid": self.uid,
            "prompts": prompt,
            "responses": response,
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "position_ids": torch.arange(len(ids)),
            "response_mask": self.mask(),
            "loss_mask": self.mask(),
            "rm_scores": scores,
            "rollout_log_probs": torch.full((self.response,), -4.0),
            "extra_fields": {"reward_extra_info": self.info},
            "num_turns": 2,
        }


def put(rollouts: list[Rollout]) -> KVBatchMeta:
    """Write them into the queue."""
    tags = [
        {"status": "success", "seq_len": r.prompt + r.response, "min_global_steps": 0, "max_global_steps": 0}
        for r in rollouts
    ]
    keys = [rollout.key for rollout in rollouts]
    fields = list_of_dict_to_tensordict([rollout.fields() for rollout in rollouts])
    return tq.kv_batch_put(keys=keys, partition_id="train", fields=fields, tags=tags)


def column(batch: KVBatchMeta, name: str) -> dict[str, Any]:
    """A field of the queue by key."""
    data = tq.kv_batch_get(keys=batch.keys, partition_id="train", select_fields=[name])[name]
    return dict(zip(batch.keys, data.unbind() if isinstance(data, Tensor) else list(data)))


class InProcess:
    """verl's worker where its trainer expects a group of them."""

    def __init__(self, worker: Any) -> None:
        self.worker = worker
        self._dispatch_info = {"actor": [0, 1]}  # two ranks, between which the trainer balances a batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.worker, name)


def build_trainer(cls: type[PPOTrainer], config: DictConfig, worker: Any = None) -> Any:
    """The trainer after its `_setup`, of which only the launching of ray actors and servers is left out.

    `worker` None: verl's own, with its FSDP engine.
    """

    def launch(self: Any) -> None:
        actor = worker or ActorRolloutRefWorker(config=self.config.actor_rollout_ref, role="actor")
        self.actor_rollout_wg = InProcess(actor)
        self.actor_rollout_wg.init_model()
        self.tokenizer = SimpleNamespace(eos_token_id=0, pad_token_id=0)
        self.reward_loop_manager = SimpleNamespace(reward_loop_worker_handles=[])
        self.checkpoint_manager = SimpleNamespace(sleep_replicas=lambda: None, abort_replicas=lambda: None)
        self.train_dataloader = SimpleNamespace(state_dict=dict, load_state_dict=lambda state: None)
        self.distillation_config = None
        self.curr_step_profile = False
        self._load_checkpoint()

    trainer = cls(config)
    original, PPOTrainer._setup = PPOTrainer._setup, launch
    try:
        trainer._setup()
    finally:
        PPOTrainer._setup = original
    return trainer


def step(trainer: Any, *batches: list[Rollout]) -> tuple[KVBatchMeta, dict[str, Any]]:
    """verl's step on these rollouts, one list for each of its local updates."""
    waiting = [put(rollouts) for rollouts in batches]
    trainer.replay_buffer = SimpleNamespace(sample=lambda **_: (waiting.pop(0), {}))
    trainer.prepare_step = dict
    metrics: dict[str, Any] = {}
    trainer.global_steps += 1
    trainer.timing_raw = {}
    trainer.on_step_begin()
    batch = trainer.step(metrics, {})
    return batch, metrics


def logprob_and_entropy(model: Qwen2ForCausalLM, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """[response], from the whole softmax, in the dtype of the model."""
    prompt, response = rollout.ids()
    logits = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
    logp = logits.log_softmax(-1)
    return logp.gather(-1, response[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
