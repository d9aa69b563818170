"""Compile the package's kernels for a GPU on any machine, and read the assembler's report."""

import hashlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.cache import get_cache_manager

from qwen_vit.kernels.launch import LAUNCH

HOPPER = 90  # compute capability, as Triton's targets name it
REGISTERS = 65_536  # per multiprocessor
# Bytes of shared memory per multiprocessor, from the table of compute capabilities in CUDA's
# programming guide.
SHARED_MEMORY = {80: 167_936, 89: 102_400, HOPPER: 233_472, 100: 233_472, 120: 102_400}
SHARED_BYTES_OF_THE_SYSTEM = 1024  # in each program


@dataclass(frozen=True)
class Compiled:
    registers: int
    spill_bytes: int
    serialised_wgmma: bool  # C7515: each matrix instruction waits for the previous one
    wgmma_shapes: frozenset[str]
    shared_bytes: int
    corrupt_descriptors: int
    unfenced_reads: int
    barrier_arrays: int  # arrays that the kernel invalidates at its end
    barriers_left: int  # barriers that the kernel never invalidates
    has_async_copies: bool = True  # without copies to shared memory, a load does not overlap a GEMM
    capability: int = HOPPER
    spills_in_loops: int = 0  # loads and stores of spilled registers between matrix instructions

    def programs_that_fit(self, num_warps: int) -> int:
        """Return the number of programs on one multiprocessor, by registers, shared memory and
        warps."""
        registers = -(-self.registers // 8) * 8 * 32 * num_warps
        max_warps = 48 if self.capability in (89, 120) else 64
        return min(
            REGISTERS // registers,
            SHARED_MEMORY[self.capability] // (self.shared_bytes + SHARED_BYTES_OF_THE_SYSTEM),
            max_warps // num_warps,
        )


def compile_for_hopper(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], **options: int
) -> Compiled:
    return compile_for(HOPPER, kernel, signature, constants, **options)


def compile_for(
    capability: int, kernel: Any, signature: dict[str, str], constants: dict[str, Any],
    **options: int,
) -> Compiled:  # fmt: skip
    """Compile a kernel. `signature` types the run-time arguments. Pointers and N count as multiples
    of 16.
    """
    names = kernel.arg_names
    defaults = {param.name: param.default for param in kernel.params if param.has_default}
    constants = defaults | constants
    full = {name: "constexpr" if name in constants else signature[name] for name in names}
    attrs = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if full[name].startswith("*") or name == "N"
    }
    source_type = GluonASTSource if kernel.is_gluon() else ASTSource
    source = source_type(
        fn=kernel,
        signature=full,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=attrs,
    )
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=options | LAUNCH)
    ptx = compiled.asm["ptx"]
    return Compiled(
        **_assemble(ptx, capability),
        wgmma_shapes=frozenset(re.findall(r"wgmma\.mma_async\.sync\.aligned\.(m\d+n\d+k\d+)", ptx)),
        shared_bytes=compiled.metadata.shared,
        has_async_copies="cp.async" in ptx,
        capability=capability,
    )


def tma_block(block: list[int], dtype: Any = gl.bfloat16) -> str:
    """Return the type of a descriptor of a Gluon kernel, as from `hopper.descriptor`."""
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    return f"tensordesc<{dtype}{block},{layout!r}>"


def _assemble(ptx: str, capability: int) -> dict[str, Any]:
    report, sass = _assembled(ptx, capability)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
    return {
        "registers": int(re.findall(r"Used (\d+) registers", report)[0]),
        "spill_bytes": sum(map(int, spills)),
        "spills_in_loops": count_spills_in_loops(sass),
        "serialised_wgmma": "C7515" in report or "serializ" in report,
        "corrupt_descriptors": count_corrupt_descriptors(sass),
        "unfenced_reads": count_unfenced_reads(sass),
        **dict(zip(("barrier_arrays", "barriers_left"), count_barriers(ptx), strict=True)),
    }


