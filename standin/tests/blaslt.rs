//! libcublasLt.so: products against plain loops in f64, epilogues, algorithms, refusals, and the faults that
//! options plant.

#[macro_use]
mod common;

use std::ffi::c_int;
use std::ptr;

use common::blas::{BF16, BIAS, Blas, Descriptors, F32, Found, IN_F32, NO_EPILOGUE, Product, ld};
use common::{Handle, role, run_again};

const GELU_AUX_BIAS: u32 = 164;
const DGELU: u32 = 192;
const DGELU_BGRAD: u32 = 208;
const BGRADA: u32 = 256;
const BGRADB: u32 = 512;

/// Bytes of workspace that [`Blas::multiply`] passes.
const SCRATCH: u64 = 4 << 20;

fn gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + (std::f64::consts::FRAC_2_PI.sqrt() * (x + 0.044715 * x.powi(3))).tanh())
}

fn gelu_slope(x: f64) -> f64 {
    (gelu(x + 1e-5) - gelu(x - 1e-5)) / 2e-5
}

/// `sum over k of op(A)[i, k] · op(B)[k, j]` and the plain sums of both over k.
fn product_of(p: &Product, a: &[f64], b: &[f64]) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let a_at = |i: usize, k: usize| if p.transpose.0 { a[k + i * p.k] } else { a[i + k * p.m] };
    let b_at = |k: usize, j: usize| if p.transpose.1 { b[j + k * p.n] } else { b[k + j * p.k] };
    let mut d = vec![0.0; p.m * p.n];
    for j in 0..p.n {
        for i in 0..p.m {
            d[i + j * p.m] = (0..p.k).map(|k| a_at(i, k) * b_at(k, j)).sum();
        }
    }
    let over_a = (0..p.m).map(|i| (0..p.k).map(|k| a_at(i, k)).sum()).collect();
    let over_b = (0..p.n).map(|j| (0..p.k).map(|k| b_at(k, j)).sum()).collect();
    (d, over_a, over_b)
}

fn close(what: &str, found: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len());
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        assert!((f - e).abs() <= tolerance * (1.0 + e.abs()), "{what}[{i}]: {f}, not {e}");
    }
}

/// Runs one product and compares everything that it wrote.
fn check(blas: &Blas, p: &Product) {
    let x = blas.describe(p);
    let (a, a_values) = blas.matrix(p.input, p.a(), 1);
    let (b, b_values) = blas.matrix(p.input, p.b(), 2);
    let (c, c_values) = blas.matrix(p.output, (p.m, p.n), 3);
    let sums = if p.epilogue == BGRADB { p.n } else { p.m };
    let (bias, bias_values) = blas.matrix(p.output, (sums, 1), 4);
    let (aux, aux_values) = blas.matrix(p.output, (p.m, p.n), 5);
    let (d, _) = blas.matrix(p.output, (p.m, p.n), 6);
    assert_eq!(blas.set(x.product, 8, bias), 0);
    assert_eq!(blas.set(x.product, 11, aux), 0);
    assert_eq!(blas.multiply(&x, p, [a, b, c, d], None, 0), 0, "{}", blas.gpu.report());

    let tolerance = if p.output == BF16 { 1.0 / 256.0 } else { 1e-5 };
    let (plain, over_a, over_b) = product_of(p, &a_values, &b_values);
    let mut expected: Vec<f64> = plain
        .iter()
        .zip(&c_values)
        .map(|(v, c)| f64::from(p.alpha) * v + if p.beta == 0.0 { 0.0 } else { f64::from(p.beta) * c })
        .collect();
    if matches!(p.epilogue, BIAS | GELU_AUX_BIAS) {
        for (at, v) in expected.iter_mut().enumerate() {
            *v += bias_values[at % p.m];
        }
    }
    let unpadded = |at: u64| -> Vec<f64> {
        let all = blas.download(p.output, at, ld(p.m) * p.n);
        let (used, padding): (Vec<_>, Vec<_>) = all.iter().enumerate().partition(|(i, _)| i % ld(p.m) < p.m);
        assert!(padding.iter().all(|(_, v)| v.is_nan()), "padding was written");
        used.into_iter().map(|(_, v)| *v).collect()
    };
    if p.epilogue == GELU_AUX_BIAS {
        close("aux", &unpadded(aux), &expected, tolerance);
        expected.iter_mut().for_each(|v| *v = gelu(*v));
    }
    if matches!(p.epilogue, DGELU | DGELU_BGRAD) {
        expected.iter_mut().zip(&aux_values).for_each(|(v, x)| *v *= gelu_slope(*x));
    }
    close("d", &unpadded(d), &expected, tolerance);
    let sums_expected: Option<Vec<f64>> = match p.epilogue {
        BGRADA => Some(over_a),
        BGRADB => Some(over_b),
        DGELU_BGRAD => Some((0..p.m).map(|i| (0..p.n).map(|j| expected[i + j * p.m]).sum()).collect()),
        _ => None,
    };
    if let Some(sums) = sums_expected {
        close("bias gradient", &blas.download(p.output, bias, sums.len()), &sums, tolerance);
    }
}

