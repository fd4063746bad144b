//! Products of every form against float64 loops, on the stand-in GPU of `standin/`.
//!
//! Values are small integers: every sum is exact in f32, so the tests compare bits. Everything outside the
//! operands is NaN and must keep its bits.

use std::path::Path;
use std::process::Command;

use half::bf16;

use super::super::SCRATCH;
use super::*;
use crate::backend::{Arena, Backend, DeviceOptions, Mat, MemoryPlan, Precision, Residual};

/// Set in a process whose driver is the stand-in.
const ON_STAND_IN: &str = "VITRUM_TEST_ON_STAND_IN";

/// True where the test `name` of this file runs on the stand-in GPU. Otherwise runs it again in a process of
/// its own that finds the stand-in's libraries.
fn on_stand_in(name: &str) -> bool {
    if std::env::var_os(ON_STAND_IN).is_some() {
        return true;
    }
    let program = std::env::current_exe().unwrap();
    let folder = program.ancestors().nth(2).unwrap().join("standin");
    let library = folder.join("libcuda.so");
    if !library.is_file() || !folder.join("libcublasLt.so").is_file() {
        println!("skipped: no stand-in GPU; `cargo build -p vitrum-standin` builds it");
        return false;
    }
    let changed = |path: &Path| std::fs::metadata(path).and_then(|file| file.modified()).unwrap();
    let kernel = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels/product.cu");
    assert!(
        changed(&kernel) <= changed(&library),
        "`cargo build -p vitrum-standin` builds the stand-in again"
    );
    let done = Command::new(program)
        .args([&format!("backend::cuda::product::tests::{name}"), "--exact", "--nocapture"])
        .env("LD_LIBRARY_PATH", folder)
        .env("VITRUM_STANDIN", "checks=on,threads=1")
        .env(ON_STAND_IN, "1")
        .output()
        .unwrap();
    let said = [done.stdout, done.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    assert!(done.status.success() && said.contains("1 passed"), "{said}");
    false
}

/// `D = op(A)·op(B) [+ C]`, and the layout of its matrices.
#[derive(Clone, Copy, Debug)]
struct Case {
    sizes: [usize; 3],
    transposed: [bool; 2],
    dtypes: [Dtype; 2],
    add: Add,
    /// Elements after every column, and before every matrix.
    gap: usize,
    skew: usize,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Add {
    Nothing,
    /// C is another matrix.
    Other,
    /// C is D.
    Itself,
}

const TYPES: [[Dtype; 2]; 3] =
    [[Dtype::F32, Dtype::F32], [Dtype::Bf16, Dtype::F32], [Dtype::Bf16, Dtype::Bf16]];

/// `[m, n, k]`: 1 everywhere, a warp's worth of each and its neighbours, slices of k with remainders.
const SMALL: [[usize; 3]; 16] = [
    [1, 1, 1],
    [1, 1, 60],
    [1, 7, 3],
    [5, 1, 1],
    [1, 60, 7],
    [33, 1, 17],
    [1, 33, 17],
    [31, 2, 31],
    [2, 31, 40],
    [32, 32, 32],
    [33, 31, 33],
    [65, 9, 70],
    [5, 65, 64],
    [4, 4, 300],
    [40, 3, 513],
    [3, 70, 520],
];
/// A head of 21,843 classes on one row, and one class on many rows: forward, and both gradients.
const LONG: [[usize; 3]; 7] = [
    [1, 1, 100_000],
    [100_000, 1, 1],
    [1, 100_000, 2],
    [21_843, 1, 12],
    [1, 21_843, 5],
    [40, 1, 21_843],
    [1, 40, 21_843],
];

fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = Vec::new();
    for (sizes, all_types) in SMALL.map(|s| (s, true)).into_iter().chain(LONG.map(|s| (s, false))) {
        for transposed in [[false, false], [true, false], [false, true], [true, true]] {
            for dtypes in TYPES {
                let i = cases.len();
                let add = [Add::Nothing, Add::Itself, Add::Other][i / 2 % 3];
                let case =
                    Case { sizes, transposed, dtypes, add, gap: [0, 3, 8, 1][i % 4], skew: [0, 1, 5][i % 3] };
                if all_types || dtypes == TYPES[i % 3] {
                    cases.push(case);
                }
            }
        }
    }
    cases
}

#[test]
fn products_of_every_form_equal_float64_to_the_bit() {
    if !on_stand_in("products_of_every_form_equal_float64_to_the_bit") {
        return;
    }
    let options = DeviceOptions { deterministic: true, ..DeviceOptions::default() };
    let mut cuda = Cuda::open(0, &options).unwrap();
    let mut plan = MemoryPlan::new(Cuda::storage_of(Precision::Bf16, Residual::Auto));
    let (long, small): (Vec<_>, Vec<_>) = cases().into_iter().partition(|case| LONG.contains(&case.sizes));
    for (cases, bytes) in [(small, 512 << 10), (long, 8 << 20)] {
        plan.set_bytes(Arena::Activations, bytes);
        cuda.allocate(&plan).unwrap();
        for (i, case) in cases.iter().enumerate() {
            case.check(&mut cuda, bytes, i as u64);
        }
    }
}

/// Integers from 1 to 4 of either sign, never 0: every term counts.
fn values(count: usize, seed: u64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let bits = state >> 61;
        (1 + (bits & 3)) as f64 * if bits & 4 == 0 { 1.0 } else { -1.0 }
    };
    (0..count).map(|_| next()).collect()
}

