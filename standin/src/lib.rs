//! A GPU on the host, for tests: the location of the stand-in's libraries.
//!
//! Building this package makes `libcuda.so`, `libcublasLt.so` and `libnccl.so.2`, which have the driver's,
//! cuBLASLt's and NCCL's own names and run the sources of `kernels/` on the processor. A program finds them through `LD_LIBRARY_PATH`
//! and needs no change. The README says what they check and what they cannot.

use std::path::Path;

/// The folder that holds the libraries.
pub fn libraries() -> &'static Path {
    Path::new(env!("STANDIN_LIBRARIES"))
}
