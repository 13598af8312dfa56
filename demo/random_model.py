"""A Llama with random weights and a tokenizer of bytes, as files that vLLM loads: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

VOCABULARY = 512

DTYPE_BYTES = {"bfloat16": 2, "float32": 4}

_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""Of /proc/cpuinfo, on x86 and ARM."""


def fast_dtype() -> str:
    """What this machine's CPU computes a model in without detours: without instructions for bfloat16 it takes
    several times as long as float32.
    """
    flags: set[str] = set()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.lower().startswith(("flags", "features")):
            flags |= set(line.partition(":")[2].split())
    return "bfloat16" if flags & _BFLOAT16_FLAGS else "float32"


def make_model(
    folder: Path,
    *,
    layers: int = 8,
    hidden: int = 1024,
    heads: int = 16,
    kv_heads: int = 4,
    positions: int = 8192,
    seed: int = 0,
) -> Path:
    """Write the model into `folder`, unless it is there; `folder`. One byte of text is one token; the dtype
    is the one that this machine is fast with.
    """
    if (folder / "config.json").exists():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
        dtype=fast_dtype(),
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(seed)
    automatic: Any = AutoModelForCausalLM
    model = automatic.from_config(config, dtype=getattr(torch, fast_dtype()))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # larger than the usual start: answers depend on all of the prompt
                parameter.normal_(0, 2 / hidden**0.5)
    model.save_pretrained(folder)
    _byte_tokenizer().save_pretrained(folder)
    return folder


def _byte_tokenizer() -> Any:
    """A byte-level BPE without merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*alphabet, *(f"<unused{number}>" for number in range(VOCABULARY - len(alphabet)))]
    tokenizer = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast: Any = PreTrainedTokenizerFast
    return fast(tokenizer_object=tokenizer, eos_token=names[-1])
