use vitrum::backend::cpu::{attention, compute::*, gemm, view::*};
use vitrum::backend::{Gelu, Heads};
fn cpu_ns() -> f64 {
    let s = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    s.split_whitespace().next().unwrap().parse().unwrap()
}
fn time(name: &str, flops: f64, peak: f64, mut f: impl FnMut()) -> f64 {
    f();
    let t0 = std::time::Instant::now();
    f();
    let one = t0.elapsed().as_secs_f64();
    let n = ((0.25 / one) as usize).clamp(1, 100000);
    let mut best = f64::MAX;
    for _ in 0..5 {
        let a = cpu_ns();
        for _ in 0..n {
            f();
        }
        best = best.min((cpu_ns() - a) / n as f64);
    }
    let g = flops / best;
    println!("{name:40} {:9.1} us {g:7.1} GFLOP/s {:5.1}%", best / 1e3, 100.0 * g / peak);
    best
}
#[target_feature(enable = "avx2,fma")]
fn peak() -> f32 {
    use std::arch::x86_64::*;
    let mut a = [_mm256_set1_ps(0.5); 12];
    let (x, y) = (_mm256_set1_ps(std::hint::black_box(0.999)), _mm256_set1_ps(std::hint::black_box(0.001)));
    for _ in 0..1_000_000 {
        for v in &mut a {
            *v = _mm256_fmadd_ps(*v, x, y);
        }
    }
    let mut s = a[0];
    for v in a {
        s = _mm256_add_ps(s, v);
    }
    _mm256_cvtss_f32(s)
}
fn main() {
    let isa = match std::env::args().nth(1).as_deref() {
        Some("avx2") => Isa::Avx2,
        Some("scalar") => Isa::Scalar,
        _ => Isa::best(),
    };
    let filter = std::env::args().nth(2).unwrap_or_default();
    let mut p = 1.0;
    let ns = time("peak", 12.0 * 16.0 * 1e6, 1.0, || {
        std::hint::black_box(unsafe { peak() });
    });
    let pk = 12.0 * 16.0 * 1e6 / ns;
    p *= pk;
    let c = Compute::new(isa, 1).unwrap();
    let mut seed = 1u32;
    let mut rnd = |n: usize| -> Vec<f32> {
        (0..n)
            .map(|_| {
                seed = seed.wrapping_mul(1664525).wrapping_add(1013904223);
                (seed >> 8) as f32 / 8388608.0 - 1.0
            })
            .collect()
    };
    for (tag, r, d, m) in [("ti16", 3152, 192, 768), ("s16", 1576, 384, 1536), ("demo", 2048, 128, 512)] {
        let mut tot = [0.0f64; 4];
        let mut fl = 0.0;
        for (name, i, o) in [("qkv", d, 3 * d), ("proj", d, d), ("fc1", d, m), ("fc2", m, d)] {
            let (x, w, b) = (rnd(r * i), rnd(o * i), rnd(o));
            let mut y = rnd(r * o);
            let mut pre = rnd(r * o);
            let dy = rnd(r * o);
            let mut dx = rnd(r * i);
            let mut dw = rnd(o * i);
            let f = 2.0 * (r * i * o) as f64;
            fl += f;
            let (xr, wr, dyr) = (Rows::dense(&x, r, i), Rows::dense(&w, o, i), Rows::dense(&dy, r, o));
            let n = |k: &str| format!("{tag} {name} {k}");
            let want = |k: &str| filter.is_empty() || n(k).contains(&filter);
            if want("fwd none") {
                time(&n("fwd none"), f, p, || {
                    gemm::matmul(&c, xr, wr, gemm::Epilogue::None, RowsMut::dense(&mut y, r, o))
                });
            }
            if want("fwd") {
                tot[0] += time(&n("fwd bias"), f, p, || {
                    gemm::matmul(&c, xr, wr, gemm::Epilogue::Bias(&b), RowsMut::dense(&mut y, r, o))
                });
            }
            if name == "fc1" && want("gelu") {
                for form in [Gelu::Tanh, Gelu::Erf] {
                    time(&n(&format!("fwd gelu {form:?}")), f, p, || {
                        gemm::matmul(
                            &c,
                            xr,
                            wr,
                            gemm::Epilogue::BiasGelu {
                                bias: &b,
                                pre: RowsMut::dense(&mut pre, r, o),
                                form,
                                dropout: None,
                            },
                            RowsMut::dense(&mut y, r, o),
                        )
                    });
                }
            }
            if want("dX") {
                tot[1] += time(&n("dX"), f, p, || {
                    gemm::input_grad(&c, dyr, wr, gemm::InputEpilogue::Plain, RowsMut::dense(&mut dx, r, i))
                });
            }
            if name == "fc2" && want("dgelu") {
                for form in [Gelu::Tanh, Gelu::Erf] {
                    time(&n(&format!("dX dgelu {form:?}")), f, p, || {
                        gemm::input_grad(
                            &c,
                            dyr,
                            wr,
                            gemm::InputEpilogue::Gelu { pre: xr, form, dropout: None },
                            RowsMut::dense(&mut dx, r, i),
                        )
                    });
                }
            }
            if want("dW") {
                tot[2] += time(&n("dW"), f, p, || {
                    gemm::weight_grad(&c, dyr, xr, false, RowsMut::dense(&mut dw, o, i))
                });
            }
            if want("colsum") {
                let mut s = vec![0.0; o];
                time(&n("colsum (GB/s)"), 4.0 * (r * o) as f64, p, || {
                    gemm::column_sums(&c, dyr, false, &mut s)
                });
            }
            if want("crate") {
                unsafe {
                    time(&n("crate gemm fwd"), f, p, || {
                        gemm_crate(r, o, i, &mut y, &x, (i as isize, 1), &w, (1, i as isize))
                    });
                    time(&n("crate gemm dX"), f, p, || {
                        gemm_crate(r, i, o, &mut dx, &dy, (o as isize, 1), &w, (i as isize, 1))
                    });
                    time(&n("crate gemm dW"), f, p, || {
                        gemm_crate(o, i, r, &mut dw, &dy, (1, o as isize), &x, (i as isize, 1))
                    });
                }
            }
        }
        for (k, t) in ["fwd", "dX", "dW"].iter().zip(tot) {
            println!("== {tag} {k}: {:.1}% of peak", 100.0 * fl / t / p);
        }
    }
    for (tag, b, t, h, dh) in
        [("ti4", 64, 65, 3, 64), ("ti16", 16, 197, 3, 64), ("demo", 128, 16, 4, 32), ("s16", 8, 197, 6, 64)]
    {
        if !(filter.is_empty() || filter.contains("att")) {
            continue;
        }
        let heads = Heads { tokens: t, heads: h, head_size: dh };
        let (r, w) = (b * t, h * dh);
        let (qkv, d_o) = (rnd(r * 3 * w), rnd(r * w));
        let (mut o, mut d, mut lse) = (rnd(r * w), rnd(r * 3 * w), rnd(b * h * t));
        let f = 2.0 * (b * h * t * t * dh) as f64;
        let q = Rows::dense(&qkv, r, 3 * w);
        time(&format!("attention fwd {tag}"), 2.0 * f, p, || {
            attention::forward(&c, heads, q, RowsMut::dense(&mut o, r, w), &mut lse, None)
        });
        time(&format!("attention bwd {tag}"), 5.0 * f, p, || {
            attention::backward(
                &c,
                heads,
                q,
                Rows::dense(&o, r, w),
                &lse,
                None,
                Rows::dense(&d_o, r, w),
                RowsMut::dense(&mut d, r, 3 * w),
            )
        });
    }
}
unsafe fn gemm_crate(
    m: usize,
    n: usize,
    k: usize,
    y: &mut [f32],
    a: &[f32],
    (ars, acs): (isize, isize),
    b: &[f32],
    (brs, bcs): (isize, isize),
) {
    unsafe {
        ::gemm::gemm(
            m,
            n,
            k,
            y.as_mut_ptr(),
            1,
            n as isize,
            false,
            a.as_ptr(),
            acs,
            ars,
            b.as_ptr(),
            bcs,
            brs,
            0.0,
            1.0,
            false,
            false,
            false,
            ::gemm::Parallelism::None,
        )
    }
}
