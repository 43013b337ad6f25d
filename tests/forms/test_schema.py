"""The schema accepts what it wrote, and names what it cannot read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cur_modifier.forms.schema
from cur_modifier.forms.registry import find_form
from cur_modifier.forms.row_id import shared_skeleton
from cur_modifier.forms.schema import (
    DenseSize,
    ModuleSpec,
    Producer,
    Schema,
    SchemaError,
    checksum,
)

MODULE = {"form": "cur", "rank": 4, "in_features": 8, "out_features": 6, "bias": False}

SHARING = {"form": "id", "rank": 7, "in_features": 8, "out_features": 6, "direct_outputs": 2}


def section(**changes: Any) -> dict[str, Any]:
    return {"quant_method": "cur", "version": 1, "modules": {"a.q_proj": MODULE}} | changes


@given(
    form=st.sampled_from(["cur", "id"]),
    m=st.integers(2, 40),
    n=st.integers(1, 40),
    bias=st.booleans(),
    direct=st.sampled_from([None, 0, 1]),
    shared=st.sampled_from([None, "layers.0.q_proj"]),
)
def test_what_is_written_is_read_back(
    form: Any,
    m: int,
    n: int,
    bias: bool,
    direct: int | None,
    shared: str | None,
) -> None:
    module = ModuleSpec(
        form=form,
        rank=min(m - 1, n),
        in_features=n,
        out_features=m,
        bias=bias,
        direct_outputs=direct,
        shared_skeleton=shared,
    )
    layout = Schema(
        producer=Producer(name="test"), modules={"a": module}, compressed_tensors={"format": "x"}
    )
    assert Schema.read(json.loads(json.dumps(layout.write()))) == layout


@pytest.mark.parametrize("form", ["cur", "id"])
@pytest.mark.parametrize("bias", [False, True])
def test_shapes_are_those_of_the_modules(form: Any, bias: bool) -> None:
    layout = ModuleSpec(form=form, rank=3, in_features=8, out_features=6, bias=bias)
    module = find_form(form).build(layout, bias=bias)
    assert {k: tuple(f.weight.shape) for k, f in module.factors.items()} == layout.factor_shapes


def test_shapes_are_those_of_modules_that_share() -> None:
    direct = [3, 1, 0]
    modules = shared_skeleton(8, [3, 6, 2], 4, direct)
    for k, module in enumerate(modules):
        layout = ModuleSpec(
            form="id",
            rank=4,
            in_features=8,
            out_features=module.out_features,
            direct_outputs=direct[k],
            shared_skeleton="a" if k else None,
        )
        stored = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        assert stored == layout.tensor_shapes


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (section(version=3), r"schema version 3;.*reads versions 1 and 2.*Upgrade"),
        (section(version=None), "schema version None"),
        (section(surprise=1), "surprise"),
        (
            section(modules={"a": MODULE | {"form": "svd"}}),
            r"'svd' needs a newer .* cur, id",
        ),
        (section(modules={"a": MODULE | {"rank": 7}}), r"rank 7 is above min.* = 6"),
        (section(modules={"a": MODULE | {"rank": 0}}), "modules.a.rank"),
        (section(modules={"a": SHARING | {"rank": 9}}), r"rank 9 is above in_features = 8"),
        (section(modules={"a": SHARING | {"direct_outputs": 7}}), r"direct_outputs 7 .* = 6"),
        (section(modules={"a": SHARING | {"direct_outputs": -1}}), r"modules.a.direct_outputs"),
        (section(modules={"a": MODULE | {"colour": "red"}}), "colour"),
        (section(quant_method="awq"), "quant_method"),
    ],
)
def test_what_cannot_be_read_is_named(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        Schema.read(changed)


@pytest.mark.parametrize(
    "variant",
    [
        {"axis": "column"},
        {"order": "absorbed"},
        {"form": "cur", "shared_skeleton": "g"},
        {"axis": "column", "direct_outputs": 2, "shared_skeleton": "g"},
    ],
)
def test_variants_of_later_versions_say_so(variant: dict[str, Any]) -> None:
    with pytest.raises(SchemaError, match=r"needs a newer cur-modifier.*pip install -U"):
        Schema.read(section(modules={"a": MODULE | {"form": "id"} | variant})).check_supported()


@pytest.mark.parametrize("axis", [None, "row"])
@pytest.mark.parametrize("order", [None, "stored"])
def test_variants_that_nothing_wrote_otherwise_are_passed_over(axis: Any, order: Any) -> None:
    read = Schema.read(section(modules={"a": MODULE | {"axis": axis, "order": order}}))
    assert read == Schema.read(section(modules={"a": MODULE}))


def sharing(**changes: dict[str, Any]) -> Schema:
    """q, k and v with one skeleton of rank 7, q's; and o, which shares nothing."""
    modules: dict[str, Any] = {
        "a.q_proj": SHARING | {"direct_outputs": 6},
        "a.k_proj": SHARING | {"direct_outputs": 1, "shared_skeleton": "a.q_proj"},
        "a.v_proj": SHARING | {"direct_outputs": 0, "shared_skeleton": "a.q_proj"},
        "a.o_proj": MODULE | {"form": "id"},
    }
    for name, change in changes.items():
        modules[f"a.{name}_proj"] = modules[f"a.{name}_proj"] | change
    return Schema.read(section(modules=modules))


