//! Rows that lie further apart than 32 bits can count, without the memory in between: each is an allocation of its
//! own, and the option `gap` puts them apart.

#[macro_use]
mod common;

use common::{Gpu, arg};

const COLUMNS: usize = 64;

#[test]
fn a_row_is_found_beyond_32_bits() {
    // Rows 4 GiB apart: 2^31 elements of bf16, so that row 2 starts at element 2^32.
    const APART: u64 = 4 << 30;
    let row = 2 * COLUMNS;
    let options = format!("checks=on,threads=1,memory=16G,gap={}", APART - row.next_multiple_of(256) as u64);
    let gpu = Gpu::open(vitrum_standin::libraries(), &options);
    let values: Vec<u16> = (0..COLUMNS).map(|i| 0x3f80 + i as u16).collect();
    let rows: Vec<u64> = (0..4).map(|_| gpu.upload(&values)).collect();
    assert!(rows.windows(2).all(|two| two[1] - two[0] == APART), "{rows:x?}");

    // x = factor·x in every row.
    // `ScaleArgs`: a `View` (address, row stride, rows, columns, 4 bytes of padding) and the factor.
    let args = [
        arg(rows[0]),
        arg((APART / 2) as u32),
        arg(rows.len() as u32),
        arg(COLUMNS as u32),
        arg(0u32),
        arg(2f32),
        arg(0u32),
    ];
    let args = [args.concat()];
    let sizes: Vec<usize> = args.iter().map(Vec::len).collect();
    assert_eq!(
        parameters(&gpu, "scale_bf16"),
        sizes,
        "the kernel has other parameters: see kernels/activation.cu"
    );
    assert_eq!((gpu.launch("scale_bf16", 1, 256, 0, &args), gpu.wait()), (0, 0), "{}", gpu.report());
    let doubled: Vec<u16> = values.iter().map(|v| v + 0x80).collect();
    for row in rows {
        assert_eq!(gpu.download::<u16>(row, COLUMNS), doubled);
    }
}

/// The sizes of a kernel's parameters.
fn parameters(gpu: &Gpu, kernel: &str) -> Vec<usize> {
    let function = gpu.function(kernel);
    let size = |which: usize| {
        let (mut offset, mut size) = (0usize, 0usize);
        let code = cu!(gpu, cuFuncGetParamInfo(
            function => common::Handle, which => usize, &mut offset => *mut usize, &mut size => *mut usize));
        (code == 0).then_some(size)
    };
    (0..).map_while(size).collect()
}