/// Places matrices in the arena, column by column.
struct Places {
    image: Vec<u8>,
    end: usize,
}

impl Places {
    /// A matrix with these values, or space for one.
    fn place(
        &mut self,
        case: &Case,
        rows: usize,
        cols: usize,
        dtype: Dtype,
        values: Option<&[f64]>,
    ) -> (Matrix, usize) {
        let ld = rows + case.gap;
        let offset = self.end.next_multiple_of(16) + case.skew * dtype.bytes();
        self.end = offset + ld * cols * dtype.bytes();
        let matrix = Matrix { rows, cols, ld, dtype };
        if let Some(values) = values {
            put(&mut self.image, matrix, offset, values);
        }
        (matrix, offset)
    }
}

fn put(image: &mut [u8], matrix: Matrix, offset: usize, values: &[f64]) {
    let Matrix { rows, ld, dtype, .. } = matrix;
    for (i, value) in values.iter().enumerate() {
        let at = offset + (i / rows * ld + i % rows) * dtype.bytes();
        match dtype {
            Dtype::F32 => image[at..at + 4].copy_from_slice(&(*value as f32).to_le_bytes()),
            Dtype::Bf16 => image[at..at + 2].copy_from_slice(&bf16::from_f64(*value).to_le_bytes()),
        }
    }
}

impl Case {
    /// All matrices lie in an arena of `bytes` bytes.
    fn check(&self, cuda: &mut Cuda, bytes: usize, seed: u64) {
        let Case {
            sizes: [m, n, k], transposed: [transpose_a, transpose_b], dtypes: [from, to], add, ..
        } = *self;
        let [a, b, c] = [m * k, k * n, m * n].map(|count| values(count, seed + count as u64));
        let of_a = |i: usize, t: usize| if transpose_a { a[i * k + t] } else { a[t * m + i] };
        let of_b = |t: usize, j: usize| if transpose_b { b[t * n + j] } else { b[j * k + t] };
        let mut expected = if add == Add::Nothing { vec![0.0; m * n] } else { c.clone() };
        for (at, sum) in expected.iter_mut().enumerate() {
            let (i, j) = (at % m, at / m);
            *sum += (0..k).map(|t| of_a(i, t) * of_b(t, j)).sum::<f64>();
        }

        // Every byte 0xff is NaN in both types.
        let mut places = Places { image: vec![0xff; bytes], end: 0 };
        let (a_rows, a_cols) = if transpose_a { (k, m) } else { (m, k) };
        let (b_rows, b_cols) = if transpose_b { (n, k) } else { (k, n) };
        let (a_matrix, a_at) = places.place(self, a_rows, a_cols, from, Some(&a));
        let (b_matrix, b_at) = places.place(self, b_rows, b_cols, from, Some(&b));
        let (d_matrix, d_at) = places.place(self, m, n, to, (add == Add::Itself).then_some(&c));
        let c_at = match add {
            Add::Other => places.place(self, m, n, to, Some(&c)).1,
            _ => d_at,
        };
        let start =
            cuda.at(Mat { arena: Arena::Activations, offset: 0, rows: 1, cols: 1, ld: 1, dtype: Dtype::F32 });
        let address = |offset: usize| start + offset as u64;
        let shape = Shape {
            transpose_a,
            transpose_b,
            a: a_matrix,
            b: b_matrix,
            d: d_matrix,
            add_c: add != Add::Nothing,
            fused: Fused::Nothing,
            aux_ld: 0,
        };
        let [a, b, c, d] = [a_at, b_at, c_at, d_at].map(address);
        cuda.write_arena(Arena::Activations, &places.image).unwrap();
        product(cuda, &shape, &Operands { a, b, c, d, bias: 0, aux: 0 }).unwrap();

        put(&mut places.image, d_matrix, d_at, &expected);
        let got = cuda.read_arena(Arena::Activations).unwrap();
        if let Some(at) = (0..bytes).find(|at| got[*at] != places.image[*at]) {
            panic!("byte {at} (D begins at {d_at}) is {:#x}, not {:#x}: {self:?}", got[at], places.image[at]);
        }
    }
}

