"""transformers: a causal LM whose forward returns the loss, without logits.

    fuse_lm_head(model)
    out = model(
        input_ids, attention_mask=mask, target=target, old_logprob=..., advantage=...
    )
    out.loss.backward()

The model's body runs as always. Its LM head is called inside the model's own forward, and computes the loss
from the hidden states. So what gathers weights around a module's forward (DDP, FSDP2 on the model or on the
head) works as it does for logits.

A loop that has hidden states of its own (packed rows, a value head beside the LM head) takes the parts
instead: `check_lm_head` once, then `lm_body` and `head_loss`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aer_fast import linear_distill_loss, linear_ppo_loss, linear_token_loss, linear_token_stats
from aer_fast.integrations._forwards import is_covered, put_forward, settings_of, take_forward
from aer_fast.integrations._versions import require
from aer_fast.reference import IGNORE

require("transformers")

__all__ = [
    "FusedOutput",
    "LossInputs",
    "causal_lm",
    "check_lm_head",
    "fuse_lm_head",
    "head_loss",
    "head_shape",
    "is_fused",
    "lm_body",
    "next_token_target",
    "unfuse_lm_head",
]

_FIXED = ("hidden", "weight", "bias", "softcap")  # what the model itself says


def _keywords(function: Callable[..., Any]) -> frozenset[str]:
    """The arguments of a loss that a caller of the model may give."""
    names = inspect.signature(function).parameters.keys()
    return frozenset(names) - frozenset(_FIXED)


_STATS = _keywords(linear_token_stats)
_PPO = _keywords(linear_ppo_loss)
_OBJECTIVE = _keywords(linear_token_loss)
_DISTILL = _keywords(linear_distill_loss)
_ALL = _STATS | _PPO | _OBJECTIVE | _DISTILL


class FusedOutput(NamedTuple):
    """What a fused model returns. Per-token tensors are [B, T], as the target.

    Attributes:
        loss: of `linear_ppo_loss`, `linear_token_loss` or `linear_distill_loss`; None where only statistics
            were asked for.
        logprob: log-probability of the target. With gradients where there is no loss, else detached.
        entropy: entropy of the policy, in nats. With gradients where there is no loss, else detached.
        metrics: those of the loss; empty where there is none.
        aux_loss: load-balancing loss of a mixture of experts, if router logits are asked for. It is not part
            of ``loss``.
        divergence: from a teacher, detached; None without one.
    """

    loss: Tensor | None
    logprob: Tensor
    entropy: Tensor
    metrics: dict[str, Tensor]
    aux_loss: Tensor | None = None
    divergence: Tensor | None = None


class LossInputs:
    """The inputs of the loss as one object: ``model(input_ids, loss_inputs=LossInputs(target=..., ...))``.

    This does the same as giving them one by one, but what wraps the model does not see the tensors. FSDP2
    with mixed precision rounds every float32 tensor among a module's arguments to bfloat16, and with an
    output_dtype, which accelerate sets, what the module returns as well. ``result`` is the `FusedOutput`
    before such rounding.

    The names given decide which loss it is:

        advantage          linear_ppo_loss
        objective          linear_token_loss, with token_tensors, a sequence of tensors
        ref_hidden         linear_distill_loss, if neither advantage nor objective is given
        none of these      linear_token_stats

    A teacher whose logits are scaled gets a ref_temperature divided by its scale, and a ref_softcap, if it
    has one, divided likewise. Beside ``advantage`` it is a reference policy instead: its logits have the
    scale and the softcap of the model. ref_hidden may be narrower than ref_weight, as autocast leaves it.

    Args:
        **inputs: keyword arguments of that function, without hidden, weight, bias and softcap. ``target`` is
            always needed.

    Raises:
        ValueError: if ``target`` is missing; if names do not belong together; or if a log-probability is in
            half precision, whose rounding is of the order of the clip range.
    """

    def __init__(self, **inputs: Any) -> None:
        if inputs.get("target") is None:
            raise ValueError(f"target is missing; got {', '.join(sorted(inputs)) or 'no inputs'}")
        if "objective" in inputs:
            kind, known = "linear_token_loss (objective is given)", _OBJECTIVE
        elif "advantage" in inputs:
            kind, known = "linear_ppo_loss (advantage is given)", _PPO
        elif "ref_hidden" in inputs:
            kind, known = "linear_distill_loss (ref_hidden is given)", _DISTILL
        else:
            kind, known = "linear_token_stats (no advantage, objective or ref_hidden is given)", _STATS
        unknown = sorted(set(inputs) - known)
        if unknown:
            raise ValueError(
                f"{', '.join(unknown)}: not an input of {kind}; it takes {', '.join(sorted(known))}"
            )
        if "ref_hidden" in inputs and inputs.get("ref_weight") is None:
            raise ValueError("ref_weight is missing: it is the head that ref_hidden is multiplied with")
        for name in ("old_logprob", "ref_logprob"):
            value = inputs.get(name)
            if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16):
                raise ValueError(
                    f"{name} must be float32, got {value.dtype}. FSDP2's mixed precision casts a model's "
                    "arguments: give them as one loss_inputs=LossInputs(...)"
                )
        self.inputs = inputs
        self.result: FusedOutput | None = None

    def loss_of(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, shape: HeadShape) -> FusedOutput:
        """Call the loss.

        Args:
            hidden: [..., D].
            weight: [V, D], of the head.
            bias: [V], of the head, or None.
            shape: of the head. It goes into the softcap and the temperature of the loss.

        Returns:
            A `FusedOutput`.
        """
        device = hidden.device
        given: dict[str, Any] = {
            k: x.to(device) if isinstance(x, Tensor) else x for k, x in self.inputs.items()
        }
        target = given.pop("target")
        if given.get("ref_hidden") is not None:
            ref_hidden, ref_weight = given["ref_hidden"], given["ref_weight"]
            given["ref_hidden"] = ref_hidden.to(torch.promote_types(ref_hidden.dtype, ref_weight.dtype))
        softcap, scale = shape
        # softcap · tanh(s x / softcap) / τ: with softcap / s and τ / s nothing is multiplied, and rounded
        given["temperature"] = given.get("temperature", 1.0) / scale
        options: dict[str, Any] = {"bias": bias, "softcap": None if softcap is None else softcap / scale}
        if "objective" in given:
            objective = given.pop("objective")
            tensors = [x.to(device) if isinstance(x, Tensor) else x for x in given.pop("token_tensors", ())]
            out = linear_token_loss(hidden, weight, target, objective, *tensors, **given, **options)
        elif "advantage" in given:
            given.setdefault("old_logprob", None)
            out = linear_ppo_loss(hidden, weight, target, **given, **options)
        elif "ref_hidden" in given:
            if given.get("ref_temperature") is None:
                given["ref_temperature"] = self.inputs.get("temperature", 1.0)
            found = linear_distill_loss(hidden, weight, target=target, **given, **options)
            assert found.logprob is not None
            return FusedOutput(
                found.loss, found.logprob, found.entropy, found.metrics, divergence=found.divergence
            )
        else:
            logprob, entropy = linear_token_stats(hidden, weight, target, **given, **options)
            # no views: FSDP2 hangs its hooks on these, which a change in place of a view would lose
            return FusedOutput(None, logprob.clone(), entropy.clone(), {})
        return FusedOutput(out.loss, out.logprob, out.entropy, out.metrics)


class HeadShape(NamedTuple):
    """How logits come of the head: softcap · tanh(scale · head(hidden) / softcap), or scale · head(hidden).

    Attributes:
        softcap: positive; None for no softcap.
        scale: of the head's output.
    """

    softcap: float | None
    scale: float


def head_shape(config: Any) -> HeadShape:
    """The softcap and the scale of a model's logits, from its configuration.

        logits = softcap · tanh(scale · head(hidden) / softcap)

    Without a softcap logits = scale · head(hidden).

    Args:
        config: of the model, as transformers has it.

    Returns:
        (softcap, scale), a named tuple; softcap is None where there is none.
    """
    text = config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling"):
        value = getattr(text, name, None)
        if isinstance(value, (int, float)):
            divides = name == "logits_scaling" and text.model_type != "hyperclovax"
            scale *= 1 / value if divides else value
    names = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return HeadShape(next((x for name in names if (x := getattr(text, name, None))), None), scale)


def next_token_target(input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """What each position predicts: the next token, or -100 where there is none to predict.

    Args:
        input_ids: [B, T].
        mask: [B, T], 0 for tokens that are not to be predicted, such as prompt and padding. None: all are.

    Returns:
        Targets [B, T], int64 as input_ids: input_ids shifted by one, -100 at the end and where ``mask`` is 0
        for the token that is predicted.

    Examples:
        >>> next_token_target(torch.tensor([[5, 6, 7]]), torch.tensor([[0, 0, 1]]))
        tensor([[-100,    7, -100]])
    """
    target = torch.full_like(input_ids, IGNORE)
    target[:, :-1] = input_ids[:, 1:]
    if mask is not None:
        target[:, :-1] = target[:, :-1].where(mask[:, 1:] != 0, IGNORE)
    return target


class _Settings(NamedTuple):
    """What a fused model and its head know. The head knows nothing of the model: a copy of it stays small."""

    shape: HeadShape
    head_dtype: torch.dtype | None


def fuse_lm_head(model: Any, *, head_dtype: torch.dtype | None = None, check: bool = True) -> None:
    """Make a causal LM of transformers return the loss instead of logits.

    Afterwards ``model(input_ids, ..., target=target, <inputs of the loss>)`` runs the body and the fused
    head, and returns a `FusedOutput`. Which loss it is depends on the inputs:

        advantage                  that of linear_ppo_loss
        objective, token_tensors   that of linear_token_loss; token_tensors is a sequence
        ref_hidden, ref_weight     that of linear_distill_loss, from a teacher
        none of these              no loss: logprob and entropy, with gradients

    Without ``target`` the model is called as before: generation is unchanged. `unfuse_lm_head` undoes it.
    Copies of the model are fused, too, and compute with their own weights: those of
    ``torch.save(model, file)`` and any other pickle, of deepcopy and of DataParallel.

    Tensors of the loss are [B, T] as input_ids. Position t is judged by ``target[:, t]``, the token that
    follows: see `next_token_target`. With ``logits_to_keep`` they cover only the positions kept, and the
    others cost nothing; as in transformers it is an int k for the last k positions, a slice or an index
    tensor.

    Tied heads, biases, softcaps and logit scales are taken from the model. LoRA may be on the body and on the
    head; on the head, its gradient costs as much as training the whole head would.

    Call this before or after wrapping in PEFT, DDP or FSDP2, and before accelerate's ``prepare``. Under FSDP2
    with mixed precision give the loss's tensors as one `LossInputs`. The Trainer of transformers drops
    columns that it does not find in the signature of the model's forward: give it
    ``remove_unused_columns=False``.

    Args:
        model: a causal LM, or one wrapped by PEFT, DDP or torch.compile.
        head_dtype: compute the head in this dtype, outside autocast. None: in the dtype it has.
        check: run the model on a few tokens, and compare its logits with what the fused head assumes. Without
            this check, an architecture that does something else to its logits is trained on the wrong ones,
            and a forward that somebody else has wrapped (in autocast, for example) loses what the wrapper
            does.

    Raises:
        ValueError: if the model's head cannot be fused, with the reason.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
        >>> fuse_lm_head(model)
        >>> ids = torch.ones(2, 4, dtype=torch.long)
        >>> advantage = torch.tensor([[1.0], [-1.0]])
        >>> out = model(ids, target=next_token_target(ids), advantage=advantage, entropy_coef=0.01)
        >>> out.loss.backward()
        >>> out.entropy.shape
        torch.Size([2, 4])
    """
    causal = causal_lm(model)
    name = type(causal).__name__
    if settings_of(causal) is not None:
        raise ValueError(f"{name} has a fused head already; unfuse_lm_head(model) comes first")
    _refuse(model)
    if check and hasattr(causal, "_original_forward"):
        raise ValueError(
            f"accelerate has wrapped the forward of {name}, for mixed precision: fuse it before "
            "accelerator.prepare"
        )
    if check and head_dtype is None:
        _try(causal, None)
    settings = _Settings(head_shape(causal.config), head_dtype)
    put_forward(causal, _model_forward, settings)
    put_forward(causal.get_output_embeddings(), _head_forward, settings)


def unfuse_lm_head(model: Any) -> None:
    """Undo `fuse_lm_head`: the model is as it was.

    Args:
        model: a fused model, wrapped or not.

    Raises:
        ValueError: if the model is not fused, or its forward has been replaced since.
    """
    causal = causal_lm(model)
    if settings_of(causal) is None:
        raise ValueError(f"{type(causal).__name__} has no fused head")
    for module in (causal, causal.get_output_embeddings()):
        if settings_of(module) is not None and is_covered(module):
            name = type(module).__name__
            raise ValueError(f"{name}.forward was replaced since it was fused; undo that first")
    for module in causal.modules():  # with heads that others have replaced or wrapped since
        if settings_of(module) is not None:
            take_forward(module)


def is_fused(model: Any) -> bool:
    """Whether `fuse_lm_head` has been called on the model, and not undone.

    Args:
        model: any object; what is no module is not fused.

    Returns:
        True or False.

    Raises:
        ValueError: if it is a module and no causal LM.
    """
    return isinstance(model, nn.Module) and settings_of(causal_lm(model)) is not None


def check_lm_head(model: Any, *, autocast: torch.dtype | None = None) -> None:
    """Check that `head_loss` computes what the model's own logits give, as `fuse_lm_head` does.

    The model runs on a few tokens. Its logits are compared with softcap · tanh(scale · head / softcap), once
    as they are and once with large numbers in the place of the head's output.

    Args:
        model: a causal LM, or one wrapped by PEFT, DDP or torch.compile.
        autocast: run it under autocast to this dtype, as it will be trained. None: in the dtype it has.

    Raises:
        ValueError: if the head cannot be computed, with the reason: no causal LM, an encoder-decoder, no head
            or no body, learned prompts, a quantised head, an adapter on it that is not plain LoRA, or logits
            that are not as assumed.
    """
    _refuse(model)
    _try(causal_lm(model), autocast)


def head_loss(
    model: Any, hidden: Tensor, inputs: LossInputs, *, head_dtype: torch.dtype | None = None
) -> FusedOutput:
    """The loss, or the statistics, of a causal LM from its hidden states, without logits.

        head(hidden) = hidden · weightᵀ + bias
        logits = softcap · tanh(scale · head(hidden) / softcap)

    Weight (tied or not), bias, LoRA on the head, softcap and scale are the model's own. hidden is moved to
    the head's device. The model need not be fused. The weights of its head must be in place: under FSDP2 call
    this inside the forward of a module that gathers them.

    Args:
        model: a causal LM that `check_lm_head` accepts, or one wrapped by PEFT, DDP or torch.compile.
        hidden: [..., D], last hidden states of `lm_body`, or any rows of them.
        inputs: what the loss takes besides. Its tensors are [...], as target.
        head_dtype: compute the head in this dtype, outside autocast. None: in the dtype it has.

    Returns:
        A `FusedOutput`, which is also ``inputs.result``.

    Raises:
        ValueError: if the head cannot be computed so, with the reason.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
        >>> ids = torch.ones(2, 4, dtype=torch.long)
        >>> hidden = lm_body(model)(ids).last_hidden_state
        >>> inputs = LossInputs(target=ids[:, 1:], advantage=torch.ones(2, 1), entropy_coef=0.01)
        >>> head_loss(model, hidden[:, :-1], inputs).loss.backward()
        >>> inputs.result.entropy.shape
        torch.Size([2, 3])
    """
    causal = causal_lm(model)
    return _head_loss(causal.get_output_embeddings(), hidden, inputs, head_shape(causal.config), head_dtype)


def causal_lm(model: Any) -> Any:
    """The causal LM of transformers itself, without what is wrapped around it.

    Args:
        model: the causal LM, or PEFT, DDP, DataParallel or torch.compile around it.

    Returns:
        The causal LM.

    Raises:
        ValueError: if there is none.
    """
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(model, torch._dynamo.OptimizedModule) if "torch._dynamo" in sys.modules else False:
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            break
    if not all(hasattr(model, x) for x in ("config", "base_model", "get_output_embeddings")):
        raise ValueError(f"model must be a causal LM of transformers, got {type(model).__name__}")
    return model


def lm_body(model: Any) -> Any:
    """A causal LM without its head: ``lm_body(model)(input_ids, ...).last_hidden_state`` goes into the head.

    It is the model's ``base_model``; or its ``model``, for models whose base_model is themselves.

    Args:
        model: a causal LM, or one wrapped by PEFT, DDP or torch.compile.

    Returns:
        The body, a module.

    Raises:
        ValueError: if there is no causal LM.
    """
    causal = causal_lm(model)
    body = causal.base_model
    return getattr(causal, "model", body) if body is causal else body


def _model_forward(
    self: Any, original: Callable[..., Any], settings: _Settings, *args: Any, **kwargs: Any
) -> Any:
    """The forward of a fused model: the original one unless it is given inputs of the loss."""
    named = {k: kwargs.pop(k) for k in list(kwargs) if k in _ALL}
    inputs: LossInputs | None = kwargs.pop("loss_inputs", None)
    if inputs is None and not named:
        return original(*args, **kwargs)
    if inputs is None:
        inputs = LossInputs(**named)
    elif not isinstance(inputs, LossInputs):
        raise ValueError(f"loss_inputs must be a LossInputs, got {type(inputs).__name__}")
    elif named:
        raise ValueError(f"{', '.join(sorted(named))}: give all inputs of the loss in loss_inputs, or none")
    for name in ("labels", "shift_labels"):
        if kwargs.pop(name, None) is not None:
            raise ValueError(
                f"{name}: a fused model takes target, which is shifted already (next_token_target)"
            )
    keep = kwargs.pop("logits_to_keep", 0)
    kwargs.pop("num_items_in_batch", None)
    kwargs |= {"use_cache": False, "return_dict": True}
    if getattr(self.config.get_text_config(), "output_router_logits", False):
        kwargs.setdefault("output_router_logits", True)
    outputs = lm_body(self)(*args, **kwargs)
    hidden = outputs.last_hidden_state
    if not isinstance(keep, int):
        hidden = hidden[:, keep]
    elif keep > 0:
        hidden = hidden[:, -keep:]
    head = self.get_output_embeddings()
    if settings_of(head) != settings:  # PEFT and others may have replaced it since
        _head_parts(head, None)
        put_forward(head, _head_forward, settings)
    if getattr(head, "_distribute_module_applied", False):  # its hooks are for logits
        result = _head_loss(head, hidden, inputs, *settings)
    else:
        result = head(hidden, inputs)
    if kwargs.get("output_router_logits"):
        result = result._replace(aux_loss=_aux_loss(self, outputs, kwargs.get("attention_mask")))
        inputs.result = result
    return result


def _head_forward(
    self: Any, original: Callable[..., Any], settings: _Settings, *args: Any, **kwargs: Any
) -> Any:
    """The forward of a fused head: the original one unless it is given inputs of the loss."""
    if not (len(args) > 1 and isinstance(args[1], LossInputs)):
        return original(*args, **kwargs)
    if kwargs:
        raise ValueError(f"{', '.join(sorted(kwargs))}: a fused LM head does not know what to do with it")
    return _head_loss(self, args[0], args[1], *settings)


def _head_loss(
    head: Any, hidden: Tensor, inputs: LossInputs, shape: HeadShape, head_dtype: torch.dtype | None
) -> FusedOutput:
    """`head_loss` with what it asks the model for: a fused head knows nothing of its model."""
    if head_dtype is None:
        inputs.result = inputs.loss_of(*_head_parts(head, hidden), shape)
        return inputs.result
    with torch.autocast(hidden.device.type, enabled=False):
        hidden, weight, bias = _head_parts(head, hidden.to(head_dtype))
        bias = None if bias is None else bias.to(head_dtype)
        inputs.result = inputs.loss_of(hidden, weight.to(head_dtype), bias, shape)
    return inputs.result


def _refuse(model: Any) -> None:
    """Raise ValueError for what the model says of itself; nothing is run."""
    causal = causal_lm(model)
    name = type(causal).__name__
    if getattr(causal.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder; only causal LMs can be fused")
    head = causal.get_output_embeddings()
    if head is None:
        raise ValueError(f"{name} has no LM head (get_output_embeddings() is None)")
    if lm_body(causal) is causal:
        raise ValueError(f"{name} has no body of its own: its base_model is the model itself")
    for adapter, config in getattr(model, "peft_config", {}).items():
        if getattr(config, "is_prompt_learning", False):
            raise ValueError(
                f"adapter {adapter!r} learns prompts, which shift the positions the loss is told of"
            )
    _head_parts(head, None)


def _head_parts(head: Any, hidden: Tensor | None) -> tuple[Any, Tensor, Tensor | None]:
    """(hidden, weight, bias) with head(hidden) = hidden · weightᵀ + bias; None: only check that it is so."""
    if hasattr(head, "modules_to_save"):  # PEFT trains a copy of the head
        trained = head.modules_to_save[head.active_adapters[0]]
        return _head_parts(head.original_module if head.disable_adapters else trained, hidden)
    if hasattr(head, "base_layer"):
        return _adapted_parts(head, hidden)
    weight, name = getattr(head, "weight", None), type(head).__name__
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ValueError(f"the LM head, {name}, has no weight [V, D]")
    if not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
        raise ValueError(
            f"the LM head, {name}, is quantised ({weight.dtype}); keep the head out of quantisation"
        )
    if hidden is not None and hidden.device != weight.device:
        hidden = hidden.to(weight.device)  # a model split between devices
    return hidden, weight, getattr(head, "bias", None)


def _adapted_parts(head: Any, hidden: Tensor | None) -> tuple[Any, Tensor, Tensor | None]:
    """A head with LoRA: hidden · Wᵀ + s · (A hidden) · Bᵀ = [hidden, s · A hidden] · [W, B]ᵀ."""
    if not hasattr(head, "lora_A"):
        raise ValueError(f"the LM head carries an adapter, {type(head).__name__}, which is not LoRA")
    base = head.get_base_layer()
    active = [] if head.disable_adapters else [x for x in head.active_adapters if x in head.lora_A]
    for adapter in active:
        if getattr(head, "lora_variant", {}).get(adapter) is not None or head.use_dora.get(adapter):
            raise ValueError(
                f"adapter {adapter!r} of the LM head is not plain LoRA (DoRA, or another variant)"
            )
    if head.disable_adapters and head.merged:
        head.unmerge()
    parts = _head_parts(base, hidden)
    if hidden is None or head.merged or not active:
        return parts
    hidden, weight, bias = parts
    hiddens, weights = [hidden], [weight]
    for adapter in active:
        down, up = head.lora_A[adapter], head.lora_B[adapter]
        scaling = head.scaling[adapter]
        low = down(head.lora_dropout[adapter](hidden.to(down.weight.dtype)))
        hiddens.append((low * scaling).to(hidden.dtype))
        weights.append(up.weight.to(weight.dtype))
        if up.bias is not None:
            shift = up.bias * scaling
            bias = shift if bias is None else bias + shift
    bias = None if bias is None else bias.to(weight.dtype)
    return torch.cat(hiddens, -1), torch.cat(weights, 1), bias


def _aux_loss(causal: Any, outputs: Any, attention_mask: Tensor | None) -> Tensor:
    """The load-balancing loss as the model's own code has it."""
    text = causal.config.get_text_config()
    owners = ((x, k) for x in (causal, text) for k in ("num_experts", "num_local_experts"))
    experts = next((getattr(x, k) for x, k in owners if getattr(x, k, None) is not None), None)
    for cls in type(causal).__mro__:
        function = getattr(sys.modules.get(cls.__module__), "load_balancing_loss_func", None)
        if function is not None and experts is not None:
            loss: Tensor = function(outputs.router_logits, experts, text.num_experts_per_tok, attention_mask)
            return loss
    raise ValueError(
        f"{type(causal).__name__} returns router logits, but its load-balancing loss was not found"
    )


