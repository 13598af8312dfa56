"""Tiny models with random weights, made on the spot: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

VOCABULARY = 512


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


def _save(folder: Path, config: object, seed: int) -> Path:
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():  # larger than the usual start: answers that depend on the prompt
            if parameter.dim() > 1:
                parameter.normal_(0, 0.08)
    model.save_pretrained(folder)
    return folder
