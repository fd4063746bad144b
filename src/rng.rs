//! Counter-based random numbers: Philox4x32-10 (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1,
//! 2, 3").
//!
//! Nothing here has global state. A draw is a function of a key (seed and purpose) and a counter (sample and
//! element). So workers, threads, ranks, micro-batches and restarts never change it, and the CPU and a GPU
//! draw the same numbers.

/// One block of four independent 32-bit words: the Philox4x32 bijection with ten rounds.
#[inline(always)]
pub fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..PHILOX_ROUNDS {
        counter = philox_round(counter, key);
        key = philox_next_key(key);
    }
    counter
}

pub(crate) const PHILOX_ROUNDS: usize = 10;

/// One round of [`philox`], for code that draws many blocks at once.
#[inline(always)]
pub(crate) fn philox_round([c0, c1, c2, c3]: [u32; 4], [k0, k1]: [u32; 2]) -> [u32; 4] {
    let p0 = u64::from(c0) * 0xD251_1F53;
    let p1 = u64::from(c2) * 0xCD9E_8D57;
    [(p1 >> 32) as u32 ^ c1 ^ k0, p1 as u32, (p0 >> 32) as u32 ^ c3 ^ k1, p0 as u32]
}

/// The key of the next round.
#[inline(always)]
pub(crate) fn philox_next_key([k0, k1]: [u32; 2]) -> [u32; 2] {
    [k0.wrapping_add(0x9E37_79B9), k1.wrapping_add(0xBB67_AE85)]
}

/// The purpose of a stream of draws. Streams of different domains never share a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Domain {
    /// Parameter initialisation: counter high word = index of the tensor.
    Init = 1,
    /// Dropout and drop-path masks.
    Mask = 2,
    /// Order of the samples in an epoch.
    Order = 3,
    /// Per-sample augmentation.
    Augment = 4,
    /// Per-batch draws: mixup, cutmix.
    Mix = 5,
    /// The procedural demo data set.
    Demo = 6,
    /// Splits by keyed hash.
    Split = 7,
}

/// A stream of draws for one (seed, domain, a, b): a cursor over a stateless generator.
#[derive(Clone, Debug)]
pub struct Stream {
    key: [u32; 2],
    counter: [u32; 4],
    block: [u32; 4],
    used: usize,
}

impl Stream {
    /// `a` and `b` name the object that needs the draws: (epoch, sample), (tensor, 0), ...
    pub fn new(seed: u64, domain: Domain, a: u64, b: u64) -> Self {
        // The key is a hash of everything except the position, so that any two streams have different keys.
        let [k0, k1, ..] = philox(
            [a as u32, (a >> 32) as u32, b as u32, (b >> 32) as u32],
            [seed as u32 ^ (domain as u32).wrapping_mul(0x85EB_CA6B), (seed >> 32) as u32 ^ domain as u32],
        );
        Self { key: [k0, k1], counter: [0, 0, domain as u32, 0], block: [0; 4], used: 4 }
    }

    /// A uniform 32-bit word.
    pub fn next_u32(&mut self) -> u32 {
        if self.used == 4 {
            self.block = philox(self.counter, self.key);
            let position = (u64::from(self.counter[1]) << 32 | u64::from(self.counter[0])) + 1;
            (self.counter[0], self.counter[1]) = (position as u32, (position >> 32) as u32);
            self.used = 0;
        }
        self.used += 1;
        self.block[self.used - 1]
    }

    /// A uniform 64-bit word.
    pub fn next_u64(&mut self) -> u64 {
        u64::from(self.next_u32()) << 32 | u64::from(self.next_u32())
    }

    /// Uniform in [0, 1) with 24 bits.
    pub fn uniform(&mut self) -> f32 {
        unit(self.next_u32())
    }

