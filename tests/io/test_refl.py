"""Reflection tables: the byte layout against DIALS, the table's own arithmetic, and every kind of bad file."""

from __future__ import annotations

import struct
import time

import msgpack
import numpy as np
import pytest

from xtalfast.errors import InputError
from xtalfast.io import Flag, RawColumn, ReflectionTable, ShoeboxColumn, read_refl, write_refl

WRITE_ALL_TYPES = """
import sys, json
from dials.array_family import flex
from dials.model.data import Shoebox
t = flex.reflection_table()
t["bool"] = flex.bool([True, False, True])
t["int"] = flex.int([-1, 0, 2**31 - 1])
t["size_t"] = flex.size_t([0, 1, 2**30])
t["double"] = flex.double([0.1, -1e300, float("inf")])
t["vec2"] = flex.vec2_double([(1, 2), (3, 4), (5, 6)])
t["vec3"] = flex.vec3_double([(1, 2, 3), (4, 5, 6), (7, 8, 9)])
t["mat3"] = flex.mat3_double([tuple(range(9 * i, 9 * i + 9)) for i in range(3)])
t["int6"] = flex.int6([(0, 1, 2, 3, 4, 5)] * 3)
t["miller_index"] = flex.miller_index([(1, 2, 3), (-1, -2, -3), (0, 0, 4)])
t["text"] = flex.std_string(["a", "bc", "longer than the short-string buffer"])
boxes = flex.shoebox(3)
boxes[0] = Shoebox(1, (0, 2, 5, 6, 0, 1))  # without pixels
for i, bbox in ((1, (0, 3, 5, 7, 2, 4)), (2, (1, 2, 1, 2, 1, 2))):
    box = Shoebox(i, bbox)
    box.allocate()
    for j in range(len(box.data)):
        box.data[j], box.mask[j], box.background[j] = 10 * i + j, j % 8, 0.5 * j
    boxes[i] = box
t["shoebox"] = boxes
t.experiment_identifiers()[0] = "one"
t.experiment_identifiers()[3] = "two"
t.as_file(sys.argv[1])
flags = flex.reflection_table.flags.names
print(json.dumps({name: int(value) for name, value in flags.items()}))
"""

READ_BACK = """
import sys, json
from dials.array_family import flex
t = flex.reflection_table.from_file(sys.argv[1])
box = t["shoebox"][1]
print(json.dumps({
    "n": len(t), "columns": sorted(t.keys()), "ids": dict(t.experiment_identifiers()),
    "types": {k: type(t[k]).__name__ for k in t.keys()}, "value": list(t["intensity.prf.value"]),
    "s1": [list(x) for x in t["s1"]], "flags": list(t["flags"]), "hkl": [list(x) for x in t["miller_index"]],
    "bbox": list(box.bbox), "data": list(box.data), "mask": list(box.mask), "allocated": t["shoebox"][0].is_allocated(),
}))
"""


def small_table() -> ReflectionTable:
    boxes = ShoeboxColumn(
        panel=np.array([0, 1]),
        bbox=np.array([[0, 2, 0, 1, 0, 1], [3, 5, 7, 9, 0, 3]]),
        data=np.arange(12.0),
        mask=np.full(12, 5),
        background=np.full(12, 0.25),
        has_data=np.array([False, True]),
    )
    columns = {
        "id": np.array([0, 1]),
        "miller_index": np.array([[1, 2, 3], [-4, 5, 6]]),
        "panel": np.array([0, 1]),
        "flags": np.array([Flag.Predicted, Flag.Predicted | Flag.IntegratedPrf]),
        "intensity.prf.value": np.array([1.5, -2.5]),
        "s1": np.array([[1, 0, 0], [0, 1, 0]]),
        "bbox": boxes.bbox,
        "entering": np.array([True, False]),
        "shoebox": boxes,
    }
    return ReflectionTable.from_columns(columns, {0: "a", 1: "b"})


