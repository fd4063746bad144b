//! What ptxas says about the kernels (`-Xptxas -v`): their registers and spills, and where it had to make code
//! slower.

/// One kernel for one target.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Kernel {
    /// Stem of its source.
    pub(crate) file: String,
    pub(crate) name: String,
    pub(crate) target: String,
    pub(crate) hot: bool,
    pub(crate) registers: u32,
    pub(crate) spill_bytes: u32,
    pub(crate) stack_bytes: u32,
}

/// The kernels of one source, in the order of the report; `hot` has the names of the hot ones.
pub(crate) fn kernels(file: &str, report: &str, hot: &[&str]) -> Vec<Kernel> {
    let mut kernels: Vec<Kernel> = Vec::new();
    for line in report.lines() {
        let quoted: Vec<&str> = line.split('\'').collect();
        if line.contains("Compiling entry function") && quoted.len() >= 4 {
            kernels.push(Kernel {
                file: file.to_owned(),
                name: quoted[1].to_owned(),
                target: quoted[3].to_owned(),
                hot: hot.contains(&quoted[1]),
                registers: 0,
                spill_bytes: 0,
                stack_bytes: 0,
            });
        }
        // A remark on a kernel may speak of registers too, and comes before the kernel that it is on.
        let Some(kernel) = kernels.last_mut().filter(|_| code(line).is_none()) else { continue };
        for part in line.split(',') {
            let number = || part.split_whitespace().find_map(|word| word.parse().ok()).unwrap_or(0);
            if part.contains("stack frame") {
                kernel.stack_bytes = number();
            } else if part.contains("spill stores") {
                kernel.spill_bytes = number();
            } else if part.contains("registers") {
                kernel.registers = number();
            }
        }
    }
    kernels
}

/// One sentence for each hot kernel that spills registers.
pub(crate) fn spills(kernels: &[Kernel]) -> Vec<String> {
    let spilled = kernels.iter().filter(|k| k.hot && k.spill_bytes > 0);
    spilled
        .map(|k| {
            format!("hot kernel `{}` spills {} bytes of registers on {}", k.name, k.spill_bytes, k.target)
        })
        .collect()
}

/// The remarks of ptxas on what it does not run as it was written: products of Hopper's tensor cores (wgmma)
/// one after the other instead of overlapped, waits that it added for them, and `setmaxnreg` that it ignores.
/// It compiles on, and calls most of these an info. Each kind of remark comes once for each kernel.
pub(crate) fn slowed(file: &str, report: &str) -> Vec<String> {
    let (mut seen, mut lines) = (Vec::new(), Vec::new());
    for line in report.lines() {
        let Some(code) = code(line) else { continue };
        let named = line.split('\'').nth(1);
        let slow = (7510..=7520).contains(&code) || line.contains("Potential Performance Loss");
        if slow && !seen.contains(&(code, named)) {
            seen.push((code, named));
            let said = line.split_once(" : ").map_or(line, |(_, said)| said);
            lines.push(format!("kernels/{file}.cu: ptxas: {said}"));
        }
    }
    lines
}

/// 7511 of `ptxas info    : (C7511) Potential Performance Loss: ...`
fn code(line: &str) -> Option<u32> {
    let (_, rest) = line.split_once("(C")?;
    let (digits, _) = rest.split_once(')')?;
    digits.parse().ok().filter(|_| line.starts_with("ptxas "))
}