def _assembled(ptx: str, capability: int) -> tuple[str, str]:
    """Return ptxas' report and the disassembly, and cache both beside Triton's own cache. Both
    programs are deterministic. They take a second of one core, mostly for their start.
    """
    ptx = without_source_lines(ptx)
    assembler = get_ptxas(capability)  # Triton itself uses this assembler
    ptxas, version = Path(assembler.path), assembler.version
    tools = f"{triton.__version__} {ptxas} {version}"
    key = hashlib.sha256(f"{tools}\n{ptx}".encode()).hexdigest()
    cache = get_cache_manager(key)
    paths = [cache.get_file(name) for name in ("report.txt", "disassembly.txt")]
    if None not in paths:
        report, sass = (Path(str(path)).read_text() for path in paths)
        return report, sass
    arch = re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)[0]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        report = subprocess.run(
            [ptxas, "-v", f"-arch={arch}", source, "-o", Path(folder, "kernel.cubin")],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
        sass = subprocess.run(
            [ptxas.with_name("nvdisasm"), "-c", Path(folder, "kernel.cubin")],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    cache.put(report, "report.txt", binary=False)
    cache.put(sass, "disassembly.txt", binary=False)
    return report, sass


def without_source_lines(ptx: str) -> str:
    """Remove the references to source lines, because an edit of a comment changes them."""
    code = ptx.partition("\t.section\t.debug")[0]
    return re.sub(r"^\s*\.(?:loc|file)\b.*\n", "", code, flags=re.MULTILINE)


def count_barriers(ptx: str) -> tuple[int, int]:
    """Return the number of barrier arrays that a kernel keeps to its end, and of other barriers.

    A kernel keeps an array by invalidating the array's first barrier at the kernel's end. The
    compiler may reuse the shared memory of other barriers. The number of arrays is necessary,
    because the function takes an array directly behind a kept array for a part of that array.

    A GEMM once kept its bias in the shared memory of two unused barriers. After a context switch
    to another process, the hardware restored the barriers, and a few columns became NaN.
    """
    step = re.compile(
        r"add\.s32\s+(?P<sum>%r\d+), %r\d+, (?P<bytes>\d+);"
        r"|mbarrier\.(?P<action>init|inval)\.shared(?:::cta)?\.b64 \[(?P<at>%r\d+)\]"
    )
    offset: dict[str, int] = {}  # register -> its offset from the start of shared memory
    made, kept = set[int](), set[int]()
    for found in step.finditer(ptx):
        if found["sum"]:
            offset[found["sum"]] = int(found["bytes"])
        else:
            (made if found["action"] == "init" else kept).add(offset.get(found["at"], 0))
    arrays, left = len(kept), 0
    for place in sorted(made - kept):
        if place - 8 in kept:  # the next barrier of an array
            kept.add(place)
        else:
            left += 1
    return arrays, left


def count_spills_in_loops(sass: str) -> int:
    """Count the loads and stores of spilled registers between a loop's first matrix instruction and
    the loop's end."""
    in_loop, found = False, 0
    for line in sass.splitlines():
        if re.search(r"\b[HQI]GMMA\b", line):
            in_loop = True
        elif re.search(r"\bBRA\b", line):
            in_loop = False
        elif in_loop and re.search(r"\b(?:LDL|STL)\b", line):
            found += 1
    return found


def count_unfenced_reads(sass: str) -> int:
    """Count the matrix instructions and bulk stores that may read shared memory before a store.

    These instructions read shared memory through the asynchronous proxy. After a store, the storing
    thread must therefore execute a proxy fence, and then all threads must pass a barrier. The
    function follows the order of the code, and checks stores of 16 bytes at any address.
    """
    order = re.compile(
        r"\*/ +(?:@!?U?P\w+ +)?"
        r"(STS\.128|STSM[.\w]*\.4|FENCE\.VIEW\.ASYNC|BAR\.SYNC|[HQ]GMMA|UTMASTG|EXIT)\b"
    )
    state, unfenced = "visible", 0
    for line in sass.splitlines():
        if (found := order.search(line)) is None:
            continue
        instruction = found[1]
        if instruction.startswith("STS"):
            state = "stored"
        elif instruction.startswith("FENCE"):
            state = "fenced" if state == "stored" else state
        elif instruction.startswith("BAR"):
            state = "visible" if state == "fenced" else state
        elif instruction == "EXIT":
            state = "visible"
        elif state != "visible":
            unfenced += 1
    return unfenced


def count_corrupt_descriptors(sass: str) -> int:
    """Count the 64-bit uniform additions whose high word adds the low word's register.

    Triton 3.6 and 3.7 contain ptxas 12.8, which sometimes makes such a matrix descriptor. The
    address then changes the strides, so the GEMM reads wrong memory. The last 16 dims were wrong,
    or the GPU reported an illegal address.
    """
    low = re.compile(r"UIADD3 UR\d+, (UP\d+), (UR\d+), 0x[0-9a-f]+, URZ")
    high = re.compile(r"UIADD3\.X UR\d+, (UR\d+), -?0x[0-9a-f]+, URZ, (UP\d+), !UPT")
    written = re.compile(r"\*/ +(?:@!?U?P\d+ +)?[A-Z0-9_.]+ (UR\d+),")
    low_register: dict[str, str] = {}  # carry predicate -> register of the low word's addition
    corrupt = 0
    for line in sass.splitlines():
        if found := high.search(line):
            corrupt += low_register.get(found[2]) == found[1]
        if target := written.search(line):
            low_register = {p: r for p, r in low_register.items() if r != target[1]}
        if found := low.search(line):
            low_register[found[1]] = found[2]
    return corrupt
