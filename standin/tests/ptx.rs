//! The engine that runs PTX, on kernels written here: each instruction does what the manual says, lanes part and meet, and
//! what is not known is an error that names it. `bugs.rs` runs the PTX that nvcc makes of the planted bugs.

#[macro_use]
mod common;

use std::ptr;

use common::{Gpu, arg};

fn gpu(options: &str) -> Gpu {
    // Opened with the other engine: modules without an image are its own.
    let gpu = Gpu::open(vitrum_standin::libraries(), "checks=on");
    gpu.configure(&format!("engine=ptx,{options}"));
    gpu
}

/// A kernel `k(x, y)` with registers %r0–9 and %f0–9 (32 bits), %d0–9 (64 bits), %p0–9; %d0 and %d1 are x and y.
fn kernel(body: &str) -> String {
    format!(
        ".version 8.0\n.target sm_90\n.address_size 64\n.extern .shared .align 16 .b8 memory[];\n\
         .visible .entry k(.param .u64 k_0, .param .u64 k_1) {{\n\
         .reg .b32 %r<10>; .reg .f32 %f<10>; .reg .b64 %d<10>; .reg .pred %p<10>; .reg .b16 %h<10>;\n\
         ld.param.u64 %d0, [k_0]; ld.param.u64 %d1, [k_1];\n{body}\nret;\n}}\n"
    )
}

/// Runs a kernel on one block; y has as many words as the block has threads.
fn run(gpu: &Gpu, text: &str, threads: u32, x: &[u32]) -> Result<Vec<u32>, (i32, String)> {
    let module = gpu.load_ptx(text).map_err(|code| (code, gpu.report()))?;
    let mut function = ptr::null_mut();
    let name = c"k";
    let code = cu!(gpu, cuModuleGetFunction(
        &mut function => *mut common::Handle, module => common::Handle, name.as_ptr() => *const std::ffi::c_char));
    if code != 0 {
        return Err((code, gpu.report()));
    }
    let (from, to) = (gpu.upload(x), gpu.upload(&vec![0u32; threads as usize]));
    let launched = gpu.launch_function(function, ptr::null_mut(), 1, threads, 1024, &[arg(from), arg(to)]);
    match if launched == 0 { gpu.wait() } else { launched } {
        0 => Ok(gpu.download(to, threads as usize)),
        code => Err((code, gpu.report())),
    }
}