fn shape([m, n, k]: [usize; 3], [transpose_a, transpose_b]: [bool; 2]) -> Shape {
    let matrix = |rows: usize, cols| Matrix { rows, cols, ld: rows, dtype: Dtype::Bf16 };
    let turned = |rows, cols, turn| if turn { matrix(cols, rows) } else { matrix(rows, cols) };
    Shape {
        transpose_a,
        transpose_b,
        a: turned(m, k, transpose_a),
        b: turned(k, n, transpose_b),
        d: matrix(m, n),
        add_c: false,
        fused: Fused::Nothing,
        aux_ld: 0,
    }
}

#[test]
fn slices_cover_k_and_partial_sums_fit_whatever_the_sizes() {
    let sizes = [1, 2, 31, 32, 33, 255, 257, 768, 5003, 21_843, 100_000];
    for m in sizes {
        for (n, k) in sizes.into_iter().flat_map(|n| sizes.map(|k| (n, k))) {
            for transposed in [[false, false], [true, false], [false, true], [true, true]] {
                let plan = Plan::new(&shape([m, n, k], transposed));
                let (slice, slices) = (plan.shape.slice as usize, plan.slices as usize);
                assert!(slice * slices >= k && slice * (slices - 1) < k, "{m} {n} {k}: {plan:?}");
                assert!(slices <= 65_535 && 4 * plan.partials() <= SCRATCH, "{m} {n} {k}: {plan:?}");
                let rows = plan.shape.m as usize;
                let groups = if plan.along_k { rows } else { rows.div_ceil(LANES) };
                let warps = groups * (plan.shape.n as usize).div_ceil(COLUMNS);
                assert_eq!(plan.blocks as usize, warps.div_ceil(WARPS), "{m} {n} {k}: {plan:?}");
            }
        }
    }
}

/// Lanes are contiguous in memory wherever one of the long sides is.
#[test]
fn a_single_row_or_column_is_read_along_what_lies_side_by_side() {
    for ([m, n, k], transposed) in [
        // A head on one row: forward, input gradient, weight gradient.
        ([21_843, 1, 768], [true, false]),
        ([768, 1, 21_843], [false, false]),
        ([768, 21_843, 1], [false, true]),
        // One class on many rows.
        ([1, 100_000, 768], [true, false]),
        ([768, 100_000, 1], [false, false]),
        ([768, 1, 100_000], [false, true]),
        // The long sides the other way round.
        ([1, 768, 21_843], [true, true]),
        ([1, 21_843, 768], [true, false]),
        ([1, 768, 100_000], [false, true]),
    ] {
        let plan = Plan::new(&shape([m, n, k], transposed));
        let ProductShape { m: rows, n: columns, a_row, a_step, b_step, .. } = plan.shape;
        let a_is_long = rows > 1 && k > 1;
        let b_is_long = columns > 1 && k > 1;
        if plan.along_k {
            assert!((a_step == 1 || !a_is_long) && (b_step == 1 || !b_is_long), "{m} {n} {k}: {plan:?}");
        } else {
            assert!(a_row == 1 && !b_is_long, "{m} {n} {k}: {plan:?}");
        }
        // Enough warps for a GPU, if there is enough to read.
        let warps = plan.blocks as usize * WARPS * plan.slices as usize;
        assert!(warps >= BUSY / 4 || m * n * k < BUSY * LEAST_SLICE * LANES, "{m} {n} {k}: {plan:?}");
    }
}