const PLAIN: Product = Product {
    transpose: (true, false),
    m: 40,
    n: 19,
    k: 33,
    input: BF16,
    output: BF16,
    epilogue: NO_EPILOGUE,
    alpha: 1.0,
    beta: 0.0,
};

#[test]
fn products_equal_plain_loops_in_every_transpose_and_type() {
    let blas = Blas::open("checks=on");
    for transpose in [(false, false), (true, false), (false, true), (true, true)] {
        for (input, output) in [(BF16, BF16), (BF16, F32), (F32, F32)] {
            for (m, n, k) in [(40, 19, 33), (1, 1, 1), (16, 4, 8), (7, 130, 65)] {
                check(&blas, &Product { transpose, m, n, k, input, output, ..PLAIN });
                check(&blas, &Product { transpose, m, n, k, input, output, alpha: 0.5, beta: 1.0, ..PLAIN });
            }
        }
    }
}

#[test]
fn epilogues_equal_their_formulas() {
    let blas = Blas::open("checks=on");
    for epilogue in [BIAS, GELU_AUX_BIAS, DGELU, DGELU_BGRAD, BGRADA, BGRADB] {
        for (input, output) in [(BF16, BF16), (BF16, F32), (F32, F32)] {
            check(&blas, &Product { epilogue, input, output, ..PLAIN });
            check(&blas, &Product { epilogue, input, output, beta: 1.0, transpose: (false, true), ..PLAIN });
        }
    }
}

#[test]
fn each_algorithm_gives_the_product_and_remembers_its_shape() {
    let blas = Blas::open("checks=on");
    let p = Product { input: F32, output: F32, ..PLAIN };
    let x = blas.describe(&p);
    let (a, a_values) = blas.matrix(F32, p.a(), 1);
    let (b, b_values) = blas.matrix(F32, p.b(), 2);
    let (d, _) = blas.matrix(F32, (p.m, p.n), 3);
    let scratch = blas.gpu.allocate(SCRATCH as usize).unwrap();
    let found = blas.candidates(&x, SCRATCH, None).unwrap();
    assert_eq!(found.len(), 8);
    assert_eq!(blas.candidates(&x, 0, Some(IN_F32)).unwrap().len(), 1, "only one works without a workspace");
    let (expected, _, _) = product_of(&p, &a_values, &b_values);
    for one in &found {
        assert_eq!(blas.multiply(&x, &p, [a, b, d, d], Some(one), scratch), 0);
        let all = blas.download(F32, d, ld(p.m) * p.n);
        let used: Vec<f64> =
            all.iter().enumerate().filter(|(i, _)| i % ld(p.m) < p.m).map(|(_, v)| *v).collect();
        close("d", &used, &expected, 1e-5);
    }
    // The same bytes for another product, and bytes that the library never returned.
    let check = |x: &Descriptors, algorithm: &[u64; 8]| blas.check(x, algorithm);
    assert_eq!(check(&x, &found[1].algorithm), 0);
    let other = blas.describe(&Product { n: 20, ..p });
    assert_eq!(check(&other, &found[1].algorithm), 15);
    assert_eq!(check(&x, &[0x77; 8]), 7);
    let second = blas.candidates(&x, SCRATCH, Some(IN_F32)).unwrap()[1];
    assert_eq!(check(&x, &second.algorithm), 0);
    blas.gpu.configure("refuse_algorithm=1");
    assert_eq!(check(&x, &second.algorithm), 15);
    // A heuristic that refuses, that finds nothing, or whose findings are none.
    blas.gpu.configure("heuristic=refusal");
    assert_eq!(blas.candidates(&x, 0, None).err(), Some(15));
    assert_eq!(blas.multiply(&x, &p, [a, b, d, d], Some(&found[0]), scratch), 15);
    blas.gpu.configure("heuristic=nothing");
    assert_eq!(blas.candidates(&x, 0, None).unwrap().len(), 0);
    assert_eq!(blas.multiply(&x, &p, [a, b, d, d], None, scratch), 15);
    blas.gpu.configure("heuristic=unfit");
    let unfit = blas.candidates(&x, 0, None).unwrap();
    assert!(!unfit.is_empty() && unfit.iter().all(|one| one.state == 15));
}