#[test]
fn instructions_do_what_their_names_say() {
    let gpu = gpu("");
    let f = f32::to_bits;
    // %r1, %r2, %r3 and %f1, %f2, %f3 are the inputs; the result is in %r0.
    let cases: [(&str, [u32; 3], u32); 46] = [
        ("add.s32 %r0, %r1, %r2;", [7, -9i32 as u32, 0], -2i32 as u32),
        ("mul.hi.u32 %r0, %r1, %r2;", [1 << 31, 6, 0], 3),
        ("mad.lo.s32 %r0, %r1, %r2, %r3;", [5, 6, 7], 37),
        ("div.u32 %r0, %r1, %r2;", [100, 7, 0], 14),
        ("div.s32 %r0, %r1, %r2;", [-100i32 as u32, 7, 0], -14i32 as u32),
        ("rem.u32 %r0, %r1, %r2;", [100, 7, 0], 2),
        ("min.s32 %r0, %r1, %r2;", [-1i32 as u32, 1, 0], -1i32 as u32),
        ("min.u32 %r0, %r1, %r2;", [-1i32 as u32, 1, 0], 1),
        // A shift by more than the width leaves nothing, or the sign.
        ("shl.b32 %r0, %r1, %r2;", [1, 33, 0], 0),
        ("shr.u32 %r0, %r1, %r2;", [1 << 31, 32, 0], 0),
        ("shr.s32 %r0, %r1, %r2;", [1 << 31, 40, 0], u32::MAX),
        ("bfi.b32 %r0, %r1, %r2, 4, 8;", [0xab, 0xffff_ffff, 0], 0xffff_fabf),
        ("bfe.u32 %r0, %r1, 4, 8;", [0x1234_5678, 0, 0], 0x67),
        ("prmt.b32 %r0, %r1, %r2, 0x7531;", [0x3322_1100, 0x7766_5544, 0], 0x7755_3311),
        ("lop3.b32 %r0, %r1, %r2, %r3, 0xe8;", [0b1100, 0b1010, 0b0110], 0b1110),
        ("shf.r.wrap.b32 %r0, %r1, %r2, 8;", [0x1122_3344, 0x5566_7788, 0], 0x8811_2233),
        ("popc.b32 %r0, %r1;", [0xf0f0, 0, 0], 8),
        ("clz.b32 %r0, %r1;", [0xff, 0, 0], 24),
        ("not.b32 %r0, %r1;", [5, 0, 0], !5),
        ("setp.lt.s32 %p1, %r1, %r2; selp.b32 %r0, 1, 2, %p1;", [-1i32 as u32, 1, 0], 1),
        ("setp.lt.u32 %p1, %r1, %r2; selp.b32 %r0, 1, 2, %p1;", [-1i32 as u32, 1, 0], 2),
        ("setp.lt.f32 %p1, %f1, %f2; selp.b32 %r0, 1, 2, %p1;", [f(f32::NAN), f(1.0), 0], 2),
        ("setp.ltu.f32 %p1, %f1, %f2; selp.b32 %r0, 1, 2, %p1;", [f(f32::NAN), f(1.0), 0], 1),
        ("setp.ne.f32 %p1, %f1, %f2; selp.b32 %r0, 1, 2, %p1;", [f(f32::NAN), f(1.0), 0], 2),
        ("setp.gt.u32 %p1, %r1, %r2; @!%p1 mov.u32 %r0, 3;", [1, 2, 0], 3),
        ("cvt.u16.u32 %h1, %r1; mul.wide.u16 %r0, %h1, 3;", [0x1_8000, 0, 0], 0x1_8000),
        ("cvt.u16.u32 %h1, %r1; cvt.s32.s16 %r0, %h1;", [0x1_8000, 0, 0], 0xffff_8000),
        ("mov.b32 {%h1, %h2}, %r1; mov.b32 %r0, {%h2, %h1};", [0x1234_5678, 0, 0], 0x5678_1234),
        (
            "mul.wide.s32 %d2, %r1, %r2; shr.s64 %d2, %d2, 8; cvt.u32.u64 %r0, %d2;",
            [-512i32 as u32, 3, 0],
            -6i32 as u32,
        ),
        // Rounding: to the nearest even, to zero, down.
        (
            "add.f32 %f0, %f1, %f2; mov.b32 %r0, %f0;",
            [f(1.0), f(1.5 * f32::EPSILON), 0],
            f(1.0 + 2.0 * f32::EPSILON),
        ),
        (
            "add.rz.f32 %f0, %f1, %f2; mov.b32 %r0, %f0;",
            [f(1.0), f(1.5 * f32::EPSILON), 0],
            f(1.0 + f32::EPSILON),
        ),
        (
            "fma.rm.f32 %f0, %f1, %f2, %f3; mov.b32 %r0, %f0;",
            [f(1.0), f(-1e-10), f(1.0)],
            f(1.0 - f32::EPSILON / 2.0),
        ),
        // One rounding in fma, two without.
        (
            "fma.rn.f32 %f0, %f1, %f1, %f2; mov.b32 %r0, %f0;",
            [f(1.0 + f32::EPSILON), f(-1.0 - 2.0 * f32::EPSILON), 0],
            f(f32::EPSILON * f32::EPSILON),
        ),
        (
            "mul.f32 %f0, %f1, %f1; add.f32 %f0, %f0, %f2; mov.b32 %r0, %f0;",
            [f(1.0 + f32::EPSILON), f(-1.0 - 2.0 * f32::EPSILON), 0],
            0,
        ),
        ("cvt.rn.bf16x2.f32 %r0, %f1, %f2;", [0x3f80_8001, 0x3f80_8000, 0], 0x3f81_3f80),
        ("cvt.rz.bf16x2.f32 %r0, %f1, %f2;", [0x3f80_8001, 0x3f81_8000, 0], 0x3f80_3f81),
        ("cvt.rni.s32.f32 %r0, %f1;", [f(2.5), 0, 0], 2),
        ("cvt.rzi.s32.f32 %r0, %f1;", [f(-2.5), 0, 0], -2i32 as u32),
        ("cvt.rzi.u32.f32 %r0, %f1;", [f(-2.5), 0, 0], 0),
        ("cvt.rn.f32.u32 %f0, %r1; mov.b32 %r0, %f0;", [16_777_217, 0, 0], f(16_777_216.0)),
        ("cvt.sat.f32.f32 %f0, %f1; mov.b32 %r0, %f0;", [f(f32::NAN), 0, 0], 0),
        ("max.f32 %f0, %f1, %f2; mov.b32 %r0, %f0;", [f(f32::NAN), f(-3.0), 0], f(-3.0)),
        ("min.f32 %f0, %f1, %f2; mov.b32 %r0, %f0;", [f(0.0), f(-0.0), 0], f(-0.0)),
        ("copysign.f32 %f0, %f1, %f2; mov.b32 %r0, %f0;", [f(-1.0), f(3.0), 0], f(-3.0)),
        // Subnormals are zero where the name says so.
        ("ex2.approx.ftz.f32 %f0, %f1; mov.b32 %r0, %f0;", [f(-130.0), 0, 0], 0),
        ("cvt.f64.f32 %d2, %f1; cvt.rn.f32.f64 %f0, %d2; mov.b32 %r0, %f0;", [f(0.1), 0, 0], f(0.1)),
    ];
    for (text, x, expected) in cases {
        let load = "ld.global.u32 %r1, [%d0]; ld.global.u32 %r2, [%d0+4]; ld.global.u32 %r3, [%d0+8];\n\
                    mov.b32 %f1, %r1; mov.b32 %f2, %r2; mov.b32 %f3, %r3;\n";
        let got = run(&gpu, &kernel(&format!("{load}{text}\nst.global.u32 [%d1], %r0;")), 1, &x);
        assert_eq!(got.unwrap()[0], expected, "{text} of {x:x?}");
    }
}

