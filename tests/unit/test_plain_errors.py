"""Errors of jsonargparse in one sentence: nothing that says what is wrong is lost, nothing else is kept."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lightning_longrope.plain_errors import plain


def union(key, types, entries, value):
    """What jsonargparse writes of a value that may be of several types."""

    def indented(text):
        return text.replace("\n", "\n  ")

    listed = "".join(f"\n  - {indented(indented(entry))}" for entry in entries)
    return (
        f"{key}Does not validate against any of the Union subtypes\nSubtypes: {types}\nErrors:{listed}"
        f"\nGiven value type: <class 'jsonargparse._namespace.Namespace'>\nGiven value: {value}"
    )


NOTHING = "Expected a <class 'NoneType'>"
NO_SUBCLASS = "Not a valid subclass of Callback\nSubclass types expect one of:\n- a class path (str)\n- a dict"
DUMP = "Namespace(class_path='a.B', init_args=Namespace(seq_len=0,\nkey='v\n- w'))"
LORA = union("", "[LoRA, NoneType]", ["`lora` needs a rank of at least 1, got rank=0."], "Namespace(rank=0)")


@pytest.mark.parametrize(
    ("key", "entries", "value", "said"),
    [
        ("", ["`seq_len` must be at least 4, got 0.", NOTHING], DUMP, "`seq_len` must be at least 4, got 0."),
        ("", [LORA, NOTHING], DUMP, "`lora` needs a rank of at least 1, got rank=0."),
        ("", ["a line\nand one more", NO_SUBCLASS], "[<a.B object at 0x7f>]", "a line and one more"),
        (
            'Parser key "data": ',
            ["Parser key \"seq_len\":\n  Expected a <class 'int'>. Got value: abc"],
            "NestedArg(key='seq_len', val='abc')",
            'Parser key "data.seq_len": Expected int. Got value: abc',
        ),
        (
            'Parser key "data": ',
            ["Parser key \"seq_len\":\n  Expected a <class 'int'>. Got value: ", NOTHING],
            "{'class_path': 'a.B', 'init_args': {'seq_len': ''}}",
            "Parser key \"data.seq_len\": Expected int. Got value: ''",
        ),
        (
            'Parser key "trainer.logger": ',
            ["Expected a dot import path string: ", "Expected a <class 'bool'>", NOTHING],
            "",
            "Parser key \"trainer.logger\": Expected a dot import path string: Expected bool. Got value: ''",
        ),
        (
            'Parser key "precision": ',
            ["Expected a <class 'int'>.", "Expected a typing.Literal['16', '32']", f"{NOTHING}. Got value: [a\nb]"],
            "nope",
            "Parser key \"precision\": Expected int; Expected one of '16', '32'. Got value: nope",
        ),
        (
            'Parser key "callbacks": ',
            [NO_SUBCLASS, NOTHING],
            "7",
            'Parser key "callbacks": Not a valid subclass of Callback Subclass types expect one of: a class path (str);'
            " a dict. Got value: 7",
        ),
        (
            'Parser key "trainer.callbacks": ',
            ["unrecognized arguments: --0.init_args.documents=4", NO_SUBCLASS],
            "NestedArg(key='0.init_args.documents', val='4')",
            "`--trainer.callbacks.0.init_args.documents`: an entry of a list goes by its number in files only,"
            " under `short` of a stage. Change the entry in the file, or give the whole list with --trainer.callbacks.",
        ),
    ],
)
def test_only_what_says_what_is_wrong_is_kept_in_whatever_order_the_types_come(key, entries, value, said):
    assert plain(union(key, "[...]", entries, value)) == said
    if len(entries) == 2:
        assert plain(union(key, "[...]", entries[::-1], value)) == said


@given(st.text() | st.text(alphabet=" :-\n\t\xa0'a"))
@example(":")
@example("\t")
def test_whatever_the_value_is_what_was_expected_is_said(value):
    inner = f"Parser key \"seq_len\":\n  Expected a <class 'int'>. Got value: {value}"
    assert 'Parser key "data.seq_len": Expected int' in plain(union('Parser key "data": ', "[...]", [inner], value))


def test_other_texts_stay_as_they_are():
    text = "No checkpoint in a:\n  - expected a .ckpt"
    assert plain(text) == text