@pytest.mark.dials
def test_every_type_of_dials_comes_back_as_the_same_bytes(tmp_path, run_dials):
    names = run_dials(WRITE_ALL_TYPES, tmp_path / "dials.refl")
    table = read_refl(tmp_path / "dials.refl")
    write_refl(tmp_path / "untouched.refl", table)
    assert (tmp_path / "untouched.refl").read_bytes() == (tmp_path / "dials.refl").read_bytes()

    assert table.identifiers == {0: "one", 3: "two"}
    assert table["bool"].tolist() == [True, False, True]
    assert table["int"].tolist() == [-1, 0, 2**31 - 1] and table["int"].dtype == np.int32
    assert table["size_t"].tolist() == [0, 1, 2**30] and table["size_t"].dtype == np.uint64
    assert table["double"].tolist() == [0.1, -1e300, np.inf]
    assert table["vec2"].shape == (3, 2) and table["vec3"].shape == (3, 3) and table["vec3"].dtype == np.float64
    np.testing.assert_array_equal(table["mat3"], np.arange(27.0).reshape(3, 3, 3))
    assert table["int6"][0].tolist() == [0, 1, 2, 3, 4, 5]
    assert table["miller_index"].tolist() == [[1, 2, 3], [-1, -2, -3], [0, 0, 4]]
    assert isinstance(table["text"], RawColumn) and table["text"].dials_type == "std::string"
    boxes = table["shoebox"]
    assert boxes.panel.tolist() == [1, 1, 2] and boxes.has_data.tolist() == [False, True, True]
    assert boxes.ptr.tolist() == [0, 0, 12, 13]
    assert boxes.data.tolist() == [*range(10, 22), 20] and boxes.background[11] == 5.5 and boxes.mask[9] == 1

    # Now that the shoeboxes have been unpacked, they are packed anew.
    write_refl(tmp_path / "parsed.refl", table)
    assert (tmp_path / "parsed.refl").read_bytes() == (tmp_path / "dials.refl").read_bytes()
    ours = {"".join(word.capitalize() for word in name.split("_")): value for name, value in names.items()}
    assert ours == {name: int(flag) for name, flag in Flag.__members__.items()}


@pytest.mark.dials
def test_dials_reads_what_we_write(tmp_path, run_dials):
    table = small_table()
    write_refl(tmp_path / "ours.refl", table)
    theirs = run_dials(READ_BACK, tmp_path / "ours.refl")
    assert theirs["n"] == 2 and theirs["columns"] == sorted(table)
    assert theirs["ids"] == {"0": "a", "1": "b"}
    assert theirs["types"]["panel"] == theirs["types"]["flags"] == "size_t" and theirs["types"]["id"] == "int"
    assert theirs["types"]["miller_index"] == "miller_index" and theirs["types"]["bbox"] == "int6"
    assert theirs["value"] == [1.5, -2.5] and theirs["s1"] == [[1, 0, 0], [0, 1, 0]] and theirs["flags"] == [1, 513]
    assert theirs["hkl"] == [[1, 2, 3], [-4, 5, 6]]
    assert theirs["bbox"] == [3, 5, 7, 9, 0, 3] and theirs["data"] == list(range(12)) and theirs["mask"] == [5] * 12
    assert theirs["allocated"] is False


def test_round_trip_without_dials(tmp_path):
    table = small_table()
    table.columns["odd"] = RawColumn("Odd<>", 2, b"\x00\x01\x02")
    write_refl(tmp_path / "a.refl", table)
    again = read_refl(tmp_path / "a.refl")
    assert list(again) == list(table) and again.identifiers == table.identifiers
    write_refl(tmp_path / "b.refl", again)
    assert (tmp_path / "a.refl").read_bytes() == (tmp_path / "b.refl").read_bytes()
    again["intensity.prf.value"][0] = 7.0  # what is read can be changed in place
    write_refl(tmp_path / "b.refl", again)
    assert read_refl(tmp_path / "b.refl")["intensity.prf.value"].tolist() == [7.0, -2.5]