#[test]
fn what_is_not_known_is_an_error_with_its_line() {
    const INVALID_PTX: i32 = 218;
    let gpu = gpu("");
    for (text, expected) in [
        ("frob.b32 %r0, %r1;", "image.ptx:8: instruction `frob.b32` is not known"),
        ("add.sat.s32 %r0, %r1, %r2;", "image.ptx:8: instruction `add.sat.s32` is not known"),
        ("cvt.rn.relu.bf16x2.f32 %r0, %f1, %f2;", "`cvt.rn.relu.bf16x2.f32` is not known"),
        ("add.s32 %r0, %r1;", "`add.s32 %r0, %r1`: the stand-in does not know these operands"),
        ("add.s32 %r0, %r1, %d1;", "register `%d1` has another width than `add.s32` reads"),
        ("add.s32 %r0, %r1, %q1;", "operand `%q1` of `add.s32` is not known"),
        ("mov.u32 %r0, %clock;", "operand `%clock` of `mov.u32` is not known"),
        ("bra nowhere;", "label `nowhere` does not exist"),
        (".shared .b32 fixed[4];", "smem_base()"),
        (".pragma \"surprise\";", "pragma `surprise` is not known"),
        ("ld.param.u32 %r0, [k_1+8];", "outside the parameter's 8 bytes"),
        ("call.uni (), elsewhere, ();", "a call of `elsewhere`, which is not in the module"),
    ] {
        let (code, report) = run(&gpu, &kernel(text), 32, &[0]).unwrap_err();
        assert_eq!(code, INVALID_PTX, "{text}: {report}");
        assert!(report.contains(expected), "{text}: {report}");
    }
    let (code, report) = run(&gpu, ".version 8.0\n.target sm_90\n.alias a, b;\n", 32, &[0]).unwrap_err();
    assert_eq!(code, INVALID_PTX);
    assert!(report.contains("image.ptx:3: directive `.alias` is not known"), "{report}");
    assert_eq!(run(&gpu, "no text of that kind", 32, &[0]).unwrap_err().0, INVALID_PTX);
}

