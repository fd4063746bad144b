//! libcublasLt.so of other versions: what they do not have, and what every version refuses by its documentation.

#[macro_use]
mod common;

use std::ffi::c_int;

use common::blas::{BF16, BIAS, Blas, F32, IN_F32, NO_EPILOGUE, Product, ld};

const PLAIN: Product = Product {
    transpose: (true, false),
    m: 40,
    n: 24,
    k: 32,
    input: BF16,
    output: BF16,
    epilogue: NO_EPILOGUE,
    alpha: 1.0,
    beta: 0.0,
};

/// `cublasLtEpilogue_t`
const GELU_AUX_BIAS: u32 = 164;
const DGELU: u32 = 192;
const DGELU_BGRAD: u32 = 208;
const BGRADB: u32 = 512;

/// The code with which a product of this description is refused, 0 if there are candidates.
fn answer(blas: &Blas, p: &Product) -> c_int {
    blas.candidates(&blas.describe(p), 0, Some(IN_F32)).err().unwrap_or(0)
}

#[test]
fn an_older_library_has_fewer_epilogues() {
    // CUDA 11.4 to 11.5 had a GELU gradient only together with a bias gradient. 11.6.5 reported its number in a shorter form.
    for (version, dgelu) in
        [("11502", 15), ("11605", 15), ("110703", 15), ("110801", 0), ("120000", 0), ("131000", 0)]
    {
        let blas = Blas::open(&format!("checks=on,blaslt={version}"));
        let all = [BIAS, GELU_AUX_BIAS, DGELU_BGRAD, BGRADB, DGELU]
            .map(|epilogue| answer(&blas, &Product { epilogue, ..PLAIN }));
        assert_eq!(all, [0, 0, 0, 0, dgelu], "{version}");
    }
}

#[test]
fn an_attribute_exists_in_the_versions_that_have_it() {
    // SM_COUNT_TARGET, FAST_ACCUM's neighbour BIAS_DATA_TYPE, an attribute of 12.2 to 12.9, one of 12.8 on.
    for (version, codes) in [
        ("110502", [7, 7, 7, 7]),
        ("110703", [0, 7, 7, 7]),
        ("111103", [0, 0, 7, 7]),
        ("120201", [0, 0, 0, 7]),
        ("120803", [0, 0, 0, 0]),
        ("130000", [0, 0, 7, 0]),
    ] {
        let blas = Blas::open(&format!("checks=on,blaslt={version}"));
        let x = blas.describe(&PLAIN);
        assert_eq!(
            [15, 26, 27, 31].map(|attribute| blas.set(x.product, attribute, 0i32)),
            codes,
            "{version}"
        );
    }
}

#[test]
fn every_type_of_the_table_and_no_other_is_multiplied() {
    let blas = Blas::open("checks=on");
    const F16: c_int = 2;
    for input in [F32, BF16, F16] {
        for output in [F32, BF16, F16] {
            for compute in [64, 68, 69, 74, 75, 77] {
                let known = match (input, output) {
                    (F32, F32) => [68, 69, 77].contains(&compute),
                    (BF16, F32 | BF16) => [68, 69].contains(&compute),
                    _ => false,
                };
                let x = blas.describe(&Product { input, output, ..PLAIN });
                assert_eq!(blas.set(x.product, 0, compute), 0);
                let found = blas.candidates(&x, 0, Some(IN_F32)).err();
                assert_eq!(found, (!known).then_some(15), "{input} {output} {compute}");
            }
        }
    }
}

#[test]
fn bf16_needs_a_gpu_that_has_it() {
    let old = Blas::open("checks=on,sm=75");
    assert_eq!(answer(&old, &PLAIN), 8);
    assert_eq!(answer(&old, &Product { input: F32, output: F32, ..PLAIN }), 0);
}

/// Attributes that only FP8 has, C transposed, a part of D: no product here can have them.
#[test]
fn attributes_without_a_meaning_for_these_types_are_refused_when_used() {
    let blas = Blas::open("checks=on");
    let with = |set: &dyn Fn(common::Handle) -> c_int| {
        let x = blas.describe(&PLAIN);
        assert_eq!(set(x.product), 0);
        blas.candidates(&x, 0, Some(IN_F32)).err()
    };
    for pointer in [17, 18, 19, 20, 21, 23, 24] {
        assert_eq!(with(&|x| blas.set(x, pointer, 256u64)), Some(7), "{pointer}");
        assert_eq!(with(&|x| blas.set(x, pointer, 0u64)), None, "{pointer}");
    }
    assert_eq!(with(&|x| blas.set(x, 5, 1i32)), Some(7));
    assert_eq!(with(&|x| blas.set(x, 6, 0i32)), Some(7));
    assert_eq!(with(&|x| blas.set(x, 6, 2i32)), None);
    // The types of aux and bias are those of D, or D's by default.
    for (value, aux, bias) in [(-1, 0, 0), (BF16, 0, 0), (F32, 7, 15)] {
        let x = |attribute: c_int, epilogue: u32| {
            let x = blas.describe(&Product { epilogue, ..PLAIN });
            assert_eq!(blas.set(x.product, attribute, value), 0);
            blas.candidates(&x, 0, Some(IN_F32)).err().unwrap_or(0)
        };
        assert_eq!((x(22, DGELU), x(26, BIAS)), (aux, bias), "{value}");
    }
}

/// An aux matrix of GELU: a leading dimension of at least the rows, in steps of 8.
#[test]
fn the_leading_dimension_of_aux_is_a_multiple_of_eight() {
    let blas = Blas::open("checks=on");
    for epilogue in [GELU_AUX_BIAS, DGELU, DGELU_BGRAD] {
        for (ld, code) in [(32i64, 7), (40, 0), (44, 7), (48, 0), (0, 7)] {
            let x = blas.describe(&Product { epilogue, ..PLAIN });
            assert_eq!(blas.set(x.product, 12, ld), 0);
            assert_eq!(blas.candidates(&x, 0, Some(IN_F32)).err().unwrap_or(0), code, "{epilogue}, {ld}");
        }
    }
}

/// The heuristic reads how far bias and aux are aligned from their pointers, so an algorithm is not for pointers that are
/// aligned less.
#[test]
fn an_algorithm_is_for_the_alignment_of_the_bias_that_it_was_found_with() {
    let blas = Blas::open("checks=on");
    let p = Product { epilogue: BIAS, ..PLAIN };
    let x = blas.describe(&p);
    let (a, _) = blas.matrix(BF16, p.a(), 1);
    let (b, _) = blas.matrix(BF16, p.b(), 2);
    let (d, _) = blas.matrix(BF16, (p.m, p.n), 3);
    let bias = blas.upload(BF16, &vec![1.0; ld(p.m) + 8]);
    // Found at one place, used at another: bytes after a boundary of 16.
    for (found_at, used_at, code) in
        [(0, 0, 0), (0, 2, 7), (0, 16, 0), (2, 2, 0), (4, 2, 7), (2, 4, 0), (8, 4, 7)]
    {
        assert_eq!(blas.set(x.product, 8, bias + found_at), 0);
        let one = blas.candidates(&x, 0, Some(IN_F32)).unwrap()[0];
        assert_eq!(blas.set(x.product, 8, bias + used_at), 0);
        let status = blas.multiply(&x, &p, [a, b, d, d], Some(&one), 0);
        assert_eq!(status, code, "{found_at}, {used_at}: {}", blas.gpu.report());
        assert_eq!(blas.gpu.wait(), 0);
    }
}
