//! The k-th largest magnitude of a tensor, exactly, in passes of constant memory.
//!
//! An interval that contains it is cut into bins. Each pass over the values counts those of each bin
//! and finds its least and greatest; the bin that contains the k-th largest is the next interval. A
//! sample gives the first guess, but only what a pass over all values has counted is an answer. The
//! answer is a value of the tensor, whatever the guess was and in whichever order chunks are counted.
//! NaN and infinities are ignored.

use crate::kernel::blend::{self, BLOCK, LARGEST};

/// Bins of one pass.
const BINS: usize = 2048;
/// The number of values in a sample, and of the runs that they are taken in.
pub(super) const SAMPLE: usize = 1 << 14;
pub(super) const SAMPLE_RUNS: usize = 16;
/// How far below and above its place in the sample the k-th largest is sought.
const MARGIN: f64 = 0.02;

/// An interval of magnitudes, both ends included, in which the k-th largest is sought.
#[derive(Debug, Clone, Copy)]
pub(super) struct Interval {
    low: u64,
    high: u64,
    /// Whether a pass over all values has shown that it contains the k-th largest.
    counted: bool,
}

#[derive(Debug, Clone, Copy)]
struct Bin {
    count: u64,
    least: u64,
    greatest: u64,
}

const EMPTY: Bin = Bin { count: 0, least: u64::MAX, greatest: 0 };

/// What one pass counts.
#[derive(Debug)]
pub(super) struct Counts {
    above: u64,
    below: u64,
    bins: Vec<Bin>,
}

/// The share `density` of `numel` values, as a number: at least one, and at most all.
fn rank(density: f64, numel: u64) -> u64 {
    ((density * numel as f64) as u64).max(1).min(numel)
}

impl Interval {
    /// Every finite magnitude.
    pub(super) const ALL: Interval = Interval { low: 0, high: LARGEST, counted: false };

    /// Where the smallest of the largest values (a share of `density`) probably is, judging by a sample
    /// of magnitudes.
    pub(super) fn guess(sample: &mut Vec<u64>, density: f64) -> Self {
        sample.retain(|&magnitude| magnitude <= Self::ALL.high);
        if sample.is_empty() {
            return Self::ALL;
        }
        sample.sort_unstable();
        let last = (sample.len() - 1) as f64;
        let place = |share: f64| sample[(share.clamp(0.0, 1.0) * last) as usize];
        let share = 1.0 - density;
        let low = if share <= MARGIN { 0 } else { place(share - MARGIN) };
        let high = if share >= 1.0 - MARGIN { Self::ALL.high } else { place(share + MARGIN) };
        Self { low, high, counted: false }
    }

    /// The value, once only one is left. A guess does not count, however narrow: in bfloat16 a sample
    /// often has a single value around the place that is sought.
    pub(super) fn only(&self) -> Option<u64> {
        (self.counted && self.low == self.high).then_some(self.low)
    }

    /// By how many bits the distance from the lower end is shifted to give the bin.
    fn shift(&self) -> u32 {
        let nbits = u64::BITS - (self.high - self.low).leading_zeros();
        nbits.saturating_sub(BINS.trailing_zeros())
    }

    /// Narrow it with the counts of a pass over all values.
    pub(super) fn narrowed(&self, counts: &Counts, density: f64) -> Self {
        let known = |low, high| Self { low, high, counted: true };
        let k = rank(density, counts.numel());
        if k == 0 {
            // No value is finite, so there is nothing to trim.
            return known(0, 0);
        }
        if k <= counts.above {
            return known(self.high + 1, Self::ALL.high);
        }
        let mut seen = counts.above;
        for bin in counts.bins.iter().rev() {
            seen += bin.count;
            if k <= seen {
                return known(bin.least, bin.greatest);
            }
        }
        // The guess was too high: the k-th value is below it.
        known(0, self.low.saturating_sub(1))
    }
}

impl Counts {
    pub(super) fn new() -> Self {
        Self { above: 0, below: 0, bins: vec![EMPTY; BINS] }
    }

    /// Bytes that one takes.
    pub(super) const NBYTES: usize = BINS * size_of::<Bin>();

