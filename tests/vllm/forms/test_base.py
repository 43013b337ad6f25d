import pytest
import torch
from linears import FACTORED, WIDTH, Example, built, hand_over
from vllm.model_executor.layers.linear import ReplicatedLinear

from cur_modifier.vllm.forms.base import is_plain


@pytest.mark.parametrize("form", FACTORED)
def test_a_form_says_its_shapes_before_anything_is_made(form: str) -> None:
    """The cost model goes by them; they are those of the products that are then made."""
    example = Example(form, 24, 0, rank=5)
    with built(ReplicatedLinear, "o_proj", {"o_proj": example}, WIDTH, 24) as layer:
        [product] = layer.products
        [served] = product.served
        assert served.rows == 5 and served.first_name.startswith("model.layers.0.block.o_proj.")
        shapes = served.shapes()
        hand_over(layer, {"o_proj": example})
        layer.quant_method.process_weights_after_loading(layer)  # and not the kernels of Linears
        made = [[tuple(linear.weight.shape) for linear in chain] for chain in served.chains]
        assert made == shapes
        assert served.entries == sum(chain[-1][0] for chain in shapes)


@pytest.mark.parametrize("form", FACTORED)
def test_its_tensors_are_those_of_the_checkpoint(form: str) -> None:
    example = Example(form, 24, 0, rank=5)
    with built(ReplicatedLinear, "o_proj", {"o_proj": example}, WIDTH, 24) as layer:
        [served] = layer.products[0].served
        [part] = served.parts
        found = {name: tuple(tensor.shape) for name, tensor in example.tensors.items()}
        assert served.tensors(part) == found
        like = torch.empty(0)
        [(of, weight)] = served.weights({part: example.tensors}, like)
        assert of is part
        torch.testing.assert_close(weight, example.product, rtol=1e-4, atol=1e-4)


def test_a_linear_that_nothing_quantizes_is_plain() -> None:
    with built(ReplicatedLinear, "o_proj", {"o_proj": Example("id", 24, 0)}, WIDTH, 24) as layer:
        assert is_plain(layer.products[0].first)
