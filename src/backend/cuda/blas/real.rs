//! NVIDIA's cuBLASLt takes what we set. These tests call our descriptions of a product, and so the table of
//! functions that a run uses, on the real library, which needs no GPU for it. `VITRUM_CUBLASLT` names its
//! folder, which must be on `LD_LIBRARY_PATH` too; `.ci/run cublaslt` does both.
//!
//! Without a GPU the library checks the attribute's number and the value's size, and nothing else: it takes any
//! epilogue, leading dimension and type. Whether it has an algorithm for a product shows on a GPU only.

use std::path::Path;

use libloading::Library as Opened;

use super::*;

/// Whether there is a library to test.
fn opened() -> bool {
    let Some(folder) = std::env::var_os("VITRUM_CUBLASLT") else {
        println!(
            "skipped: VITRUM_CUBLASLT does not name a folder with cuBLASLt; `.ci/run cublaslt` fetches it"
        );
        return false;
    };
    libraries::cublaslt().unwrap();
    let folder = Path::new(&folder).canonicalize().unwrap();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let folder = folder.to_str().unwrap();
    assert!(maps.lines().any(|l| l.contains(folder) && l.contains("libcublasLt")), "opened another one");
    true
}

fn matrix(rows: usize, cols: usize, dtype: Dtype) -> Matrix {
    Matrix { rows, cols, ld: rows, dtype }
}

/// The products of an MLP of ViT-B/16, 8 pictures: outputs, input gradients, weight gradients.
fn shapes() -> Vec<Shape> {
    let (rows, narrow, wide) = (8 * 197, 768, 3072);
    let mut shapes = Vec::new();
    for dtype in [Dtype::Bf16, Dtype::F32] {
        let forward = |fused, aux_ld| Shape {
            transpose_a: true,
            transpose_b: false,
            a: matrix(narrow, wide, dtype),
            b: matrix(narrow, rows, dtype),
            d: matrix(wide, rows, dtype),
            add_c: false,
            fused,
            aux_ld,
        };
        shapes.push(forward(Fused::Nothing, 0));
        shapes.push(forward(Fused::Bias, 0));
        shapes.push(forward(Fused::BiasGeluAlone, 0));
        shapes.push(forward(Fused::BiasGelu, wide));
        let d_x = matrix(wide, rows, dtype);
        let (a, b) = (matrix(wide, narrow, dtype), matrix(narrow, rows, dtype));
        let transposed = Shape { transpose_a: false, a, b, d: d_x, ..forward(Fused::GeluGrad, wide) };
        shapes.push(transposed);
        let (a, b) = (matrix(narrow, rows, dtype), matrix(wide, rows, dtype));
        shapes.push(Shape {
            transpose_a: false,
            transpose_b: true,
            a,
            b,
            d: matrix(narrow, wide, Dtype::F32),
            add_c: true,
            ..forward(Fused::BiasGrad, 0)
        });
    }
    shapes
}

