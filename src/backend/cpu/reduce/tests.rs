//! The order of sums, and whole updates on threads that are ranks of each other.

use std::sync::{Arc, Barrier, Mutex};

use super::super::compute::Isa;
use super::*;
use crate::backend::{
    Backend, Factor, GroupScalars, Limits, MemoryPlan, Ranks, Rule, Segment, Shards, StepReport, Storage,
    Write,
};

const LEN: usize = 37;

fn compute() -> Compute {
    Compute::new(Isa::best(), 1).unwrap()
}

/// Values of very different sizes, so that another order of additions has other bits.
fn gradients(chunk: usize) -> Vec<f32> {
    (0..LEN)
        .map(|i| ((i * 7919 + chunk * 104_729) % 1009) as f32 * 10f32.powi(chunk as i32 % 5 - 2))
        .collect()
}

/// A rank's own sum, taken in two ranges, from the last gradient to the first.
fn own(chunks: std::ops::Range<usize>) -> Vec<f32> {
    let c = compute();
    let mut waiting = vec![f32::NAN; LEN * chunks.len().ilog2() as usize];
    let mut sum = Vec::new();
    for chunk in chunks.clone() {
        sum = gradients(chunk);
        for range in [20..LEN, 0..20] {
            add_chunk(&c, &mut sum, &mut waiting, range, chunk - chunks.start, chunks.len());
        }
    }
    sum
}

#[test]
fn the_tree_is_the_same_on_any_number_of_ranks() {
    const CHUNKS: usize = 16;
    let want = own(0..CHUNKS);
    for ranks in [1, 2, 4, 8, 16] {
        let each = CHUNKS / ranks;
        let mut parts: Vec<f32> = (0..ranks).flat_map(|rank| own(rank * each..(rank + 1) * each)).collect();
        sum_parts(&compute(), &mut parts, LEN, true);
        assert_eq!(parts[..LEN], want, "{ranks} ranks");
    }
    let mut in_order: Vec<f32> = (0..CHUNKS).flat_map(gradients).collect();
    sum_parts(&compute(), &mut in_order, LEN, false);
    assert!(in_order[..LEN] != want[..], "another order has other bits");
}

#[test]
fn four_chunks_are_two_pairs() {
    let [a, b, c, d] = [0, 1, 2, 3].map(gradients);
    let want: Vec<f32> = (0..LEN).map(|i| (a[i] + b[i]) + (c[i] + d[i])).collect();
    assert_eq!(own(0..4), want);
}

#[test]
fn ranks_in_order_are_added_from_the_first() {
    let mut values: Vec<f32> = [0, 1, 2].into_iter().flat_map(gradients).collect();
    let want: Vec<f32> = (0..LEN).map(|i| (values[i] + values[LEN + i]) + values[2 * LEN + i]).collect();
    sum_parts(&compute(), &mut values, LEN, false);
    assert_eq!(values[..LEN], want);
}

// Whole updates --------------------------------------------------------------------------------------------------

/// Ranks of one process: each is a thread.
struct Thread {
    rank: usize,
    size: usize,
    meeting: Arc<(Barrier, Mutex<Vec<Vec<u8>>>)>,
}

impl Thread {
    /// Shows the others `bytes`, and looks at theirs.
    fn meet(&self, bytes: &[u8], look: impl FnOnce(&[Vec<u8>])) {
        let (barrier, boards) = &*self.meeting;
        boards.lock().unwrap()[self.rank] = bytes.to_vec();
        barrier.wait();
        look(&boards.lock().unwrap());
        barrier.wait();
    }
}

impl Ranks for Thread {
    fn rank(&self) -> usize {
        self.rank
    }
    fn size(&self) -> usize {
        self.size
    }
    fn all_to_all(&self, parts: &[u8], own: &mut [u8]) -> Result<()> {
        let len = parts.len() / self.size;
        self.meet(parts, |boards| {
            for (to, board) in own.chunks_mut(len).zip(boards) {
                to.copy_from_slice(&board[self.rank * len..][..len]);
            }
        });
        Ok(())
    }
    fn all_gather(&self, own: &[u8], all: &mut [u8]) -> Result<()> {
        self.meet(own, |boards| all.copy_from_slice(&boards.concat()));
        Ok(())
    }
}