#[test]
fn an_epilogue_is_refused_on_demand_and_others_are_not() {
    let blas = Blas::open("checks=on,refuse_epilogues=36+512");
    let found =
        |epilogue: u32| blas.candidates(&blas.describe(&Product { epilogue, ..PLAIN }), 0, None).err();
    assert_eq!([36, 512].map(found), [Some(15); 2]);
    assert_eq!([NO_EPILOGUE, BIAS, GELU_AUX_BIAS, DGELU].map(found), [None; 4]);
}

/// What cuBLASLt 13.1.0 does where there is no GPU: attributes are looked at by number and size, values only
/// when something is asked for with them.
#[test]
fn setters_look_at_sizes_and_uses_at_values() {
    let blas = Blas::open("checks=on");
    let x = blas.describe(&PLAIN);
    let found = |x: &Descriptors| blas.candidates(x, 0, Some(IN_F32)).map(|all| all.len());
    assert_eq!(found(&x), Ok(1));
    // Wrong sizes, attributes that do not exist.
    assert_eq!(blas.set(x.product, 3, 1i64), 7);
    assert_eq!(blas.set(x.product, 12, 8i32), 7);
    assert_eq!(blas.set(x.product, 99, 0i32), 7);
    assert_eq!(found(&x), Ok(1), "and nothing has changed");
    // Values that mean nothing.
    for (attribute, value, code) in [(7, 77_777, 15), (2, 9, 15), (0, 200, 15), (1, 99, 15), (26, 99, 15)] {
        let x = blas.describe(&PLAIN);
        assert_eq!(blas.set(x.product, attribute, value), 0);
        assert_eq!(found(&x), Err(code), "attribute {attribute}");
    }
    let x = blas.describe(&Product { epilogue: GELU_AUX_BIAS, ..PLAIN });
    assert_eq!((blas.set(x.product, 12, 7i64), found(&x)), (0, Err(7)));
    // Layouts.
    for (layout, code) in [((BF16, 4), 7), ((BF16, 0), 7), ((99, 48), 15)] {
        let x = blas.describe(&PLAIN);
        let (dtype, ld) = layout;
        let wrong = Descriptors { a: blas.layout(dtype, PLAIN.a(), ld), ..x };
        assert_eq!(found(&wrong), Err(code), "{layout:?}");
    }
    // An algorithm of zeros has an id, as in the real library; it belongs to no product.
    assert_eq!(blas.configuration(&[0; 8], 0), (0, 0, 4));
    assert_eq!(blas.check(&blas.describe(&PLAIN), &[0; 8]), 7);
}

