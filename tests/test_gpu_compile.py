"""Every GPU kernel compiles for Hopper and fits its shared memory, wherever the tests run."""

from __future__ import annotations

import os
import subprocess
import sys

_TOO_LARGE = """
import sys
from tests import compile_gpu_kernels as script
compiled = script._compile_only()
from dataclasses import replace
from functools import partial
from isobatch.kernels.gpu import catalogue
from isobatch.kernels.linear.gpu_record import LINEAR
from isobatch.kernels.linear.members import tile_named
from isobatch.kernels.linear.triton import linear_tile
from isobatch.kernels.registry import Member
from isobatch.kernels.stock import STOCK
large = Member("large", partial(linear_tile, tile=tile_named("128x256x64.8.5tp1")), STOCK)
catalogue.GPU_RECORDS = {"linear": replace(LINEAR, members=(large,), variants=("logits/bf16",))}
print(list(script.failures()))
"""


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    # The interpreter would take the compiler's place.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_every_member_compiles_and_could_be_launched() -> None:
    ran = _run("-m", "tests.compile_gpu_kernels")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("kernels, at most") >= 30


_HASTY = """
from tests import compile_gpu_kernels as script
compiled = script._compile_only()
import torch
from tests.test_gpu_overlap import _beside_kernel, _between_kernel, _copy_kernel, _look_kernel
x, count = torch.zeros(64), torch.zeros(1, dtype=torch.int32)
for waits in (True, False):
    _copy_kernel[(1,)](x, x, COUNT=64, WAITS=waits, launch_pdl=True)
for waits in (0, 1, 2, 3):
    _beside_kernel[(1,)](x, x, count, COUNT=64, WAITS=waits, HASTY=False, launch_pdl=True)
_beside_kernel[(1,)](x, x, count, COUNT=64, WAITS=1, HASTY=True, launch_pdl=True)
for marked in (True, False):
    _look_kernel[(1,)](count, count, COUNT=1, MARKED=marked, launch_pdl=True)
for hasty in (False, True):
    _between_kernel[(1,)](x, x, COUNT=64, HASTY=hasty, launch_pdl=True)
print([script.touches_too_early(kernel.asm["ptx"]) for kernel in compiled])
"""


def test_a_kernel_that_is_launched_early_and_does_not_wait_is_found() -> None:
    ran = _run("-c", _HASTY)
    beside = [True, False, False, True, True]
    expected = [False, True, *beside, False, True, False, True]
    assert (ran.returncode, ran.stdout) == (0, f"{expected}\n"), ran.stderr


# Decode in Gluon as it is, and with each of its waits left out.
_GROUPS = """
import re
from tests import compile_gpu_kernels as script
compiled = script._compile_only()
from isobatch.kernels.attention.gpu_record import ATTENTION_GPU
ATTENTION_GPU.draw("groups", 41, "grouped/bf16").call(ATTENTION_GPU.member("streamed"))
(code,) = {kernel.asm["ptx"] for kernel in compiled if "// settled" in kernel.asm["ptx"]}
waits = [found.span() for found in re.finditer(r"griddepcontrol\\.wait ;", code)]
without = [code[:begin] + code[end:] for begin, end in waits]
print([script.touches_too_early(text) for text in (code, *without)])
"""


def test_each_group_of_warps_waits_and_one_that_does_not_is_found() -> None:
    ran = _run("-c", _GROUPS)
    assert (ran.returncode, ran.stdout) == (0, "[False, True, True, True]\n"), ran.stderr