#[test]
fn lanes_that_branch_apart_meet_again() {
    // Each lane goes round as often as its number says, then all exchange what they have.
    let text = kernel(
        "mov.u32 %r1, %tid.x; mov.u32 %r2, 0; mov.u32 %r3, 0;\n\
         again: setp.ge.u32 %p1, %r2, %r1; @%p1 bra done;\n\
         add.u32 %r3, %r3, %r2; add.u32 %r2, %r2, 1; bra again;\n\
         done: shfl.sync.bfly.b32 %r4|%p2, %r3, 1, 31, -1;\n\
         sub.u32 %r4, %r4, %r3; mul.wide.u32 %d2, %r1, 4; add.s64 %d2, %d2, %d1; st.global.u32 [%d2], %r4;",
    );
    for seed in [0, 1, 2] {
        let gpu = gpu(&format!("seed={seed}"));
        let sums: Vec<u32> = (0..64u32).map(|n| n * n.saturating_sub(1) / 2).collect();
        let expected: Vec<u32> = (0..64).map(|l| sums[l ^ 1].wrapping_sub(sums[l])).collect();
        assert_eq!(run(&gpu, &text, 64, &[0]).unwrap(), expected);
    }
}

#[test]
fn matrices_that_are_stored_are_loaded_again() {
    // Lane l holds pairs (l, l + 100) and (l + 200, l + 300); a transposed store is undone by a transposed load.
    for trans in ["", ".trans"] {
        let text = kernel(&format!(
            "mov.u32 %r1, %tid.x; add.u32 %r2, %r1, 6553600; add.u32 %r3, %r2, 13107400;\n\
             mov.u32 %r4, memory; and.b32 %r5, %r1, 15; shl.b32 %r5, %r5, 4; add.u32 %r4, %r4, %r5;\n\
             stmatrix.sync.aligned.m8n8.x2{trans}.shared.b16 [%r4], {{%r2, %r3}}; bar.warp.sync -1;\n\
             ldmatrix.sync.aligned.m8n8.x2{trans}.shared.b16 {{%r6, %r7}}, [%r4];\n\
             sub.u32 %r6, %r6, %r2; sub.u32 %r7, %r7, %r3; or.b32 %r6, %r6, %r7;\n\
             elect.sync _|%p1, -1; @%p1 add.u32 %r6, %r6, 7;\n\
             mul.wide.u32 %d2, %r1, 4; add.s64 %d2, %d2, %d1; st.global.u32 [%d2], %r6;"
        ));
        let expected: Vec<u32> = (0..32).map(|l| if l == 0 { 7 } else { 0 }).collect();
        assert_eq!(run(&gpu(""), &text, 32, &[0]).unwrap(), expected);
    }
}

#[test]
fn a_warp_that_spins_is_stopped() {
    let text = kernel("ld.global.u32 %r1, [%d0]; round: setp.eq.u32 %p1, %r1, 0; @%p1 bra round;");
    let (code, report) = run(&gpu("checks=on"), &text, 32, &[0]).unwrap_err();
    assert_eq!(code, 719);
    assert!(report.contains("spins"), "{report}");
}

