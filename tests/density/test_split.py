"""Splits: by parent, stable, no parent on both sides, clusters together."""

import numpy as np
import pytest

from xtalfast.density.split import Clusters, require_disjoint, split_of
from xtalfast.errors import InputError


def test_split_is_a_function_of_the_name_and_near_the_fraction_asked_for():
    names = [f"{i}ABC" for i in range(5000)]
    splits = np.array([split_of(name) for name in names])
    assert [split_of(name) for name in reversed(names)] == splits[::-1].tolist()
    assert abs((splits == "test").mean() - 0.1) < 4 * np.sqrt(0.09 / 5000)
    # A larger test set contains the smaller one.
    wider = np.array([split_of(name, test_fraction=0.2) for name in names])
    assert (wider[splits == "test"] == "test").all()
    assert split_of("4AZ3", test_fraction=0) == "train" and split_of("4AZ3", test_fraction=1) == "test"


def test_clusters_join_lines_and_entities():
    clusters = Clusters([["4AZ3_1", "1ABC_2"], ["1abc_1", "9XYZ"], ["2DEF"]])
    assert clusters.group("4AZ3") == clusters.group("1ABC") == clusters.group("9XYZ") != clusters.group("2DEF")
    assert clusters.group("not_there") == "not_there"
    assert clusters.group("9xyz") == clusters.group("9XYZ")


def test_underscores_in_other_names_join_nothing():
    clusters = Clusters([["BM5_one"], ["BM5_two"]])
    assert clusters.group("BM5_one") != clusters.group("BM5_two")


def test_pairs_and_lists_of_the_same_clusters_agree(tmp_path):
    (tmp_path / "pairs.tsv").write_text("1AAA\t1AAA\n1AAA\t2BBB\n1AAA\t3CCC\n4DDD\t4DDD\n")
    (tmp_path / "lists.txt").write_text("1AAA 2BBB 3CCC\n4DDD\n")
    pairs, lists = (Clusters.read(tmp_path / name) for name in ("pairs.tsv", "lists.txt"))
    for name in ("1AAA", "2BBB", "3CCC", "4DDD"):
        assert pairs.group(name) == lists.group(name)
    assert pairs.fingerprint() == lists.fingerprint() != Clusters().fingerprint()


def test_long_chains_of_pairs():
    n = 5000
    clusters = Clusters([f"N{i:05d}", f"N{i + 1:05d}"] for i in range(n))
    assert clusters.group(f"N{n:05d}") == clusters.group("N00000") == "N00000"


def test_unreadable_cluster_files(tmp_path):
    (tmp_path / "empty").write_text("\n\n")
    with pytest.raises(InputError, match="holds no clusters"):
        Clusters.read(tmp_path / "empty")
    with pytest.raises(InputError, match="cannot read the cluster file"):
        Clusters.read(tmp_path / "missing")


def test_evaluation_on_training_structures_is_refused():
    require_disjoint(["1AAA", "2BBB"], ["3CCC"])
    with pytest.raises(InputError, match=r"1 of the structures.*\(2BBB\)"):
        require_disjoint(["1AAA", "2BBB"], ["3CCC", "2BBB"])