@torch.no_grad()
def _whole(x: Any) -> Any:
    """A DTensor as the tensor that it stands for."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def _left_here(expected: Tensor, logits: Tensor, weight: Any) -> Tensor:
    """Of all logits those of this rank's words, where a head that is split by them leaves no others."""
    if not hasattr(weight, "full_tensor") or logits.shape[-1] != weight.to_local().shape[0]:
        return expected
    mesh = weight.device_mesh
    start = mesh.get_local_rank() * -(-weight.shape[0] // mesh.size())
    return expected[..., start : start + logits.shape[-1]]


def _try(causal: Any, autocast: torch.dtype | None) -> None:
    """Compare the model's logits of a few tokens with what `head_loss` will assume of them.

    Once as they are; once with large numbers in the place of the head's, which a softcap bends.
    """
    head, shape = causal.get_output_embeddings(), head_shape(causal.config)
    name, device = type(causal).__name__, next(head.parameters()).device
    if device.type == "meta":
        return
    modes = [(module, module.training) for module in causal.modules()]
    vocabulary = causal.get_input_embeddings().weight.shape[0]
    ids = torch.tensor([[(7 * k + 3) % vocabulary for k in range(5)]], device=causal.device)
    large: list[Tensor] = []

    def enlarge(module: nn.Module, args: Any, output: Any) -> Any:
        spread = torch.linspace(-100, 100, output.shape[-1], dtype=output.dtype, device=output.device)
        large.append(spread.expand(output.shape).contiguous())
        if not hasattr(output, "full_tensor"):
            return large[-1]
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(large[-1], output.device_mesh, output.placements)

    def bent(raw: Tensor) -> Tensor:
        scaled = shape.scale * raw.float()
        return scaled if shape.softcap is None else shape.softcap * (scaled / shape.softcap).tanh()

    handle = None
    try:
        causal.eval()
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            logits = _whole(causal(input_ids=ids, use_cache=False).logits)[0]
            hidden = lm_body(causal)(input_ids=ids, use_cache=False, return_dict=True).last_hidden_state[0]
            parts = _head_parts(head, _whole(hidden))
            hidden, weight, bias = map(_whole, parts)
            raw = nn.functional.linear(hidden, weight.to(hidden.dtype)).float()
            raw = raw if bias is None else raw + bias.float()
            pairs = [(logits, bent(_left_here(raw, logits, parts[1])))]
            handle = head.register_forward_hook(enlarge)
            logits = _whole(causal(input_ids=ids, use_cache=False).logits)[0]
            if large:  # else the model multiplies by the head's weight itself
                pairs.append((logits, bent(large[-1].reshape(logits.shape))))
    except Exception as error:
        raise ValueError(
            f"{name} cannot be tried on five tokens ({type(error).__name__}: {error}). If its logits are "
            "softcap(scale · head(hidden)), fuse it with check=False"
        ) from error
    finally:
        if handle is not None:
            handle.remove()
        for module, training in modes:
            module.training = training
    exact = autocast is None and weight.dtype == hidden.dtype == torch.float32
    for logits, expected in pairs:
        wide = logits.shape == expected.shape
        off = (logits.to(expected.device).float() - expected).abs().max().item() if wide else float("inf")
        if not off <= (1e-3 if exact else 0.05) * expected.abs().max().item():
            raise ValueError(
                f"{name} does more to its logits than softcap(scale · head(hidden)) with softcap "
                f"{shape.softcap} and scale {shape.scale:g}: they differ by {off:.2g}"
            )
