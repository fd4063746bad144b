//! Every operation of `vitrum bench --what kernels` under criterion, timed by the GPU's own events.
//!
//!     cargo bench -p vitrum-benches --bench gpu -- "layernorm B/16"
//!
//! `VITRUM_BENCH_FEW=1` uses the small sizes. Without a GPU, one line says so.

use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use vitrum::bench::kernels::Bench;

fn operations(criterion: &mut Criterion) {
    let mut bench = match Bench::open(0, std::env::var_os("VITRUM_BENCH_FEW").is_some()) {
        Ok(bench) => bench,
        Err(why) => return println!("skipped: {}", why.message()),
    };
    let mut group = criterion.benchmark_group("gpu");
    for (at, title) in bench.titles().into_iter().enumerate() {
        let mut ready = None;
        group.bench_function(title, |b| {
            let ready = ready.get_or_insert_with(|| bench.prepare(at).expect("the operation runs"));
            b.iter_custom(|runs| {
                Duration::from_secs_f64(bench.seconds(ready, runs).expect("the operation runs"))
            });
        });
    }
    group.finish();
}

fn config() -> Criterion {
    Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_secs(1))
}

criterion_group! { name = gpu; config = config(); targets = operations }
criterion_main!(gpu);
