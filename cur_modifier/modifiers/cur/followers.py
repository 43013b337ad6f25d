"""What later stages of the recipe will do to the factors, and every reason that they cannot."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from llmcompressor.modifiers import Modifier
from loguru import logger
from torch import nn

from cur_modifier.forms.base import FactoredLinear
from cur_modifier.forms.form import Form
from cur_modifier.modifiers import upstream
from cur_modifier.modifiers.cur.candidates import Candidate

__all__ = ["check_followers", "follower_bits"]


def check_followers(
    model: nn.Module,
    modifier: Modifier,
    planned: Sequence[Candidate],
    form: Form,
    multiple_of: int,
) -> None:
    """Check that later stages can compress the factors, and say where they would miss them.

    Raises:
        ValueError: a group size or a sparsity block that does not divide the inputs of a factor or
            of a dense Linear, naming all of them.
    """
    factored: dict[str, FactoredLinear] = {}
    for candidate in planned:
        if candidate.rank is not None:
            factored |= candidate.empty_modules(form, device="meta")
    children = dict.fromkeys(child for module in factored.values() for child in module.factors)
    dense = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in factored
    }
    for follower in upstream.followers(modifier):
        if not upstream.compresses(follower):
            continue
        stage = type(follower).__name__
        problems: list[str] = []
        missed: defaultdict[str, list[str]] = defaultdict(list)
        for name, container in factored.items():
            whole = upstream.matches(follower, name, nn.Linear(1, 1, device="meta"))
            for child, factor in container.factors.items():
                problems += _indivisible(follower, f"{name}.{child}", factor)
                if upstream.matches(follower, f"{name}.{child}", factor) != whole:
                    missed["missed" if whole else "compressed"].append(name)
        for name, linear in dense.items():
            problems += _indivisible(follower, name, linear)
        if problems:
            raise ValueError(
                f"{stage} can't compress {len(problems)} modules:\n  "
                + "\n  ".join(problems[:12])
                + ("\n  …" if len(problems) > 12 else "")
                + "\nThe rank is the number of inputs of a second factor: set CURModifier's "
                f"`multiple_of` (now {multiple_of}) to a multiple of the group or block. Where a "
                "dense input is not divisible, choose a size that divides it (64 for 576 inputs), "
                "or put the module on the stage's `ignore`."
            )
        for what, names in missed.items():
            verb = "leaves their factors alone" if what == "missed" else "would still compress them"
            logger.warning(
                f"{stage}'s targets and ignore were written for dense modules: it {verb} in "
                f"{sorted(set(names))[:4]} and alike. Factors are Linears named "
                f"{'/'.join(children)} below the module: end a pattern "
                "with `_proj.*` rather than `_proj$`."
            )


def follower_bits(modifier: Modifier, candidate: Candidate, form: Form) -> int | None:
    """Bits to which a later stage will quantize the first factor of ``candidate``, or None."""
    module, container = next(iter(candidate.empty_modules(form, device="meta").items()))
    name, factor = next(iter(container.factors.items()))
    bits = (
        upstream.weight_bits(follower, f"{module}.{name}", factor)
        for follower in upstream.followers(modifier)
    )
    return min((b for b in bits if b is not None), default=None)


def _indivisible(follower: Modifier, name: str, linear: nn.Linear) -> list[str]:
    found = [
        f"{name}: {linear.in_features} inputs, group_size {size}"
        for size in upstream.group_sizes(follower, name, linear)
        if linear.in_features % size
    ]
    block = upstream.prune_block(follower)
    if block and linear.in_features % block and upstream.matches(follower, name, linear):
        found.append(f"{name}: {linear.in_features} inputs, sparsity blocks of {block}")
    return found