    /// Uniform in [0, 1) with 53 bits.
    pub fn uniform_f64(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// Uniform in [low, high).
    pub fn range(&mut self, low: f32, high: f32) -> f32 {
        low + (high - low) * self.uniform()
    }

    /// Uniform integer in [0, n). The bias of the multiply-shift is below n / 2^64.
    pub fn below(&mut self, n: usize) -> usize {
        assert!(n > 0, "below(0) has no value");
        ((u128::from(self.next_u64()) * n as u128) >> 64) as usize
    }

    /// True with probability `p`.
    pub fn chance(&mut self, p: f32) -> bool {
        self.uniform() < p
    }

    /// Standard normal (Box and Muller 1958).
    pub fn normal(&mut self) -> f64 {
        let u = 1.0 - self.uniform_f64();
        let v = self.uniform_f64();
        (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
    }

    /// Beta(alpha, alpha) from two gammas (Marsaglia and Tsang 2000).
    pub fn beta(&mut self, alpha: f64) -> f64 {
        let (x, y) = (self.gamma(alpha), self.gamma(alpha));
        if x + y > 0.0 { x / (x + y) } else { f64::from(u8::from(self.chance(0.5))) }
    }

    fn gamma(&mut self, shape: f64) -> f64 {
        if shape < 1.0 {
            let u = 1.0 - self.uniform_f64();
            return self.gamma(shape + 1.0) * u.powf(1.0 / shape);
        }
        let d = shape - 1.0 / 3.0;
        let c = 1.0 / (9.0 * d).sqrt();
        loop {
            let x = self.normal();
            let v = (1.0 + c * x).powi(3);
            let u = 1.0 - self.uniform_f64();
            if v > 0.0 && u.ln() < 0.5 * x * x + d - d * v + d * v.ln() {
                return d * v;
            }
        }
    }
}

/// The top 24 bits of a word as a float in [0, 1).
#[inline(always)]
pub fn unit(word: u32) -> f32 {
    (word >> 8) as f32 * (1.0 / (1u32 << 24) as f32)
}

/// How many indices [`Permutation::all`] permutes at a time.
const LANES: usize = 16;

/// A keyed permutation of `0..n` that can be evaluated at any index: a Feistel network over the next power of
/// four, applied until the result is below n (Black and Rogaway 2002, cycle walking).
#[derive(Clone, Debug)]
pub struct Permutation {
    n: u64,
    half_bits: u32,
    keys: [u32; 6],
}

impl Permutation {
    /// A permutation of `0..n`, keyed by (seed, domain, a).
    pub fn new(n: usize, seed: u64, domain: Domain, a: u64) -> Self {
        let mut stream = Stream::new(seed, domain, a, n as u64);
        let bits = (usize::BITS - n.saturating_sub(1).leading_zeros()).max(2);
        Self { n: n as u64, half_bits: bits.div_ceil(2), keys: std::array::from_fn(|_| stream.next_u32()) }
    }

    /// The element at place `index`. `index < n`.
    pub fn at(&self, index: usize) -> usize {
        assert!((index as u64) < self.n, "index {index} outside a permutation of {}", self.n);
        let mut x = index as u64;
        loop {
            x = self.round_trip(x);
            if x < self.n {
                return x as usize;
            }
        }
    }

    /// Replaces each index by [`Permutation::at`] of it. Plain loops over [`LANES`] indices, which the
    /// compiler vectorises for the caller's instruction set.
    #[inline(always)]
    pub fn all(&self, indices: &mut [usize]) {
        assert!(indices.iter().all(|i| (*i as u64) < self.n), "an index outside a permutation of {}", self.n);
        // The places of the indices that are not yet below n.
        let mut walking: Vec<usize> = (0..indices.len()).collect();
        while !walking.is_empty() {
            for some in walking.chunks(LANES) {
                let mut lanes = [0u64; LANES];
                lanes.iter_mut().zip(some).for_each(|(lane, place)| *lane = indices[*place] as u64);
                self.round_trips(&mut lanes);
                some.iter().zip(lanes).for_each(|(place, lane)| indices[*place] = lane as usize);
            }
            walking.retain(|place| indices[*place] as u64 >= self.n);
        }
    }

    #[inline(always)]
    fn round_trips(&self, x: &mut [u64; LANES]) {
        // Halves have at most 32 bits.
        let mask = ((1u64 << self.half_bits) - 1) as u32;
        let mut left: [u32; LANES] = std::array::from_fn(|l| (x[l] >> self.half_bits) as u32);
        let mut right: [u32; LANES] = std::array::from_fn(|l| x[l] as u32 & mask);
        for (i, key) in self.keys.iter().enumerate() {
            let (mut c0, mut c1, mut c2, mut c3) = (right, [0; LANES], [i as u32; LANES], [0; LANES]);
            let mut key = [*key, self.half_bits];
            for _ in 0..PHILOX_ROUNDS {
                for l in 0..LANES {
                    [c0[l], c1[l], c2[l], c3[l]] = philox_round([c0[l], c1[l], c2[l], c3[l]], key);
                }
                key = philox_next_key(key);
            }
            for l in 0..LANES {
                (left[l], right[l]) = (right[l], (left[l] ^ c0[l]) & mask);
            }
        }
        *x = std::array::from_fn(|l| u64::from(left[l]) << self.half_bits | u64::from(right[l]));
    }

    fn round_trip(&self, x: u64) -> u64 {
        let mask = (1u64 << self.half_bits) - 1;
        let (mut left, mut right) = (x >> self.half_bits, x & mask);
        for (i, key) in self.keys.iter().enumerate() {
            let [mix, ..] = philox([right as u32, (right >> 32) as u32, i as u32, 0], [*key, self.half_bits]);
            (left, right) = (right, (left ^ u64::from(mix)) & mask);
        }
        left << self.half_bits | right
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_gives_the_known_answers_of_random123() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
        assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
        assert_eq!(
            philox([0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344], [0xa4093822, 0x299f31d0]),
            [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]
        );
    }

    #[test]
    fn a_permutation_visits_every_index_once_and_depends_on_its_key() {
        for n in [1, 2, 3, 5, 64, 1000, 4097] {
            let p = Permutation::new(n, 7, Domain::Order, 3);
            let mut seen: Vec<_> = (0..n).map(|i| p.at(i)).collect();
            seen.sort_unstable();
            assert!(seen.iter().copied().eq(0..n), "n = {n}");
        }
        for n in [1, 5, 100, 6000, 1 << 20, (1 << 40) + 3] {
            let p = Permutation::new(n, 9, Domain::Order, 1);
            let mut indices: Vec<usize> = (0..77).map(|i| i * 7919 % n).collect();
            let one_by_one: Vec<usize> = indices.iter().map(|i| p.at(*i)).collect();
            p.all(&mut indices);
            assert_eq!(indices, one_by_one, "n = {n}");
        }
        let order = |epoch| {
            (0..100).map(|i| Permutation::new(100, 7, Domain::Order, epoch).at(i)).collect::<Vec<_>>()
        };
        assert_ne!(order(0), order(1));
    }

    #[test]
    fn beta_and_normal_have_their_moments() {
        let mut s = Stream::new(1, Domain::Mix, 0, 0);
        let n = 40_000;
        for alpha in [0.2, 1.0, 3.0] {
            let draws: Vec<f64> = (0..n).map(|_| s.beta(alpha)).collect();
            let mean = draws.iter().sum::<f64>() / n as f64;
            let var = draws.iter().map(|d| (d - mean).powi(2)).sum::<f64>() / n as f64;
            assert!((mean - 0.5).abs() < 0.01, "alpha {alpha}: mean {mean}");
            let expected = 0.25 / (2.0 * alpha + 1.0);
            assert!(
                (var / expected - 1.0).abs() < 0.05,
                "alpha {alpha}: variance {var}, expected {expected}"
            );
        }
        let draws: Vec<f64> = (0..n).map(|_| s.normal()).collect();
        let var = draws.iter().map(|d| d * d).sum::<f64>() / n as f64;
        assert!((var - 1.0).abs() < 0.03, "variance {var}");
    }
}
