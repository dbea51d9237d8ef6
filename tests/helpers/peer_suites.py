"""Other projects' tests, with our functions in the place of theirs.

    python -m tests.helpers.peer_suites trl   PATH [--impl IMPL] [pytest options]
    python -m tests.helpers.peer_suites liger PATH ...
    python -m tests.helpers.peer_suites verl  PATH ...

PATH is a checkout of TRL, Liger-Kernel or verl. Its own code is imported from there, what that imports has to
be installed, and no file in it is changed: the names under test are replaced once the tests are collected.
Oracles and tolerances are the project's. A test that passes without having called us fails. The table at the
end says what was deselected, and what else was done to the tests.
"""

import argparse
import importlib
import inspect
import os
import sys
from collections import Counter
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from aer_fast import PPOLoss, linear_ppo_loss, linear_token_loss, linear_token_stats
from aer_fast._validation import Impl
from aer_fast.integrations._grpo_losses import CLIPPED, GRPOLoss
from aer_fast.reference import IGNORE

FLOAT32_ORACLE = "the oracle, which rounds logits to bfloat16, gets the factors in float32"


# ---- TRL: log-probability and entropy from hidden states and a head


def trl_function(theirs: Any, impl: Impl = "auto") -> Callable[..., tuple[Any, ...]]:
    """`linear_token_stats` behind the ``apply`` of TRL's function, of the version that ``theirs`` has."""
    signature = inspect.signature(theirs.forward)

    def apply(*args: Any) -> tuple[Any, ...]:
        bound = signature.bind(None, *args)
        bound.apply_defaults()
        (_, hidden, weight, *_), given = bound.args, bound.arguments
        outputs = given.get("outputs", ("entropy",))
        others = set(outputs) - {"log_probs", "entropy"}
        if others:
            pytest.skip(f"not computed by linear_token_stats: {', '.join(sorted(others))}")
        # softcap tanh(scale z / softcap) / temperature, in our terms
        scale, softcap = given["logit_scale"], given["final_logit_softcapping"]
        bias = given.get("bias")
        logprob, entropy = linear_token_stats(
            hidden,
            weight.to(hidden.dtype),
            given["targets"],
            bias=None if bias is None else bias.to(hidden.dtype),
            temperature=given["temperature"] / scale,
            softcap=None if softcap is None else softcap / scale,
            chunk_tokens=given["chunk_size"],  # theirs is of words, ours of tokens: several chunks either way
            impl=impl,
        )
        if "outputs" not in given:
            return logprob, entropy
        return logprob, entropy if "entropy" in outputs else None, None, None, None

    return apply


# ---- Liger: the family of clipped losses, fused with the head

Inputs = tuple[Tensor, Tensor, Tensor]  # hidden, weight, target
Settings = SimpleNamespace  # with the names of the constructor of LigerFusedLinearGRPOLoss


