"""What happens to files: disks flip bits, copies stop half way, people type, and some mean harm."""

import random
import re
from collections.abc import Callable

NUMBER = re.compile(rb"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")
VALUE = re.compile(rb'"(?:[^"\\\n]|\\.)*"|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?|true|false|null|\[\]|\{\}')
NUMBERS = [
    b"NaN",
    b"Infinity",
    b"-Infinity",
    b".inf",
    b"1e400",
    b"-1e400",
    b"9" * 400,
    b"9" * 5000,
    b"-1",
    b"0",
    b"-0.0",
]
NUMBERS += [
    b"1e-400",
    b"1_000",
    b"0x10",
    b"010",
    b"1:30",
    b"true",
    b"null",
    b'"1"',
    b"2.5",
    b"18446744073709551616",
    b"1,5",
]
NUMBERS += ["\u0661\u0662".encode(), b"1e5", b"+1", b" 7 ", b"1152921504606846976", b"~", b""]
VALUES = [
    b"{}",
    b"[]",
    b"null",
    b"true",
    b'""',
    b'"x"',
    b"[[[]]]",
    b'{"a": {"b": []}}',
    b"[null]",
    b"0",
    b'"../../x"',
    b'"/etc/passwd"',
]
VALUES += [
    b'"\\ud800"',
    b'"\\u0000"',
    b"[" * 3000,
    b"[" * 90 + b"]" * 90,
    b"[" * 150 + b"]" * 150,
    b'{"a":' * 200 + b"1" + b"}" * 200,
]
PIECES = [
    b"\0",
    b"\xef\xbb\xbf",
    b"\r\n",
    b"\n",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"\xc3",
    b'"',
    b"'",
    b",",
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
]
PIECES += [
    b"x" * 140_000,
    b"&a [*a]",
    b"!!python/object/apply:os.system ['true']",
    b"!!python/name:os.system ''",
    b"<<: *x",
]
PIECES += [
    b"a: &a [x,x,x,x,x,x,x,x,x]\n"
    + b"".join(b"%c: &%c [*%c,*%c,*%c,*%c,*%c,*%c,*%c,*%c,*%c]\n" % (c + 1, c + 1, *[c] * 9) for c in range(97, 110))
]
PIECES += [
    b"\n---\n",
    b"- " * 300,
    b"\t",
    b"\x1b[31m",
    b"#",
    b"%YAML 1.2\n",
    b"? x",
    b"!!binary x",
    b"!!int x",
    b"2020-99-99",
    b"\x80",
]

Change = Callable[[random.Random, bytes], bytes]


def _cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _flip(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8)) if data else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _drop(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + data[start + rng.choice((1, 2, 7, 40, 400)) :]


def _double(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data) + 1)
    end = start + rng.choice((1, 3, 20, 200))
    return data[:end] + data[start:end] + data[end:]


def _insert(rng: random.Random, data: bytes) -> bytes:
    place = rng.choice((0, len(data), rng.randrange(len(data) + 1)))
    return data[:place] + rng.choice(PIECES) + data[place:]


def _exchange(pattern: re.Pattern[bytes], others: list[bytes]) -> Change:
    def change(rng: random.Random, data: bytes) -> bytes:
        found = list(pattern.finditer(data))
        if not found:
            return data
        match = rng.choice(found)
        return data[: match.start()] + rng.choice(others) + data[match.end() :]

    return change


def _move(rng: random.Random, data: bytes) -> bytes:
    """One value in the place of another."""
    found = list(VALUE.finditer(data))
    if not found:
        return data
    one, other = rng.choice(found), rng.choice(found)
    return data[: one.start()] + other[0] + data[one.end() :]


def _lines(rng: random.Random, data: bytes) -> bytes:
    lines = data.split(b"\n")
    one, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    kind = rng.randrange(4)
    if kind == 0:
        lines[one], lines[other] = lines[other], lines[one]
    elif kind == 1:
        lines.insert(one, lines[other])
    elif kind == 2:
        del lines[one]
    else:
        lines[one] = rng.choice((b" ", b"  ", b"\t", b"- ", b"")) + lines[one]
    return b"\n".join(lines)


CHANGES: list[Change] = [_cut, _flip, _flip, _drop, _double, _insert, _lines, _move]
CHANGES += [_exchange(NUMBER, NUMBERS), _exchange(NUMBER, NUMBERS), _exchange(VALUE, VALUES)]


def damaged(rng: random.Random, data: bytes) -> bytes:
    """The data after one to three accidents."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        data = rng.choice(CHANGES)(rng, data)
    return data