const CHUNKS: usize = 4;
/// The last gradient lies in the middle of a block.
const GRADS: usize = 9 * BLOCK + 1000;
const PARAMS: usize = GRADS + 4096;
const STEPS: u64 = 4;
/// One rank has a gradient that is not finite.
const BAD_STEP: u64 = 2;

/// Three tensors, one of many blocks, with a gap before the last; weights that are not trained lie first.
fn segments() -> Vec<Segment> {
    let segment = |grad: usize, rows: usize, cols: usize, group: usize, state: usize| Segment {
        name: format!("tensor.{grad}"),
        param: grad + 4096,
        grad,
        len: rows * cols,
        group,
        factor: Some(Factor {
            outer: [1, 1],
            rows,
            cols,
            outer_stride: [0, 0],
            row_stride: cols,
            col_stride: 1,
            state,
            factored: rows > 1,
        }),
    };
    let first = 1000 * 140;
    vec![
        segment(0, 1000, 140, 0, 0),
        segment(first, 1, 5000, 1, 1140),
        segment(GRADS - 3000, 50, 60, 0, 6140),
    ]
}

fn noise(seed: usize, i: usize) -> f32 {
    let hash = (seed * 1_000_003 + i).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40;
    (hash as f32 / (1 << 23) as f32 - 1.0) * 10f32.powi((hash % 4) as i32 - 2)
}

fn inside(i: usize) -> bool {
    segments().iter().any(|s| (s.grad..s.grad + s.len).contains(&i))
}

/// What a run leaves, as one rank would hold it, to the bit.
#[derive(PartialEq)]
struct Left {
    params: Vec<u8>,
    ema: Vec<u8>,
    moments: [Vec<u8>; 2],
    reports: Vec<(u64, bool, i32)>,
}

fn train_on(thread: Thread, rule: Rule, gradients: &[Vec<f32>]) -> Left {
    let (rank, size) = (thread.rank, thread.size);
    let shards = Shards::with_buckets(GRADS, size, 3 * BLOCK);
    let is_sharded = size > 1 && rule.is_elementwise();
    let own = |whole: usize| if is_sharded { shards.shard() } else { whole };
    let second =
        if rule.is_elementwise() { rule.second_moments(&segments()).min(1) * GRADS } else { 6140 + 110 };
    let mut plan = MemoryPlan::new(Storage::CPU);
    plan.set_bytes(Arena::Params, PARAMS * 4);
    plan.set_bytes(Arena::Grads, shards.padded() * 4);
    plan.set_bytes(Arena::Moment1, own(GRADS) * rule.first_moment().bytes());
    plan.set_bytes(Arena::Moment2, if second == GRADS { own(GRADS) } else { second } * 4);
    plan.set_bytes(Arena::Ema, own(PARAMS) * 4);
    let exchange = crate::backend::ranks::exchange_bytes(Storage::CPU, &shards, CHUNKS / size);
    plan.set_bytes(Arena::Exchange, exchange);
    let mut b = CpuBackend::new(1).unwrap();
    b.allocate(&plan).unwrap();
    let pieces = shards.pieces(&segments(), rank);
    let group = Group {
        ranks: Box::new(thread),
        comm: None,
        shards: shards.clone(),
        is_sharded,
        segments: segments(),
        samples: CHUNKS / size,
        in_chunks: true,
    };
    b.join(group).unwrap();
    let params: Vec<f32> =
        (0..PARAMS).map(|i| if i < 4096 || inside(i - 4096) { noise(99, i) } else { 0.0 }).collect();
    b.write_arena(Arena::Params, bytemuck::cast_slice(&params)).unwrap();
    let mut ema = params.clone();
    if is_sharded {
        ema = vec![0.0; shards.shard()];
        pieces.iter().for_each(|p| ema[p.ema..][..p.len].copy_from_slice(&params[p.param..][..p.len]));
    }
    b.write_arena(Arena::Ema, bytemuck::cast_slice(&ema)).unwrap();

    let mut reports = Vec::new();
    for step in 0..STEPS {
        b.begin_report().unwrap();
        b.tell_signal(if rank + 1 == size && step == 1 { 15 } else { 0 });
        for first in 0..CHUNKS / size {
            let samples = 1;
            b.begin_micro(Micro {
                first,
                samples,
                global_first: 0,
                gradients: Write::Assign,
                mean_over: CHUNKS,
            })
            .unwrap();
            let chunk = rank * (CHUNKS / size) + first;
            let mut values = gradients[(step as usize * 7 + chunk) % gradients.len()].clone();
            if step == BAD_STEP && chunk == CHUNKS - 1 {
                values[5] = f32::NAN;
            }
            values.resize(shards.padded(), 0.0);
            b.write_arena(Arena::Grads, bytemuck::cast_slice(&values)).unwrap();
            for from in [GRADS - 3000, 2 * BLOCK + 17, 2 * BLOCK + 17, 0] {
                b.gradients_done(from).unwrap();
            }
        }
        let segments = segments();
        let rates = [GroupScalars { lr: 0.1, decay: 0.01 }, GroupScalars { lr: 0.02, decay: 0.0 }];
        let update = Update {
            limits: Limits::NONE,
            rule,
            segments: &segments,
            groups: &rates,
            t: step + 1,
            clip: Some(1.0),
            clip_torch: false,
            ema_decay: Some(0.9),
        };
        b.update(&update).unwrap();
        let StepReport { grad_norm, skipped, signal, .. } = b.report().unwrap();
        reports.push((grad_norm.to_bits(), skipped, signal));
    }
    let params = b.read_arena(Arena::Params).unwrap();
    b.gather_ema().unwrap();
    b.swap_ema().unwrap();
    let ema = b.read_arena(Arena::Params).unwrap();
    b.swap_ema().unwrap();
    assert!(b.read_arena(Arena::Params).unwrap() == params, "the weights are back");

    let moments = [Arena::Moment1, Arena::Moment2].map(|arena| {
        let held = b.read_arena(arena).unwrap();
        if !is_sharded || held.is_empty() {
            return held;
        }
        let size = held.len() / shards.shard();
        let mut whole = vec![0; GRADS * size];
        pieces.iter().for_each(|p| {
            whole[p.grad * size..][..p.len * size].copy_from_slice(&held[p.moment * size..][..p.len * size]);
        });
        whole
    });
    Left { params, ema, moments, reports }
}

