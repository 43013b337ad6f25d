"""One oneshot with a healing stage, for the test that kills it.

python heal_run.py CHECKPOINT RECIPE OUTPUT writes the factors to OUTPUT.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from safetensors.torch import save_file
from support import NO_PROCESSOR
from transformers import AutoModelForCausalLM

import cur_modifier  # noqa: F401 - registers the stages
from cur_modifier.forms.base import FactoredLinear


def main(checkpoint: str, recipe: str, output: str) -> None:
    torch.set_num_threads(1)
    ids = torch.randint(0, 512, (8, 64), generator=torch.Generator().manual_seed(1))
    data = Dataset.from_dict(
        {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    )
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    oneshot(model=model, dataset=data, recipe=Path(recipe).read_text(), processor=NO_PROCESSOR)
    factors = {
        f"{name}.{child}": factor.weight.detach().contiguous()
        for name, module in model.named_modules()
        if isinstance(module, FactoredLinear)
        for child, factor in module.factors.items()
    }
    save_file(factors, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
