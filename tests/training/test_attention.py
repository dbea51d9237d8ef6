"""Packed rows without a mask: the sums of padded sequences, and all else as transformers' SDPA has it."""

import copy
import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import masking_utils
from transformers import modeling_flash_attention_utils as flash

from tests.helpers.attention import (
    CPU,
    EAGER,
    FAMILIES,
    PACKS,
    SIZES,
    SOME_LAYERS,
    WINDOWS,
    assert_same,
    build,
    gradients,
    settled,
)
from tests.helpers.trainers import small, trainer
from training import attention
from training.attention import PACKED, Packed, flash_arguments, name_of, packed_mask, packed_sdpa, settle
from training.batch import Batch, Part, Rollout, make_batch
from training.config import Config, check
from training.models import load_model
from training.policy import Policy, check_model

pytestmark = [pytest.mark.needs("training"), pytest.mark.host]
# one token, neighbours of one length, longer than a window and not
LENGTHS = [2, 9, 9, 4, 2, 7, 5, 5, 12]


def batches(lengths: list[int] = LENGTHS) -> tuple[Batch, Batch]:
    """The same sequences packed and padded; the first has a prompt and a response of one token each."""
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(3, 61, (length,), generator=generator).tolist() for length in lengths]
    cut = [Rollout(row[: len(row) // 3 or 1], row[len(row) // 3 or 1 :], False) for row in rows]
    packed, padded = (make_batch(cut, packing=packing, pad=0, device=CPU) for packing in (True, False))
    return packed, padded


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, tuple[int, ...] | None]]:
    """Of each call of SDPA: the sequences it is called with, and the shape of the mask."""
    seen: list[tuple[int, tuple[int, ...] | None]] = []
    function = torch.nn.functional.scaled_dot_product_attention

    def spy(query: Tensor, *factors: Tensor, **options: Any) -> Tensor:
        mask = options["attn_mask"]
        seen.append((len(query), None if mask is None else tuple(mask.shape[-2:])))
        return function(query, *factors, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    return seen


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_is_padded_and_no_mask_is_as_long_as_the_row(
    family: str, recompute: bool, masks: list[tuple[int, tuple[int, ...] | None]]
) -> None:
    model = build(family)
    packed, padded = batches()
    same = copy.deepcopy(model)
    same.set_attn_implementation("eager" if family in EAGER else "sdpa")
    expected = gradients(same, padded)
    model = settled(model)
    assert name_of(model) == ("eager" if family in EAGER else PACKED)
    if recompute:
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
        model.train()
    masks.clear()
    assert_same(gradients(model, packed), expected)
    layers = SIZES["num_hidden_layers"] * (1 + recompute)
    alone = [9, 4, 2, 7, 5, 12]  # what is left of the lengths when neighbours are run together
    assert len(masks) == (0 if family in EAGER else layers * (1 + len(alone)))
    assert {count for count, _ in masks} <= {1, 2}
    long = {
        None,
        *(
            (n, n)
            for n in LENGTHS
            if n > WINDOWS["sliding_window"] and "sliding_window" in FAMILIES[family][1]
        ),
    }
    assert {shape for _, shape in masks} == (set() if family in EAGER else long)


@pytest.mark.parametrize("lengths", [[2] * 5, [12], [2], [12, 2], [2, 3, 4]], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3 windows", "learned positions"])
def test_few_and_short_sequences(family: str, lengths: list[int]) -> None:
    model = build(family)
    packed, padded = batches(lengths)
    assert_same(gradients(settled(model), packed), gradients(model, padded))


def test_sequences_of_one_token() -> None:
    """They attend to themselves alone; one that is longer stands among them."""
    model, ids = build("qwen3 windows"), torch.tensor([[7, 8, 9, 10, 11, 12]])
    positions = torch.tensor([[0, 0, 0, 1, 2, 0]])
    alone = [model(ids[:, k:end]).logits for k, end in ((0, 1), (1, 2), (2, 5), (5, 6))]
    found = settled(model)(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(found, torch.cat(alone, 1), rtol=1e-5, atol=1e-5)
    nothing = settled(model)(ids, position_ids=torch.zeros_like(ids), use_cache=False).logits
    torch.testing.assert_close(nothing[:, 3:4], model(ids[:, 3:4]).logits, rtol=1e-5, atol=1e-5)


def test_a_rank_without_sequences_runs_the_model() -> None:
    batch = make_batch([], packing=True, pad=0, device=CPU)
    assert (batch.boundaries.tolist(), batch.longest) == ([0, 1], 1)
    logprob, grads = gradients(settled(build()), batch)
    assert logprob.shape == (0,)
    assert all(not grad.any() for grad in grads)


def test_bfloat16_is_as_close_as_padded() -> None:
    packed, padded = batches()
    model = build("qwen3 windows")

    def logprob(model: Any, batch: Batch, dtype: str) -> Tensor:
        found: Tensor = Policy(model, temperature=1.0, dtype=dtype, value_head=False)(batch).logprob
        return found

    with torch.no_grad():
        exact = logprob(model, padded, "float32")
        rounded = (logprob(model, padded, "bfloat16") - exact).norm()
        assert (logprob(settled(model), packed, "bfloat16") - exact).norm() < 2 * rounded


# ---- what is no packed row


@pytest.mark.parametrize("family", ["llama", "qwen3 windows", "gemma3", "learned positions"])
def test_padded_batches_and_generation_are_sdpa_bit_for_bit(family: str) -> None:
    """Before and after a packed step, with prompts that are padded on the left."""
    model, (packed, padded) = build(family), batches()
    ours = settled(model)
    ids, mask = torch.randint(3, 61, (3, 6)), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6, [0, 1, 1, 1, 1, 1]])
    greedy = {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask, "output_logits": True}
    greedy |= {"return_dict_in_generate": True, "eos_token_id": None, "pad_token_id": 0}
    for _ in range(2):
        expected, found = (x.eval().generate(ids, **greedy) for x in (model, ours))
        assert torch.equal(found.sequences, expected.sequences)
        assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))
        for x, y in zip(gradients(ours, padded)[1], gradients(model, padded)[1], strict=True):
            assert torch.equal(x, y)
        gradients(ours, packed)
        for x in (model, ours):
            x.zero_grad()


