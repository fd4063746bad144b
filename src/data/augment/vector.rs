//! One door to wider registers: work that is plain loops is compiled once more for AVX2 with FMA, and runs there on
//! processors that have it. The loops say in which order values are added and where products are fused, so both
//! compilations give the same bits.

/// Work to run behind the door. `run` and everything hot that it calls must be `#[inline(always)]` functions (and not
/// closures), or they are compiled without the wider registers.
pub trait Task {
    type Out;
    fn run(self) -> Self::Out;
}

/// Runs a task with the best instructions that there are.
pub fn run<T: Task>(task: T) -> T::Out {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("bmi2")
    {
        // SAFETY: the processor has the features that the function is compiled for: they were just detected.
        return unsafe { run_avx2(task) };
    }
    task.run()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,bmi1,bmi2,lzcnt")]
fn run_avx2<T: Task>(task: T) -> T::Out {
    task.run()
}