def test_the_shoebox_layout_is_header_then_three_planes(tmp_path):
    write_refl(tmp_path / "a.refl", small_table())
    packed = msgpack.unpackb((tmp_path / "a.refl").read_bytes(), strict_map_key=False)[2]["data"]["shoebox"][1][1]
    empty = struct.pack("<I6iB", 0, 0, 2, 0, 1, 0, 1, 0)
    filled = struct.pack("<I6iB12f12i12f", 1, 3, 5, 7, 9, 0, 3, 1, *range(12), *[5] * 12, *[0.25] * 12)
    assert packed == empty + filled


def test_an_empty_table_is_legal(tmp_path):
    write_refl(tmp_path / "none.refl", ReflectionTable())
    assert len(read_refl(tmp_path / "none.refl")) == 0
    write_refl(tmp_path / "rows.refl", small_table().select([]))
    table = read_refl(tmp_path / "rows.refl")
    assert len(table) == 0 and list(table) == list(small_table())
    assert table["bbox"].shape == (0, 6) and len(table["shoebox"].data) == 0


@pytest.mark.parametrize(
    ("name", "values", "dtype", "shape"),
    [
        ("panel", np.zeros(3, np.int64), np.uint64, (3,)),
        ("id", np.zeros(3, np.int64), np.int32, (3,)),
        ("num_pixels.valid", [1, 2, 3], np.int32, (3,)),
        ("d", np.zeros(3, np.float32), np.float64, (3,)),
        ("xyzcal.px", np.zeros((3, 3), np.int64), np.float64, (3, 3)),
        ("miller_index", np.zeros((3, 3), np.int16), np.int32, (3, 3)),
        ("bbox", np.zeros((3, 6), np.int64), np.int32, (3, 6)),
        ("A", np.zeros((3, 9)), np.float64, (3, 3, 3)),
        ("keep", np.zeros(3, bool), np.bool_, (3,)),
    ],
)
def test_setting_a_column_infers_the_type_of_dials(name, values, dtype, shape):
    table = ReflectionTable()
    table[name] = values
    assert table[name].dtype == dtype and table[name].shape == shape


def test_whole_numbers_keep_the_type_of_the_column_they_replace():
    table = small_table()
    table["intensity.prf.value"] = np.array([1, 2])
    assert table["intensity.prf.value"].dtype == np.float64


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("id", [1, 2, 3], "column id must have 2 rows"),
        ("panel", [-1, 0], "column panel must fit uint64, got values from -1 to 0"),
        ("id", [0, 2**31], "column id must fit int32"),
        ("x", np.zeros((2, 4)), "got float64 [2, 4]"),
        ("x", ["a", "b"], "column x must be one of bool [N]"),
        ("x", 1.0, "column x must be one of"),
    ],
)
def test_a_column_that_cannot_be_stored_is_refused(name, values, message):
    with pytest.raises(InputError, match=message.replace("[", r"\[")):
        small_table()[name] = values


def test_select_by_rows_and_mask_agree_with_each_row_alone():
    table = small_table()
    rows = table.select([1, 0, -1])
    assert rows["intensity.prf.value"].tolist() == [-2.5, 1.5, -2.5]
    boxes = rows["shoebox"]
    assert boxes.ptr.tolist() == [0, 12, 12, 24] and boxes.has_data.tolist() == [True, False, True]
    assert boxes.data.tolist() == [*range(12), *range(12)]
    masked = table.select(table.has_flags(Flag.IntegratedPrf))
    assert masked["id"].tolist() == [1] and masked["shoebox"].data.tolist() == list(range(12))
    with pytest.raises(InputError, match=r"rows must be a bool mask \[2\], got \[3\]"):
        table.select(np.ones(3, bool))
    with pytest.raises(InputError, match="from -2 to 1"):
        table.select([2])


def test_copy_and_delete_leave_the_original_alone():
    table = small_table()
    other = table.copy()
    other["id"][:] = 9
    other["shoebox"].data[:] = -1
    del other["s1"]
    assert table["id"].tolist() == [0, 1] and "s1" in table and table["shoebox"].data[3] == 3