def mask_of(create: Callable[..., Any], positions: list[list[int]], **more: Any) -> Any:
    config = transformers.Qwen3Config(**SIZES | SOME_LAYERS)
    config.sliding_window, config.attention_chunk_size = 4, 3
    config._attn_implementation = PACKED
    rows, length = len(positions), len(positions[0])
    given = {"attention_mask": None, "position_ids": torch.tensor(positions)} | more
    if "cache_position" in inspect.signature(create).parameters:  # transformers 5.0
        given |= {"cache_position": torch.arange(length), "past_key_values": None}
    else:
        given["cache"] = None
    return create(config, torch.zeros(rows, length, 32), **given)


def row(*lengths: int, window: int | None = None) -> Packed:
    return Packed(tuple(map(Part, lengths)), window)


def test_a_packed_row_is_told_by_its_mask_function() -> None:
    rows = [[0, 1, 0, 0, 1, 2, 3, 4, 5, 0]]
    causal, sliding = masking_utils.create_causal_mask, masking_utils.create_sliding_window_causal_mask
    assert mask_of(causal, rows) == row(2, 1, 6, 1)
    assert mask_of(sliding, rows) == row(2, 1, 6, 1, window=4)
    assert mask_of(sliding, [[0, 1, 2, 3, 0]]) == row(4, 1)  # none is longer than the window
    assert mask_of(causal, [[0, 1, 2, 3]]) is None  # one sequence: SDPA's causal flag


