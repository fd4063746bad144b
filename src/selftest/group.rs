//! A step's update in a group: gradients in two chunks, each passed on as it becomes final, then the update of
//! the shard, and the way of the weights and of their average through the memory of the gradients. The group
//! is this device alone, which does all of that but send.

use crate::backend::ranks::exchange_bytes;
use crate::backend::shards::BLOCK;
use crate::backend::{Arena, Group, Micro, Ranks, Rule, Shards, Write, update_bytes};
use crate::error::Result;

use super::harness::{Case, ELEMENTWISE, Trial};
use super::update::{Buffers, Setting, name, reference, request, rounded_like, rules, segments};

pub(super) fn cases() -> Vec<Case> {
    let case = |rule: Rule| Case::new("update in a group", name(rule), move |t| update(t, rule));
    rules().into_iter().map(case).collect()
}

/// One rank.
struct Alone;

impl Ranks for Alone {
    fn rank(&self) -> usize {
        0
    }
    fn size(&self) -> usize {
        1
    }
    fn all_to_all(&self, parts: &[u8], own: &mut [u8]) -> Result<()> {
        own.copy_from_slice(parts);
        Ok(())
    }
    fn all_gather(&self, own: &[u8], all: &mut [u8]) -> Result<()> {
        all.copy_from_slice(own);
        Ok(())
    }
}

const CHUNKS: usize = 2;
const SIGNAL: i32 = 15;

fn update(t: &mut Trial, rule: Rule) -> Result<()> {
    let s = Setting::in_a_group();
    let segments = segments(s.more);
    let mut before = Buffers::new(t, rule, &segments, s);
    let shards = Shards::with_buckets(before.grads.len(), 1, BLOCK);
    let is_sharded = rule.is_elementwise();
    let chunks = [0.25, 0.75].map(|share| -> Vec<f32> {
        let mut part: Vec<f32> = before.grads.iter().map(|g| (g * share) as f32).collect();
        part.resize(shards.padded(), 0.0);
        part
    });
    for (i, g) in before.grads.iter_mut().enumerate() {
        *g = f64::from(chunks[0][i] + chunks[1][i]);
    }
    let mut expected = before.clone();
    let norm = reference(&mut expected, rule, &segments, s);

    let mut placed = before.clone();
    placed.grads.resize(shards.padded(), 0.0);
    if is_sharded {
        let frozen = before.params.len() - before.grads.len();
        placed.ema.drain(..frozen);
        for values in [&mut placed.moment1, &mut placed.moment2, &mut placed.ema] {
            if !values.is_empty() {
                values.resize(shards.padded(), 0.0);
            }
        }
    }
    placed.place(t, rule);
    t.reserve(Arena::Exchange, exchange_bytes(t.storage(), &shards, CHUNKS));
    t.reserve(Arena::Update, update_bytes(t.storage(), rule, &segments, Some(&shards)));

    let b = t.start()?;
    b.join(Group {
        ranks: Box::new(Alone),
        comm: None,
        shards: shards.clone(),
        is_sharded,
        segments: segments.clone(),
        samples: CHUNKS,
        in_chunks: true,
    })?;
    b.tell_signal(SIGNAL);
    b.begin_report()?;
    for (first, chunk) in chunks.iter().enumerate() {
        let gradients = Write::Assign;
        b.begin_micro(Micro { first, samples: 1, global_first: 0, gradients, mean_over: CHUNKS })?;
        b.write_arena(Arena::Grads, bytemuck::cast_slice(chunk))?;
        b.gradients_done(segments[2].grad)?;
        b.gradients_done(0)?;
    }
    b.update(&request(rule, &segments, s))?;
    let report = b.report()?;
    // The weights become their average, and themselves again.
    b.gather_ema()?;
    b.swap_ema()?;
    let swapped = b.read_arena(Arena::Params)?;
    b.swap_ema()?;
    let got = Buffers::take(t, rule)?;

    t.expect("the report has the signal", report.signal == SIGNAL && !report.skipped);
    t.judge("norm", &[report.grad_norm], &[norm], 1, ELEMENTWISE);
    if super::update::is_bf16(rule) {
        rounded_like(&mut expected.moment1, &got.moment1);
    }
    let swapped: Vec<f64> =
        swapped.as_chunks().0.iter().map(|word| f64::from(f32::from_le_bytes(*word))).collect();
    for segment in &segments {
        let params = segment.param..segment.param + segment.len;
        let grads = segment.grad..segment.grad + segment.len;
        let named = |what: &str| format!("{what} of `{}`", segment.name);
        let mut judge = |what: &str, got: &[f64], expected: &[f64]| {
            t.judge(&named(what), got, expected, segment.len, 2.0 * ELEMENTWISE);
        };
        judge("moment 1", &got.moment1[grads.clone()], &expected.moment1[grads.clone()]);
        if let Rule::Adam { .. } = rule {
            judge("moment 2", &got.moment2[grads.clone()], &expected.moment2[grads]);
        }
        judge("weights", &got.params[params.clone()], &expected.params[params.clone()]);
        judge("average", &swapped[params.clone()], &expected.ema[params]);
    }
    Ok(())
}