#[test]
fn the_real_library_takes_every_description_of_a_product() {
    if !opened() {
        return;
    }
    let operands = Operands { a: 1 << 20, b: 2 << 20, c: 3 << 20, d: 3 << 20, bias: 4 << 20, aux: 5 << 20 };
    use sys::cublasComputeType_t::{CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_32F_FAST_TF32};
    for shape in shapes() {
        for compute in [CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_32F_FAST_TF32] {
            let desc = Desc::new(compute, &shape).unwrap();
            let [a, b, d] = [shape.a, shape.b, shape.d].map(|matrix| Layout::new(matrix).unwrap());
            let mut plan = Plan { desc, a, b, d, algo: Candidate::NONE.algo, workspace: 0, in_use: false };
            plan.point_at(&shape, &operands).unwrap();

            // What it stored is what we set; what we leave out has the value that we rely on.
            let read = |attribute| stored(&plan.desc, attribute);
            let (transpose_a, transpose_b) = (i64::from(shape.transpose_a), i64::from(shape.transpose_b));
            assert_eq!(read(DescAttribute::CUBLASLT_MATMUL_DESC_TRANSA), (4, transpose_a));
            assert_eq!(read(DescAttribute::CUBLASLT_MATMUL_DESC_TRANSB), (4, transpose_b));
            let (bias, aux) = (shape.fused.reads_or_writes_bias(), shape.fused.reads_or_writes_aux());
            let of = |has: bool, value: i64| (8, if has { value } else { 0 });
            assert_eq!(read(DescAttribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER), of(bias, 4 << 20));
            assert_eq!(read(DescAttribute::CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER), of(aux, 5 << 20));
            let ld = shape.aux_ld as i64;
            assert_eq!(read(DescAttribute::CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD), of(aux, ld));
            // -1: the bias, and what GELU's gradient reads, have D's type.
            assert_eq!(read(DescAttribute::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE), (4, -1));
            assert_eq!(read(DescAttribute::CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_DATA_TYPE), (4, -1));
        }
    }
    for reduction in [Reduction::Unsplit, Reduction::InF32] {
        Preference::new(reduction).unwrap();
    }
}

/// Size and value of an attribute.
fn stored(desc: &Desc, attribute: DescAttribute) -> (usize, i64) {
    type Get = unsafe extern "C" fn(
        sys::cublasLtMatmulDesc_t,
        DescAttribute,
        *mut c_void,
        usize,
        *mut usize,
    ) -> Code;
    let (mut value, mut bytes) = ([0u8; 8], 0);
    // SAFETY: the library is open already, and its header declares the function so; the descriptor is live, and
    // there is room for each attribute.
    let status = unsafe {
        let library = Opened::new("libcublasLt.so.13").unwrap();
        let get = library.get::<Get>(b"cublasLtMatmulDescGetAttribute\0").unwrap();
        get(desc.0, attribute, ptr::null_mut(), 0, &mut bytes);
        get(desc.0, attribute, value.as_mut_ptr().cast(), bytes, &mut bytes)
    };
    assert_eq!(status, 0, "{attribute:?}");
    let [a, b, c, d, ..] = value;
    let value = if bytes == 4 { i32::from_le_bytes([a, b, c, d]).into() } else { i64::from_le_bytes(value) };
    (bytes, value)
}

/// So a success says that our sizes are the library's.
#[test]
fn the_real_library_refuses_a_value_of_the_wrong_size() {
    if !opened() {
        return;
    }
    use DescAttribute::*;
    let shape = shapes()[0];
    let mut desc = Desc::new(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, &shape).unwrap();
    for attribute in [CUBLASLT_MATMUL_DESC_TRANSA, CUBLASLT_MATMUL_DESC_TRANSB, CUBLASLT_MATMUL_DESC_EPILOGUE]
    {
        let why = desc.set(attribute, &0u64).unwrap_err().to_string();
        assert!(why.contains("INVALID_VALUE") && why.contains(&format!("{attribute:?}")), "{why}");
    }
    for attribute in [
        CUBLASLT_MATMUL_DESC_BIAS_POINTER,
        CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER,
        CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD,
    ] {
        assert!(desc.set(attribute, &0u32).is_err(), "{attribute:?}");
    }
    let preference = Preference::new(Reduction::InF32).unwrap();
    use sys::cublasLtMatmulPreferenceAttributes_t::*;
    assert!(preference.set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &0u32).is_err());
    assert!(preference.set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &0u64).is_err());
    assert!(preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &0u64).is_err());
}

/// The properties that decide whether an algorithm is right are words that the library tells.
#[test]
fn the_real_library_tells_the_properties_of_an_algorithm() {
    if !opened() {
        return;
    }
    // An algorithm of zeros has none of them set.
    let config = Config::of(&Candidate::NONE.algo);
    assert_eq!(config, Config { id: Some(0), splits: Some(0), stages: Some(0) });
}