/// Sums of products whose bits are known: 1 + 128 · (2⁻⁸)³ and the like.
#[test]
fn tensor_cores_drop_what_does_not_fit_on_demand() {
    let sum = |options: &str, input: c_int, tf32: bool, b: &[f32]| {
        let blas = Blas::open(options);
        let p = Product { m: 8, n: 1, k: b.len(), input, output: F32, ..PLAIN };
        let x = blas.describe(&p);
        if tf32 {
            assert_eq!(blas.set(x.product, 0, 77i32), 0);
        }
        let a = blas.upload(input, &vec![1.0; ld(8) * p.k]);
        let b = [b, &[f32::NAN; 8]].concat();
        let (b, d) = (blas.upload(input, &b), blas.gpu.allocate(4 * ld(8)).unwrap());
        assert_eq!(blas.multiply(&x, &p, [a, b, d, d], None, 0), 0);
        blas.gpu.download::<f32>(d, 1)[0]
    };
    let ulp = f32::EPSILON;
    let (round, truncate) = ("checks=on", "checks=on,tensor_cores=truncate");
    // 1 and 15 terms of ¾ of its last place: each is rounded up, or each is dropped.
    let high: Vec<f32> = std::iter::once(1.0).chain([0.75 * ulp; 15]).collect();
    assert_eq!(sum(round, BF16, false, &high), 1.0 + 15.0 * ulp);
    assert_eq!(sum(truncate, BF16, false, &high), 1.0);
    // It is towards zero, and f32 products are not the tensor cores' work.
    let low: Vec<f32> = high.iter().map(|v| -v).collect();
    assert_eq!(sum(truncate, BF16, false, &low), -1.0);
    assert_eq!(sum(truncate, F32, false, &high), 1.0 + 15.0 * ulp);
    // TF32 keeps 10 bits of what it is given.
    let fine = [1.0 + 1.75 / 1024.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0];
    assert_eq!(sum(round, F32, true, &fine), 1.0 + 2.0 / 1024.0);
    assert_eq!(sum(truncate, F32, true, &fine), 1.0 + 1.0 / 1024.0);
    // What fits is exact, and NaN stays.
    let whole: Vec<f32> = (0..40).map(|i| i as f32).collect();
    assert_eq!(sum(truncate, BF16, false, &whole), 780.0);
    assert!(sum(truncate, BF16, false, &[1.0, f32::NAN, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]).is_nan());
    assert_eq!(sum(truncate, BF16, false, &[f32::INFINITY; 8]), f32::INFINITY);
}

#[test]
fn what_the_library_refuses_is_refused() {
    let blas = Blas::open("checks=on");
    let (a, _) = blas.matrix(BF16, (64, 64), 1);
    let (d, _) = blas.matrix(F32, (64, 64), 2);
    let run = |p: &Product, at: [u64; 4], change: &dyn Fn(&Descriptors)| {
        let x = blas.describe(p);
        change(&x);
        blas.multiply(&x, p, at, None, 0)
    };
    let nothing = |_: &Descriptors| {};
    // Types.
    assert_eq!(run(&Product { input: F32, output: BF16, ..PLAIN }, [a, a, d, d], &nothing), 15);
    assert_eq!(run(&Product { input: 2, ..PLAIN }, [a, a, d, d], &nothing), 15);
    // Pointers.
    assert_eq!(run(&PLAIN, [a + 8, a, d, d], &nothing), 7);
    assert!(blas.gpu.report().contains("A at"), "{}", blas.gpu.report());
    assert_eq!(run(&PLAIN, [a, a, d, 0], &nothing), 7);
    // Epilogues without their operands.
    assert_eq!(run(&Product { epilogue: BIAS, ..PLAIN }, [a, a, d, d], &nothing), 7);
    let bias = |x: &Descriptors| assert_eq!(blas.set(x.product, 8, d), 0);
    assert_eq!(run(&Product { epilogue: GELU_AUX_BIAS, ..PLAIN }, [a, a, d, d], &bias), 7);
    let short = |x: &Descriptors| assert_eq!(blas.set(x.product, 12, 8i64), 0);
    assert_eq!(run(&Product { epilogue: DGELU, ..PLAIN }, [a, a, d, d], &short), 7);
    assert_eq!(run(&Product { epilogue: 3, ..PLAIN }, [a, a, d, d], &nothing), 15);
    // Leading dimensions: too short, and not a multiple of 16 bytes.
    for (ld, code) in [(32usize, 7), (44, 15)] {
        let x = blas.describe(&PLAIN);
        let wrong = Descriptors { d: blas.layout(BF16, (PLAIN.m, PLAIN.n), ld), ..x };
        assert_eq!(blas.multiply(&wrong, &PLAIN, [a, a, d, d], None, 0), code);
    }
}