#[test]
fn functions_are_called_and_parameters_are_bytes_too() {
    let text = ".version 8.0\n.target sm_90\n.address_size 64\n\
        .global .align 4 .b8 table[8] = {1, 0, 0, 0, 2, 1, 0, 0};\n\
        .func (.param .b64 result) twice(.param .b64 value) {\n\
        .reg .b64 %d<3>; .reg .pred %p<2>;\n\
        ld.param.b64 %d1, [value]; setp.eq.s64 %p1, %d1, 0; @%p1 bra out; add.s64 %d1, %d1, %d1;\n\
        out: st.param.b64 [result+0], %d1; ret;\n}\n\
        .visible .entry k(.param .u64 k_0, .param .align 8 .b8 k_1[8]) {\n\
        .reg .b32 %r<9>; .reg .b64 %d<9>;\n\
        ld.param.u64 %d1, [k_1]; ld.param.v2.u32 {%r1, %r2}, [k_1]; ld.param.u16 %r7, [k_1+2];\n\
        mov.u64 %d2, 21;\n\
        { .param .b64 a; st.param.b64 [a+0], %d2; .param .b64 b; call.uni (b), twice, (a); ld.param.b64 %d3, [b+0]; }\n\
        { .param .b64 a; st.param.b64 [a+0], %d3; .param .b64 b; call.uni (b), twice, (a); ld.param.b64 %d3, [b+0]; }\n\
        cvt.u32.u64 %r3, %d3; mov.u64 %d4, table; ld.global.u32 %r4, [%d4+4]; add.u32 %r3, %r3, %r4;\n\
        mov.b64 %d5, {%r1, %r2}; sub.s64 %d5, %d5, %d1; cvt.u32.u64 %r5, %d5; add.u32 %r3, %r3, %r5;\n\
        shr.u32 %r6, %r1, 16; sub.u32 %r6, %r6, %r7; add.u32 %r3, %r3, %r6;\n\
        st.global.u32 [%d1], %r3; ret;\n}\n";
    // 4 · 21 from two calls, 258 from the table; what is read of the parameter in parts is what is read as a whole.
    assert_eq!(run(&gpu(""), text, 1, &[0]).unwrap(), [84 + 258]);
}

#[test]
fn counters_count_the_instructions_of_the_ptx() {
    let file = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("ptx-counters.json");
    let _ = std::fs::remove_file(&file);
    // A warp reads 128 bytes in a row; its odd lanes then write to one bank of shared memory, 16 words.
    let text = kernel(
        "mov.u32 %r1, %tid.x; mul.wide.u32 %d2, %r1, 4; add.s64 %d3, %d0, %d2; ld.global.u32 %r2, [%d3];\n\
         and.b32 %r3, %r1, 1; setp.eq.u32 %p1, %r3, 1; shl.b32 %r4, %r1, 6; mov.u32 %r5, memory;\n\
         and.b32 %r4, %r4, 1023; add.u32 %r4, %r4, %r5;\n\
         @%p1 st.shared.u32 [%r4], %r2; add.s64 %d3, %d1, %d2; st.global.u32 [%d3], %r2;",
    );
    run(&gpu(&format!("checks=bounds,counters={}", file.display())), &text, 32, &[0; 32]).unwrap();
    let line = std::fs::read_to_string(&file).unwrap();
    for part in [
        r#""global_read":{"instructions":1,"bytes":128,"sectors":4"#,
        r#""global_write":{"instructions":1,"bytes":128,"sectors":4"#,
        r#""shared_write":{"instructions":1,"wavefronts":8,"ideal":1}"#,
    ] {
        assert!(line.contains(part), "{part} is not in {line}");
    }
}

#[test]
fn tensor_maps_that_no_card_takes_are_refused() {
    const INVALID_VALUE: i32 = 1;
    #[repr(align(64))]
    struct Map([u8; 128]);
    let gpu = gpu("");
    let base = gpu.upload(&[0f32; 1024]);
    let make = |base: u64, stride: u64, box_: [u32; 2], steps: u32, swizzle: i32| {
        let mut map = Map([0; 128]);
        cu!(gpu, cuTensorMapEncodeTiled(
            map.0.as_mut_ptr() => *mut u8, 9 => i32, 2 => u32, base => u64, [64u64, 32].as_ptr() => *const u64,
            [stride].as_ptr() => *const u64, box_.as_ptr() => *const u32, [steps; 2].as_ptr() => *const u32,
            0 => i32, swizzle => i32, 0 => i32, 0 => i32))
    };
    assert_eq!(make(base, 128, [64, 8], 1, 3), 0);
    for (why, code) in [
        ("an address between multiples of 16", make(base + 8, 128, [64, 8], 1, 3)),
        ("a stride between multiples of 16", make(base, 136, [64, 8], 1, 3)),
        ("a box of more than 256", make(base, 128, [64, 257], 1, 3)),
        ("a row wider than the swizzle", make(base, 128, [64, 8], 1, 2)),
        ("a row that is no multiple of 16 bytes", make(base, 128, [4, 8], 1, 0)),
        ("steps", make(base, 128, [64, 8], 2, 3)),
    ] {
        assert_eq!(code, INVALID_VALUE, "{why}");
    }
}

