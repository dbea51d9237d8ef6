"""A copy of a fused model, by whatever copies modules, is fused and computes with its own weights."""

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32, extract_model_from_parallel
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from aer_fast.integrations.transformers import fuse_lm_head, is_fused, next_token_target, unfuse_lm_head
from tests import ROOT
from tests.helpers.models import FAMILIES, V, build

pytestmark = pytest.mark.needs("transformers", "peft", "accelerate")
IDS = torch.arange(3, 17).view(2, 7)
TARGET = next_token_target(IDS)


def saved(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def saved_as_of_old(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file, _use_new_zipfile_serialization=False)
    file.seek(0)
    return torch.load(file, weights_only=False)


def replica(module: nn.Module) -> Any:
    """As DataParallel makes one, with parameters of its own."""
    made: Any = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        setattr(made, name, None if child is None else replica(child))
    for name, parameter in module._parameters.items():
        setattr(made, name, None if parameter is None else parameter.detach().clone())
    return made


def pickled(protocol: int) -> Callable[[Any], Any]:
    return lambda model: pickle.loads(pickle.dumps(model, protocol))


COPIES: dict[str, Callable[[Any], Any]] = {
    "torch.save": saved,
    "torch.save of old": saved_as_of_old,
    "deepcopy": copy.deepcopy,
    "replica": replica,
    **{f"pickle {protocol}": pickled(protocol) for protocol in (0, 2, 5)},
}


def with_lora(model: Any) -> Any:
    settings = LoraConfig(r=3, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    return get_peft_model(model, settings)


def with_a_trained_copy(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))


def unwrapped(model: Any) -> Any:
    """As accelerate leaves a model of mixed precision: with a method bound to it."""
    model._original_forward = model.forward
    mixed = torch.autocast("cpu", torch.bfloat16)(model.forward.__func__)
    model.forward = MethodType(convert_outputs_to_fp32(mixed), model)
    return extract_model_from_parallel(model, keep_fp32_wrapper=False)


AROUND: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda model: model,
    "lora": with_lora,
    "modules_to_save": with_a_trained_copy,
    "accelerate": unwrapped,
    "another head": lambda model: model.resize_token_embeddings(V + 4) and model,
}


def assert_own_weights(model: Any, made: Any) -> None:
    assert is_fused(made)
    inputs = {"target": TARGET, "advantage": 1.0}
    expected = model(IDS, **inputs)
    plain = model(IDS).logits
    out = made(IDS, **inputs)
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(made(IDS).logits, plain)
    with torch.no_grad():  # an embedding of zeros makes every logit 0
        for weight in (made.get_input_embeddings().weight, made.get_output_embeddings().weight):
            weight.zero_()
    assert made(IDS).logits.abs().max() == 0.0
    out = made(IDS, **inputs)
    torch.testing.assert_close(out.entropy[0, 0].item(), torch.tensor(out_features(made)).log().item())
    assert torch.equal(model(IDS, **inputs).loss, expected.loss)
    assert torch.equal(model(IDS).logits, plain)


def out_features(model: Any) -> float:
    return float(model.get_output_embeddings().weight.shape[0])


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("family", ["untied", "tied"])
def test_copies(family: str, how: str) -> None:
    model = build(family).eval()
    fuse_lm_head(model)
    assert_own_weights(model, COPIES[how](model))


@pytest.mark.parametrize("how", ["torch.save", "deepcopy", "replica"])
@pytest.mark.parametrize("around", AROUND)
def test_copies_of_what_was_done_since(around: str, how: str) -> None:
    model = build().eval()
    fuse_lm_head(model)
    model = AROUND[around](model).eval()
    expected = model(IDS, target=TARGET)
    made = COPIES[how](model)
    assert is_fused(made)
    assert torch.equal(made(IDS, target=TARGET).logprob, expected.logprob)
    if around == "accelerate" and how == "replica":
        return  # the method it left is bound to the first, fused or not
    with torch.no_grad():
        made.get_input_embeddings().weight.zero_()
    assert not torch.equal(made(IDS, target=TARGET).logprob, expected.logprob)
    assert torch.equal(model(IDS, target=TARGET).logprob, expected.logprob)


def test_they_load_in_a_fresh_process(tmp_path: Path) -> None:
    models = {family: build(family).eval() for family in FAMILIES}
    for model in models.values():
        fuse_lm_head(model)
    torch.save(models, tmp_path / "models.pt")
    script = """if True:
        import sys, torch
        models = torch.load(sys.argv[1] + "/models.pt", weights_only=False)
        ids = torch.arange(3, 17).view(2, 7)
        found = {k: (m(ids, target=ids).logprob.detach(), m(ids).logits) for k, m in models.items()}
        torch.save(found, sys.argv[1] + "/found.pt")
        from aer_fast.integrations.transformers import unfuse_lm_head
        for model in models.values():
            unfuse_lm_head(model)
            assert not any("aer" in k for m in model.modules() for k in m.__dict__)
    """
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for family, (logprob, logits) in torch.load(tmp_path / "found.pt").items():
        torch.testing.assert_close(logprob, models[family](IDS, target=IDS).logprob)
        torch.testing.assert_close(logits, models[family](IDS).logits)


def test_the_head_by_itself() -> None:
    model = build()
    fuse_lm_head(model)
    head = saved(model.lm_head)
    hidden = torch.randn(2, head.in_features)
    assert torch.equal(head(hidden), model.lm_head(hidden))


def test_a_model_within_data_parallel_is_found() -> None:
    model: Any = nn.DataParallel(build())
    fuse_lm_head(model)
    assert is_fused(model)
    assert is_fused(saved(model))
    unfuse_lm_head(model)


def test_it_keeps_its_name(tmp_path: Path) -> None:
    model = build()
    cls = type(model)
    fuse_lm_head(model)
    assert (str(type(model)), type(model).__name__) == (str(cls), cls.__name__)
    model.save_pretrained(tmp_path)
    assert model.config.architectures == [cls.__name__]
    again = type(model).from_pretrained(tmp_path)
    assert not is_fused(again)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    unfuse_lm_head(model)
    assert type(model) is cls
    assert type(model.lm_head) is nn.Linear


def doubled(self: Any, *args: Any, **kwargs: Any) -> Any:
    output = type(self).forward(self, *args, **kwargs)
    output.logits = 2 * output.logits
    return output


@pytest.mark.parametrize("how", ["deepcopy", "replica", "torch.save"])
def test_a_method_that_was_on_the_model_before(how: str) -> None:
    """It is bound to the copy, as the module's own would be."""
    model = build().eval()
    plain: Tensor = model(IDS).logits
    model.forward = MethodType(doubled, model)
    fuse_lm_head(model, check=False)
    made = COPIES[how](model)
    torch.testing.assert_close(made(IDS).logits, 2 * plain)
    with torch.no_grad():
        made.lm_head.weight.zero_()
    assert made(IDS).logits.abs().max() == 0.0
    torch.testing.assert_close(model(IDS).logits, 2 * plain)
    unfuse_lm_head(made)
    assert made.forward.__self__ is made


def test_a_head_of_two_models() -> None:
    """Each computes it in the dtype that it was fused for."""
    model = build()
    other = copy.deepcopy(model)
    other.lm_head = model.lm_head
    fuse_lm_head(model)
    fuse_lm_head(other, head_dtype=torch.float64)
    for _ in range(2):
        assert model(IDS, target=TARGET).logprob.dtype == torch.float32
        assert other(IDS, target=TARGET).logprob.dtype == torch.float64
