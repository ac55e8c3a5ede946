"""Damaged files: flipped bits, cuts, other bytes, and JSON that is JSON and says something else."""

import json

ODD = [None, True, -1, 0, 1, 2**70, 1.5, float("nan"), "", "..", "/etc/passwd", "\0", "\ud800", [], [[]], {}, {"a": 1},
       {"__dtype__": "nn"}, {"__dtype__": 3}, {"__float__": []}, {"__tuple__": 3}]  # fmt: skip


WHOLE = [b"", b"[" * 100_000, b"null", b"{}", b"[]", b"\xff\xfe", b"\xef\xbb\xbf{}", b"9" * 5000]


def damaged(content, draw):
    """Bytes that are near `content`."""
    raw = bytearray(content or b"\0")
    place = draw.randrange(len(raw) or 1)
    kind = draw.randrange(5)
    if kind == 0:
        raw[place] ^= 1 << draw.randrange(8)
    elif kind == 1:
        del raw[place:]
    elif kind == 2:
        raw[place : place + draw.randrange(9)] = draw.randbytes(draw.randrange(9))
    elif kind == 3:
        raw[:] = draw.randbytes(draw.randrange(200))
    else:
        raw[:] = draw.choice(WHOLE)
    return bytes(raw)


def altered(content, draw):
    """JSON with one or two values replaced, removed, moved or renamed."""
    tree = json.loads(content)
    for _ in range(draw.randrange(1, 3)):
        places = list(places_in(tree))
        if not places:
            break
        parent, key = draw.choice(places)
        kind = draw.randrange(4)
        if kind == 0:
            del parent[key]
        elif kind == 1:
            parent[key] = draw.choice(ODD)
        elif kind == 2:
            other, at = draw.choice(places)
            parent[key] = other[at] if not reaches(other[at], parent) else None
        elif isinstance(parent, dict):
            parent[draw.choice(["", "x", "../x", "pieces", "__dtype__", "__float__"])] = parent.pop(key)
    return tree


def places_in(tree):
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items):
        yield tree, key
        yield from places_in(value)


def reaches(tree, wanted):
    return tree is wanted or any(parent[key] is wanted for parent, key in places_in(tree))