/// A 64×64 matrix of small whole numbers, and its bf16 bits.
fn matrix(seed: u32) -> (Vec<f32>, Vec<u16>) {
    let values: Vec<f32> =
        (0..64 * 64u32).map(|i| ((i * 37 + seed * 11 + i / 64 * 5) % 13) as f32 - 6.0).collect();
    let bits = values.iter().map(|v| (v.to_bits() >> 16) as u16).collect();
    (values, bits)
}

/// `d` = a·bᵀ or a·b, 64×64×64, by four wgmma on tiles that bulk copies have brought, swizzled by 128 bytes.
fn product_kernel(transposed: bool, in_registers: bool) -> String {
    let registers = |prefix: &str, count: usize| {
        let names: Vec<String> = (0..count).map(|n| format!("{prefix}{n}")).collect();
        names.join(", ")
    };
    let mut text = String::from(
        ".version 8.0\n.target sm_90a\n.address_size 64\n.extern .shared .align 1024 .b8 memory[];\n\
         .visible .entry k(.param .u64 k_0, .param .align 64 .b8 k_1[128], .param .align 64 .b8 k_2[128]) {\n\
         .reg .b32 %r<30>; .reg .f32 %f<32>; .reg .b64 %d<20>; .reg .pred %p<4>;\n\
         mov.u32 %r0, %tid.x; setp.ne.u32 %p1, %r0, 0; mov.u32 %r1, memory; @%p1 bra made;\n\
         mbarrier.init.shared::cta.b64 [%r1+16384], 1;\nmade: bar.sync 0; @%p1 bra loaded;\n\
         mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1+16384], 16384; mov.u32 %r2, 0;\n\
         mov.b64 %d1, k_1; cvta.param.u64 %d1, %d1; mov.b64 %d2, k_2; cvta.param.u64 %d2, %d2;\n",
    );
    for (at, map) in [(0, "%d1"), (8192, "%d2")] {
        let bar = "mbarrier::complete_tx::bytes";
        text += &format!("add.u32 %r3, %r1, {at}; add.u32 %r4, %r1, 16384;\n");
        text += &format!(
            "cp.async.bulk.tensor.2d.shared::cluster.global.tile.{bar} [%r3], [{map}, {{%r2, %r2}}], [%r4];\n"
        );
    }
    text += "loaded: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r1+16384], 0; @!%p2 bra loaded;\n";
    text += &(0..32).map(|n| format!("mov.f32 %f{n}, 0f00000000;\n")).collect::<String>();
    // Descriptors: the start in 16 bytes, 1024 bytes from core to core, swizzled by 128 bytes.
    let descriptor = |at: u64| (at >> 4) | (1024 >> 4) << 16 | (1024 >> 4) << 32 | 1u64 << 62;
    let warp_row = "shr.u32 %r10, %r0, 5; and.b32 %r11, %r0, 31; shr.u32 %r12, %r11, 2; and.b32 %r13, %r11, 3;\n\
                    shl.b32 %r10, %r10, 4; add.u32 %r10, %r10, %r12;\n";
    text += warp_row;
    if in_registers {
        // Row g of the warp's sixteen, columns 2q and 2q + 1, and those 8 below and to the right.
        for k in 0..4 {
            for r in 0..4 {
                let (below, right) = (8 * (r & 1), 16 * k + 8 * (r >> 1));
                text += &format!(
                    "add.u32 %r14, %r10, {below}; shl.b32 %r15, %r14, 7; shl.b32 %r16, %r13, 2; add.u32 %r15, %r15, %r16;\n\
                     add.u32 %r15, %r15, {}; and.b32 %r16, %r14, 7; shl.b32 %r16, %r16, 4; xor.b32 %r15, %r15, %r16;\n\
                     add.u32 %r15, %r15, %r1; ld.shared.u32 %r{}, [%r15];\n",
                    2 * right,
                    17 + r
                );
            }
            text += &format!(
                "wgmma.fence.sync.aligned; mov.b64 %d4, {};\n",
                descriptor(8192 + if transposed { 2048 } else { 32 } * k)
            );
            text += &format!(
                "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {{{}}}, {{{}}}, %d4, 1, 1, 1, {};\n\
                 wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;\n",
                registers("%f", 32),
                (17..21).map(|r| format!("%r{r}")).collect::<Vec<_>>().join(", "),
                u8::from(transposed)
            );
        }
    } else {
        text += "wgmma.fence.sync.aligned;\n";
        for k in 0..4 {
            let b = 8192 + if transposed { 2048 } else { 32 } * k;
            text += &format!("mov.b64 %d3, {}; mov.b64 %d4, {};\n", descriptor(32 * k), descriptor(b));
            text += &format!(
                "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {{{}}}, %d3, %d4, 1, 1, 1, 0, {};\n",
                registers("%f", 32),
                u8::from(transposed)
            );
        }
        text += "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;\n";
    }
    text += "ld.param.u64 %d5, [k_0];\n";
    for n in 0..32 {
        let (column, below) = (n / 4 * 8 + n % 2, 8 * (n % 4 / 2));
        text += &format!(
            "add.u32 %r14, %r10, {below}; shl.b32 %r15, %r14, 6; shl.b32 %r16, %r13, 1; add.u32 %r15, %r15, %r16;\n\
             add.u32 %r15, %r15, {column}; mul.wide.u32 %d6, %r15, 4; add.s64 %d6, %d6, %d5; st.global.f32 [%d6], %f{n};\n"
        );
    }
    text + "ret;\n}\n"
}

