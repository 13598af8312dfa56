"""A process with one vLLM engine, which does what it is told over a pipe."""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any


class Engine:
    """The commands; each takes and returns what JSON can say."""

    def __init__(self) -> None:
        self.llm: Any = None

    def start(self, **options: Any) -> dict[str, Any]:
        """Make the engine."""
        from vllm import LLM

        self.llm = LLM(**options)
        config = self.llm.llm_engine.vllm_config
        return {"block": config.cache_config.block_size, "async": config.scheduler_config.async_scheduling}

    def generate(
        self,
        prompts: list[list[int]],
        max_tokens: int | list[int] = 1,
        logprobs: int | None = 5,
        salt: str | None = None,
        lora: list[Any] | None = None,
        prompt_logprobs: int | None = None,
        image: list[int] | None = None,
    ) -> list[dict[str, Any]]:
        """Answer prompts, all at once: tokens, their logprobs, how many tokens were cached. image: a colour,
        which all of them are asked about.
        """
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        counts = max_tokens if isinstance(max_tokens, list) else [max_tokens] * len(prompts)
        parameters = [
            SamplingParams(
                max_tokens=count,
                temperature=0,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
                ignore_eos=True,
                detokenize=False,
            )
            for count in counts
        ]
        beside: dict[str, Any] = {"cache_salt": salt} if salt else {}
        if image:
            beside["multi_modal_data"] = {"image": _image(image)}
        asked = [{"prompt_token_ids": prompt, **beside} for prompt in prompts]
        adapter = LoRARequest(*lora) if lora else None
        answers = self.llm.generate(asked, parameters, use_tqdm=False, lora_request=adapter)
        return [_answer(each) for each in answers]

    def abort(self, prompts: list[list[int]], after_steps: int) -> list[str]:
        """Add requests and abort them after some steps of the engine."""
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        ids = []
        for at, prompt in enumerate(prompts):
            parameters = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, detokenize=False)
            ids.append(
                engine.add_request(
                    f"abort-{os.urandom(4).hex()}-{at}", {"prompt_token_ids": prompt}, parameters
                )
            )
        for _ in range(after_steps):
            engine.step()
        engine.abort_request(ids, internal=True)
        while engine.has_unfinished_requests():
            engine.step()
        return ids

    def reset(self, connector: bool = False) -> bool:
        """Forget vLLM's own prefix cache, and the connector's if asked for."""
        return bool(self.llm.reset_prefix_cache(reset_connector=connector))

    def metrics(self) -> dict[str, float]:
        """vLLM's Prometheus metrics of ours, and of preemption and speculation, summed over labels."""
        from prometheus_client import REGISTRY

        found: dict[str, float] = {}
        for family in REGISTRY.collect():
            for sample in family.samples:
                ours = sample.name.startswith(("vllm:vcache", "vllm:num_preemptions", "vllm:spec_decode"))
                if ours and not sample.name.endswith("_created"):
                    found[sample.name] = found.get(sample.name, 0.0) + sample.value
        return found


def _image(colour: list[int]) -> Any:
    from PIL import Image

    return Image.new("RGB", (28, 28), tuple(colour))


def _answer(output: Any) -> dict[str, Any]:
    told = output.outputs[0]
    logprobs = [
        sorted((token, value.logprob) for token, value in position.items())
        for position in told.logprobs or ()
    ]
    return {
        "tokens": list(told.token_ids),
        "logprobs": logprobs,
        "cached": output.num_cached_tokens,
        "finish": told.finish_reason,
    }


def main() -> None:
    """Read commands from the first pipe, write answers to the second."""
    commands, answers = os.fdopen(int(sys.argv[1])), os.fdopen(int(sys.argv[2]), "w")
    engine = Engine()
    for line in commands:
        name, arguments = json.loads(line)
        try:
            answer = {"result": getattr(engine, name)(**arguments)}
        except BaseException as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    engine.llm = None


if __name__ == "__main__":
    main()
