"""Tiny models with random weights, made on the spot: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

VOCABULARY = 512
IMAGE_TOKENS = 64


def llama(folder: Path, *, seed: int = 0, dtype: str = "bfloat16", hidden: int = 128) -> Path:
    """A Llama of two layers with two KV heads."""
    from transformers import LlamaConfig

    return _save(
        folder,
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            dtype=dtype,
        ),
        seed,
    )


def gemma3(folder: Path, *, seed: int = 0) -> Path:
    """A Gemma-3 of six layers, five of which see 64 tokens: vLLM makes several KV groups of it."""
    from transformers import Gemma3TextConfig

    return _save(
        folder,
        Gemma3TextConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=4096,
            sliding_window=64,
            query_pre_attn_scalar=32,
            dtype="bfloat16",
        ),
        seed,
    )


def deepseek(folder: Path, *, seed: int = 0) -> Path:
    """A DeepSeek-V2 of two dense layers: their KV is one latent vector a token (MLA)."""
    from transformers import DeepseekV2Config

    return _save(
        folder,
        DeepseekV2Config(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            q_lora_rank=None,
            kv_lora_rank=512,
            qk_rope_head_dim=64,
            qk_nope_head_dim=32,
            v_head_dim=32,
            n_routed_experts=2,
            num_experts_per_tok=1,
            n_shared_experts=1,
            moe_intermediate_size=64,
            first_k_dense_replace=2,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            dtype="bfloat16",
        ),
        seed,
    )


def blip2(folder: Path, *, seed: int = 0) -> Path:
    """A BLIP-2, which sees an image as IMAGE_TOKENS tokens before the text. Its words are `w3`, `w4`, …"""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2Processor,
        BlipImageProcessorPil,
        PreTrainedTokenizerFast,
    )

    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 64, "intermediate_size": 128}
    config = Blip2Config(
        vision_config={**small, "image_size": 28, "patch_size": 14},
        qformer_config={**small, "vocab_size": 8, "encoder_hidden_size": 64},
        text_config={
            "model_type": "opt",
            "vocab_size": VOCABULARY,
            "hidden_size": 128,
            "word_embed_proj_dim": 128,
            "ffn_dim": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 4096,
        },
        num_query_tokens=IMAGE_TOKENS,
        image_token_index=VOCABULARY - 1,
    )
    words = {**{f"w{number}": number for number in range(VOCABULARY - 1)}, "<image>": VOCABULARY - 1}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")),
        unk_token="w0",
        pad_token="w0",
        bos_token="w1",
        eos_token="w2",
        additional_special_tokens=["<image>"],
    )
    size = {"height": 28, "width": 28}
    Blip2Processor(BlipImageProcessorPil(size=size), tokenizer, IMAGE_TOKENS).save_pretrained(folder)
    return _save(folder, config, seed, Blip2ForConditionalGeneration._from_config)


def drafter(folder: Path, *, seed: int = 0) -> Path:
    """A `llama` whose weights are a little off: most of what it says is what that would say."""
    import torch
    from safetensors.torch import load_file, save_file

    llama(folder, seed=seed)
    weights = load_file(folder / "model.safetensors")
    torch.manual_seed(seed + 1)
    off = {name: weight + torch.randn_like(weight) * 0.01 for name, weight in weights.items()}
    save_file(off, folder / "model.safetensors", {"format": "pt"})
    return folder


def eagle(folder: Path, *, seed: int = 0) -> Path:
    """An EAGLE head for `llama`: one layer that sees the model's hidden states, too."""
    import json

    import torch
    from safetensors.torch import load_file, save_file

    config = json.loads((llama(folder, seed=seed) / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    weights = load_file(folder / "model.safetensors")
    width, layer = config["hidden_size"], "model.layers.0."
    head = {
        name.removeprefix("model."): weight
        for name, weight in weights.items()
        if name.startswith(layer) and "input_layernorm" not in name
    }
    head["fc.weight"] = torch.randn(width, 2 * width, dtype=torch.bfloat16) * 0.08
    save_file(head, folder / "model.safetensors", {"format": "pt"})
    return folder


def adapter(folder: Path, *, seed: int = 0) -> Path:
    """A LoRA adapter for `llama`."""
    import json

    import torch
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    weights = {}
    for layer in range(2):
        for name, width in (("q_proj", 128), ("v_proj", 64)):
            place = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{place}.lora_A.weight"] = torch.randn(8, 128, dtype=torch.bfloat16)
            weights[f"{place}.lora_B.weight"] = torch.randn(width, 8, dtype=torch.bfloat16)
    folder.mkdir(parents=True)
    save_file(weights, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _save(folder: Path, config: object, seed: int, make: Callable[..., Any] | None = None) -> Path:
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = (make or AutoModelForCausalLM.from_config)(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():  # larger than the usual start: answers that depend on the prompt
            if parameter.dim() > 1:
                parameter.normal_(0, 0.08)
    model.save_pretrained(folder)
    return folder
