"""`benchmarks.static`: the readers count listings whose counts are known, and every sabotage breaks its bound."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import counts, gpus, listing, static

ROOT = Path(__file__).resolve().parents[2]

PTX = """
.visible .entry k(.param .u64 a) .reqntid 32
{
	ld.param.b64 	%rd1, [a];
	ld.global.b64 { %rd2 }, [ %rd1 + 0 ];
	mov.u32 	%r1, %tid.x;
	mad.wide.u32 	%rd3, %r1, 16, %rd2;
	setp.lt.s32 	%p1, %r9, 256;
	@%p1 bra 	$L2;
$L1:
	ld.global.v4.b32 { %r2, %r3, %r4, %r5 }, [ %rd3 + 0 ];
	add.s32 	%r8, %r8, 256;
	setp.lt.s32 	%p2, %r8, %r9;
	@%p2 bra 	$L1;
	ret;
$L2:
	@%p3 ld.global.b16 { %rs1 }, [ %rd3 + 0 ];
	ret;
}
"""
# 4 instructions, a body of 5 with a slow path that is not walked, and 2.
SASS = """
k:
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   LDG.E.64 R2, desc[UR4][R8.64] ;
        /*0020*/                   IMAD.WIDE.U32 R4, R0, 0x10, R2 ;
        /*0030*/               @P0 BRA `(.L_2) ;
.L_1:
        /*0040*/                   LDG.E.128 R12, desc[UR4][R4.64] ;
        /*0050*/                   FADD R1, R12, R13 ;
        /*0060*/              @!P2 BRA `(.L_4) ;
        /*0070*/                   CALL.REL.NOINC `(slow) ;
.L_4:
        /*0080*/                   IADD3 R6, R6, 0x100, RZ ;
        /*0090*/               @P1 BRA `(.L_1) ;
        /*00a0*/                   MOV R1, R2 ;
        /*00b0*/                   EXIT ;
.L_2:
        /*00c0*/               @P3 LDG.E.U16 R1, desc[UR4][R4.64] ;
        /*00d0*/                   EXIT ;
slow:
        /*00e0*/                   RET.REL.NODEC R8 `(k) ;
"""


def row(**changes):
    path = counts.Path([(8, 1), (16, 3)], [(8, 1), (16, 3)], 28.0, 0.0, 67.5, None, 71680)
    whole = counts.Row("adam", "_update_kernel", 90, 48, 0, 0, 256, 5, "registers", {"add.rn.f32": 1}, [path])
    own = {name: value for name, value in changes.items() if hasattr(whole, name)}
    return replace(whole, **{"paths": [replace(path, **{k: v for k, v in changes.items() if k not in own})]} | own)


def test_a_listing_of_known_counts():
    (path,) = counts.full_block_paths(PTX, SASS, elements=64, row=replace(row(), threads=32, blocks=2), losses=2)
    assert path.loads == [(16, 8)]  # 2,048 elements in steps of 256
    assert path.bytes_per_parameter == 2
    assert path.loop_instructions_per_parameter == 8 * 5 / 64
    assert path.instructions_per_parameter == (4 + 8 * 5 + 2) / 64
    assert path.bytes_in_flight == 16 * 32 * 2


def test_an_access_that_the_sass_lacks_is_an_error():
    with pytest.raises(ValueError, match="no path"):
        counts.full_block_paths(PTX, SASS.replace("LDG.E.128", "LDG.E.64"), 64, replace(row(), threads=32), 2)


def test_an_instruction_that_cannot_be_followed_is_an_error():
    with pytest.raises(ValueError, match="BRX"):
        listing.read_sass(SASS.replace("MOV R1, R2", "BRX R2"))


def test_loads_in_flight_end_with_the_first_use():
    body = "\n".join(
        f"        /*{n:04x}*/                   {line} ;"
        for n, line in enumerate(
            [
                "S2R R0, SR_TID.X",
                "LDG.E.128 R4, [R0]",
                "LDG.E.128 R8, [R0]",
                "FADD R1, R4, R5",
                "LDG.E.128 R4, [R0]",
                "EXIT",
            ]
        )
    )
    sass = listing.read_sass(body)
    way = listing.same_path(sass, Counter({listing.Access("load", 16): 3}), [])
    assert sass.loads_in_flight(way) == 32


def test_residency():
    hopper = gpus.MULTIPROCESSORS[90]
    assert hopper.resident(48, 256, 0) == (5, "registers")
    assert hopper.resident(49, 256, 0) == (4, "registers")  # 8 registers at a time
    assert hopper.resident(16, 1024, 0) == (2, "threads")
    assert hopper.resident(16, 32, 0) == (32, "blocks")
    assert hopper.resident(16, 32, 100 * 1024) == (2, "shared memory")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bytes_per_parameter": 32.0}, "32 bytes a parameter"),
        ({"loads": [(2, 4), (16, 3)]}, "accesses of 2 bytes"),
        ({"instructions_per_parameter": 151.0}, "151.0 instructions"),
        ({"bytes_in_flight": 49151}, "49151 bytes of loads in flight"),
        ({"spilled_bytes": 8}, "spills 8 bytes"),
        ({"shared_bytes": 4096}, "4096 bytes of shared memory"),
        ({"ptx": {"fma.rn.f32": 1}}, "fma.rn.f32"),
        ({"ptx": {"mul.ftz.f32": 1}}, "mul.ftz.f32"),
        ({"ptx": {"mul.f32": 1}}, "mul.f32"),
        ({"ptx": {"sqrt.approx.f32": 1}}, "sqrt.approx.f32"),
        ({"paths": []}, "every access to elements is masked"),
    ],
)
def test_a_broken_bound_is_named(changes, words):
    assert static.broken([row()]) == []
    (failure,) = static.broken([row(**changes)])
    assert failure.startswith("adam, sm_90: ")
    assert words in failure


MASK = "_update_block(work, start, offsets, {},"
SABOTAGE = {  # name: (file, text, its replacement, words of the bound that breaks)
    "masked": ("kernels/update.py", MASK.format("None"), MASK.format("offsets < left"), "is masked"),
    "fused": ("kernels/launch.py", '"enable_fp_fusion": False', '"enable_fp_fusion": True', "fma.rn.f32"),
    "twice": (
        "kernels/update.py",
        "    write(pointers[0], master, mask)\n",
        "    write(pointers[0], master, mask)\n    slots = (slots[0] + read(pointers[2], mask), slots[1])\n",
        "32 bytes a parameter",
    ),
}


def check(tree):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(tree)}
    command = [sys.executable, "-m", "benchmarks.static", "--check", "--json", "--workers", "1"]
    command += ["--arch", "90", "--case", "adam"]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)


def test_sabotaged_kernels_are_noticed(tmp_path):
    pytest.importorskip("triton")
    trees = []
    for name, (file, old, new, _) in SABOTAGE.items():
        tree = tmp_path / name
        for folder in ("kernels", "mpengine", "benchmarks"):
            shutil.copytree(ROOT / folder, tree / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        text = (tree / file).read_text()
        assert text.count(old) == 1
        (tree / file).write_text(text.replace(old, new))
        trees.append(tree)
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(check, trees))
    for done, (_, _, _, words) in zip(runs, SABOTAGE.values(), strict=True):
        assert done.returncode == 1, done.stderr
        assert words in " ".join(json.loads(done.stdout)["broken"])