    pub(super) fn clear(&mut self) {
        (self.above, self.below) = (0, 0);
        self.bins.fill(EMPTY);
    }

    /// How many finite magnitudes were counted.
    fn numel(&self) -> u64 {
        self.above + self.below + self.bins.iter().map(|bin| bin.count).sum::<u64>()
    }

    /// Count the magnitudes of a block of values.
    pub(super) fn count(&mut self, within: Interval, values: &[f64]) {
        let mut sifted = [0; BLOCK];
        let (count, below, above) = blend::sift(values, within.low, within.high, &mut sifted);
        self.below += below;
        self.above += above;
        let shift = within.shift();
        for &magnitude in &sifted[..count] {
            let bin = &mut self.bins[((magnitude - within.low) >> shift) as usize];
            bin.count += 1;
            bin.least = bin.least.min(magnitude);
            bin.greatest = bin.greatest.max(magnitude);
        }
    }

    pub(super) fn add(&mut self, other: &Counts) {
        self.above += other.above;
        self.below += other.below;
        for (bin, other) in self.bins.iter_mut().zip(&other.bins) {
            bin.count += other.count;
            bin.least = bin.least.min(other.least);
            bin.greatest = bin.greatest.max(other.greatest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The answer as the passes find it: they, too, ask before anything is counted.
    fn kth(values: &[u64], density: f64, mut interval: Interval) -> (u64, usize) {
        let mut passes = 0;
        loop {
            if let Some(value) = interval.only() {
                return (value, passes);
            }
            let mut counts = Counts::new();
            for block in values.chunks(BLOCK) {
                let block: Vec<f64> = block.iter().map(|&bits| f64::from_bits(bits)).collect();
                counts.count(interval, &block);
            }
            interval = interval.narrowed(&counts, density);
            passes += 1;
            assert!(passes <= 9, "an interval that does not shrink");
        }
    }

    fn guessed(low: u64, high: u64) -> Interval {
        Interval { low, high, counted: false }
    }

    #[test]
    fn the_kth_largest_is_found_whatever_the_values_and_the_guess() {
        let mut state = 7u64;
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 1) % (Interval::ALL.high + 1)
        };
        let wild: Vec<u64> = (0..5000).map(|_| next()).collect();
        let few: Vec<u64> = (0..5000).map(|_| next() % 5).collect();
        let near: Vec<u64> = (0..5000).map(|_| (1 << 40) + next() % 100).collect();
        for values in [wild, few, near, vec![0; 9], vec![Interval::ALL.high; 3]] {
            let mut sorted = values.clone();
            sorted.sort_unstable_by(|a, b| b.cmp(a));
            for density in [1e-9, 2.0 / 5000.0, 0.3, 0.5, 1.0] {
                let k = rank(density, values.len() as u64);
                let expected = sorted[k as usize - 1];
                let mut sample = values[..values.len().min(64)].to_vec();
                for guess in [
                    Interval::ALL,
                    Interval::guess(&mut sample, density),
                    guessed(0, 0),
                    guessed(3, 3),
                    guessed(1, 2),
                    guessed(1 << 62, (1 << 62) + 9),
                    guessed(Interval::ALL.high, Interval::ALL.high),
                ] {
                    assert_eq!(kth(&values, density, guess).0, expected);
                }
            }
        }
    }

    #[test]
    fn a_guess_is_no_answer_even_where_the_sample_is_of_one_value() {
        let mut values = vec![0; 900];
        values.extend(1..=100);
        let guess = Interval::guess(&mut vec![0; 64], 0.05);
        assert_eq!((guess.low, guess.high, guess.only()), (0, 0, None));
        assert_eq!(kth(&values, 0.05, guess).0, 51);
    }

    #[test]
    fn what_is_not_finite_is_neither_counted_nor_an_answer() {
        let mut values = vec![(-f64::NAN).to_bits(), f64::NEG_INFINITY.to_bits()];
        assert_eq!(kth(&values, 0.5, Interval::ALL).0, 0);
        values.extend(1..=10);
        for guess in [Interval::ALL, guessed(5, 5), guessed(20, 30)] {
            assert_eq!(kth(&values, 0.2, guess).0, 9);
        }
    }
}
