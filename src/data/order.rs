//! Which record a sample is. This is a function of the sample's number, so the next number is a run's whole
//! state.
//!
//! An epoch is a keyed permutation of the records that can be evaluated at any position. A mixture of data
//! sets is a fixed pattern of places, each with its own stream of epochs. A windowed shuffle permutes the
//! windows and the records within each.

use crate::rng::{Domain, Permutation};

use super::augment::vector::{self, Task};

/// How samples are ordered.
#[derive(Clone, Debug)]
pub struct Order {
    seed: u64,
    /// Size of the windows in which records are shuffled; 0: all.
    window: usize,
    /// Samples of each record, one after the other.
    repeats: usize,
    parts: Vec<Part>,
    /// For each place of the pattern: its index into `parts`, and how many places of that part came before.
    pattern: Vec<(u32, u32)>,
}

/// A data set of the mixture: its records, and its number of places in the pattern.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Part {
    start: usize,
    len: usize,
    places: usize,
}

/// Which picture sample number n is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drawn {
    pub epoch: u64,
    pub record: usize,
    /// Which of the samples of this record.
    pub repeat: usize,
}

/// Slots in the pattern of a mixture: weights are exact to a thousandth, or, with many parts, to a quarter of
/// their mean weight.
const PLACES: usize = 1000;
const PLACES_OF_A_PART: usize = 4;

impl Order {
    /// `parts` gives the number of records and the weight of each data set, in their order.
    pub fn new(parts: &[(usize, f64)], seed: u64, window: usize, repeats: usize) -> Self {
        let total: f64 = parts.iter().map(|(_, weight)| weight).sum();
        let places = if parts.len() == 1 { 1 } else { PLACES.max(PLACES_OF_A_PART * parts.len()) };
        // Each part's share of the places. The largest remainders are rounded up, so that the sum is right.
        let exact: Vec<f64> = parts.iter().map(|(_, weight)| weight / total * places as f64).collect();
        let mut counts: Vec<usize> = exact.iter().map(|e| (*e as usize).max(1)).collect();
        while counts.iter().sum::<usize>() != places {
            let short = counts.iter().sum::<usize>() < places;
            let error = |i: usize| exact[i] - counts[i] as f64;
            let order = |a: &usize, b: &usize| error(*a).total_cmp(&error(*b));
            let all = 0..counts.len();
            let chosen = if short { all.max_by(order) } else { all.min_by(order) }.expect("a part");
            counts[chosen] = if short { counts[chosen] + 1 } else { counts[chosen] - 1 };
        }
        let mut start = 0;
        let mut made = Vec::new();
        for ((len, _), places) in parts.iter().zip(&counts) {
            made.push(Part { start, len: *len, places: *places });
            start += len;
        }
        Self { seed, window, repeats: repeats.max(1), parts: made, pattern: pattern(&counts) }
    }

    /// The record of sample number `n` of the run.
    pub fn at(&self, n: u64) -> Drawn {
        self.of([n])[0]
    }

    /// The records of these samples, one by one. Consecutive numbers cost less than single ones.
    pub fn of(&self, numbers: impl IntoIterator<Item = u64>) -> Vec<Drawn> {
        let mut drawn: Vec<Drawn> = Vec::new();
        // Numbers of one part and one epoch are permuted together.
        let mut run: Vec<usize> = Vec::new();
        let mut of_run = None;
        let finish = |of: Option<(usize, u64)>, run: &mut Vec<usize>, drawn: &mut Vec<Drawn>| {
            if let Some((part, epoch)) = of {
                let part = self.parts[part];
                self.permute(part, epoch, run);
                let first = drawn.len() - run.len();
                drawn[first..]
                    .iter_mut()
                    .zip(run.drain(..))
                    .for_each(|(d, place)| d.record = part.start + place);
            }
        };
        for n in numbers {
            let places = self.pattern.len() as u64;
            let (index, before) = self.pattern[(n % places) as usize];
            let part = self.parts[index as usize];
            let own = n / places * part.places as u64 + u64::from(before);
            let (epoch, place) = (own / part.len as u64, (own % part.len as u64) as usize);
            if of_run != Some((index as usize, epoch)) {
                finish(of_run.replace((index as usize, epoch)), &mut run, &mut drawn);
            }
            run.push(place / self.repeats);
            drawn.push(Drawn { epoch, record: 0, repeat: place % self.repeats });
        }
        finish(of_run, &mut run, &mut drawn);
        drawn
    }

    /// Replaces each position in an epoch of a part by the record at that position.
    fn permute(&self, part: Part, epoch: u64, places: &mut [usize]) {
        // Parts of equal length must not share an order.
        let key = epoch ^ (part.start as u64) << 32;
        if self.window == 0 || self.window >= part.len {
            let permutation = self.permutation(part.len, key);
            return vector::run(Permute { permutation, places });
        }
        places.iter_mut().for_each(|place| *place = self.windowed(part, key, *place));
    }

    fn permutation(&self, n: usize, a: u64) -> Permutation {
        Permutation::new(n, self.seed, Domain::Order, a)
    }

