"""Greedy text from a folder in Hugging Face's form, in the four ways in which transformers gives it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.real_model.function import load

NEW_TOKENS = 32
QUESTION = "What is the capital of France?"
PROMPTS = (
    "Gravity is the force that",
    "def read_lines(path):\n    ",
    '"""Parse command line arguments and',
)


def generate(folder: Path) -> dict[str, Any]:
    """Return the texts, and for how many prompts the other ways give the tokens of the first, one prompt with the cache."""
    from transformers import AutoTokenizer, pipeline

    tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = load(folder)
    prompts = [chat(tokenizer), *PROMPTS]
    expected = [_greedy(model, tokenizer, [prompt])[0] for prompt in prompts]
    plain = [_greedy(model, tokenizer, [prompt], use_cache=False)[0] for prompt in prompts]
    together = _greedy(model, tokenizer, prompts)
    made: Any = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_full_text": False}
    piped = [made(prompt, **options)[0]["generated_text"] for prompt in prompts]
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]
    return {
        "texts": texts,
        "tokens": expected,
        "without cache": _equal(plain, expected),
        "batched with left padding": _equal(together, expected),
        "pipeline": _equal(piped, texts),
    }


def chat(tokenizer: Any) -> str:
    """Return the question as the model was tuned to be asked."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], tokenize=False, add_generation_prompt=True
    )


@torch.no_grad()
def _greedy(model: Any, tokenizer: Any, prompts: list[str], use_cache: bool = True) -> list[list[int]]:
    """Return the new tokens of every prompt up to the end of its text."""
    given = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    made = model.generate(
        input_ids=given["input_ids"],
        attention_mask=given["attention_mask"],
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=use_cache,
        pad_token_id=tokenizer.pad_token_id,
    )
    return [
        _until_end(row, tokenizer.eos_token_id) for row in made[:, given["input_ids"].shape[1] :].tolist()
    ]


def _until_end(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids


def _equal(found: list[Any], expected: list[Any]) -> int:
    return sum(one == other for one, other in zip(found, expected, strict=True))
