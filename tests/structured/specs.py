"""Every structure, by spec and the sizes it has."""

from structured.testing import structures

ANY = range(13)

# spec -> sizes; every name, and the names of the PyPI package singd
SPECS = {
    "dense": ANY,
    "diagonal": ANY,
    "scaled_identity": ANY,
    "block_diagonal(1)": ANY,
    "block_diagonal(3)": ANY,
    "lower_triangular": ANY,
    "upper_triangular": ANY,
    "lower_toeplitz": ANY,
    "upper_toeplitz": ANY,
    "circulant": ANY,
    "block_circulant(2)": range(0, 13, 2),
    "block_upper(dense, lower_toeplitz, 3)": ANY,
    "block_lower(diagonal, block_lower(diagonal, dense, -2), -4)": ANY,
    "hierarchical(2, 3)": ANY,
    "low_rank_upper(2)": ANY,
    "low_rank_upper(-2)": ANY,
    "low_rank_lower(2)": ANY,
    "low_rank_lower(-2)": ANY,
    "direct_sum(lower_toeplitz, dense, 3)": ANY,
    "transposed(low_rank_lower(2))": ANY,
    "transposed(hierarchical(2, 3))": ANY,
    "tied(3, lower_triangular)": range(0, 13, 3),
    "strided(2, upper_triangular)": range(0, 13, 2),
    "rotated(diagonal, cosine)": ANY,
    "rotated(lower_triangular, hadamard)": ANY,
}

# The same for those that are checked on fewer cases.
FURTHER = {
    "hypercomplex(2)": range(0, 13, 2),
    "quaternions": range(0, 13, 4),
    "group_algebra(2, 2)": range(0, 13, 4),
    "group_algebra(dihedral)": range(0, 13, 2),
    "incidence(divisors)": ANY,
    "incidence(subsets)": ANY,
    "centrosymmetric": ANY,
    "up_to(4, lower_triangular, circulant)": ANY,
    "kron(lower_triangular, complex_numbers, 2)": range(0, 13, 2),
    "kron(diagonal, hierarchical(1, 1), 3)": range(0, 13, 3),
}

# Laws that compile take seconds a structure: they are asked of one spec of each class ...
COMPILING = ("compiled", "dynamic")
COMPILED = SPECS.keys() - {
    "block_diagonal(1)",
    "low_rank_upper(2)",
    "low_rank_upper(-2)",
    "low_rank_lower(2)",
    "low_rank_lower(-2)",
    "transposed(hierarchical(2, 3))",
}
# ... and one case of these asks every operation, some in every dtype: few of each structure do.
OF_EVERY_OPERATION = (
    *("fresh", "batches", "precision", "gradients", "meta", "deterministic"),
    *("backward", "forward", "mapped", "autocast", "large", "first_use"),
)


def cases(law: str) -> int:
    """How many cases of a law are drawn for each of many structures."""
    return 8 if law in OF_EVERY_OPERATION else 12


ALIASES = {
    "block30diagonal": "block_diagonal(30)",
    "hierarchical15_15": "hierarchical(15, 15)",
    "triltoeplitz": "lower_toeplitz",
    "triutoeplitz": "upper_toeplitz",
}

NESTINGS = structures(depth=3)
