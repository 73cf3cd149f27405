"""The model of a power loss is as weak as POSIX: it finds the faults that careless writers have."""

import pytest

from tests.chaos.power_loss import Operation, Tree, states

OLD, NEW = b"o" * 2000, b"n" * 3000
BEFORE = [
    Operation("create", "file"),
    Operation("write", "file", data=OLD),
    Operation("sync_file", "file"),
    Operation("sync_folder", "."),
]
ASIDE = [Operation("create", "aside"), Operation("write", "aside", data=NEW)]
RENAME = Operation("rename", "aside", target="file")


def found_after(*operations: Operation) -> list[Tree]:
    """The trees that may be found where the crash came after all of them."""
    end = len(operations) + 1  # at a mark every state is told of, though it was seen before
    return [crash.tree for crash in states([*operations, Operation("mark", "end")]) if crash.after == end]


def contents(*writer: Operation) -> set[bytes | None]:
    """What may be found in the file once it was there, wherever in the writer's operations the crash came."""
    after = len(BEFORE)
    return {crash.tree.get("file") for crash in states([*BEFORE, *writer]) if crash.after >= after}


def test_written_aside_synced_and_renamed_a_file_is_the_old_or_the_new_one() -> None:
    assert contents(*ASIDE, Operation("sync_file", "aside"), RENAME) == {OLD, NEW}


def test_once_the_folder_is_synced_only_the_new_one_is_found() -> None:
    found = found_after(*BEFORE, *ASIDE, Operation("sync_file", "aside"), RENAME, Operation("sync_folder", "."))
    assert {tree["file"] for tree in found} == {NEW}


@pytest.mark.parametrize(
    "careless",
    [
        pytest.param([*ASIDE, RENAME], id="renamed before it was synced"),
        pytest.param([Operation("write", "file", data=NEW)], id="written in place"),
        pytest.param(
            [Operation("unlink", "file"), *ASIDE, Operation("sync_file", "aside"), RENAME], id="removed first"
        ),
    ],
)
def test_a_careless_writer_is_found_out(careless: list[Operation]) -> None:
    assert contents(*careless) - {OLD, NEW}


def test_unsynced_data_may_be_lost_torn_zero_or_a_hole() -> None:
    written = [Operation("write", "file", offset=2000, data=NEW), Operation("write", "file", offset=5000, data=NEW)]
    found = {tree["file"] for tree in found_after(*BEFORE, *written)}
    assert {OLD, OLD + NEW + NEW, OLD + bytes(6000), OLD + bytes(3000) + NEW} <= found
    torn = OLD + NEW[:1024]
    assert any(data is not None and data.startswith(torn) and not data.startswith(OLD + NEW) for data in found)


def test_a_file_in_a_folder_whose_name_is_not_durable_is_lost_with_it() -> None:
    writer = [
        Operation("mkdir", "save"),
        Operation("create", "save/file"),
        Operation("write", "save/file", data=NEW),
        Operation("sync_file", "save/file"),
        Operation("sync_folder", "save"),
    ]
    found = found_after(*writer)
    assert {} in found and {"save": None, "save/file": NEW} in found


def test_names_changed_and_not_synced_come_back_in_any_combination() -> None:
    removed = [Operation("unlink", "save/first"), Operation("unlink", "save/second")]
    made = [
        Operation("mkdir", "save"),
        Operation("sync_folder", "."),
        Operation("create", "save/first"),
        Operation("create", "save/second"),
        Operation("sync_folder", "save"),
    ]
    found = {frozenset(tree) for tree in found_after(*made, *removed)}
    assert found == {
        frozenset(left | {"save"})
        for left in (set[str](), {"save/first"}, {"save/second"}, {"save/first", "save/second"})
    }
