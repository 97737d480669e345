"""The instructions of barriers in memory, of tensor maps and of copies in bulk."""

from __future__ import annotations

import re

from .encode import SCOPES, TYPES, Encoder, _Row
from .parse import split

# The fields of a tensor map that tensormap.replace sets, in the machine's order.
FIELDS = ("global_address", "rank", "box_dim", "global_dim", "global_stride", "element_stride")
FIELDS += ("elemtype", "interleave_layout", "swizzle_mode", "fill_mode")
SIZED = ("box_dim", "global_dim", "global_stride", "element_stride")  # for each dimension
COPY = ("tensor", "tile", "shared", "shared::cluster", "global", "mbarrier::complete_tx::bytes")


def _refuse_others(words: list[str], *known: str) -> None:
    if unknown := [word for word in words if word not in known]:
        raise ValueError(f"modifier .{unknown[0]}")


class Asynchronous(Encoder):
    """Instructions that run on their own, and how they are waited for."""

    def _mbarrier(self, words: list[str], operands: tuple[str, ...]) -> _Row:
        kind, *words = words
        orders = ("relaxed",) if kind == "expect_tx" else ("release",) if kind == "arrive" else ()
        orders = ("acquire",) if kind.endswith("wait") else orders
        _refuse_others(words, "b64", "shared", "cta", "expect_tx", "parity", *orders)
        if kind in ("init", "inval"):
            count = [self.value(x) for x in operands[1:]]
            if len(count) != (kind == "init"):
                raise ValueError("operands")
            return _Row(f"mbarrier_{kind}", numbers=[*self.address(operands[0]), *count])
        if kind in ("try_wait", "test_wait"):
            ended, place, phase, *hint = operands
            if len(hint) > (kind == "try_wait"):
                raise ValueError("operands")
            numbers = [self.target(ended), *self.address(place), self.value(phase)]
            return _Row(f"mbarrier_{kind.partition('_')[0]}", numbers=numbers)
        if kind == "expect_tx":
            place, size = operands
            numbers = [-1, *self.address(place), self.value("1"), self.value(size)]
            return _Row("mbarrier_expect", numbers=numbers)
        if kind != "arrive":
            raise ValueError(f"kind .{kind}")
        state, place, *count = operands
        expects = "expect_tx" in words
        if len(count) > 1 or expects > len(count):
            raise ValueError("operands")
        by = self.value(count[0]) if count else self.value("1")
        more = [self.value("1"), by] if expects else [by, -1]
        return _Row("mbarrier_arrive", numbers=[self.sink(state), *self.address(place), *more])

    def _bulk(self, words: list[str], operands: tuple[str, ...]) -> _Row:
        """The rest of cp.async.bulk."""
        if words == ["commit_group"]:
            return _Row("bulk_commit")
        if words in (["wait_group"], ["wait_group", "read"]):
            mode = "reads" if len(words) > 1 else "plain"
            return _Row("bulk_wait", mode=mode, numbers=[int(operands[0], 0)])
        if words[:2] == ["prefetch", "tensor"]:
            return _Row("nop")
        dimensions = next((int(word[0]) for word in words if re.fullmatch("[1-5]d", word)), 0)
        if words[0] != "tensor":
            raise ValueError("a copy without a tensor map")
        loads = words.index("global") > min(
            map(words.index, {"shared", "shared::cluster"} & {*words})
        )
        _refuse_others(
            words, f"{dimensions}d", *COPY[: 5 + loads], *([] if loads else ["bulk_group"])
        )
        place, boxed, barrier = operands if loads else (*operands[::-1], "")
        name, coordinates = split(boxed.strip("[] "))
        numbers = [*self.address(place), *self.address(name)]
        numbers += self.address(barrier) if loads else (-1, 0)
        parts = split(coordinates.strip("{} "))
        if len(parts) != dimensions:
            raise ValueError("operands")
        numbers += [self.value(x) for x in parts]
        return _Row("bulk_load" if loads else "bulk_store", numbers=numbers)

    def _tensormap(self, words: list[str], operands: tuple[str, ...]) -> _Row:
        kind, *words = words
        if kind == "cp_fenceproxy":
            known = ("global", "shared", "tensormap::generic", "release", "gpu", "sync", "aligned")
            _refuse_others(words, *known)
            to, source, size = operands
            if int(size, 0) != 128:
                raise ValueError("size")
            return _Row("map_copy", numbers=[*self.address(to), *self.address(source)])
        tile, field, *rest = words
        space = next((word for word in rest if word in ("shared", "global")), "generic")
        _refuse_others(rest, space, "b1024", *TYPES)
        place, *dimension, value = operands
        if (kind, tile) != ("replace", "tile") or len(dimension) != (field in SIZED):
            raise ValueError("operands")
        numbers = [*self.address(place), FIELDS.index(field), *(int(x, 0) for x in dimension)]
        numbers += [] if dimension else [0]
        return _Row("map_replace", numbers=[*numbers, self.value(value)], space=space)

    def _prefetch(self, words: list[str], operands: tuple[str, ...]) -> _Row:
        _refuse_others(words, "tensormap", "param", "const", "global", "L1", "L2")
        return _Row("nop")

    def _fence(self, words: list[str], operands: tuple[str, ...]) -> _Row:
        if words[:2] == ["proxy", "tensormap::generic"]:
            _refuse_others(words[2:], "acquire", "release", "cta", "gpu", "sys")
            if "release" in words:
                return _Row("fence")
            if int(operands[1], 0) != 128:
                raise ValueError("size")
            return _Row("map_fence", numbers=[*self.address(operands[0])])
        if words[0] == "proxy" and len(words) > 1:
            if words[1] != "async":
                raise ValueError("kind of fence")
            return _Row("fence_proxy")
        if words == ["mbarrier_init", "release", "cluster"]:
            return _Row("fence")
        if not set(words) <= {*SCOPES, "sc", "gl"}:
            raise ValueError("kind of fence")
        return _Row("fence")

    _membar = _fence

    def _bar(self, words: list[str], operands: tuple[str, ...]) -> _Row:
        words = [word for word in words if word not in ("cta", "aligned")]
        if words == ["warp", "sync"]:
            return _Row("bar_warp", numbers=[self.value(operands[0])])
        number, threads = (*operands, "0")[:2]
        numbers = [self.value(number), self.value(threads)]
        if words == ["arrive"] and len(operands) == 2:
            return _Row("bar_arrive", numbers=numbers)
        if words != ["sync"]:
            raise ValueError("kind of barrier")
        return _Row("bar", numbers=numbers)

    _barrier = _bar

    def _elect(self, words: list[str], operands: tuple[str, ...]) -> _Row:
        _refuse_others(words, "sync")
        targets, members = operands
        lane, _, elected = targets.partition("|")
        numbers = [self.sink(lane), self.target(elected), self.value(members)]
        return _Row("elect", numbers=numbers)

    def _setmaxnreg(self, words: list[str], operands: tuple[str, ...]) -> _Row:
        way, *words = words
        _refuse_others(words, "sync", "aligned", "u32")
        registers = int(operands[0], 0)
        if registers % 8 or not 24 <= registers <= 256:
            raise ValueError("registers")
        return _Row("setmaxnreg", numbers=[registers, {"inc": 1, "dec": 0}[way]])

    def _griddepcontrol(self, words: list[str], operands: tuple[str, ...]) -> _Row:
        _refuse_others(words, "wait", "launch_dependents")
        return _Row("nop")

    def _nanosleep(self, words: list[str], operands: tuple[str, ...]) -> _Row:
        return _Row("pause")
