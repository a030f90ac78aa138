"""Structures and plain values as JSON: exact both ways, and nothing else gets through."""

import json
from collections import OrderedDict, defaultdict, deque
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree
from transformers.modeling_outputs import BaseModelOutput

from planish.ir.errors import UnsupportedError
from planish.ir.trees import (
    child_keys,
    decode,
    encode,
    known_class,
    leaf_paths,
    spec_from_json,
    spec_to_json,
)

ATOMS = st.none() | st.booleans() | st.integers() | st.floats() | st.complex_numbers() | st.text()
VALUES = st.recursive(
    ATOMS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(VALUES)
def test_plain_values_come_back_exactly(value: Any) -> None:
    again = decode(json.loads(json.dumps(encode(value, "it"), allow_nan=False)))
    assert repr(again) == repr(value)  # tells 1 from True and 1.0, -0.0 from 0.0, list from tuple


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", torch.float32, [torch.ones(1)], len])
def test_anything_else_is_refused_by_name(value: Any) -> None:
    with pytest.raises(UnsupportedError, match="input 'x' holds a"):
        encode(value, "input 'x'")


@pytest.mark.parametrize("data", [{"eval": "1"}, {"float": 1, "list": []}, [1], {}, 1.5])
def test_json_that_encode_does_not_write_is_refused(data: Any) -> None:
    with pytest.raises(ValueError, match="unknown value"):
        decode(data)


def structure(value: Any) -> tuple[Any, pytree.TreeSpec]:
    spec = pytree.tree_structure(value)
    return json.loads(json.dumps(spec_to_json(spec, "the outputs"))), spec


def lists_by_name() -> defaultdict[str, Any]:
    made: defaultdict[str, Any] = defaultdict(list)
    made["a"] = 1
    return made


STRUCTURES = {
    "leaf": 1,
    "empty": ((), [], {}),
    "nested": ({"a": [1, (2,)], 3: None}, [[1]]),
    "ordered": OrderedDict(b=1, a=2),
    "bounded": deque([1, 2], maxlen=3),
    "defaults": lists_by_name(),
    "torch's own": torch.return_types.max((torch.ones(1), torch.ones(1))),
    "model output": BaseModelOutput(last_hidden_state=1, attentions=(1, 2)),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures_come_back_exactly(name: str) -> None:
    data, spec = structure(STRUCTURES[name])
    remarks: list[str] = []
    assert spec_from_json(data, remarks) == spec
    assert remarks == []


def test_leaves_are_named_by_the_way_to_them() -> None:
    _, spec = structure({"a": [1, (2,)], "b": BaseModelOutput(last_hidden_state=1)})
    assert leaf_paths(spec) == [("a", "0"), ("a", "1", "0"), ("b", "last_hidden_state")]
    assert child_keys(pytree.tree_structure(lists_by_name())) == ["a"]
    assert leaf_paths(pytree.tree_structure(1)) == [()]


@pytest.mark.parametrize(
    ("name", "module"),
    [("nowhere.at.all:Found.Inner", "nowhere.at.all"), ("nowhere.at.all.Found", "nowhere.at.all")],
)
def test_an_unknown_class_becomes_a_dict_and_says_what_to_import(name: str, module: str) -> None:
    remarks: list[str] = []
    data = {"kind": "class", "class": name, "context": None, "keys": ["a"], "children": [None]}
    assert spec_from_json(data, remarks) == pytree.tree_structure({"a": 1})
    assert f"import {module} before loading" in remarks[0]


def test_a_class_that_is_no_structure_is_not_built() -> None:
    remarks: list[str] = []
    data = {"kind": "class", "class": "os:PathLike", "context": None, "keys": ["0"]}
    spec = spec_from_json({**data, "children": [None]}, remarks)
    assert spec.type is dict
    assert remarks != []


@pytest.mark.parametrize(
    "data",
    [
        {"kind": "dict", "context": {"list": ["a"]}, "children": []},
        {"kind": "dict", "context": None, "children": []},
        {"kind": "namedtuple", "class": "m:T", "keys": ["a b"], "children": [None]},
        {"kind": "namedtuple", "class": "m:T", "keys": ["a"], "children": []},
        {"kind": "strange", "class": "m:T", "keys": [], "children": []},
    ],
)
def test_structures_that_do_not_fit_are_refused(data: Any) -> None:
    with pytest.raises(ValueError, match=r"values for the keys|field names|unknown structure"):
        spec_from_json(data, [])


@pytest.mark.parametrize("name", ["os:path", "os:sep", "nowhere:X", "os:no.such", ":", "os", ""])
def test_only_classes_of_loaded_modules_are_known(name: str) -> None:
    assert known_class(name) is None
    assert known_class("collections:OrderedDict") is OrderedDict
    assert known_class("math:inf") is None
