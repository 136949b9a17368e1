"""A table of parts: each is read once, in the requested order, as a table and as CSV."""

import io
from pathlib import Path

import pandas as pd

from harness.store.growing import GrowingTable

COLUMNS = ("epoch", "name", "value")


def made(read: list[str]) -> GrowingTable:
    def rows_of(path: Path) -> pd.DataFrame:
        read.append(path.name)
        epoch = int(path.name)
        # one part has no rows, and one has a missing value
        values = [0.1 * epoch, float("nan")][: epoch % 3]
        return pd.DataFrame({"epoch": epoch, "name": f'n,"{epoch}"', "value": values}, columns=list(COLUMNS))

    return GrowingTable(COLUMNS, rows_of)


def parts(*numbers: int) -> list[Path]:
    return [Path(str(number)) for number in numbers]


def test_parts_are_read_once_and_kept_in_the_given_order() -> None:
    read: list[str] = []
    table = made(read)
    assert table.of(parts(1, 4))["epoch"].tolist() == [1, 4]
    # between them, and before them
    assert table.of(parts(0, 1, 2, 4, 5))["epoch"].tolist() == [1, 2, 2, 4, 5, 5]
    assert table.of(parts(5, 1))["epoch"].tolist() == [5, 5, 1]
    assert table.of(parts(0)).empty
    assert list(table.of(parts(0))) == list(COLUMNS)
    assert read == ["1", "4", "0", "2", "5"]


def test_a_rewritten_part_is_read_again() -> None:
    read: list[str] = []
    table = made(read)
    table.of(parts(1, 2, 4))
    table.forget(Path("2"))
    table.forget(Path("7"))
    assert table.of(parts(1, 2, 4))["epoch"].tolist() == [1, 2, 2, 4]
    assert read == ["1", "2", "4", "2"]
    assert table.csv(parts(1, 2, 4)).count("\n") == 5


def test_the_csv_holds_the_table() -> None:
    table = made([])
    for asked in (parts(1, 4), parts(0, 1, 2, 4, 5), parts(4, 2), parts()):
        whole = table.of(asked)
        back = pd.read_csv(io.StringIO(table.csv(asked)))
        assert back.to_dict("list").keys() == whole.to_dict("list").keys()
        pd.testing.assert_frame_equal(back, whole, check_dtype=bool(len(whole)))
    assert '"n,""4"""' in table.csv(parts(4))