def test_a_pattern_that_is_not_causal_keeps_its_mask() -> None:
    """The overlays of images and prefixes, both ways, more rows than one, and a padding mask."""
    rows = [[0, 1, 2, 0, 1, 2]]
    causal = masking_utils.create_causal_mask
    assert mask_of(causal, rows, or_mask_function=lambda b, h, q, k: k < 2)[0, 0, 0].tolist()[1]
    ahead = lambda b, h, q, k: q // 3 == k // 3  # noqa: E731
    given: dict[str, Any] = {"batch_size": 1, "kv_length": 6, "allow_is_causal_skip": False}
    if "cache_position" in inspect.signature(masking_utils.sdpa_mask).parameters:  # transformers 5.0
        given["cache_position"] = torch.arange(6)
    else:
        given |= {"q_length": 6, "device": "cpu"}
    assert isinstance(packed_mask(mask_function=ahead, **given), Tensor)
    holes = lambda b, h, q, k: (k <= q) & ((q - k) % 3 != 2)  # noqa: E731
    assert isinstance(packed_mask(mask_function=holes, **given), Tensor)
    assert isinstance(mask_of(causal, rows, and_mask_function=lambda b, h, q, k: k != 0), Tensor)
    padded = torch.tensor([[True] * 5 + [False]])
    assert isinstance(
        packed_mask(mask_function=masking_utils.causal_mask_function, attention_mask=padded, **given), Tensor
    )
    both = mask_of(causal, rows * 2)
    assert both.shape == (2, 1, 6, 6)
    assert not both[:, :, 3:, :3].any()
    assert mask_of(causal, rows, attention_mask=padded).shape == (1, 1, 6, 6)


@pytest.mark.parametrize("name", ["softcap", "position_bias", "s_aux"])
def test_what_sdpa_cannot_do_is_refused(name: str) -> None:
    x = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match=f"attention 'packed_sdpa' has no {name}"):
        packed_sdpa(torch.nn.Module(), x, x, x, row(2, 2), **{name: 2.0})


# ---- who gets it


@pytest.mark.parametrize(
    ("change", "expected"),
    [({}, PACKED), ({"packing": False}, "sdpa"), ({"attention": PACKED, "packing": False}, PACKED)],
    ids=str,
)
def test_on_a_cpu_packing_takes_it(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    build().save_pretrained(tmp_path)
    model = load_model(str(tmp_path), replace(PACKS, **change), CPU)
    assert name_of(model) == expected
    model.save_pretrained(tmp_path / "again")
    assert PACKED not in (tmp_path / "again" / "config.json").read_text()


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_another_attention_by_name(tmp_path: Path, name: str) -> None:
    build().save_pretrained(tmp_path)
    assert name_of(load_model(str(tmp_path), replace(PACKS, attention=name), CPU)) == name


def test_a_model_that_cannot_have_it_says_so(tmp_path: Path) -> None:
    build("gemma2").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="attention 'packed_sdpa' can't be that of Gemma2ForCausalLM"):
        load_model(str(tmp_path), replace(PACKS, attention=PACKED), CPU)
    with pytest.raises(ValueError, match="Gemma2ForCausalLM"):  # transformers refuses it, or we do
        load_model(str(tmp_path), replace(PACKS, attention="sdpa"), CPU)
    with pytest.raises(ValueError, match="attention 'flash_attention_2' needs a GPU"):
        load_model(str(tmp_path), replace(PACKS, attention="flash_attention_2", dtype="bfloat16"), CPU)