    fn windowed(&self, part: Part, key: u64, place: usize) -> usize {
        let permutation = |n: usize, a: u64| self.permutation(n, a);
        let window = self.window;
        let whole = part.len / window;
        let (index, size) = match place / window {
            i if i < whole => (permutation(whole, key).at(i), window),
            i => (i, part.len - whole * window),
        };
        let inner = permutation(size, key ^ (index as u64 + 1) << 20 ^ 1 << 63);
        // Windows start at another offset in each epoch.
        let turn = permutation(part.len, key).at(0);
        (index * window + inner.at(place % window) + turn) % part.len
    }
}

struct Permute<'a> {
    permutation: Permutation,
    places: &'a mut [usize],
}

impl Task for Permute<'_> {
    type Out = ();

    #[inline(always)]
    fn run(self) {
        self.permutation.all(self.places);
    }
}

/// Spreads the parts evenly: the next place goes to the part that is furthest behind its share.
fn pattern(counts: &[usize]) -> Vec<(u32, u32)> {
    let places: usize = counts.iter().sum();
    let mut given = vec![0u32; counts.len()];
    let mut pattern = Vec::with_capacity(places);
    for place in 0..places {
        let behind = |i: usize| counts[i] as f64 * (place + 1) as f64 / places as f64 - f64::from(given[i]);
        let chosen = (0..counts.len())
            .filter(|i| (given[*i] as usize) < counts[*i])
            .max_by(|a, b| behind(*a).total_cmp(&behind(*b)))
            .expect("places are left");
        pattern.push((chosen as u32, given[chosen]));
        given[chosen] += 1;
    }
    pattern
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn an_epoch_visits_every_record_once_whatever_the_window() {
        for window in [0, 1, 7, 10, 64, 99, 100, 1000] {
            let order = Order::new(&[(100, 1.0)], 5, window, 1);
            for epoch in 0..3 {
                let mut seen: Vec<_> = (0..100).map(|i| order.at(epoch * 100 + i)).collect();
                assert!(seen.iter().all(|d| d.epoch == epoch && d.repeat == 0));
                let ordered: Vec<_> = seen.iter().map(|d| d.record).collect();
                seen.sort_by_key(|d| d.record);
                assert!(seen.iter().map(|d| d.record).eq(0..100), "window {window}");
                if window > 1 && window < 100 {
                    let far = ordered[..window]
                        .iter()
                        .map(|r| r.abs_diff(ordered[0]).min(100 - r.abs_diff(ordered[0])));
                    assert!(far.max().unwrap() <= window, "window {window}: {ordered:?}");
                }
            }
            let other = Order::new(&[(100, 1.0)], 6, window, 1);
            assert!(window == 1 || (0..100).any(|i| other.at(i) != order.at(i)));
        }
    }

    #[test]
    fn thousands_of_parts_have_their_places() {
        let parts: Vec<_> = (0..3000).map(|i| (1 + i % 7, 1.0)).collect();
        let order = Order::new(&parts, 1, 0, 1);
        let mut drawn = BTreeMap::<usize, usize>::new();
        let starts: Vec<usize> =
            parts.iter().scan(0, |at, (len, _)| Some(std::mem::replace(at, *at + len))).collect();
        for n in 0..12_000 {
            *drawn.entry(starts.partition_point(|start| *start <= order.at(n).record)).or_default() += 1;
        }
        assert_eq!((drawn.len(), drawn.values().min(), drawn.values().max()), (3000, Some(&4), Some(&4)));
    }

    #[test]
    fn a_mixture_keeps_its_weights_and_each_part_its_epochs() {
        let order = Order::new(&[(10, 3.0), (200, 1.0)], 1, 0, 1);
        let mut counts: BTreeMap<usize, usize> = BTreeMap::new();
        for n in 0..800 {
            *counts.entry(order.at(n).record).or_default() += 1;
        }
        let first: usize = (0..10).map(|r| counts[&r]).sum();
        assert_eq!(first, 600);
        assert!((0..10).all(|r| counts[&r] == 60), "{counts:?}");
        assert!((10..210).all(|r| counts[&r] == 1), "{counts:?}");
        // Far from the start as well, without stepping there.
        let far = order.at(1 << 50);
        assert!(far.record < 210 && far.epoch > 1 << 40);
        // Evenly spread.
        assert!((0..796).all(|n| (n..n + 4).filter(|n| order.at(*n).record < 10).count() >= 2));
    }

    #[test]
    fn repeats_follow_each_other_and_leave_the_epoch_as_long() {
        let order = Order::new(&[(90, 1.0)], 1, 0, 3);
        for n in (0..270).step_by(3) {
            let three = [0, 1, 2].map(|i| order.at(n + i));
            assert!(three.iter().all(|d| d.record == three[0].record));
            assert_eq!(three.map(|d| d.repeat), [0, 1, 2]);
        }
        let records: std::collections::BTreeSet<_> = (0..90).map(|n| order.at(n).record).collect();
        assert_eq!(records.len(), 30);
        assert_eq!(order.at(89).epoch, 0);
        assert_eq!(order.at(90).epoch, 1);
    }
}