def liger_loss(
    settings: Settings,
    hidden: Tensor,  # [B, T, D]
    weight: Tensor,  # [V, D]
    target: Tensor,  # [B, T]
    attention_mask: Tensor,  # [B, T]
    advantages: Tensor,  # [B]
    bias: Tensor | None = None,
    ref_logprob: Tensor | None = None,  # [B, T]
    old_logprob: Tensor | None = None,  # [B, T]
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    vllm_is_ratio: Tensor | None = None,  # [B], [B, 1] or [B, T]
    num_items_in_batch: float | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the loss and its metrics: the mean KL where it has a coefficient, and the clipped fraction."""
    s = settings
    head: dict[str, Any] = {"bias": bias, "temperature": float(s.temperature), "impl": impl}
    if s.use_ref_model and ref_logprob is None:
        assert ref_hidden is not None
        assert ref_weight is not None
        with torch.no_grad():
            ref_head = {**head, "bias": ref_bias}
            ref_logprob = linear_token_stats(ref_hidden, ref_weight, target, **ref_head).logprob
    loss = GRPOLoss(
        s.loss_type,
        (s.epsilon_low, s.epsilon_high),
        s.delta,
        sequence_ratio=s.importance_sampling_level == "sequence",
        kl_coef=0.0 if ref_logprob is None else s.beta,  # the policy as its own reference: no KL, no gradient
        kl_ratio=s.use_bias_correction_kl,
        sapo_temperature=(s.sapo_temperature_pos, s.sapo_temperature_neg),
        vespo=((s.vespo_k_pos, s.vespo_lambda_pos), (s.vespo_k_neg, s.vespo_lambda_neg)),
    )
    keep = attention_mask.float()
    tokens = keep.sum().clamp(min=1)
    share = tokens if num_items_in_batch is None else tokens.new_tensor(max(num_items_in_batch, 1.0))
    head["mask"], head["denominator"] = loss.aggregation(
        keep, window=1, tokens=share, max_length=s.max_completion_length
    )
    constants = {"advantage": advantages.float().unsqueeze(1), "entropy_coef": keep.new_zeros(1, 1)}
    optional = {"old_logprob": old_logprob, "ref_logprob": ref_logprob, "importance_weight": vllm_is_ratio}
    for name, value in optional.items():
        if value is not None:
            constants[name] = (value.unsqueeze(1) if value.dim() == 1 else value).float()
    inputs = hidden, weight, target.where(keep > 0, IGNORE)
    out = (
        by_ppo_loss(loss, inputs, constants, head)
        if loss.is_ppo
        else by_token_loss(loss, inputs, constants, head)
    )
    kl, clipped = kl_and_clipped(loss, out.logprob, constants, keep)
    metrics = [(kl * keep).sum() / tokens] if s.beta != 0 else []
    return out.loss, (*metrics, (clipped * keep).sum() / tokens)


def by_ppo_loss(
    loss: GRPOLoss, inputs: Inputs, constants: dict[str, Tensor], head: dict[str, Any]
) -> PPOLoss:
    given: dict[str, Any] = {"old_logprob": None, **constants, **head}
    given |= {"clip": loss.clip, "dual_clip": loss.delta, "kl_coef": loss.kl_coef}
    hidden, weight, target = inputs
    return linear_ppo_loss(hidden, weight, target, **given)


def by_token_loss(
    loss: GRPOLoss, inputs: Inputs, constants: dict[str, Tensor], head: dict[str, Any]
) -> PPOLoss:
    B, T = inputs[2].shape
    if loss.whole_sequences:
        constants = {**constants, "sequence": torch.arange(B, device=inputs[2].device).unsqueeze(1)}
        head = {**head, "cu_seqlens": torch.arange(0, B * T + 1, T)}
    return linear_token_loss(*inputs, loss.objective(list(constants)), *constants.values(), **head)


def kl_and_clipped(
    loss: GRPOLoss, logprob: Tensor, constants: dict[str, Tensor], keep: Tensor
) -> tuple[Tensor, Tensor]:
    """What Liger reports of each token [B, T], from its log-probability."""
    log_ratio = logprob - constants.get("old_logprob", logprob)
    if loss.sequence_ratio:
        log_ratio = (log_ratio * keep).sum(1, keepdim=True) / keep.sum(1, keepdim=True).clamp(min=1)
    ratio, advantage = log_ratio.exp().expand_as(logprob), constants["advantage"]
    high = advantage > 0
    if loss.loss_type in CLIPPED:
        low = (advantage < 0) & (ratio < 1 - loss.clip[0])
        clipped = low | (high & (ratio > 1 + loss.clip[1]))
    else:
        clipped = high & (ratio > loss.clip[1]) & (loss.loss_type == "cispo")
    difference = constants.get("ref_logprob", logprob) - logprob
    kl = difference.exp() - difference - 1
    return kl * ratio if loss.kl_ratio else kl, clipped.float()


# ---- verl: log-probability and entropy from hidden states and a head


def verl_stats(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [...]
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """`linear_token_stats` behind the signature of verl's ``linear_cross_entropy``."""
    if reduction != "none" or dist_process_group is not None:
        pytest.skip("linear_token_stats has no reduction and no vocabulary spread over processes")
    rows = hidden.reshape(-1, hidden.shape[-1])
    stats = linear_token_stats(rows, weight, labels.reshape(-1), temperature=temperature, impl=impl)
    return stats.logprob, stats.entropy


class TorchOnCPU:
    """torch as verl's tests see it where there is no GPU: "cuda" is the CPU, and its clock stands still."""

    def __init__(self) -> None:
        self.cuda = MagicMock()
        self.cuda.is_available.return_value = True
        self.cuda.Event.return_value.elapsed_time.return_value = 0.0

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        if name not in ("empty", "zeros", "randint"):
            return value
        return lambda *args, **options: value(*args, **{**options, "device": "cpu"})


# ---- the suites


class Suite:
    """A pytest plugin: it replaces names in the modules that are collected, and tells what came of it."""

    file: str  # of the tests
    source = "."  # where in the checkout the package lies

    def __init__(self, impl: Impl) -> None:
        self.impl = impl
        self.calls = 0
        self.notes: list[str] = []
        self.unserved: Counter[str] = Counter()

    def replace(self, module: Any) -> None:
        """Put our functions into the module of the tests."""
        raise NotImplementedError

    def reason(self, item: pytest.Item) -> str | None:
        """Why a test is not for us, or None."""
        raise NotImplementedError

    def ours(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its calls counted."""

        def counted(*args: Any, **options: Any) -> Any:
            self.calls += 1
            return function(*args, **options)

        return counted

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        parents = [item.getparent(pytest.Module) for item in items]
        for module in {parent.obj for parent in parents if parent is not None}:
            self.replace(module)
        chosen, left_out = [], []
        for item in items:
            reason = self.reason(item)
            if reason is None:
                chosen.append(item)
            else:
                left_out.append(item)
                self.unserved[reason] += 1
        config.hook.pytest_deselected(items=left_out)
        items[:] = chosen

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Generator[None, object, object]:
        before = self.calls
        result = yield
        if self.calls == before:
            pytest.fail("passed without calling us")
        return result

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        reports = terminalreporter.stats
        rows = [(len(reports.get(kind, [])), kind, "") for kind in ("passed", "failed", "error")]
        skipped = Counter(x.longrepr[2].removeprefix("Skipped: ") for x in reports.get("skipped", []))
        for kind, reasons in (("skipped", skipped), ("deselected", self.unserved)):
            rows += [(n, kind, reason) for reason, n in reasons.most_common()]
        terminalreporter.section(f"{self.file}: {self.calls} calls of ours")
        for n, kind, reason in rows:
            terminalreporter.write_line(f"{n:6} {kind:10}  {reason}".rstrip())
        for note in self.notes:
            terminalreporter.write_line(f"  note: {note}")


class TRL(Suite):
    file = "tests/test_utils.py"

    def replace(self, module: Any) -> None:
        utils: Any = importlib.import_module("trl.trainer.utils")
        apply = self.ours(trl_function(utils._ChunkedLogProbFunction, self.impl))
        # the tests call it themselves and by way of a model
        module._ChunkedLogProbFunction = utils._ChunkedLogProbFunction = SimpleNamespace(apply=apply)

        tests = module.TestChunkedLogProbFunction
        theirs = tests._reference_logprobs_and_entropy

        def oracle(test: Any, hidden: Tensor, weight: Tensor, *rest: Any) -> Any:
            return theirs(test, hidden.float(), weight.float(), *rest)

        tests._reference_logprobs_and_entropy = oracle
        self.notes.append(FLOAT32_ORACLE)

    def reason(self, item: pytest.Item) -> str | None:
        if "ChunkedLogProb" in item.nodeid:
            return None
        if "ChunkedLMHead" not in item.nodeid:
            return "tests something else"
        if "dummy_model" in item.nodeid:
            for node in item.listchain():  # the mark is for its neighbours
                node.own_markers = [mark for mark in node.own_markers if mark.name != "skipif"]
            return None
        return None if torch.cuda.is_available() else "needs a GPU, and models from the Hugging Face Hub"


class Liger(Suite):
    file = "test/chunked_loss/test_grpo_loss.py"
    source = "src"

    def replace(self, module: Any) -> None:
        loss = self.ours(partial(liger_loss, impl=self.impl))
        signature = inspect.signature(module.LigerFusedLinearGRPOFunction.forward)

        def function(*args: Any) -> Any:
            bound = signature.bind(None, *args)
            bound.apply_defaults()
            settings = SimpleNamespace(**bound.arguments)
            more = {name: bound.arguments[name] for name in ("vllm_is_ratio", "num_items_in_batch")}
            return loss(settings, *bound.args[1:12], **more)

        def logprob(hidden: Tensor, weight: Tensor, target: Tensor, **options: Any) -> Tensor:
            return linear_token_stats(hidden, weight, target, impl=self.impl, **options).logprob

        def but(theirs: type, **methods: Any) -> type:
            return type(theirs.__name__, (theirs,), methods)

        module.liger_fused_linear_grpo = function
        module.LigerFusedLinearGRPOLoss = but(module.LigerFusedLinearGRPOLoss, forward=loss)
        module.LigerFusedLinearPPOBase = but(
            module.LigerFusedLinearPPOBase, chunk_forward=staticmethod(self.ours(logprob))
        )

    def reason(self, item: pytest.Item) -> str | None:
        reasons = {
            "test_triton_grpo_loss": "wants the loss of each token, which we do not return",
            "test_reduce_grpo_loss": "tests Liger's own sum over per-token losses",
            "test_sequence_level_rejects": "tests which settings Liger's own class rejects",
        }
        arguments = getattr(getattr(item, "callspec", None), "params", {})
        if arguments.get("loss_type") == "luspo":
            return "Liger's luspo counts padding as tokens; ours, like TRL's, does not"
        return next((reason for name, reason in reasons.items() if item.name.startswith(name)), None)


class Verl(Suite):
    file = "tests/utils/test_linear_cross_entropy.py"

    def replace(self, module: Any) -> None:
        module.linear_cross_entropy = self.ours(partial(verl_stats, impl=self.impl))
        theirs = module.logprobs_from_logits

        def logprobs(logits: Tensor, labels: Tensor, **options: Any) -> Any:
            return theirs(logits=logits, labels=labels.view(logits.shape[:-1]), **options)

        module.logprobs_from_logits = logprobs  # without flash-attn it does not flatten labels itself
        if torch.cuda.is_available():
            return
        module.torch = TorchOnCPU()
        torch.compiler.set_stance("force_eager")  # what they compile are other implementations of theirs
        case, padding = module.TestLinearCrossEntropy, module.test_lce_non_divisible_vocab_padding
        generate = case.generate_hyper

        def generate_less(self: Any) -> None:
            generate(self)
            self.num_tokens //= 16
            self.vocab_size //= 16

        case.generate_hyper = generate_less
        less = {3584: 64, 512: 16}  # hidden units, of which one is not 0, and tokens, which are all equal
        constants = tuple(less.get(x, x) for x in padding.__code__.co_consts)
        padding.__code__ = padding.__code__.replace(co_consts=constants)
        self.notes.append("no GPU: a 16th of the tokens and of the words, and nothing compiled")

    def pytest_pycollect_makeitem(self, collector: pytest.Module, name: str, obj: Any) -> Any:
        """The class is driven by the file's main: a test for each of its cases."""
        if name != "TestLinearCrossEntropy":
            return None
        return [
            pytest.Function.from_parent(
                collector, name=f"{name}[{k}]", callobj=lambda k=k: obj(k).verify_correctness()
            )
            for k in range(collector.obj.MAX_TEST_CASES)
        ]

    def reason(self, item: pytest.Item) -> str | None:
        return None


SUITES = {"trl": TRL, "liger": Liger, "verl": Verl}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.helpers.peer_suites", allow_abbrev=False)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("path", type=Path, help="a checkout of that project")
    parser.add_argument("--impl", choices=get_args(Impl), default="auto", help="of our functions")
    options, of_pytest = parser.parse_known_args()
    suite = SUITES[options.suite](options.impl)
    checkout = options.path.resolve()
    if not (checkout / suite.file).is_file():
        parser.error(f"{checkout} has no {suite.file}")

    if options.impl == "triton" and not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    sys.dont_write_bytecode = True  # the checkout stays as it is
    sys.path[:0] = [str(checkout / suite.source), str(checkout)]
    for name in ("tests", "test"):  # theirs have the same name
        sys.modules.pop(name, None)
    quiet = ["-p", "no:cacheprovider", "-o", "log_cli=false"]
    return pytest.main([str(checkout / suite.file), *quiet, *of_pytest], plugins=[suite])


if __name__ == "__main__":
    sys.exit(main())