def test_a_body_that_reads_its_masks_keeps_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those say of themselves that flash attention cannot serve; by force it is refused before a run."""
    model = build()
    monkeypatch.setattr(type(model), "_supports_flash_attn", False)
    assert name_of(settled(model)) == "sdpa"
    forward = model.model.layers[0].forward

    def reads(*args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        mask = None if attention_mask is None else attention_mask[:, :, :, :]
        return forward(*args, attention_mask=mask, **kwargs)

    monkeypatch.setattr(model.model.layers[0], "forward", reads)
    policy = Policy(model, temperature=1.0, dtype="float32", value_head=False)
    check_model(policy, row=64, pad=0, name="odd")
    model.set_attn_implementation(PACKED)
    with pytest.raises(ValueError, match="odd takes no packed sequences; use --no-packing, or try --att"):
        check_model(policy, row=64, pad=0, name="odd")


def test_sequences_that_run_together_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(settled(build()), temperature=1.0, dtype="float32", value_head=False)
    check_model(policy, row=64, pad=0, name="odd")
    apart = attention._packed

    def together(**given: Any) -> Packed | None:
        found = apart(**given)
        return None if found is None else row(sum(part.length for part in found.parts))

    monkeypatch.setattr(attention, "_packed", together)
    with pytest.raises(ValueError, match="does not keep packed sequences apart; use --no-packing, or try"):
        check_model(policy, row=64, pad=0, name="odd")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [0.02, 0.3])
def test_a_state_that_goes_on_into_the_next_sequence_is_noticed(dtype: str, size: float) -> None:
    """However little it changes, and whatever bfloat16 rounds: here a convolution's, which has no mask."""
    torch.manual_seed(3)
    layers = {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}
    model = settled(transformers.Lfm2ForCausalLM(transformers.Lfm2Config(**SIZES | layers)))
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=size)
    policy = Policy(model, temperature=1.0, dtype=dtype, value_head=False)
    with pytest.raises(ValueError, match=r"odd: .* packed sequence.*; use --no-packing"):
        check_model(policy, row=64, pad=0, name="odd")


def test_what_depends_on_the_whole_batch_is_no_such_state() -> None:
    """As rounding does in a mixture of experts: a padded batch shows it, too."""
    model = settled(build("qwen2 moe windows"))
    model.model.norm.register_forward_hook(lambda module, given, out: out * (1 + 1e-5 * out.sum().sin()))
    policy = Policy(model, temperature=1.0, dtype="bfloat16", value_head=False)
    check_model(policy, row=64, pad=0, name="odd")
    assert policy.shares


def test_a_mixture_of_experts_shares_whatever_bfloat16_rounds() -> None:
    """An expert's product of more tokens may round otherwise, and a padded batch may not show it."""
    settings = SIZES | {"hidden_size": 512, "intermediate_size": 512, "initializer_range": 0.02}
    for seed in (2, 3):
        torch.manual_seed(seed)
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**settings, num_local_experts=8))
        policy = Policy(settled(model), temperature=1.0, dtype="bfloat16", value_head=False)
        check_model(policy, row=256, pad=0, name="odd")
        assert policy.shares


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_looks_at_the_place_in_the_row_is_noticed_where_it_matters(dtype: str) -> None:
    """ALiBi of Falcon's is made of places in the row, and rounded: near its start that changes nothing."""
    names = ("vocab_size", "hidden_size", "num_attention_heads")
    settings = {name: SIZES[name] for name in names} | {"num_hidden_layers": 2, "alibi": True}
    torch.manual_seed(1)
    model = transformers.FalconForCausalLM(transformers.FalconConfig(**settings))
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.2)
    policy = Policy(settled(model), temperature=1.0, dtype=dtype, value_head=False)
    check_model(policy, row=64, pad=0, name="odd")
    with pytest.raises(ValueError, match="odd: its attention does not keep packed sequences apart"):
        check_model(policy, row=1024, pad=0, name="odd")