def test_concat_renumbers_experiments_by_their_identifier():
    first, second = small_table(), small_table()
    second.identifiers = {0: "b", 1: "c"}
    second["id"] = [1, -1]
    joined = ReflectionTable.concat([first, second])
    assert joined["id"].tolist() == [0, 1, 2, -1]
    assert joined.identifiers == {0: "a", 1: "b", 2: "c"}
    assert joined["shoebox"].ptr.tolist() == [0, 0, 12, 12, 24]
    del second["bbox"]
    with pytest.raises(InputError, match="tables 0 and 1 cannot be joined: only one of them has bbox"):
        ReflectionTable.concat([first, second])


def test_a_missing_column_lists_those_present():
    with pytest.raises(InputError, match=r"no column 'd', 'lp'; present: id, miller_index, panel"):
        small_table().require("id", "d", "lp")
    with pytest.raises(InputError, match="no column 'zeta'"):
        small_table()["zeta"]


def test_bad_files_say_what_they_are(tmp_path):
    def message(content: bytes) -> str:
        (tmp_path / "x.refl").write_bytes(content)
        with pytest.raises(InputError) as caught:
            read_refl(tmp_path / "x.refl")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    write_refl(tmp_path / "good.refl", small_table())
    good = (tmp_path / "good.refl").read_bytes()
    assert "truncated or damaged" in message(good[:-1])
    assert "truncated or damaged" in message(good[:60])
    assert "truncated or damaged" in message(good + b"\x00")
    assert "got an empty file" in message(b"")
    assert "got something else" in message(b'{"__id__": "ExperimentList"}')
    assert "got HDF5" in message(b"\x89HDF\r\n\x1a\n")
    assert "pickle" in message(b"\x80\x02cdials")

    content = msgpack.unpackb(good, strict_map_key=False)
    content[2]["data"]["id"][1][0] = 3
    assert "column id must have 2 rows like the table, got 3" in message(msgpack.packb(content))
    content = msgpack.unpackb(good, strict_map_key=False)
    content[2]["data"]["s1"][1][1] += b"\x00"
    assert "column s1 (vec3<double>) must have 48 bytes, got 49" in message(msgpack.packb(content))
    with pytest.raises(InputError, match=r"cannot read .*: No such file"):
        read_refl(tmp_path / "none.refl")


def test_damaged_shoeboxes_are_found_when_used_and_survive_otherwise(tmp_path):
    table = small_table()
    table.columns["shoebox"] = ShoeboxColumn.from_bytes(2, table["shoebox"].to_bytes()[:-4])
    write_refl(tmp_path / "a.refl", table)
    again = read_refl(tmp_path / "a.refl")
    write_refl(tmp_path / "b.refl", again)
    assert (tmp_path / "a.refl").read_bytes() == (tmp_path / "b.refl").read_bytes()
    with pytest.raises(InputError, match="column shoebox: 198 bytes are not 2 shoeboxes"):
        again["shoebox"].data  # noqa: B018


def test_shoeboxes_that_do_not_fit_their_boxes_are_refused():
    with pytest.raises(InputError, match="boxes of 6 voxels in all"):
        ShoeboxColumn(np.zeros(1), np.array([[0, 1, 0, 2, 0, 3]]), np.zeros(5), np.zeros(5), np.zeros(5))


def test_columns_changed_behind_the_tables_back_are_checked_on_writing(tmp_path):
    table = small_table()
    table.columns["id"] = np.zeros(3, np.int32)
    with pytest.raises(InputError, match="must have 3 rows like the rest of the table, got 2"):
        write_refl(tmp_path / "x.refl", table)
    assert not (tmp_path / "x.refl").exists()
    with pytest.raises(InputError, match="cannot write"):
        write_refl(tmp_path / "no_such_folder" / "x.refl", small_table())


def test_many_shoeboxes_are_unpacked_without_a_slow_loop():
    n = 24_000
    bbox = np.tile([0, 5, 0, 5, 0, 3], (n, 1))
    counts = np.arange(75 * n) % 1000
    column = ShoeboxColumn(np.zeros(n), bbox, counts, np.ones(75 * n), np.zeros(75 * n))
    packed = column.to_bytes()
    start = time.process_time()
    again = ShoeboxColumn.from_bytes(n, packed)
    np.testing.assert_array_equal(again.data, counts)
    assert time.process_time() - start < 1.0
    assert again.to_bytes() == packed
