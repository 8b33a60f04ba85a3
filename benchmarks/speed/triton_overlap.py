# SPDX-License-Identifier: Apache-2.0
"""What Triton's compiler costs int32 sums on Hopper: a stage that lets int8 products overlap, for measurements only.

Triton keeps a product in flight over the next loop iteration only where its sums are float32 (`dotCanBeProperlyAsync`
in lib/Dialect/TritonGPU/Transforms/Pipeliner/WGMMAPipeline.cpp, rule 2.1). So each product of patch 0016 ends before
the next one is asked for, and FP8's does not. The stage here edits the compiled kernel's TTGIR text after Triton's own
passes, to what they make of float32 sums: at most one product is in flight, and all are awaited after the loop. The
buffers are the same for both types, so no product's operands are overwritten while it runs.
"""

import contextlib
import re
import tempfile
from collections.abc import Iterator

WAIT = re.compile(r"(ttng\.warp_group_dot_wait [^\n]*?\{pendings = )0( : i32\} : tensor<\w+xi32)")
CONVERSION = re.compile(r"\n( *)%\S+ = arith\.sitofp (%\S+) : (tensor<\w+xi32, #mma>) to")


def let_products_overlap(text: str) -> str:
    """TTGIR of a kernel that sums int8 products in int32 over one loop, so that they overlap; other text as it is."""
    edited = WAIT.sub(r"\g<1>1\2", text)
    conversion = CONVERSION.search(edited)
    if edited == text or not conversion:
        return text
    indent, sums, kind = conversion.groups()
    end = f"\n{indent}%ended_sums = ttng.warp_group_dot_wait {sums} {{pendings = 0 : i32}} : {kind}"
    rest = edited[conversion.start() :].replace(f"arith.sitofp {sums} ", "arith.sitofp %ended_sums ", 1)
    return edited[: conversion.start()] + end + rest


def add_stage(self=None, stages=None, options=None, language=None, capability=None):
    """Triton's `add_stages_inspection_hook`. Without arguments: what the cache's key gets. triton 3.6 does not
    ask for it, and wants a process and an empty cache of its own."""
    if stages is None:
        return ("let_products_overlap", "let_products_overlap")
    make_ttgir = stages["ttgir"]

    def make_overlapping(src, metadata):
        from triton._C.libtriton import ir

        module = make_ttgir(src, metadata)
        text = str(module)
        edited = let_products_overlap(text)
        if edited == text:
            return module
        with tempfile.NamedTemporaryFile("w", suffix=".ttgir") as file:
            file.write(edited)
            file.flush()
            parsed = ir.parse_mlir_module(file.name, module.context)
        parsed.context = module.context  # keeps it alive, as Triton's own stages do
        return parsed

    stages["ttgir"] = make_overlapping
    return None


@contextlib.contextmanager
def overlapping_products() -> Iterator[None]:
    """Kernels that are compiled or launched meanwhile have the stage."""
    from triton import knobs

    before = knobs.runtime.add_stages_inspection_hook
    knobs.runtime.add_stages_inspection_hook = add_stage
    try:
        yield
    finally:
        knobs.runtime.add_stages_inspection_hook = before
