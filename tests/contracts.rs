//! What the build reads from the kernels about their launches (`build/contracts.rs`), and from ptxas about
//! their code (`build/ptxas.rs`).

#[path = "../build/contracts.rs"]
mod contracts;
#[path = "../build/ptxas.rs"]
mod ptxas;

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use contracts::Contracts;

fn read(header: &str, source: &str) -> Result<Contracts, String> {
    let file = |name: &str, text: &str| (name.to_owned(), text.to_owned());
    Contracts::read(&[file("types.cuh", header), file("kernel.cu", source)])
}

const HEADER: &str = "
template <typename T>
struct View {
  T* at;
  u32 ld;
  u32 rows, cols;
};

// In device memory.
struct Slot {
  const void* pixels;
  u16 y, x;
  u32 count;
};
";

const SOURCE: &str = "
struct Shape {
  u32 tokens;
  float mean[3];  // of red, green, blue; not a member
};
template <typename S, typename T>
struct MixArgs {
  const Slot* slot;
  Shape shape;
  u32 add;
  View<const S> x;
  double scale;
  float* out[2];
};
#define MIX(suffix, S, T, threads) \\
  HOT_KERNEL(mix_##suffix, 32 * threads, 2)(ARGS(MixArgs<S, T>)) { \\
    mix(args); \\
  }
