"""Runs one thread of a kernel's machine code, to count what it issues with the arguments of a real call.

Kept apart from ci/roofline.py, which asks, because it knows instructions and no GPU. Integers, predicates and
the launch's constants are computed; what comes from memory and from floating point is unknown, but for the
few conversions by which integers are divided. A branch on something unknown is not taken (slow paths of
divisions stand behind those) unless it jumps over the call of a slow path, a wait for a barrier succeeds, and
what a shuffle brings is what this lane has. So the path is that of a lane whose neighbours are like it, and the count that of its warp. An
instruction that is not known here leaves its first operand unknown; a loop that then never ends is an error.
"""

import re
import struct

MASK = 0xFFFFFFFF
STEPS = 3_000_000
# Where constants lie in bank 0: block and grid, and the kernel's argument.
ARGUMENT = 0x210
OPERAND = re.compile(r"^(-?)(~?)(!?)(\|?)(U?R\d+|U?RZ|U?P\d|U?PT|PR|SR[\w.]*|SRZ|c\[.*\]\[.*\]|-?0x[0-9a-f]+|[-+]?\d[\d.e+-]*|[-+]?(?:INF|QNAN))")
FLOATS = ("F", "D", "H", "MUFU", "I2F")


def f32(bits):
    return struct.unpack("<f", struct.pack("<I", bits & MASK))[0]


def bits32(value):
    return struct.unpack("<I", struct.pack("<f", value))[0]


def half_bits(text):
    return struct.unpack("<H", struct.pack("<e", float(text)))[0]


def signed(v):
    return v - (1 << 32) if v & 0x80000000 else v


class Operand:
    """A register, predicate, constant or number, with its sign."""

    def __init__(self, text):
        text = text.replace(".reuse", "").strip()
        found = OPERAND.match(text)
        self.neg, self.inv, self.no = (bool(found and found[i]) for i in (1, 2, 3))
        name = found[5] if found else text
        self.kind, self.at, self.index = "other", name, None
        if re.match(r"^U?R\d+", name):
            self.kind, self.at = "reg", name
        elif name in ("RZ", "URZ", "SRZ"):
            self.kind, self.at = "number", 0
        elif re.match(r"^U?P\d$", name):
            self.kind = "pred"
        elif name in ("PT", "UPT"):
            self.kind, self.at = "truth", True
        elif name.startswith("c["):
            bank, where = re.match(r"c\[(\w+)\]\[(.*)\]", name).groups()
            parts = where.split("+")
            self.kind = "const" if bank == "0x0" else "other"
            self.at = sum(int(p, 16) for p in parts if p.startswith("0x"))
            self.index = next((p.split(".")[0] for p in parts if re.match(r"^U?R\d", p)), None)
        elif re.match(r"^-?0x", name):
            self.kind, self.at = "number", int(name, 16) & MASK
        elif name.startswith("SR"):
            self.kind = "special"