#[test]
fn a_product_reads_and_writes_under_the_same_checks_as_a_kernel() {
    let blas = Blas::open("checks=on");
    let p = PLAIN;
    let x = blas.describe(&p);
    let (a, _) = blas.matrix(BF16, p.a(), 1);
    let (b, _) = blas.matrix(BF16, p.b(), 2);
    let short = blas.gpu.allocate(64).unwrap();
    assert_eq!((blas.multiply(&x, &p, [a, b, short, short], None, 0), blas.gpu.wait()), (0, 700));
    assert!(blas.gpu.report().contains("out of bounds: a matmul's D"), "{}", blas.gpu.report());
    assert_eq!(cu!(blas.gpu, standin_reset()), 0);
    let fresh = blas.gpu.allocate(2 * ld(p.k) * p.n).unwrap();
    let d = blas.gpu.allocate(2 * ld(p.m) * p.n).unwrap();
    assert_eq!((blas.multiply(&x, &p, [a, fresh, d, d], None, 0), blas.gpu.wait()), (0, 719));
    assert!(blas.gpu.report().contains("uninitialised: a matmul's B"), "{}", blas.gpu.report());
}

/// Everything that one product needs, so that it can be run with one algorithm after another.
struct Case {
    blas: Blas,
    product: Product,
    described: Descriptors,
    at: [u64; 4],
    scratch: u64,
    exact: Vec<f64>,
}

impl Case {
    fn new(options: &str, product: Product) -> Self {
        let blas = Blas::open(options);
        let described = blas.describe(&product);
        let (a, a_values) = blas.matrix(product.input, product.a(), 1);
        let (b, b_values) = blas.matrix(product.input, product.b(), 2);
        let (d, _) = blas.matrix(product.output, (product.m, product.n), 3);
        let (bias, _) = blas.matrix(product.output, (product.m.max(product.n), 1), 4);
        let (aux, _) = blas.matrix(product.output, (product.m, product.n), 5);
        assert_eq!((blas.set(described.product, 8, bias), blas.set(described.product, 11, aux)), (0, 0));
        let scratch = blas.gpu.allocate(SCRATCH as usize).unwrap();
        let (exact, ..) = product_of(&product, &a_values, &b_values);
        Self { blas, product, described, at: [a, b, d, d], scratch, exact }
    }

    fn offered(&self, reductions: Option<u32>) -> Vec<Found> {
        self.blas.candidates(&self.described, SCRATCH, reductions).unwrap()
    }

    fn run(&self, algorithm: &Found) -> c_int {
        self.blas.multiply(&self.described, &self.product, self.at, Some(algorithm), self.scratch)
    }

    /// The largest difference from the exact product, relative to the largest value.
    fn error(&self, algorithm: &Found) -> f64 {
        assert_eq!(self.run(algorithm), 0, "{}", self.blas.gpu.report());
        let all = self.blas.download(self.product.output, self.at[3], ld(self.product.m) * self.product.n);
        let found = all.iter().enumerate().filter(|(i, _)| i % ld(self.product.m) < self.product.m);
        let most = self.exact.iter().fold(0f64, |most, v| most.max(v.abs()));
        found.zip(&self.exact).fold(0f64, |worst, ((_, f), e)| worst.max((f - e).abs())) / most
    }

    fn splits(&self, algorithm: &Found) -> u32 {
        self.blas.configuration(&algorithm.algorithm, SPLITK_NUM).1
    }
}

/// `cublasLtMatmulAlgoConfigAttributes_t`
const ID: c_int = 0;
const TILE_ID: c_int = 1;
const SPLITK_NUM: c_int = 2;
const REDUCTION_SCHEME: c_int = 3;
const STAGES_ID: c_int = 6;

const IN_F32_CASE: Product = Product { input: F32, output: F32, ..PLAIN };

