//! The arithmetic against numbers worked out by hand, and against an earlier model of the same step.

use super::chip::{CHIPS, Chip, StepTime};
use super::links::{Link, Links};
use super::*;

fn near(found: f64, want: f64, share: f64) {
    assert!((found / want - 1.0).abs() <= share, "{found}, not {want} within {share}");
}

fn links(names: &[&str], chip: &Chip) -> Links {
    let names: Vec<String> = names.iter().map(|name| name.to_string()).collect();
    Links::named(&names, "nvlink", chip, 8).unwrap()
}

/// 160 MB of gradients, five buckets of 32 MB; 60 ms of passes and 8 ms of update.
fn work() -> Work {
    let alone = StepTime { forward: 0.020, backward: 0.040, update: 0.008 };
    Work { alone, micro_batches: 1, reduced: 160e6, buckets: 5, gathered: 80e6, shards_update: true }
}

const SLOW: Link = Link { name: "slow", rate: 1e9, half: 0.0 };

#[test]
fn two_ranks_of_a_node_by_hand() {
    let links = Links { inside: Link { name: "fast", rate: 10e9, half: 0.0 }, across: SLOW };
    let step = Step::of(&work(), &Cluster { ranks: 2, per_node: 8, links, overlaps: true });
    // A bucket: half of 32 MB at 10 GB/s, and 25 us: 1.625 ms. Five take 8.125 ms; the first four end behind the
    // backward's 32 ms.
    near(step.hidden, 4.0 * 1.625e-3, 1e-9);
    // The last bucket, half of 80 MB with 25 us, and the norm's 40 us.
    near(step.exposed, 1.625e-3 + 4.025e-3 + 40e-6, 1e-9);
    // Passes, half of the update, 15 % of 6.5 ms, and the slower of two: 0.5 % times the root of 2 ln 2.
    near(step.compute, 0.060 + 0.004 + 0.15 * 6.5e-3 + 0.005 * 1.177_410_02 * 0.060, 1e-8);
}

#[test]
fn a_slow_link_is_waited_for() {
    let links = Links { inside: SLOW, across: SLOW };
    let cluster = Cluster { ranks: 2, per_node: 2, links, overlaps: true };
    let step = Step::of(&work(), &cluster);
    // Five buckets of 16.025 ms; 32 ms of backward hide two of them.
    near(step.exposed, 5.0 * 16.025e-3 - 32e-3 + 40.025e-3 + 40e-6, 1e-9);
    near(step.hidden, 32e-3, 1e-9);
    // In two micro-batches, only the second one's backward hides anything.
    let halves = Step::of(&Work { micro_batches: 2, ..work() }, &cluster);
    near(halves.hidden, 16e-3, 1e-9);
    // Ranks on CPUs communicate after the backward.
    let apart = Step::of(&work(), &Cluster { overlaps: false, ..cluster });
    assert_eq!(apart.hidden, 0.0);
    near(apart.exposed, 5.0 * 16.025e-3 + 40.025e-3 + 40e-6, 1e-9);
}

#[test]
fn nodes_add_an_all_reduce_of_a_shard() {
    let links = Links { inside: Link { name: "fast", rate: 1e15, half: 0.0 }, across: SLOW };
    let step = |ranks| Step::of(&work(), &Cluster { ranks, per_node: 8, links, overlaps: false });
    // 2 nodes: each of 8 rails carries 2 · 1/2 of 4 MB, five times: 20 ms, with 25 + 24 us each. Then the norm.
    let more = step(16).exposed - step(8).exposed;
    near(more, 5.0 * (4e-3 + 49e-6) + 49e-6, 1e-6);
    // 4 nodes: 2 · 3/4 of 4 MB at 96 % of the rate, and 25 + 48 us.
    let more = step(32).exposed - step(8).exposed;
    near(more, 5.0 * (6e-3 / 0.96 + 73e-6) + 73e-6, 1e-6);
    assert_eq!(Step::of(&work(), &Cluster { ranks: 1, per_node: 8, links, overlaps: true }).exposed, 0.0);
}

