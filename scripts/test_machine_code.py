"""Checks what scripts/sass-lint, ptxas-versions and ptx-lint make of machine code, of ptxas's reports and of PTX.

    python3 scripts/test_machine_code.py
"""
import importlib.machinery
import importlib.util
import os
import sys
import unittest

sys.dont_write_bytecode = True
import machine_code


def load(name):
    path = os.path.join(machine_code.ROOT, "scripts", name)
    loader = importlib.machinery.SourceFileLoader(name.replace("-", "_"), path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


lint, versions, ptx = load("sass-lint"), load("ptxas-versions"), load("ptx-lint")

# As nvdisasm 13.2 writes it.
TEXT = """\
	.target	sm_80
//--------------------- .text.sums --------------------------
	.section	.text.sums,"ax",@progbits
	.sectioninfo	@"SHI_REGISTERS=8"
        .global         sums
        .type           sums,@function
sums:
.text.sums:
        /*0000*/                   MOV R0, 0x20 ;
        /*0010*/              @!P0 CALL.REL.NOINC `($__internal_0_$__cuda_sm20_rcp_rn_f32_slowpath) ;
.L_x_0:
        /*0020*/               @P1 STS.128 [R4.X4+0x10], R8 ;
        /*0030*/                   EXIT ;
        .weak           $__internal_0_$__cuda_sm20_rcp_rn_f32_slowpath
$__internal_0_$__cuda_sm20_rcp_rn_f32_slowpath:
        /*0040*/                   RET.REL.NODEC R6 `(sums) ;
.L_x_1:
        /*0050*/                   BRA `(.L_x_1);
//--------------------- .nv.shared.sums --------------------------
	.section	.nv.shared.sums,"aw",@nobits
	.zero		1024
//--------------------- .text.next --------------------------
	.section	.text.next,"ax",@progbits
next:
.text.next:
        /*0000*/                   EXIT ;
"""


def code(*lines):
    """Instructions, 16 bytes each; `NAME:` is a label."""
    text = '\t.section\t.text.kernel,"ax",@progbits\n'
    address = 0
    for line in lines:
        if line.endswith(":"):
            text += line + "\n"
        else:
            text += f"        /*{address:04x}*/  {line} ;\n"
            address += 16
    return machine_code.functions(text)["kernel"]


def unordered(*lines):
    return [i.opcode for i in lint.unordered_reads(code(*lines))]


class Text(unittest.TestCase):
    def test_functions_have_their_instructions_labels_and_routines(self):
        found = machine_code.functions(TEXT)
        self.assertEqual(list(found), ["sums", "next"])
        sums = found["sums"]
        self.assertEqual([i.opcode for i in sums], ["MOV", "CALL.REL.NOINC", "STS.128", "EXIT", "RET.REL.NODEC", "BRA"])
        self.assertEqual((sums[2].address, sums[2].labels, sums[2].predicate, sums[2].operands), (0x20, (".L_x_0",), "P1", "[R4.X4+0x10], R8"))
        self.assertEqual(sums[4].labels, ("$__internal_0_$__cuda_sm20_rcp_rn_f32_slowpath",))
        self.assertEqual(lint.routines(sums), {"__cuda_sm20_rcp_rn_f32_slowpath"})

    def test_fat_binaries_and_hot_kernels_are_read_from_a_build(self):
        images = '("loss", image!("/cache/loss-0.fatbin")),\nKernelReport { file: "loss", name: "hot", target: "sm_80", hot: true, }'
        images += '\nKernelReport { file: "loss", name: "cold", target: "sm_80", hot: false, }'
        self.assertEqual(machine_code.embedded(images), (["/cache/loss-0.fatbin"], {"hot"}))


class SharedMemory(unittest.TestCase):
    def test_a_read_after_a_write_needs_a_barrier(self):
        for write, read in [("STS [R0], R1", "LDS R2, [R3]"), ("LDGSTS.E.128 [R0], [R2.64]", "LDSM.16.M88.4 R4, [R3]")]:
            self.assertEqual(unordered(write, read, "EXIT"), [read.split()[0]])
            for ordering in ["BAR.SYNC.DEFER_BLOCKING 0x0", "WARPSYNC 0xffffffff", "WARPSYNC.ALL", "NOP"]:
                self.assertEqual(unordered(write, ordering, read, "EXIT"), [])
            for nothing in ["SHFL.BFLY PT, R4, R5, 0x1, 0x1f", "DEPBAR.LE SB0, 0x0", "@P0 BAR.SYNC.DEFER_BLOCKING 0x0"]:
                self.assertEqual(unordered(write, nothing, read, "EXIT"), [read.split()[0]], nothing)

    def test_every_path_needs_one(self):
        branch = ["STS [R0], R1", "@P0 BRA `(.L_x_0)", "BAR.SYNC.DEFER_BLOCKING 0x0", ".L_x_0:", "LDS R2, [R3]", "EXIT"]
        self.assertEqual(unordered(*branch), ["LDS"])
        self.assertEqual(unordered(*branch[:1], branch[2], branch[1], *branch[3:]), [])

    def test_a_loop_comes_back_to_its_reads(self):
        loop = [".L_x_0:", "LDS R2, [R3]", "STS [R0], R1", "@P0 BRA `(.L_x_0)", "EXIT"]
        self.assertEqual(unordered(*loop), ["LDS"])
        self.assertEqual(unordered(*loop[:3], "NOP", *loop[3:]), [])

    def test_a_warp_that_is_together_passes_the_call_by(self):
        sync = ["BRA.CONV ~URZ, `(.L_x_0)", "CALL.REL.NOINC `($__internal_0_$__cuda_sm70_warpsync)", ".L_x_0:", "NOP"]
        routine = ["$__internal_0_$__cuda_sm70_warpsync:", "WARPSYNC R1", "RET.REL.NODEC R2 `(kernel)"]
        self.assertEqual(unordered("STS [R0], R1", *sync, "LDS R2, [R3]", "EXIT", *routine), [])
        self.assertEqual(unordered("STS [R0], R1", *sync[:3], "LDS R2, [R3]", "EXIT", *routine), ["LDS"])

    def test_bsync_leads_to_where_its_own_bssy_says(self):
        # B0 is used twice. Only the first region writes, and a barrier follows it.
        first = ["BSSY B0, `(.L_x_0)", "STS [R0], R1", "BSYNC B0", ".L_x_0:", "BAR.SYNC.DEFER_BLOCKING 0x0"]
        second = ["BSSY B0, `(.L_x_1)", "BSYNC B0", ".L_x_1:", "LDS R2, [R3]", "EXIT"]
        self.assertEqual(unordered(*first, *second), [])
        self.assertEqual(unordered(*first[:-1], *second), ["LDS"])

    def test_loads_that_never_run_are_no_reads(self):
        self.assertEqual(unordered("LDGSTS.E.128 [R0], [R2.64]", "@!PT LDS RZ, [RZ]", "EXIT"), [])

    def test_what_cannot_be_followed_is_an_error(self):
        errors, _ = lint.lint({("sm_80", "kernel"): code("STS [R0], R1", "BRX R2 -0x30", "EXIT")}, set())
        self.assertEqual(len(errors), 1)
        self.assertIn("BRX", errors[0])


class HotKernels(unittest.TestCase):
    def test_local_memory_is_refused_in_hot_kernels_alone(self):
        body = {("sm_80", "kernel"): code("STL [R1], R2", "LDL.LU R3, [R1]", "EXIT")}
        self.assertEqual(lint.lint(body, set())[0], [])
        self.assertIn("2 accesses of local memory", lint.lint(body, {"kernel"})[0][0])

    def test_routines_need_an_entry_for_the_kernel(self):
        def calls(kernel, routine):
            label = f"$__internal_0_${routine}"
            body = code(f"CALL.REL.NOINC `({label})", "EXIT", f"{label}:", "RET.REL.NODEC R2 `(kernel)")
            return lint.lint({("sm_80", kernel): body}, {kernel})

        self.assertEqual(calls("any", "__cuda_sm20_rcp_rn_f32_slowpath"), ([], {"__cuda_sm20_rcp_rn_f32_slowpath"}))
        self.assertIn("__cuda_sm20_div_u64", calls("any", "__cuda_sm20_div_u64")[0][0])
        self.assertEqual(calls("loss_softmax_f32", "__cuda_sm20_div_rn_f64_full")[0], [])
        self.assertEqual(len(calls("loss_softmax_bf16", "__cuda_sm20_div_rn_f64_full")[0]), 1)

    def test_entries_are_for_their_kernels(self):
        body = code("STS [R0], R1", "LDS R2, [R0]", "EXIT")
        self.assertEqual(lint.lint({("sm_80", "query_attention_bf16"): body}, set()), ([], {"query_attention_(backward_)?(bf16|f32)"}))
        self.assertEqual(len(lint.lint({("sm_80", "attention_forward_bf16"): body}, set())[0]), 1)


class Versions(unittest.TestCase):
    def test_reports_are_read(self):
        text = """\
ptxas info    : Compiling entry function 'first' for 'sm_90'
ptxas info    : Function properties for first
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 48 registers, used 1 barriers, 16 bytes cumulative stack size
ptxas info    : (C7517) wgmma.wait_group is injected in around line 45 by compiler to allow use of registers defined by GMMA
ptxas info    : Compiling entry function 'second' for 'sm_90'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, used 0 barriers
"""
        self.assertEqual(versions.reports(text), {"first": versions.Report(48, 20, 16), "second": versions.Report(30, 0, 0)})

    def test_a_hot_kernel_that_spills_with_one_version_is_an_error(self):
        report = lambda **spills: {kernel: versions.Report(32, spill, 0) for kernel, spill in spills.items()}
        judge = lambda older, newer: versions.judge({"hot"}, {"1": older, "2": newer})
        self.assertEqual(judge(report(hot=0, cold=0), report(hot=0, cold=8)), ([], []))
        self.assertEqual(judge(report(hot=0), report(hot=8))[0], ["hot kernel hot spills 0 bytes with 1 and 8 bytes with 2"])
        self.assertEqual(len(judge(report(hot=4), report(hot=0))[0]), 1)
        self.assertEqual(judge(report(hot=4), report(hot=8)), ([], ["hot"]))
        self.assertEqual(len(judge(report(hot=0), report(cold=0))[0]), 1)

    def test_addresses_labels_and_padding_are_no_difference(self):
        older = code("MOV R6, 0x20", "CALL.REL.NOINC `(.L_x_9)", "FADD R1, R2.reuse, R3", "EXIT", ".L_x_9:", "RET.REL.NODEC R6 `(kernel)")
        newer = code(
            "NOP", "MOV R6, 0x30", "CALL.REL.NOINC `(.L_x_4)", "FADD R1, R2, R3", "EXIT", ".L_x_4:", "RET.REL.NODEC R6 `(kernel)", "NOP"
        )
        self.assertEqual(versions.compare(older, newer), ("equal", 0.0))

    def test_registers_are_the_softer_difference(self):
        older = code("@P0 FADD R1, R2, UR4", "EXIT")
        self.assertEqual(versions.compare(older, code("@P1 FADD R7, R3, UR5", "EXIT")), ("registers", 0.0))
        self.assertEqual(versions.compare(older, code("@P0 FADD R1, R2, 0x4", "EXIT"))[0], "other")
        self.assertEqual(versions.compare(older, code("@P0 FMUL R1, R2, UR4", "EXIT"))[0], "other")
        self.assertEqual(versions.compare(older, code("@P0 FADD R1, R2, UR4", "MOV R1, R1", "EXIT")), ("other", 0.5))


# As build.rs writes it: a View after a pointer, then a struct with a pitch.
CONTRACTS = """pub(super) struct Shape {
    pub(super) rows: u32,
    pub(super) pitch: u32,
}
const _: () = assert!(std::mem::offset_of!(Shape, rows) == 0);
const _: () = assert!(std::mem::offset_of!(Shape, pitch) == 4);
pub(super) struct ScaleArgs {
    pub(super) sums: Address,
    pub(super) x: View,
    pub(super) shape: Shape,
    pub(super) folds: u32,
}
const _: () = assert!(std::mem::offset_of!(ScaleArgs, sums) == 0);
const _: () = assert!(std::mem::offset_of!(ScaleArgs, x) == 8);
const _: () = assert!(std::mem::offset_of!(ScaleArgs, shape) == 32);
const _: () = assert!(std::mem::offset_of!(ScaleArgs, folds) == 40);
    Contract { name: "scale", args: "ScaleArgs", threads: 256, blocks: 1, constants: &[] },
"""


class Ptx(unittest.TestCase):
    def findings(self, *lines):
        body = "\n".join(f"\t{line};" for line in lines)
        text = f'.visible .entry scale(\n\t.param .align 8 .b8 scale_param_0[48]\n)\n{{\n\t.loc\t1 7 3\n{body}\n}}\n\t.file\t1 "/a/scale.cu"\n'
        return ptx.check([text], CONTRACTS)

    def test_strides_of_views_and_structs_have_their_places(self):
        self.assertEqual(ptx.places(CONTRACTS), {"scale": {16: "x.ld", 36: "shape.pitch"}})

    def test_a_row_stride_times_a_row_needs_64_bits(self):
        stride, row = "ld.param.u32 %r1, [scale_param_0+16]", "mov.u32 %r2, %ctaid.x"
        found, seen = self.findings(stride, row, "mul.lo.s32 %r3, %r2, %r1", "cvt.u64.u32 %rd1, %r3")
        self.assertEqual((found, seen), (["scale.cu:7: scale multiplies x.ld in 32 bits"], 1))
        self.assertEqual(self.findings(stride, row, "mul.wide.u32 %rd1, %r2, %r1")[0], [])
        self.assertEqual(self.findings(stride, row, "cvt.u64.u32 %rd1, %r1", "cvt.u64.u32 %rd2, %r2", "mul.lo.s64 %rd3, %rd1, %rd2")[0], [])
        # Two rows on, and eight rows: the factor is the kernel's own.
        self.assertEqual(self.findings(stride, "shl.b32 %r3, %r1, 1", "mul.lo.s32 %r4, %r1, 24")[0], [])

    def test_a_stride_is_followed_to_its_product(self):
        row = "mov.u32 %r2, %tid.x"
        for lines in (
            ("ld.param.v2.u32 {%r8, %r1}, [scale_param_0+32]", "mad.lo.s32 %r3, %r1, %r2, %r8"),
            ("mov.b64 %rd9, scale_param_0", "ld.param.u32 %r1, [%rd9+36]", "mul.lo.s32 %r3, %r2, %r1"),
            ("ld.param.u32 %r1, [scale_param_0+36]", "shl.b32 %r4, %r1, 1", "add.s32 %r5, %r4, 8", "@%p1 mul.lo.s32 %r3, %r5, %r2"),
            ("ld.param.u32 %r1, [scale_param_0+36]", "selp.b32 %r4, %r1, %r7, %p2", "shl.b32 %r3, %r4, %r2"),
        ):
            self.assertEqual(self.findings(row, *lines)[0], ["scale.cu:7: scale multiplies shape.pitch in 32 bits"], lines)

    def test_other_numbers_are_multiplied_as_they_are(self):
        self.assertEqual(self.findings("ld.param.u32 %r1, [scale_param_0+40]", "mul.lo.s32 %r3, %r1, %r1")[0], [])
        self.assertEqual(self.findings("ld.param.u32 %r1, [scale_param_0+16]", "setp.lt.u32 %p1, %r1, %r2", "mul.lo.s32 %r3, %r2, %r2")[0], [])


if __name__ == "__main__":
    unittest.main()