def test_a_softcap_is_not_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by a transformers that gives such a model its SDPA, either."""
    model = build("gemma2")
    monkeypatch.setattr(type(model), "_supports_sdpa", True)
    for auto in (PACKS, replace(PACKS, packing=False)):
        model.set_attn_implementation("sdpa")
        assert name_of(settled(model, auto)) == "eager"
    for name in ("sdpa", PACKED):
        with pytest.raises(ValueError, match=f"attention '{name}' can't be that of Gemma2ForCausalLM"):
            settled(model, replace(PACKS, attention=name))


class Asked:
    """A model that keeps what it is asked for."""

    _supports_flash_attn = True

    def __init__(self, **more: Any) -> None:
        self.asked: list[str] = []
        text = SimpleNamespace(_attn_implementation="sdpa")
        self.config = SimpleNamespace(get_text_config=lambda: text)
        vars(self).update(more)

    def set_attn_implementation(self, name: str) -> None:
        self.asked.append(name)


def test_auto_takes_flash_attention_where_version_2_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, config = torch.device("cuda"), replace(PACKS, dtype="bfloat16")

    def asked(config: Config = config, **more: Any) -> list[str]:
        model = Asked(**more)
        settle(model, config, gpu)
        return model.asked

    # what flash-attn-4 leaves: a folder that can be imported, and holds no version 2
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert asked() == []
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: True)
    assert asked() == ["flash_attention_2"]
    assert asked(replace(config, dtype="float32")) == []
    assert asked(replace(config, attention="sdpa")) == []
    assert asked(_supports_flash_attn=False) == []
    assert asked(_compatible_flash_implementations=["owner/kernel"]) == []  # it would be downloaded
    assert attention.requested(replace(config, attention="flash_attention_3"), gpu) == "flash_attention_3"
    assert attention.requested(replace(config, attention="owner/kernel"), CPU) == "owner/kernel"


@pytest.mark.parametrize(
    "name", ["flash", "flash_attention_5", "flash_attn", "", "a/b/c", "./kernel", "x y/z"]
)
def test_an_unknown_attention_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=r"attention must be one of .* or a kernel of the hub") as error:
        check(replace(PACKS, attention=name))
    assert str(error.value).endswith(repr(name))


def test_flash_attention_needs_bfloat16() -> None:
    for name in ("flash_attention_2", "flash_attention_4"):
        check(replace(PACKS, attention=name, dtype="bfloat16"))
        with pytest.raises(ValueError, match=f"attention '{name}' needs dtype 'bfloat16', got 'float32'"):
            check(replace(PACKS, attention=name))
    for name in ("kernels-community/flash-attn2", "owner/name@v1:function", PACKED):
        check(replace(PACKS, attention=name))


# ---- flash attention's arguments, as a stand-in records them


@pytest.fixture
def varlen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """transformers' own way to flash_attn_varlen_func, and in its place one that computes it on a CPU."""
    seen: list[dict[str, Any]] = []

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float = 1.0,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        deterministic: bool = False,
    ) -> Tensor:
        seen.append({key: value for key, value in locals().items() if key not in ("q", "k", "v", "seen")})
        parts = []
        for begin, end in zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist()[1:]):
            groups = q.shape[1] // k.shape[1]
            one, key, value = q[begin:end], *(x[begin:end].repeat_interleave(groups, 1) for x in (k, v))
            score = torch.einsum("qhc,khc->hqk", one, key) * softmax_scale
            score = softcap * (score / softcap).tanh() if softcap else score
            allowed = torch.ones(score.shape[1:]).tril().bool()
            if window_size[0] >= 0:
                allowed = allowed.triu(-window_size[0])
            weight = score.masked_fill(~allowed, -torch.inf).softmax(-1)
            parts.append(torch.einsum("hqk,khc->qhc", weight, value))
        return torch.cat(parts)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("this was to be known")

    monkeypatch.setattr(flash, "_loaded_implementation", "flash_attention_2", raising=False)
    monkeypatch.setattr(flash, "_flash_fn", never)
    monkeypatch.setattr(flash, "_flash_varlen_fn", flash_attn_varlen_func)
    process = flash._lazy_define_process_function(flash_attn_varlen_func)
    monkeypatch.setattr(flash, "_process_flash_kwargs_fn", process)
    monkeypatch.setattr(flash, "_prepare_from_posids", never)
    return seen