def test_modules_that_share_a_skeleton() -> None:
    layout = sharing()
    layout.check_supported()
    assert Schema.read(layout.write()) == layout
    shapes = {
        f"a.o_proj.{key}": shape for key, shape in layout.modules["a.o_proj"].tensor_shapes.items()
    }
    shapes |= {
        "a.q_proj.id_s.weight": (7, 8),  # and no id_t: all outputs are in the skeleton
        "a.q_proj.order": (6,),
        "a.k_proj.id_t.weight": (5, 7),
        "a.k_proj.order": (6,),
        "a.v_proj.id_t.weight": (6, 7),
        "a.v_proj.order": (6,),
    }
    layout.check_tensors(shapes)
    for key in shapes:
        with pytest.raises(SchemaError, match=f"{key} is missing"):
            layout.check_tensors({k: s for k, s in shapes.items() if k != key})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"k": {"shared_skeleton": "a.x_proj"}},
            "a.k_proj uses the skeleton of a.x_proj, which is not among the factored modules",
        ),
        (
            {"v": {"shared_skeleton": "a.k_proj"}},
            "a.v_proj uses the skeleton of a.k_proj, which itself uses that of a.q_proj",
        ),
        (
            {"q": {"shared_skeleton": "a.q_proj"}},
            "a.q_proj uses the skeleton of a.q_proj, which itself",
        ),
        (
            {"k": {"shared_skeleton": "a.o_proj"}},
            "a.k_proj uses the skeleton of a.o_proj, which does not share one",
        ),
        (
            {"k": {"direct_outputs": None, "rank": 6}},
            "a.k_proj uses .* a.q_proj, but has no direct_outputs",
        ),
        ({"k": {"rank": 5}}, "a.k_proj uses .* a.q_proj, whose rank is 7; its own is 5"),
        ({"k": {"in_features": 9}}, "a.k_proj uses .* a.q_proj, which has 8 inputs; its own are 9"),
        (
            {"v": {"direct_outputs": 1}},
            r"a.q_proj and a.k_proj and a.v_proj share .* rank 7, .* \[6, 1, 1\] add up to 8",
        ),
    ],
)
def test_skeletons_that_cannot_be_shared_name_both(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        sharing(**changes).check_supported()


def test_the_schema_needs_pydantic_alone() -> None:
    # As a package of its own: to import cur_modifier registers it where transformers is.
    code = (
        "import sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "import forms.schema\n"
        "assert not {'torch', 'transformers', 'vllm'} & set(sys.modules)\n"
    )
    package = Path(cur_modifier.forms.schema.__file__).parent.parent
    subprocess.run([sys.executable, "-c", code, str(package)], check=True)


def _layout(**files: str) -> Schema:
    modules = {
        "a.q_proj": ModuleSpec(form="cur", rank=4, in_features=8, out_features=6, bias=True),
        "a.o_proj": ModuleSpec(form="id", rank=4, in_features=8, out_features=6),
    }
    return Schema(modules=modules, files=files)


SHAPES: dict[str, tuple[int, ...]] = {
    "a.q_proj.cur_r.weight": (4, 8),
    "a.q_proj.cur_u.weight_packed": (4, 1),  # eight inputs of four bits in one int32
    "a.q_proj.cur_c.weight": (6, 4),
    "a.q_proj.cur_c.bias": (6,),
    "a.q_proj.rows": (4,),
    "a.q_proj.columns": (4,),
    "a.o_proj.id_s.weight": (4, 8),
    "a.o_proj.id_t.weight": (2, 4),
    "a.o_proj.order": (6,),
    "a.norm.weight": (8,),
}


def test_tensors_of_a_checkpoint_are_compared() -> None:
    _layout().check_tensors(SHAPES)


@pytest.mark.parametrize("key", [key for key in SHAPES if "norm" not in key])
def test_a_missing_tensor_is_named(key: str) -> None:
    rest = {name: shape for name, shape in SHAPES.items() if name != key}
    with pytest.raises(SchemaError, match=f"{key.removesuffix('_packed')} is missing"):
        _layout().check_tensors(rest)


@pytest.mark.parametrize("key", [key for key in SHAPES if "norm" not in key])
def test_a_tensor_of_another_shape_is_named(key: str) -> None:
    changed = SHAPES | {key: (SHAPES[key][0] + 1, *SHAPES[key][1:])}
    with pytest.raises(
        SchemaError, match=rf"{key.removesuffix('_packed')} has shape .* rank 4, so"
    ):
        _layout().check_tensors(changed)


def test_files_are_compared_with_their_checksums(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"weights")
    layout = _layout(**{"model.safetensors": checksum(weights)})
    layout.check_files(tmp_path)
    weights.write_bytes(b"weighty")
    with pytest.raises(SchemaError, match=r"model.safetensors is not the file that was saved.*or"):
        layout.check_files(tmp_path)
    weights.unlink()
    with pytest.raises(SchemaError, match=r"model.safetensors is missing"):
        layout.check_files(tmp_path)
    _layout().check_files(tmp_path)  # written before there were checksums


SIZE = {"out_features": 6, "in_features": 5}


def resized(**changes: Any) -> dict[str, Any]:
    return {"quant_method": "cur", "version": 2, "modules": {}, "resized": {"a.up_proj": SIZE}} | (
        changes
    )


@given(
    sizes=st.dictionaries(
        st.sampled_from(["a.up_proj", "a.down_proj"]),
        st.tuples(st.integers(1, 40), st.integers(1, 40), st.booleans()),
    ),
    attributes=st.dictionaries(
        st.just("a"), st.dictionaries(st.sampled_from(["heads", "split"]), st.integers(0, 40))
    ),
    factored=st.booleans(),
)
def test_sizes_are_written_and_read_back(
    sizes: dict[str, Any], attributes: dict[str, Any], factored: bool
) -> None:
    schema = Schema(
        modules={"a.q_proj": ModuleSpec.model_validate(MODULE | {"resized": factored})},
        resized={
            name: DenseSize(out_features=m, in_features=n, transposed=transposed)
            for name, (m, n, transposed) in sizes.items()
        },
        attributes=attributes,
    )
    section = json.loads(json.dumps(schema.write()))
    assert Schema.read(section) == schema
    own = bool(sizes or attributes or factored)
    assert schema.has_own_sizes == own and section["version"] == (2 if own else 1)


def test_a_section_without_sizes_is_what_it_was_before_there_were_any() -> None:
    given = section(producer={"name": "x", "version": "0"}, files={}, compressed_tensors=None)
    assert json.dumps(Schema.read(given).write(), sort_keys=True) == json.dumps(
        given, sort_keys=True
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            resized(modules={"a.up_proj": MODULE}),
            r"a\.up_proj is in 'modules' and in 'resized': it is factored or dense",
        ),
        (resized(resized={"a": SIZE | {"out_features": 0}}), r"resized\.a\.out_features"),
        (resized(resized={"a": SIZE | {"colour": "red"}}), "colour"),
        (resized(attributes={"a": {"heads": True}}), r"attributes\.a\.heads"),
        (resized(attributes={"a": {"heads": 1.5}}), r"attributes\.a\.heads"),
        (resized(attributes={"a": {"heads": -1}}), r"attributes\.a\.heads"),
    ],
)
def test_sizes_that_cannot_be_read_are_named(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        Schema.read(changed)


@pytest.mark.parametrize(
    ("transposed", "key", "shape"),
    [
        (False, "weight", (6, 5)),
        (False, "weight_packed", (6, 1)),
        (True, "weight", (5, 6)),
    ],
)
def test_resized_tensors_are_compared(transposed: bool, key: str, shape: tuple[int, int]) -> None:
    size = SIZE | {"transposed": transposed}
    schema = Schema.read(resized(resized={"a.up_proj": size}))
    shapes: dict[str, tuple[int, ...]] = {f"a.up_proj.{key}": shape, "a.up_proj.bias": (6,)}
    schema.check_tensors(shapes)
    schema.check_tensors({f"a.up_proj.{key}": shape})
    with pytest.raises(SchemaError, match=r"a\.up_proj\.weight is missing from the checkpoint"):
        schema.check_tensors({})
    larger = {f"a.up_proj.{key}": (shape[0] + 1, shape[1])}
    with pytest.raises(
        SchemaError, match=r"a\.up_proj\.weight has shape .* gives 6 outputs of 5 inputs, so"
    ):
        schema.check_tensors(larger)
    with pytest.raises(SchemaError, match=r"a\.up_proj\.bias has shape \(7,\)"):
        schema.check_tensors(shapes | {"a.up_proj.bias": (7,)})


CONVOLUTION = {"out_features": 5, "in_features": 2, "kernel_size": [3, 3]}
CONVOLUTION_SHAPES = {
    "f.3.weight": (5, 2, 3, 3),
    "f.3.bias": (5,),
    "f.1.weight": (2,),
    "f.1.running_var": (2,),
}


def test_convolutions_and_norms_come_back() -> None:
    given = section(version=2, modules={}, resized={"f.3": CONVOLUTION}, norms={"f.1": 2})
    schema = Schema.read(given)
    assert schema.resized["f.3"].weight_shape == (5, 2, 3, 3) and schema.norms == {"f.1": 2}
    written = schema.write()
    assert written["version"] == 2
    assert written["resized"] == {"f.3": CONVOLUTION} and written["norms"] == {"f.1": 2}
    assert Schema.read(written) == schema
    schema.check_tensors(CONVOLUTION_SHAPES)
    for name, shape in (("f.3.weight", (5, 3, 3, 3)), ("f.1.running_var", (3,))):
        with pytest.raises(SchemaError, match=f"{name} has shape"):
            schema.check_tensors(CONVOLUTION_SHAPES | {name: shape})


def test_without_convolutions_nothing_is_written_of_them() -> None:
    given = section(
        version=2, modules={}, resized={"a.up_proj": {"out_features": 5, "in_features": 2}}
    )
    written = Schema.read(given).write()
    assert "norms" not in written
    assert written["resized"] == {"a.up_proj": {"out_features": 5, "in_features": 2}}


@pytest.mark.parametrize("features", [0, 1.5, "3", True])
def test_features_of_a_norm_are_a_count(features: Any) -> None:
    given = section(version=2, modules={}, resized={"f.3": CONVOLUTION}, norms={"f.1": features})
    with pytest.raises(SchemaError, match=r"norms\.`f\.1`"):
        Schema.read(given)