#[test]
fn algorithms_say_what_they_are() {
    let case = Case::new("checks=on", IN_F32_CASE);
    let all = |found: &[Found], attribute| -> Vec<u32> {
        let asked = found.iter().map(|one| case.blas.configuration(&one.algorithm, attribute));
        asked.inspect(|(code, _, written)| assert_eq!((*code, *written), (0, 4))).map(|(_, v, _)| v).collect()
    };
    let found = case.offered(None);
    assert_eq!(all(&found, SPLITK_NUM), [4, 8, 1, 2, 3, 4, 6, 8]);
    assert_eq!(all(&found, REDUCTION_SCHEME), [4, 1, 0, 2, 2, 2, 2, 2]);
    assert_eq!(all(&found, ID), [21; 8]);
    assert_eq!((all(&found, TILE_ID), all(&found, STAGES_ID)), (vec![20; 8], vec![15; 8]));
    case.blas.gpu.configure("split_fault=1");
    assert_eq!(all(&found, ID), [66, 66, 21, 66, 66, 66, 66, 66]);
    assert_eq!(all(&found, STAGES_ID), [15; 8]);

    let algorithm = found[0].algorithm;
    assert_eq!(case.blas.configuration(&algorithm, 99).0, 7);
    let (mut value, mut written) = (0u16, 0usize);
    let mut ask = |bytes: usize| {
        let code = lt!(case.blas, cublasLtMatmulAlgoConfigGetAttribute(
            algorithm.as_ptr() => *const u64, ID => c_int, &mut value => *mut u16, bytes => usize,
            &mut written => *mut usize));
        (code, written)
    };
    assert_eq!(ask(2), (7, 4), "no room for it");
    assert_eq!(ask(0), (0, 4), "only asked how large it is");
}

#[test]
fn parts_of_a_sum_go_through_the_type_of_d_unless_that_is_forbidden() {
    let case = Case::new("checks=on", Product { k: 512, ..PLAIN });
    let scheme = |mask| -> Vec<u32> {
        let schemes = case.offered(mask).into_iter();
        schemes.map(|one| case.blas.configuration(&one.algorithm, REDUCTION_SCHEME).1).collect()
    };
    assert_eq!(scheme(Some(0)), [0], "nothing is split");
    assert_eq!(scheme(Some(IN_F32)), [0, 2, 2, 2, 2, 2]);
    assert_eq!(scheme(Some(1)), [1, 0]);
    assert_eq!(scheme(Some(4)), [4, 0]);
    // By default they are offered, and offered first.
    assert_eq!(scheme(None), [4, 1, 0, 2, 2, 2, 2, 2]);

    // Quarters of the sum are 128.25, 128.25, -128 and -128: bf16 has nothing between 128 and 129.
    let product = Product { m: 16, n: 8, k: 512, ..PLAIN };
    let x = case.blas.describe(&product);
    let first = |i: usize| if i % 128 < 32 { 1.0 + 1.0 / 128.0 } else { 1.0 };
    let a: Vec<f32> = (0..ld(512)).map(|i| if i < 256 { first(i) } else { -1.0 }).collect();
    let (a, b) = (case.blas.upload(BF16, &a.repeat(16)), case.blas.upload(BF16, &vec![1.0; ld(512) * 8]));
    let d = case.blas.gpu.allocate(2 * ld(16) * 8).unwrap();
    let sums: Vec<f64> = case
        .blas
        .candidates(&x, SCRATCH, None)
        .unwrap()
        .iter()
        .map(|one| {
            let code = case.blas.multiply(&x, &product, [a, b, d, d], Some(one), case.scratch);
            assert_eq!(code, 0, "{}", case.blas.gpu.report());
            case.blas.download(BF16, d, 1)[0]
        })
        .collect();
    assert_eq!(sums, [0.0, 0.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]);
}

#[test]
fn products_of_one_row_or_column_are_refused_on_demand() {
    let blas = Blas::open("checks=on");
    let (a, _) = blas.matrix(BF16, (64, 64), 1);
    let answers = |m: usize, n: usize| {
        let product = Product { m, n, ..PLAIN };
        let x = blas.describe(&product);
        let offered = blas.candidates(&x, SCRATCH, None).err().unwrap_or(0);
        (offered, blas.multiply(&x, &product, [a, a, a, a], None, 0))
    };
    let thin = Product { n: 1, ..PLAIN };
    let remembered = blas.candidates(&blas.describe(&thin), SCRATCH, None).unwrap()[0];
    for (option, code) in [("invalid", 7), ("unsupported", 15)] {
        blas.gpu.configure(&format!("thin={option}"));
        assert_eq!(answers(1, 19), (code, code), "{option}");
        assert_eq!(answers(40, 1), (code, code), "{option}");
        assert_eq!(blas.check(&blas.describe(&thin), &remembered.algorithm), code, "{option}");
        assert_eq!(blas.candidates(&blas.describe(&PLAIN), SCRATCH, None).err(), None);
    }
    assert_eq!(cu!(blas.gpu, standin_reset()), 0);
    assert_eq!(blas.check(&blas.describe(&thin), &remembered.algorithm), 0);
}

