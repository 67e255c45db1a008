"""Specs: what a text names, and what is refused."""

import copy
import pickle
import re

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import structured
from structured import (
    Circulant,
    Dense,
    Diagonal,
    Kronecker,
    Rotated,
    Structure,
    StructuredMatrix,
    Tied,
    parse,
)
from structured._core.spec import known, snake_case
from tests.structured.specs import FURTHER, SPECS


def test_every_structure_is_tested():
    ours = {word for word in known() if word in map(snake_case, structured.__all__)}
    assert ours <= {word for spec in SPECS | FURTHER for word in re.findall("[a-z_]+", spec)}


@pytest.mark.parametrize("n", [-1, 2.0, "3", True])
def test_a_size_is_a_natural_number(n):
    with pytest.raises(ValueError, match="dense: expected a size n >= 0, got"):
        parse("dense")(n)


@pytest.mark.parametrize("batch_shape", [2, None, (-1,), (2.0,), ("a",), "ab", (True,)])
def test_a_batch_shape_is_several_sizes(batch_shape):
    with pytest.raises(ValueError, match=r"dense: expected a batch shape such as \(2, 3\), got"):
        parse("dense").identity(3, batch_shape=batch_shape)


def test_a_factory_gives_a_member():
    with pytest.raises(TypeError, match="expected a StructuredMatrix, got Tensor"):
        parse(lambda n, **opts: torch.zeros(n, n))(3)


@pytest.mark.parametrize(
    ("spec", "error"),
    [
        (int, r"expected a subclass of StructuredMatrix, got int"),
        (3, r"expected a spec, a class or a callable, got int 3"),
        ("dense(", r"expected a call such as 'hierarchical\(15, 15\)'"),
        ("3", r"expected the name of a structure, got 3"),
        ("cosine", r"expected the name of a structure, got 'cosine'"),
        ("dense + dense", r"expected names, numbers and calls, got 'dense \+ dense'"),
        ("tied(True, dense)", r"expected names, numbers and calls, got 'True'"),
        ("diagonl", r"unknown name 'diagonl', did you mean 'diagonal'\? Known: "),
        ("block_diagonal", r"structure 'block_diagonal': .* missing 1 required positional"),
        ("hierarchical(1)", r"structure 'hierarchical\(1\)': .* missing 1 required positional"),
        ("low_rank_lower", r"structure 'low_rank_lower': .* missing 1 required positional"),
        ("block_diagonal(0)", r"block_diagonal\(k\): expected an integer k >= 1, got 0"),
        ("block_diagonal(2.0)", r"block_diagonal\(k\): expected an integer k >= 1, got 2\.0"),
        ("hierarchical(2, 0)", r"hierarchical\(k1, k2\): expected integers >= 1, got 0"),
        ("hierarchical(1.5, 2)", r"hierarchical\(k1, k2\): expected integers >= 1, got 1\.5"),
        ("direct_sum(dense, dense, 0.5)", r"split: expected an integer .* got 0\.5"),
        ("up_to(-1, dense, diagonal)", r"up_to\(limit, \.\.\.\): expected an integer >= 0, got -1"),
        (
            "up_to(2.0, dense, diagonal)",
            r"up_to\(limit, \.\.\.\): expected an integer >= 0, got 2\.0",
        ),
        ("up_to(2, dense)", r"up_to\(2, dense\)': .* missing 1 required positional"),
    ],
)
def test_what_is_no_spec(spec, error):
    with pytest.raises((ValueError, TypeError), match=error):
        parse(spec)


@given(st.integers(0, 9), *[st.sampled_from([*SPECS, *FURTHER])] * 2, st.data())
def test_up_to_a_limit(limit, small, large, data):
    structure = parse(f"up_to({limit}, up_to({limit}, {small}, dense), {large})")
    sizes = {**SPECS, **FURTHER}
    n = data.draw(st.sampled_from([*sizes[small], *sizes[large]]))
    spec = small if n <= limit else large
    assume(n in sizes[spec])
    assert structure.at(n) == parse(spec)
    assert parse(str(structure)) == structure
    member, expected = structure(n, batch_shape=(2,)), parse(spec)(n, batch_shape=(2,))
    assert type(member) is type(expected)
    assert str(member) == str(expected)


def test_a_split_is_no_truth_value():
    with pytest.raises(ValueError, match="split: expected an integer"):
        structured.BlockUpper.zeros(3, "dense", "dense", True)


def test_compositions_print_as_they_are_written():
    structure = parse("low_rank_upper(2)")
    assert str(structure) == "low_rank_upper(2)"
    assert structure == parse("block_upper(dense, diagonal, 2)")
    assert structured.low_rank_upper(2) == structure


def test_parts_and_their_sizes():
    A = parse("direct_sum(dense, circulant, 2)")(5)
    assert (type(A.A), A.A.n, type(A.C), A.C.n) == (Dense, 2, Circulant, 3)
    A = parse("block_upper(diagonal, dense, -2)")(5)
    assert (type(A.A), A.A.n, type(A.C), A.C.n) == (Diagonal, 3, Dense, 2)
    assert (
        parse("low_rank_upper(0)")(5).layout == parse("block_upper(dense, diagonal, 0)")(5).layout
    )
    assert parse("tied(1, dense)")(5).layout == Tied(Dense.zeros(5), 1).layout
    assert parse("block_circulant(1)")(5).blocks.shape == (5, 1, 1)


def test_classes_without_a_name():
    """A leading underscore hides a class, and one that cannot be made has no members."""

    class _Hidden(Diagonal):
        pass

    class Halfway(StructuredMatrix):
        d: Tensor

    for word in ("_hidden", "halfway"):
        with pytest.raises(ValueError, match=f"unknown name '{word}'"):
            parse(word)
    assert parse(_Hidden)(3).n == 3
    assert Halfway.__abstractmethods__ == {"zeros", "to_dense"}


@pytest.mark.parametrize("spec", [*SPECS, *FURTHER, "tied(2, up_to(4, dense, diagonal))"])
def test_copies_of_structures_are_equal(spec):
    structure = parse(spec)
    for again in (pickle.loads(pickle.dumps(structure)), copy.deepcopy(structure), parse(spec)):
        assert again == structure
        assert hash(again) == hash(structure)
        assert again(0).layout == structure(0).layout


def test_structures_of_tensors_are_equal_where_the_numbers_are():
    Q = torch.linalg.qr(torch.arange(9.0).reshape(3, 3).cos()).Q
    for basis, other in ((Q, -Q), (Kronecker(Dense(Q)), Kronecker(Dense(-Q)))):
        structure = Structure(Rotated, (parse("diagonal"), basis))
        same = Structure(Rotated, (parse("diagonal"), basis.clone()))
        assert structure == same
        assert hash(structure) == hash(same)
        assert structure != Structure(Rotated, (parse("diagonal"), other))
    assert structure != "diagonal"
