//! The one entry point to wider vector registers. Work that consists of plain loops is compiled a second time
//! for AVX2 with FMA, and runs in that form on processors that have it. The loops fix the order of additions
//! and which products are fused, so both compilations give the same bits.

/// Work to run with wider registers. `run` and everything hot that it calls must be `#[inline(always)]`
/// functions, not closures, or the compiler does not use the wider registers for them.
pub trait Task {
    type Out;
    fn run(self) -> Self::Out;
}

/// Runs a task with the best instruction set that the processor has.
pub fn run<T: Task>(task: T) -> T::Out {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("bmi2")
    {
        // SAFETY: the processor has the features that the function is compiled for; they were just detected.
        return unsafe { run_avx2(task) };
    }
    task.run()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,bmi1,bmi2,lzcnt")]
fn run_avx2<T: Task>(task: T) -> T::Out {
    task.run()
}