/// Sums of `k` by each algorithm: the splits of those that are wrong, and of those that are right.
fn wrong_and_right(options: &str, k: usize) -> (Vec<u32>, Vec<u32>) {
    let case = Case::new(options, Product { k, ..IN_F32_CASE });
    let (mut wrong, mut right) = (Vec::new(), Vec::new());
    for one in case.offered(Some(IN_F32)) {
        let error = case.error(&one);
        assert!(!(1e-5..=1e-2).contains(&error), "neither right nor wrong: {error}");
        if error < 1e-5 { &mut right } else { &mut wrong }.push(case.splits(&one));
    }
    (wrong, right)
}

#[test]
fn splits_that_leave_a_rest_of_whole_stages_are_wrong_on_demand() {
    // 1 is divided by nothing; 193 = 3 · 64 + 1 and 385 = 3 · 128 + 1 = 6 · 64 + 1 leave a rest; 192 and 384 leave none; 195 is
    // 3 · 65, 197 is 3 · 65 + 2, 257 is 4 · 64 + 1 and 2 · 128 + 1.
    for (k, wrong) in [
        (1, vec![]),
        (192, vec![]),
        (193, vec![3]),
        (195, vec![]),
        (197, vec![]),
        (257, vec![2, 4]),
        (384, vec![]),
        (385, vec![2, 3, 6]),
    ] {
        assert_eq!(wrong_and_right("checks=on,split_fault=1", k).0, wrong, "{k}");
        assert_eq!(wrong_and_right("checks=on", k).0, [0; 0], "{k}");
    }
}

#[test]
fn one_algorithm_is_wrong_on_demand_and_says_nothing() {
    for k in [1, 33, 384] {
        assert_eq!(wrong_and_right("checks=on,wrong_algorithm=0", k).0, [1], "{k}");
    }
    assert_eq!(wrong_and_right("checks=on,wrong_algorithm=3", 384), (vec![4], vec![1, 2, 3, 6, 8]));
}

#[test]
fn one_algorithm_cannot_be_launched_on_demand_and_touches_nothing() {
    let case = Case::new("checks=on,fail_algorithm=1", IN_F32_CASE);
    let before = case.blas.gpu.download::<u32>(case.at[3], ld(40) * 19);
    let found = case.offered(Some(IN_F32));
    assert_eq!(case.splits(&found[1]), 2);
    assert_eq!(case.blas.check(&case.described, &found[1].algorithm), 0);
    assert_eq!(case.run(&found[1]), 13);
    case.blas.gpu.configure("fail_status=15");
    assert_eq!(case.run(&found[1]), 15);
    assert_eq!(case.blas.gpu.download::<u32>(case.at[3], ld(40) * 19), before);
    assert_eq!(cu!(case.blas.gpu, cuCtxSynchronize()), 0);
    for one in found.iter().filter(|one| one.algorithm != found[1].algorithm) {
        assert!(case.error(one) < 1e-5);
    }
}

/// Milliseconds of a product by the clock of events: the fastest of three runs.
fn time(options: &str, epilogue: u32) -> f32 {
    let case = Case::new(options, Product { epilogue, ..PLAIN });
    let one = case.offered(Some(IN_F32))[0];
    let times = (0..3).map(|_| {
        let (start, end) = (case.blas.gpu.new_event(), case.blas.gpu.new_event());
        let record = |event: Handle| {
            assert_eq!(cu!(case.blas.gpu, cuEventRecord(event => Handle, ptr::null_mut() => Handle)), 0);
        };
        record(start);
        assert_eq!(case.run(&one), 0);
        record(end);
        assert_eq!(cu!(case.blas.gpu, cuEventSynchronize(end => Handle)), 0);
        let mut time = 0f32;
        let code =
            cu!(case.blas.gpu, cuEventElapsedTime_v2(&mut time => *mut f32, start => Handle, end => Handle));
        assert_eq!(code, 0);
        time
    });
    times.fold(f32::INFINITY, f32::min)
}