@pytest.mark.parametrize("family", ["llama", "qwen3 windows", "gemma2", "gemma3", "phi"])
def test_flash_attention_is_told_the_boundaries(family: str, varlen: list[dict[str, Any]]) -> None:
    """int32 boundaries and whole numbers, in every layer; windows and softcaps with them. With another number
    than Python's transformers, or its kernel, would wait for the device."""
    model, (packed, padded) = build(family), batches()
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    expected = gradients(eager, padded)
    model.config._attn_implementation = "flash_attention_2"
    assert_same(gradients(model, packed), expected)
    assert len(varlen) == SIZES["num_hidden_layers"]
    for given in varlen:
        for name in ("cu_seqlens_q", "cu_seqlens_k"):
            assert given[name].dtype == torch.int32
            assert given[name].tolist() == [0, 2, 11, 20, 24, 26, 33, 38, 43, 55]
        assert type(given["max_seqlen_q"]) is type(given["max_seqlen_k"]) is int
        assert (given["max_seqlen_q"], given["max_seqlen_k"]) == (12, 12)
        assert given["causal"]
    windows = {given["window_size"] for given in varlen}
    assert windows == ({(-1, -1), (3, 3)} if "window" in family or "gemma" in family else {(-1, -1)})
    assert {given["softcap"] for given in varlen} == {2.0 if family == "gemma2" else 0.0}


def test_only_flash_attention_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, padded = batches()
    model = build()
    assert flash_arguments(model.model, packed) == {}
    model.config._attn_implementation = "owner/flash-kernel"
    told = flash_arguments(model.model, packed)
    assert told["cu_seq_lens_q"] is told["cu_seq_lens_k"] is packed.boundaries
    given: list[dict[str, Any]] = []

    def forward(input_ids: Tensor, **kwargs: Any) -> Any:
        given.append(kwargs)
        return SimpleNamespace(last_hidden_state=torch.zeros(*input_ids.shape, 32))

    policy = Policy(model, temperature=1.0, dtype="float32", value_head=False)
    with monkeypatch.context() as patch:
        patch.setattr(model.model, "forward", forward)
        policy(padded)
        policy(packed)
    assert [told.keys() & kwargs.keys() for kwargs in given] == [set(), told.keys()]
    narrow = lambda input_ids, position_ids: None  # noqa: E731
    monkeypatch.setattr(model.model, "forward", narrow)
    assert flash_arguments(model.model, packed) == {}  # it would not take them


# ---- whole steps


STEPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lora": {"lora_rank": 2},
    "recomputed": {"activation_checkpointing": True},
    "recomputed lora": {"activation_checkpointing": True, "lora_rank": 2},
    "reference": {"kl_coef": 0.1},
    "teacher": {"teacher": "carry(digits=2, steps=5, batch=8)"},
    "value head": {"advantage": "gae"},
}


@pytest.mark.parametrize("kind", STEPS)
def test_steps_are_those_of_padded_batches(cache: Path, tmp_path: Path, kind: str) -> None:
    """Two of them, the second sampled by the policy that the first has trained."""
    found = []
    for packing in (True, False):
        changes = STEPS[kind] | {
            "packing": packing,
            "micro_tokens": 60,
            "minibatches": 2,
            "max_new_tokens": 6,
        }
        made = trainer(small(cache, tmp_path / str(packing), **changes))
        policies = [made.policy, made.learner.reference, made.teacher]
        for policy in policies:
            if policy is not None:
                assert name_of(policy.causal_lm) == (PACKED if packing else "sdpa")
        assert (made.teacher is not None, made.learner.reference is not None) == (
            kind == "teacher",
            kind == "reference",
        )
        found.append([made.step(1), made.step(2)])
    for one, other in zip(*found, strict=True):
        names = {"loss", "grad_norm", "entropy", "divergence", "kl", "value_loss", "tokens"} & one.keys()
        assert {"loss", "grad_norm", "entropy"} <= names
        for name in names:
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name