# Steps that differ in nothing but their size: what a number is divisible by, or that it is one, among it.
_SIZES = """
from tests import compile_gpu_kernels as script
compiled = script._compile_only()
import torch
from isobatch.kernels.attention.gpu_record import ATTENTION_GPU, GpuAttentionCase, numbers
from isobatch.kernels.gpu.catalogue import GPU_RECORDS

def anew(name, member, cases):
    known = None
    for case in cases:
        compiled.clear()
        case.call(member)
        names = {(kernel.metadata.name, kernel.hash) for kernel in compiled}
        if known is not None and names - known:
            print(name, sorted(kernel for kernel, _ in names - known))
        known = names | (known or set())

for record in GPU_RECORDS.values():
    if record.name != "attention":
        draws = (record.draw(f"sizes/{rows}", rows, record.variants[0]) for rows in (304, 300, 301, 337, 352))
        anew(record.name, record.member(record.production), draws)
q, k, v = numbers("sizes", 33, 640, 8, 2, 128, torch.bfloat16)
steps = {
    "prompts": [[(r, p) for r in range(count) for p in range(40)] for count in (17, 16, 1)],
    "decode": [[(r, 639 - r) for r in range(count)] for count in (32, 17, 33)],
}
for member in ATTENTION_GPU.members:
    for what, queries in steps.items():
        cases = (GpuAttentionCase(tuple(step), q, k, v) for step in queries)
        anew(f"{member.name}, {what}", member, cases)
print("done")
"""


def test_a_step_of_another_size_compiles_nothing_anew() -> None:
    ran = _run("-c", _SIZES)
    assert (ran.returncode, ran.stdout) == (0, "done\n"), ran.stderr


# Loads in the machine's code of decode's kernels before its first wait.
_SETTLED = """
from tests import compile_gpu_kernels as script
compiled = script._compile_only()
from isobatch.kernels.attention.gpu_record import ATTENTION_GPU
from isobatch.kernels.qkv.gpu_record import QK_NORM_ROTARY_WRITE
attention = ATTENTION_GPU.draw("settled", 41, "grouped/bf16")
for member in ("streamed", "phases", "down, gathered", "listed"):
    attention.call(ATTENTION_GPU.member(member))
rule = QK_NORM_ROTARY_WRITE.member("rule")
QK_NORM_ROTARY_WRITE.draw("settled", 3, QK_NORM_ROTARY_WRITE.variants[0]).call(rule)
for kernel in compiled:
    if "// settled" in kernel.asm["ptx"]:
        machine = kernel.asm["sass"]
        before = machine[: machine.index("ACQBULK")]
        print(kernel.metadata.name, before.count("LDG") > 1)
"""


def test_settled_tables_are_looked_up_before_the_wait() -> None:
    ran = _run("-c", _SETTLED)
    expected = [
        "_decode_kernel True",
        "_scores_kernel True",
        "_decode_kernel True",
        "_decode_kernel True",
        "_qk_norm_rotary_write_kernel True",
    ]
    assert (ran.returncode, ran.stdout.splitlines()) == (0, expected), ran.stderr


_RESCALES = """
import re
from tests import compile_gpu_kernels as script
compiled = script._compile_only()
from isobatch.kernels.attention.gpu_record import ATTENTION_GPU
for variant in ("grouped/bf16", "small head/bf16"):
    compiled.clear()
    ATTENTION_GPU.draw("rescales", 41, variant).call(ATTENTION_GPU.member("streamed deep, fed"))
    (text,) = {kernel.asm["ptx"] for kernel in compiled if "vote.sync.all" in kernel.asm["ptx"]}
    for block in re.findall(r"setp.eq.f32\\s+one.*?DONE:", text, re.DOTALL):
        asked = re.findall(r"one, (%\\w+), 0f3F800000", block)
        used = re.findall(r"mul.f32 (%\\w+), (%\\w+), (%\\w+);", block)
        print(len(used), len(asked), {factor for _, _, factor in used} == set(asked))
"""


def test_who_passes_a_rescaling_over_has_asked_for_all_its_factors() -> None:
    """It takes a thread's numbers to be of two rows, by pairs, as the compiler lays them out."""
    ran = _run("-c", _RESCALES)
    lines = [f"{count} 2 True" for count in (64, 32) for _ in range(4)]
    assert (ran.returncode, ran.stdout.splitlines()) == (0, lines), ran.stderr


def test_a_tile_that_wants_too_much_shared_memory_is_found() -> None:
    ran = _run("-c", _TOO_LARGE)
    assert ran.returncode == 0, ran.stderr
    assert "linear/large at logits/bf16" in ran.stdout
    assert "bytes of shared memory" in ran.stdout