#[test]
fn a_product_of_a_warpgroup_is_right_in_each_layout() {
    #[repr(align(64))]
    struct Map([u8; 128]);
    let gpu = gpu("");
    let ((a, a_bits), (b, b_bits)) = (matrix(1), matrix(2));
    let map = |base: u64| {
        let mut map = Map([0; 128]);
        let (size, strides, bytes) = ([64u64, 64], [128u64], [64u32, 64]);
        let code = cu!(gpu, cuTensorMapEncodeTiled(
            map.0.as_mut_ptr() => *mut u8, 9 => i32, 2 => u32, base => u64, size.as_ptr() => *const u64,
            strides.as_ptr() => *const u64, bytes.as_ptr() => *const u32, [1u32, 1].as_ptr() => *const u32,
            0 => i32, 3 => i32, 0 => i32, 0 => i32));
        assert_eq!(code, 0);
        map.0.to_vec()
    };
    let (from_a, from_b) = (gpu.upload(&a_bits), gpu.upload(&b_bits));
    for (transposed, in_registers) in [(false, false), (true, false), (false, true), (true, true)] {
        let module = gpu.load_ptx(&product_kernel(transposed, in_registers)).expect("a module");
        let function = gpu.function_of(module, "k");
        let to = gpu.upload(&vec![0f32; 64 * 64]);
        let args = [arg(to), map(from_a), map(from_b)];
        let launched = gpu.launch_function(function, ptr::null_mut(), 1, 128, 16_400, &args);
        let code = if launched == 0 { gpu.wait() } else { launched };
        assert_eq!(code, 0, "{}", gpu.report());
        let got: Vec<f32> = gpu.download(to, 64 * 64);
        for row in 0..64 {
            for column in 0..64 {
                let of_b = |k: usize| if transposed { b[k * 64 + column] } else { b[column * 64 + k] };
                let sum: f32 = (0..64).map(|k| a[row * 64 + k] * of_b(k)).sum();
                assert_eq!(
                    got[row * 64 + column],
                    sum,
                    "{row}, {column}, transposed {transposed}, {in_registers}"
                );
            }
        }
    }
}