/// The same of all ranks together: a moment is that of the rank that has it.
fn train_together(size: usize, rule: Rule, gradients: &[Vec<f32>]) -> Left {
    let meeting = Arc::new((Barrier::new(size), Mutex::new(vec![Vec::new(); size])));
    let mut of_ranks: Vec<Left> = std::thread::scope(|scope| {
        let start = |rank| {
            let thread = Thread { rank, size, meeting: meeting.clone() };
            scope.spawn(move || train_on(thread, rule, gradients))
        };
        let threads: Vec<_> = (0..size).map(start).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let mut all = of_ranks.remove(0);
    for other in of_ranks {
        assert!(other.params == all.params && other.ema == all.ema && other.reports == all.reports);
        if rule.is_elementwise() {
            for (all, other) in all.moments.iter_mut().zip(other.moments) {
                all.iter_mut().zip(other).for_each(|(all, other)| *all |= other);
            }
        }
    }
    all
}

#[test]
fn shards_are_updated_as_one_rank_updates_everything() {
    let gradients: Vec<Vec<f32>> = (0..9)
        .map(|seed| (0..GRADS).map(|i| if inside(i) { noise(seed, i) } else { 0.0 }).collect())
        .collect();
    let rules = [
        Rule::Sgd { momentum: 0.9, nesterov: true, bf16: false },
        Rule::Adam { beta1: 0.9, beta2: 0.99, eps: 1e-8, bf16: false },
        Rule::Lion { beta1: 0.9, beta2: 0.99, bf16: true },
        Rule::Adafactor {
            momentum: 0.9,
            beta2_cap: 0.999,
            decay_power: 0.8,
            clip_rms: Some(1.0),
            bf16: true,
        },
    ];
    for rule in rules {
        let alone = train_together(1, rule, &gradients);
        let skipped: Vec<bool> = alone.reports.iter().map(|(_, skipped, _)| *skipped).collect();
        assert_eq!(skipped, [false, false, true, false]);
        assert_eq!(alone.reports.iter().map(|(.., signal)| *signal).collect::<Vec<_>>(), [0, 15, 0, 0]);
        assert!(alone.params != alone.ema && alone.moments[0].iter().any(|byte| *byte != 0));
        for size in [2, 4] {
            assert!(train_together(size, rule, &gradients) == alone, "{size} ranks, {rule:?}");
        }
    }
}
