"""GKD in TRL, without logits: a class that takes the place of TRL's `GKDTrainer`.

GKD (arXiv 2306.13649) is on-policy distillation from a teacher's whole distribution. TRL makes the logits
of student and teacher, and several tensors of their size. Here the loss comes from the hidden states of
both; TRL's `beta` is `jsd_beta`. Loss and gradients are TRL's own.

Run it:
    python docs/recipes/gkd_trl.py

For a real model: take `FusedGKDTrainer` into your script. Let `AutoModelForCausalLM.from_pretrained(...)`
make the student and the teacher, and give the class the arguments that you give `GKDTrainer`. A teacher
with a softcap or a scale of its own needs `ref_softcap` and `ref_temperature`, and one with a bias on its
head `ref_bias`. What is distilled from another tokenizer, or from a server's few largest
log-probabilities, is another loss.
"""

from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl.experimental.gkd import GKDConfig, GKDTrainer

from aer_fast.integrations.transformers import fuse_lm_head, lm_body, next_token_target
from tiny import causal_lm


class FusedGKDTrainer(GKDTrainer):
    """GKD without logits."""

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        fuse_lm_head(model)  # before accelerate wraps it
        super().__init__(model, *args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        teacher = self.accelerator.unwrap_model(self.teacher_model).eval()
        with torch.no_grad():
            ref_hidden = lm_body(teacher)(ids, attention_mask=mask).last_hidden_state
        out = model(
            ids,
            attention_mask=mask,
            target=next_token_target(inputs["labels"]),
            ref_hidden=ref_hidden,
            ref_weight=teacher.get_output_embeddings().weight,
            divergence="jsd",
            jsd_beta=self.beta,
            denominator=num_items_in_batch,
        )
        return (out.loss, out) if return_outputs else out.loss


def digits() -> Any:
    """A tokenizer of single characters; yours: AutoTokenizer.from_pretrained(...)."""
    words = {word: i for i, word in enumerate(["<pad>", "<eos>", *"0123456789+="])}
    characters = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return tokenizer


def sums() -> Any:
    """Questions and answers; yours have the same columns."""
    pairs = [(a, b) for a in range(4) for b in range(4)]
    return Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": f"{a}+{b}="},
                    {"role": "assistant", "content": f"{a + b}"},
                ]
            }
            for a, b in pairs
        ]
    )


def train(trainer_class: Any) -> list[float]:
    """The loss of each of ten steps; the same numbers with TRL's own class."""
    torch.manual_seed(0)
    tokenizer = digits()
    size = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 1}
    trainer = trainer_class(
        model=causal_lm(**size),  # yours: AutoModelForCausalLM.from_pretrained(...)
        teacher_model=causal_lm(**size, initializer_range=0.3),
        args=GKDConfig(
            output_dir="runs/recipes/gkd",
            beta=0.5,
            lmbda=0.0,  # learn from the data set's answers; with 1.0 from samples of the student
            max_length=16,
            per_device_train_batch_size=16,
            max_steps=10,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            bf16=torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        processing_class=tokenizer,
        train_dataset=sums(),
    )
    trainer.train()
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    losses = train(FusedGKDTrainer)
    print(f"divergence from the teacher: {losses[0]:.3f} at first, {losses[-1]:.3f} at last")
    assert losses[-1] < losses[0]