#[test]
fn epilogues_are_slow_on_demand_by_the_clock_of_events() {
    const SLOW: &str = "checks=on,slow_epilogue=100000";
    // A product of this size takes microseconds; so large a factor cannot be noise.
    let fast = [time("checks=on", GELU_AUX_BIAS), time(SLOW, NO_EPILOGUE), time(SLOW, BIAS)];
    for epilogue in [GELU_AUX_BIAS, DGELU, BGRADB] {
        let slow = time(SLOW, epilogue);
        assert!(fast.iter().all(|fast| slow > 50.0 * fast), "{epilogue}: {slow} ms, not {fast:?}");
    }
}

#[test]
fn only_plain_products_are_split_on_demand() {
    let splits = |options: &str, epilogue| {
        let case = Case::new(options, Product { epilogue, ..IN_F32_CASE });
        case.offered(Some(IN_F32)).iter().map(|one| case.splits(one)).collect::<Vec<u32>>()
    };
    let all = [1, 2, 3, 4, 6, 8];
    assert_eq!(splits("checks=on", NO_EPILOGUE), all);
    assert_eq!(splits("checks=on", BIAS), all);
    assert_eq!(splits("checks=on,no_split_epilogue=1", NO_EPILOGUE), all);
    assert_eq!(splits("checks=on,no_split_epilogue=1", BIAS), [1]);
}

#[test]
fn a_handle_belongs_to_the_context_that_was_current() {
    let blas = Blas::open("checks=on");
    let mut context = ptr::null_mut();
    assert_eq!(cu!(blas.gpu, cuCtxGetCurrent(&mut context => *mut Handle)), 0);
    let x = blas.describe(&PLAIN);
    blas.gpu.use_context(ptr::null_mut());
    assert_eq!(blas.create(), Err(1));
    assert_eq!(blas.candidates(&x, SCRATCH, None).err(), Some(1));
    blas.gpu.use_context(context);
    assert_eq!(blas.candidates(&x, SCRATCH, None).err(), None);
    assert_eq!(blas.destroy(blas.handle), 0);
}

/// As in `misuse.rs`: the calls, and what the report says about them.
const MISUSES: [(&str, &[&str]); 4] = [
    ("destroyed twice", &["cublasLtDestroy: cuBLASLt handle 1", "was destroyed already, by cublasLtDestroy"]),
    ("used after its end", &["cublasLtMatmulAlgoGetHeuristic: cuBLASLt handle 1", "was destroyed already"]),
    ("used after its context", &["cublasLtDestroy: cuBLASLt handle 1", "its context was released before"]),
    (
        "used for another card",
        &["cublasLtMatmul: cuBLASLt handle 1, made by cublasLtCreate for card 0, in the context of card 1"],
    ),
];

#[test]
fn a_misused_handle_ends_with_a_report_and_a_right_one_says_nothing() {
    let this = "a_misused_handle_ends_with_a_report_and_a_right_one_says_nothing";
    if let Some(role) = role() {
        let (which, how) = role.split_once(": ").unwrap();
        return misuse(which, how == "broken");
    }
    for (which, says) in MISUSES {
        let (aborted, said) = run_again(this, &format!("{which}: broken"));
        assert!(aborted && says.iter().all(|part| said.contains(part)), "{which}, {aborted}: {said}");
        let (aborted, said) = run_again(this, &format!("{which}: mended"));
        assert!(!aborted && !said.contains("stand-in GPU"), "{which}, {aborted}: {said}");
    }
}

fn misuse(which: &str, broken: bool) {
    let case = Case::new("checks=on,cards=2", PLAIN);
    let blas = &case.blas;
    match which {
        "destroyed twice" => {
            let ends = if broken { 2 } else { 1 };
            (0..ends).for_each(|_| assert_eq!(blas.destroy(blas.handle), 0));
        }
        "used after its end" => {
            if broken {
                assert_eq!(blas.destroy(blas.handle), 0);
            }
            case.offered(None);
        }
        "used after its context" => {
            if broken {
                assert_eq!(blas.gpu.release(0), 0);
            }
            assert_eq!(blas.destroy(blas.handle), 0);
        }
        _ => {
            let one = case.offered(None)[0];
            blas.gpu.use_context(blas.gpu.retain(c_int::from(broken)));
            assert_eq!(case.run(&one), 0);
        }
    }
}