#define BOTH(suffix, T, threads) \\
  MIX(suffix##_f32, T, float, threads) \\
  MIX(suffix##_bf16, T, bf16, 1)

BOTH(f32, float, 4)
KERNEL(plain, 128, 1)
(ARGS(MixArgs<bf16, bf16>)) {
  mix(args);
}
";

#[test]
fn kernels_are_found_behind_macros_and_structs_are_laid_out() {
    let contracts = read(HEADER, SOURCE).unwrap();
    let kernels: Vec<_> =
        contracts.kernels.iter().map(|k| (k.file.as_str(), k.name.as_str(), k.hot)).collect();
    let expected = [
        ("kernel.cu", "mix_f32_f32", true),
        ("kernel.cu", "mix_f32_bf16", true),
        ("kernel.cu", "plain", false),
    ];
    assert_eq!(kernels, expected);

    let rust = contracts.rust();
    for line in [
        "pub(super) shape: Shape,",
        "pub(super) x: View,",
        "pub(super) out: [Address; 2],",
        "pub(super) mean: [f32; 3],",
        "assert!(size_of::<Shape>() == 16);",
        "assert!(std::mem::offset_of!(MixArgs, shape) == 8);",
        "assert!(std::mem::offset_of!(MixArgs, add) == 24);",
        "assert!(std::mem::offset_of!(MixArgs, x) == 32);",
        "assert!(std::mem::offset_of!(MixArgs, scale) == 56);",
        "assert!(std::mem::offset_of!(MixArgs, out) == 64);",
        "assert!(size_of::<MixArgs>() == 80);",
        "assert!(std::mem::offset_of!(Slot, count) == 12);",
        r#"name: "mix_f32_f32", args: "MixArgs", threads: 128, blocks: 2, constants: &[("threads", 4), ("threads", 4)]"#,
        r#"name: "mix_f32_bf16", args: "MixArgs", threads: 32, blocks: 2, constants: &[("threads", 4), ("threads", 1)]"#,
        r#"name: "plain", args: "MixArgs", threads: 128, blocks: 1, constants: &[]"#,
    ] {
        assert!(rust.contains(line), "no `{line}` in:\n{rust}");
    }
    // What is read as bytes says so, and what kernels take by value does not.
    assert!(
        rust.contains("bytemuck::Pod, bytemuck::Zeroable)]\n#[repr(C)]\npub(super) struct Slot {"),
        "{rust}"
    );
    assert!(rust.contains("PartialEq)]\n#[repr(C)]\npub(super) struct MixArgs {"), "{rust}");
}

#[test]
fn what_the_build_cannot_read_is_refused_by_name() {
    let args = |members: &str| {
        format!("struct BadArgs {{\n  {members}\n}};\nKERNEL(bad, 32, 1)(ARGS(BadArgs)) {{\n}}\n")
    };
    for (source, says) in [
        (args("T value;"), "no counterpart of type `T` is known"),
        (args("float *a, *b;"), "`float * a , * b` is not a member"),
        (args("alignas(16) float a;"), "is not a member"),
        (args("u32 a : 4;"), "is not a member"),
        (
            "KERNEL(bad, 32, 1)(ARGS(MissingArgs)) {\n}\n".to_owned(),
            "struct `MissingArgs` of a kernel's arguments is not found",
        ),
        (
            "KERNEL(bad, 32, 1)(const float* x, u32 n) {\n}\n".to_owned(),
            "kernel `bad` does not take `(ARGS(a struct))`",
        ),
        ("KERNEL(bad, WARPS * 32, 1)(ARGS(BadArgs)) {\n}\n".to_owned(), "threads of kernel `bad`"),
    ] {
        let why = read(HEADER, &source).err().unwrap_or_else(|| panic!("accepted:\n{source}"));
        assert!(why.contains(says), "`{why}` does not say `{says}`");
    }
}

/// The CUDA compiler checks the assertions of every kernel; here the host's compiler checks those of some, and
/// that a wrong layout is noticed.
#[test]
fn the_compiler_agrees_with_the_layout() {
    if Command::new("g++").arg("--version").output().is_err() {
        return println!("skipped: there is no g++");
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let entries = fs::read_dir(root.join("kernels")).unwrap().flatten();
    let mut sources: Vec<(String, String)> = entries
        .map(|entry| {
            (entry.file_name().to_string_lossy().into_owned(), fs::read_to_string(entry.path()).unwrap())
        })
        .collect();
    sources.sort();
    let contracts = Contracts::read(&sources).unwrap();
    for file in ["adafactor.cu", "patchify.cu", "attention_keep.cu"] {
        let asserts = contracts.asserts(file);
        assert!(asserts.matches("static_assert").count() > 10, "{asserts}");
        compiles(root, file, &asserts).unwrap_or_else(|why| panic!("{file}: {why}"));
        let wrong = asserts.replacen("== 8", "== 12", 1);
        assert!(compiles(root, file, &wrong).is_err(), "{file}: a wrong offset passes");
    }
}

fn compiles(root: &Path, file: &str, asserts: &str) -> Result<(), String> {
    let mut compiler = Command::new("g++")
        .args(["-std=c++17", "-DVITRUM_STANDIN", "-Wno-unknown-pragmas", "-fsyntax-only", "-xc++", "-"])
        .current_dir(root)
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| e.to_string())?;
    let text = format!("#include \"kernels/{file}\"\n{asserts}");
    compiler.stdin.take().expect("piped").write_all(text.as_bytes()).map_err(|e| e.to_string())?;
    let output = compiler.wait_with_output().map_err(|e| e.to_string())?;
    match output.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

/// Three kernels as ptxas 13.2 reports them: a remark comes before the kernel that it is on.
const REPORT: &str = "\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'first' for 'sm_80'
ptxas info    : Function properties for first
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 48 registers, used 1 barriers, 16 bytes cumulative stack size, 440 bytes cmem[0]
ptxas info    : Compile time = 61.819 ms
ptxas info    : (C7517) wgmma.wait_group is injected in around line 45 by compiler to allow use of registers defined by GMMA in function 'second'
ptxas info    : (C7517) wgmma.wait_group is injected in around line 49 by compiler to allow use of registers defined by GMMA in function 'second'
ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient register resources for the wgmma pipeline in the function 'second' in line 55
ptxas info    : Compiling entry function 'second' for 'sm_90a'
ptxas info    : Function properties for second
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, used 0 barriers
ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored to maintain minimum register requirements.
ptxas info    : Compiling entry function 'third' for 'sm_90a'
ptxas info    : Function properties for third
    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
";

#[test]
fn registers_and_spills_of_each_kernel_are_read() {
    let kernel = |name: &str, target: &str, registers, spill_bytes, stack_bytes| ptxas::Kernel {
        file: "file".into(),
        name: name.into(),
        target: target.into(),
        hot: name != "third",
        registers,
        spill_bytes,
        stack_bytes,
    };
    let kernels = ptxas::kernels("file", REPORT, &["first", "second"]);
    let expected = [
        kernel("first", "sm_80", 48, 12, 16),
        kernel("second", "sm_90a", 30, 0, 0),
        kernel("third", "sm_90a", 255, 4, 8),
    ];
    assert_eq!(kernels, expected);
    assert_eq!(ptxas::spills(&kernels), ["hot kernel `first` spills 12 bytes of registers on sm_80"]);
}

#[test]
fn code_that_ptxas_made_slower_is_told_once_for_each_kernel() {
    let told = ptxas::slowed("file", REPORT);
    let [waits, serialised, setmaxnreg] = &told[..] else { panic!("{told:#?}") };
    assert!(waits.starts_with("kernels/file.cu: ptxas: (C7517)") && waits.contains("'second'"), "{waits}");
    assert!(serialised.contains("(C7511)") && serialised.contains("serialized"), "{serialised}");
    assert!(setmaxnreg.contains("(C7508)"), "{setmaxnreg}");
    let others = "ptxas info    : (C7600) something else\nkernel.cu(3): warning #177-D: (C7511) in a name\n";
    assert_eq!(ptxas::slowed("file", others), [""; 0]);
}