class Thread:
    """`argument` is the kernel's, byte by byte (None where unknown)."""

    def __init__(self, kernel, block, grid, argument, tid, ctaid):
        self.kernel, self.argument = kernel, argument
        self.launch = {0: block, 4: 1, 8: 1, 12: grid, 16: 1, 20: 1}
        self.special = {"SR_TID.X": tid, "SR_CTAID.X": ctaid, "SR_LANEID": tid % 32}
        self.reg, self.pred = {}, {}
        self.steps = 0
        # Bytes of global memory: read, written, and under way at once at most.
        self.read = self.written = self.flying = self.most = 0
        self.pending, self.groups, self.unknown = {}, [0], set()
        # What lies in local memory, by address: registers that were spilled.
        self.local = {}

    # Values.

    def constant(self, at, size=4):
        if size == 4 and at in self.launch:
            return self.launch[at]
        part = self.argument[at - ARGUMENT : at - ARGUMENT + size] if at >= ARGUMENT else []
        return int.from_bytes(bytes(part), "little") if len(part) == size else None

    def raw(self, op, more=0):
        if op.kind == "reg":
            name = op.at
            return self.reg.get(name if not more else next_register(name, more))
        if op.kind == "number":
            return op.at if not more else (MASK if op.at & 0x80000000 else 0)
        if op.kind == "const":
            index = 0 if op.index is None else self.reg.get(op.index)
            return None if index is None else self.constant(op.at + index + 4 * more)
        if op.kind == "special":
            return self.special.get(op.at, 0)
        return None

    def value(self, op):
        v = self.raw(op)
        if v is None:
            return None
        if op.inv:
            v = ~v
        return (-v if op.neg else v) & MASK

    def pair(self, op):
        if op.kind == "number":
            return op.at
        low, high = self.raw(op), self.raw(op, 1)
        if low is None or high is None:
            return None
        v = high << 32 | low
        return -v if op.neg else v

    def truth(self, op):
        v = True if op.kind == "truth" else self.pred.get(op.at)
        return v if v is None else v != op.no

    def put(self, op, v):
        if op.kind == "reg":
            self.reg[op.at] = None if v is None else v & MASK

    def put_pair(self, op, v):
        if op.kind == "reg":
            self.reg[op.at] = None if v is None else v & MASK
            self.reg[next_register(op.at, 1)] = None if v is None else v >> 32 & MASK

    def put_pred(self, op, v):
        if op.kind == "pred":
            self.pred[op.at] = v

    # Running.

    def run(self):
        at, code = 0, self.kernel.decoded()
        while at is not None and at < len(code):
            self.steps += 1
            if self.steps > STEPS:
                raise RuntimeError(f"{self.kernel.name}: no end at instruction {at}: {self.kernel.code[at]}")
            guard, name, parts, operands, text = code[at]
            if guard is not None:
                holds = self.truth(guard)
                if holds is None and name not in ("BRA", "EXIT"):
                    holds = True
                if not holds:
                    if holds is None:
                        self.unknown.add(at)
                    at += 1
                    continue
            at = self.step(at, name, parts, operands, text)
        return self

    def step(self, at, name, parts, o, text):
        if name == "EXIT":
            return None
        if name == "BRA":
            if "DIV" in parts:
                return at + 1
            truths = [self.truth(x) for x in o if x.kind in ("pred", "truth")]
            if False in truths or None in truths and not self.passes_slow_path(at, text):
                return at + 1
            return self.kernel.target(text)
        if name == "CALL":
            return self.kernel.target(text)
        if name == "RET":
            back = self.value(o[0])
            if back is None:
                raise RuntimeError(f"{self.kernel.name}: a return to nowhere at {at}")
            return back // 16
        self.track(name, parts, o, text)
        handler = getattr(self, "op_" + (name[1:] if name in UNIFORM else name).lower(), None)
        if handler:
            handler(o, parts)
        elif o and name not in SILENT:
            for x in o[:2] if name == "SHFL" else o[:1]:
                self.put(x, None) if x.kind == "reg" else self.put_pred(x, None)
        return at + 1

    def passes_slow_path(self, at, text):
        """Whether a jump leaves out a call for what is no normal number: roots and reciprocals jump over theirs."""
        code, target = self.kernel.code, self.kernel.target(text)
        return target > at and any("slowpath" in line for line in code[at + 1 : min(target, at + 6)])

    def track(self, name, parts, o, text):
        """Global memory that is asked for, and waits for it."""
        if self.pending:
            waited = [x for x in re.findall(r"\bR\d+", text) if x in self.pending]
            if waited and name not in ("LDG",):
                # Loads come back in order.
                self.flying = 0
                self.pending.clear()
        size = 4
        for width, count in (("128", 16), ("64", 8), ("U8", 1), ("S8", 1), ("U16", 2), ("S16", 2)):
            if width in parts:
                size = count
        if name == "LDG":
            self.read += size
            self.flying += size
            for i in range(max(1, size // 4)):
                self.pending[next_register(o[0].at, i)] = size
        elif name == "LDGSTS":
            self.read += size
            self.groups[-1] += size
        elif name == "LDGDEPBAR":
            self.groups.append(0)
        elif name == "DEPBAR":
            keep = next((int(x, 16) for x in re.findall(r"0x[0-9a-f]+", text)), 0)
            self.groups = self.groups[-1 - keep :] if keep else [0]
        elif name == "STG":
            self.written += size
        self.most = max(self.most, self.flying + sum(self.groups))

    # Instructions.

    def op_mov(self, o, parts):
        self.put(o[0], self.value(o[1]))

    def op_r2ur(self, o, parts):
        self.put(o[0], self.value(o[1]))

    op_s2r = op_s2ur = op_shfl_value = op_mov

    def op_cs2r(self, o, parts):
        (self.put if "32" in parts else self.put_pair)(o[0], self.raw(o[1]))

    def op_shfl(self, o, parts):
        self.put(o[1], self.value(o[2]))
        self.put_pred(o[0], True)

    def op_ldc(self, o, parts):
        c = o[1]
        index = 0 if c.index is None else self.reg.get(c.index)
        if c.kind != "const" or index is None:
            return self.put(o[0], None)
        size = 8 if "64" in parts else 1 if "U8" in parts else 2 if "U16" in parts else 4
        v = self.constant(c.at + index, size)
        (self.put_pair if size == 8 else self.put)(o[0], v)

    def op_imad(self, o, parts):
        a, b = self.value(o[1]), self.value(o[2])
        if 0 in (a, b):
            a = b = 0
        if "WIDE" in parts or "HI" in parts:
            # A carry may stand between.
            sources = [x for x in o[1:] if x.kind not in ("pred", "truth")]
            a, b, c = self.value(sources[0]), self.value(sources[1]), self.pair(sources[2])
            if 0 in (a, b):
                a = b = 0
            if None in (a, b, c):
                v = None
            else:
                v = (a * b if "U32" in parts else signed(a) * signed(b)) + c & 0xFFFFFFFFFFFFFFFF
            if "HI" in parts:
                return self.put(o[0], None if v is None else v >> 32)
            return self.put_pair(o[0], v)
        c = self.value(o[3])
        carry = self.truth(o[4]) if "X" in parts else False
        self.put(o[0], None if None in (a, b, c, carry) else a * b + c + carry)

    def op_iadd3(self, o, parts):
        outs, rest = [], list(o[1:])
        while rest and rest[0].kind in ("pred", "truth"):
            outs.append(rest.pop(0))
        sources, carries = rest[:3], rest[3:]
        total = 0
        for x in sources:
            v = self.raw(x)
            if v is None:
                total = None
                break
            total += (~v & MASK) + 1 if x.neg else (~v & MASK if x.inv else v)
        if "X" in parts and total is not None:
            for x in carries:
                carry = self.truth(x)
                total = None if carry is None or total is None else total + carry
        self.put(o[0], total)
        for i, x in enumerate(outs):
            self.put_pred(x, None if total is None else total >> 32 > i)

    def op_viadd(self, o, parts):
        a, b = self.value(o[1]), self.value(o[2])
        self.put(o[0], None if None in (a, b) else a + b)

    def op_lea(self, o, parts):
        outs, rest = [], list(o[1:])
        while rest[0].kind in ("pred", "truth"):
            outs.append(rest.pop(0))
        if "HI" in parts:
            a, b, c, shift = (self.value(x) for x in rest[:4])
            carry = self.truth(rest[4]) if "X" in parts else False
            known = None not in (a, b, c, shift, carry)
            v = ((c << 32 | a) << shift >> 32 & MASK) + b + carry if known else None
        else:
            a, b, shift = (self.value(x) for x in rest[:3])
            v = None if None in (a, b, shift) else (a << shift & MASK) + b
        self.put(o[0], v)
        for x in outs:
            self.put_pred(x, None if v is None else v > MASK)

    def op_lop3(self, o, parts):
        outs = []
        rest = list(o)
        if rest[0].kind in ("pred", "truth"):
            outs.append(rest.pop(0))
        target, a, b, c, lut = rest[0], *(self.value(x) for x in rest[1:4]), self.value(rest[4])
        v = self.lut3(a, b, c, lut)
        self.put(target, v)
        for x in outs:
            self.put_pred(x, None if v is None else v != 0)

    @staticmethod
    def lut3(a, b, c, lut):
        # An operand that the table does not look at may be unknown; so may one that an AND with 0 hides.
        if lut == 0xC0 and 0 in (a, b):
            return 0
        looks = lambda bit: any((lut >> i & 1) != (lut >> (i ^ bit) & 1) for i in range(8))
        a, b, c = (v if v is not None or looks(bit) else 0 for v, bit in ((a, 4), (b, 2), (c, 1)))
        if None in (a, b, c):
            return None
        v = 0
        for i in range(8):
            if lut >> i & 1:
                v |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        return v & MASK

    def op_plop3(self, o, parts):
        a, b, c = (self.truth(x) for x in o[2:5])
        for target, lut in ((o[0], self.value(o[5])), (o[1], self.value(o[6]) if len(o) > 6 else 0)):
            results = {lut >> (x << 2 | y << 1 | z) & 1 for x in both(a) for y in both(b) for z in both(c)}
            self.put_pred(target, bool(results.pop()) if len(results) == 1 else None)

    def op_shf(self, o, parts):
        low, shift, high = (self.value(x) for x in o[1:4])
        if shift is None:
            return self.put(o[0], None)
        right, wide = "R" in parts, "U64" in parts or "S64" in parts
        v = None
        if wide and None not in (low, high):
            both_ = high << 32 | low
            v = both_ >> min(shift, 63) if right else both_ << min(shift, 63)
            v = v >> 32 if "HI" in parts else v
        elif not wide and right and "HI" in parts and high is not None:
            v = (signed(high) if "S32" in parts else high) >> min(shift, 31 if "S32" in parts else 32)
        elif not wide and not right and low is not None:
            v = low << min(shift, 32)
        self.put(o[0], v)

    def op_isetp(self, o, parts):
        a, b = self.value(o[2]), self.value(o[3])
        mix = self.truth(o[4])
        name = parts[1]
        if a is not None and b is not None:
            if "U32" not in parts and name not in ("EQ", "NE"):
                a, b = signed(a), signed(b)
            equal, less = a == b, a < b
            low = self.truth(o[5]) if "EX" in parts else None
            if "EX" in parts and equal:
                v = low
            else:
                v = {"EQ": equal, "NE": not equal, "LT": less, "LE": less or equal, "GT": not less and not equal, "GE": not less}[name]
        else:
            # No number is below 0.
            v = True if name == "GE" and "U32" in parts and b == 0 and "EX" not in parts else None
        if "AND" in parts:
            v = False if False in (v, mix) else None if None in (v, mix) else True
        elif "OR" in parts:
            v = True if True in (v, mix) else None if None in (v, mix) else False
        self.put_pred(o[0], v)
        self.put_pred(o[1], None)

    def op_sel(self, o, parts):
        which = self.truth(o[3])
        a, b = self.value(o[1]), self.value(o[2])
        self.put(o[0], (a if a == b else None) if which is None else a if which else b)

    op_fsel = op_sel

    def op_vimnmx(self, o, parts):
        self.minmax(o[0], self.value(o[1]), self.value(o[2]), o[3], parts)

    def op_viaddmnmx(self, o, parts):
        a, b = self.value(o[1]), self.value(o[2])
        self.minmax(o[0], None if None in (a, b) else a + b & MASK, self.value(o[3]), o[4], parts)

    def minmax(self, target, a, b, which, parts):
        least = self.truth(which)
        if None in (a, b, least):
            return self.put(target, None)
        key = (lambda v: v) if "U32" in parts else signed
        self.put(target, (min if least else max)(a, b, key=key))

    op_imnmx = op_vimnmx

    def op_prmt(self, o, parts):
        a, select, b = (self.value(x) for x in o[1:4])
        if None in (a, select, b):
            return self.put(o[0], None)
        source = (b << 32 | a).to_bytes(8, "little")
        self.put(o[0], int.from_bytes(bytes(source[select >> 4 * i & 7] for i in range(4)), "little"))

    def op_hfma2(self, o, parts):
        # A constant in two halves.
        if o[1].at == 0 and o[2].at == 0 and len(o) > 4 and o[4].kind != "reg" and o[3].kind != "reg":
            try:
                return self.put(o[0], half_bits(o[3].text) << 16 | half_bits(o[4].text))
            except (ValueError, OverflowError):
                pass
        self.put(o[0], None)

    def op_flo(self, o, parts):
        v = self.value(o[1])
        self.put(o[0], None if v is None else (v.bit_length() - 1) & MASK)

    def op_popc(self, o, parts):
        v = self.value(o[1])
        self.put(o[0], None if v is None else v.bit_count())

    def op_p2r(self, o, parts):
        old, mask = self.value(o[2]), self.value(o[3])
        flags = [self.pred.get(f"P{i}") for i in range(7)]
        known = old is not None and all(flags[i] is not None for i in range(7) if mask >> i & 1)
        bits = sum(1 << i for i in range(7) if mask >> i & 1 and flags[i])
        self.put(o[0], old & ~mask | bits if known else None)

    def op_r2p(self, o, parts):
        v, mask = self.value(o[1]), self.value(o[2])
        for i in range(7):
            if mask >> i & 1:
                self.pred[f"P{i}"] = None if v is None else bool(v >> i & 1)

    # Integers are divided by way of a reciprocal.

    def op_i2f(self, o, parts):
        v = self.value(o[1])
        known = v is not None and not any("64" in part for part in parts)
        self.put(o[0], bits32(v) if known else None)

    op_i2fp = op_i2f

    def op_mufu(self, o, parts):
        v = self.value(o[1])
        self.put(o[0], bits32(1 / f32(v)) if "RCP" in parts and v and f32(v) > 0 else None)

    def op_f2i(self, o, parts):
        v = self.value(o[1])
        known = v is not None and not any("64" in part for part in parts)
        self.put(o[0], min(max(int(f32(v)), 0), MASK) if known else None)

    def op_fchk(self, o, parts):
        self.put_pred(o[0], False)

    def op_syncs(self, o, parts):
        if o and o[0].kind == "pred":
            self.put_pred(o[0], True)

    def op_stl(self, o, parts):
        count = 2 if "64" in parts else 1
        self.local[local_address(o[0])] = [self.raw(o[1], i) for i in range(count)]

    def op_ldl(self, o, parts):
        for i, value in enumerate(self.local.get(local_address(o[1]), [None, None])):
            self.reg[next_register(o[0].at, i)] = value

    def op_ldg(self, o, parts):
        for i in range(4 if "128" in parts else 2 if "64" in parts else 1):
            self.reg[next_register(o[0].at, i)] = None

    op_lds = op_ld = op_ldg


UNIFORM = {
    "UMOV", "ULDC", "UIADD3", "UIMAD", "ULEA", "ULOP3", "UISETP", "USEL", "USHF", "UPLOP3", "UFLO", "UPOPC", "UPRMT",
    "UVIMNMX", "UVIADD", "UP2R", "UR2P",
}
SILENT = {
    "STG", "STS", "STL", "ST", "LDGSTS", "LDGDEPBAR", "DEPBAR", "BAR", "BSSY", "BSYNC", "NOP", "WARPSYNC", "MEMBAR", "ERRBAR",
    "CCTL", "UCGABAR_ARV", "UCGABAR_WAIT", "ENDCOLLECTIVE", "YIELD", "STAS", "FENCE", "BREAK", "BMOV", "NANOSLEEP", "ARRIVES",
}


def local_address(operand):
    return re.match(r"\[[^]]*\]", operand.at)[0]


def both(v):
    return (False, True) if v is None else (v,)


def next_register(name, more):
    prefix = "UR" if name.startswith("UR") else "R"
    return f"{prefix}{int(name[len(prefix):].split('.')[0]) + more}" if name[len(prefix)].isdigit() else name


def decode(text):
    """(guard, name, parts of the name, operands, text) of an instruction."""
    words = text.split(None, 1)
    guard = None
    if words[0].startswith("@"):
        guard = Operand(words[0][1:])
        words = words[1].split(None, 1)
    parts = words[0].split(".")
    rest = re.sub(r"\(\*.*?\*\)", "", words[1]) if len(words) > 1 else ""
    operands = []
    for part in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", rest):
        part = part.strip()
        if part and not part.startswith("`"):
            operand = Operand(part)
            operand.text = part
            operands.append(operand)
    return guard, parts[0], parts, operands, text