/// The table that the design was decided on: H100, f32 reduction. Model, step in ms, parameters in millions;
/// blocks; milliseconds of all reductions at 8 and 1024 GPUs, exposed ones, the gather, and efficiencies in per cent
/// at 8, 16, 64, 256 and 1024. It has buckets of some 32 MB, two at least and one to a block at most.
type Decided = (&'static str, f64, f64, f64, [f64; 2], [f64; 2], f64, [f64; 5]);
const DECIDED: [Decided; 5] = [
    ("Ti/16", 31.0, 5.717, 12.0, [0.2, 0.8], [0.1, 0.4], 0.1, [98.0, 98.0, 97.0, 97.0, 96.0]),
    ("S/16", 63.2, 22.05, 12.0, [0.5, 1.6], [0.2, 0.5], 0.2, [99.0, 98.0, 98.0, 97.0, 97.0]),
    ("B/16", 92.4, 86.57, 12.0, [1.7, 6.2], [0.2, 0.6], 0.5, [99.0, 99.0, 98.0, 97.0, 97.0]),
    ("L/16", 155.0, 304.3, 24.0, [4.8, 18.0], [0.2, 0.7], 1.5, [100.0, 99.0, 98.0, 98.0, 97.0]),
    ("H/14", 217.0, 632.0, 32.0, [8.5, 32.0], [0.3, 1.0], 3.1, [100.0, 99.0, 98.0, 98.0, 97.0]),
];

#[test]
fn the_decided_table_follows_from_its_own_steps() {
    let chip = &CHIPS[0];
    let links = links(&[], chip);
    for (name, ms, millions, blocks, reductions, exposed, gather, efficiencies) in DECIDED {
        let (total, params) = (1e-3 * ms, 1e6 * millions);
        let update = 34.0 * params / (0.88 * chip.copy);
        let passes = total - update;
        let alone = StepTime { forward: passes / 3.0, backward: passes * 2.0 / 3.0, update };
        let work = Work {
            alone,
            micro_batches: 1,
            reduced: 4.0 * params,
            buckets: (4.0 * params / 32e6).round().clamp(2.0, blocks) as usize,
            gathered: 2.0 * params,
            shards_update: true,
        };
        let step = |ranks| Step::of(&work, &Cluster { ranks, per_node: 8, links, overlaps: true });
        for (ranks, want) in [8, 16, 64, 256, 1024].into_iter().zip(efficiencies) {
            let found = 100.0 * total / step(ranks).total();
            // The table has whole per cents.
            assert!((found - want).abs() < 0.8, "{name}, {ranks} GPUs: {found:.2} %, not {want} %");
        }
        for (i, ranks) in [8, 1024].into_iter().enumerate() {
            let found = step(ranks);
            let norm = ASSUMED.norm + links.across.small(ranks / 8);
            let waited = 1e3 * (found.exposed - links.inside.ring(2.0 * params, 8) - norm);
            let all = 1e3 * found.hidden + waited;
            assert!((all - reductions[i]).abs() < 0.06_f64.max(0.013 * reductions[i]), "{name}: {all:.2} ms");
            // Rounded twice: 0.149 is 0.15 is 0.2.
            assert!((waited - exposed[i]).abs() < 0.056, "{name}: {waited:.2} ms exposed");
        }
        let found = 1e3 * links.inside.ring(2.0 * params, 8);
        assert!((found - gather).abs() < 0.06, "{name}: gather {found:.2} ms");
    }
}

#[test]
fn links_have_names_and_may_have_rates() {
    let chip = &CHIPS[0];
    let both = links(&["eth100", "pcie=12.5"], chip);
    assert_eq!((both.inside.name, both.inside.rate), ("pcie", 12.5e9));
    // One port for eight GPUs.
    assert_eq!((both.across.name, both.across.rate), ("eth100", 10e9 / 8.0));
    assert_eq!(links(&["ib200"], chip).inside.name, "nvlink");
    let refused = |names: &[&str], text: &str| {
        let names: Vec<String> = names.iter().map(|name| name.to_string()).collect();
        let error = Links::named(&names, "nvlink", chip, 8).unwrap_err();
        assert!(error.message().contains(text), "{}", error.message());
        assert!(error.hint_text().is_some());
    };
    refused(&["token-ring"], "no such link");
    refused(&["ib400=fast"], "no rate in GB/s");
    refused(&["ib400=0"], "no rate in GB/s");
    refused(&["ib400", "ib200"], "two links between nodes: ib400 and ib200");
}

#[test]
fn a_row_says_what_a_node_has_to_load() {
    let row = Row {
        ranks: 16,
        batch: 512,
        step: 0.1,
        hidden: None,
        exposed: 0.002,
        memory: 1 << 30,
        per_node: 8,
        efficiency: 0.97,
        to_train: Some(7200.0),
    };
    near(row.img_per_s(), 81_920.0, 1e-9);
    near(row.loader(), 40_960.0, 1e-9);
    let text = Row::text(std::slice::from_ref(&row));
    for part in ["16", "100.00", "-", "2.00", "1.00 GiB", "40,960", "81,920", "97.0 %", "2 h 00 min"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert_eq!(row.json()["communication_hidden_ms"], serde_json::Value::Null);
}
