//! The k-th largest magnitude of a tensor, exactly, in passes of constant memory.
//!
//! An interval that holds it is cut into bins, and each pass over the values counts what falls into
//! which and the least and the greatest of each bin; the bin that holds the k-th largest is the next
//! interval. A sample makes a good first guess. What comes out is a value of the tensor whichever way
//! the guess falls and in whichever order chunks are counted.

/// Bins of one pass.
const BINS: usize = 2048;
/// Values of a sample, and the runs that they are taken in.
pub(super) const SAMPLE: usize = 1 << 14;
pub(super) const SAMPLE_RUNS: usize = 16;
/// How far to either side of its place in the sample the k-th largest is looked for.
const MARGIN: f64 = 0.02;

/// An interval of magnitudes, both ends included, in which the k-th largest is sought.
#[derive(Debug, Clone, Copy)]
pub(super) struct Interval {
    low: u64,
    high: u64,
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
    bins: Vec<Bin>,
}

impl Interval {
    /// Every magnitude there is.
    pub(super) const ALL: Interval = Interval { low: 0, high: u64::MAX >> 1 };

    /// Where the k-th largest of `numel` probably lies, judging by some of them.
    pub(super) fn guess(sample: &mut [u64], k: u64, numel: u64) -> Self {
        if sample.is_empty() {
            return Self::ALL;
        }
        sample.sort_unstable();
        let last = (sample.len() - 1) as f64;
        let place = |share: f64| sample[(share.clamp(0.0, 1.0) * last) as usize];
        let share = 1.0 - k as f64 / numel as f64;
        let low = if share <= MARGIN { 0 } else { place(share - MARGIN) };
        let high = if share >= 1.0 - MARGIN { Self::ALL.high } else { place(share + MARGIN) };
        Self { low, high }
    }

    /// The value, once there is but one.
    pub(super) fn only(&self) -> Option<u64> {
        (self.low == self.high).then_some(self.low)
    }

    /// By how many bits a distance from the lower end is shifted to give its bin.
    fn shift(&self) -> u32 {
        let nbits = u64::BITS - (self.high - self.low).leading_zeros();
        nbits.saturating_sub(BINS.trailing_zeros())
    }

    /// Narrow it by what a pass over all values counted.
    pub(super) fn narrowed(&self, counts: &Counts, k: u64) -> Self {
        if k <= counts.above {
            return Self { low: self.high + 1, high: Self::ALL.high };
        }
        let mut seen = counts.above;
        for bin in counts.bins.iter().rev() {
            seen += bin.count;
            if k <= seen {
                return Self { low: bin.least, high: bin.greatest };
            }
        }
        // The guess was too high. Of no more than all values, one is the k-th.
        Self { low: 0, high: self.low.saturating_sub(1) }
    }
}

impl Counts {
    pub(super) fn new() -> Self {
        Self { above: 0, bins: vec![EMPTY; BINS] }
    }

    /// Bytes that one takes.
    pub(super) const NBYTES: usize = BINS * size_of::<Bin>();

    pub(super) fn clear(&mut self) {
        self.above = 0;
        self.bins.fill(EMPTY);
    }

    pub(super) fn count(&mut self, within: Interval, magnitudes: impl Iterator<Item = u64>) {
        let shift = within.shift();
        for magnitude in magnitudes {
            if magnitude > within.high {
                self.above += 1;
            } else if magnitude >= within.low {
                let bin = &mut self.bins[((magnitude - within.low) >> shift) as usize];
                bin.count += 1;
                bin.least = bin.least.min(magnitude);
                bin.greatest = bin.greatest.max(magnitude);
            }
        }
    }

    pub(super) fn add(&mut self, other: &Counts) {
        self.above += other.above;
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

    fn kth(values: &[u64], k: u64, mut interval: Interval) -> (u64, usize) {
        for pass in 1.. {
            let mut counts = Counts::new();
            counts.count(interval, values.iter().copied());
            interval = interval.narrowed(&counts, k);
            if let Some(value) = interval.only() {
                return (value, pass);
            }
        }
        unreachable!("an interval that does not shrink");
    }

    #[test]
    fn the_kth_largest_is_found_whatever_the_values_and_the_guess() {
        let mut state = 7u64;
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            state >> 1
        };
        let wild: Vec<u64> = (0..5000).map(|_| next()).collect();
        let few: Vec<u64> = (0..5000).map(|_| next() % 5).collect();
        let near: Vec<u64> = (0..5000).map(|_| (1 << 40) + next() % 100).collect();
        for values in [wild, few, near, vec![0; 9], vec![Interval::ALL.high; 3]] {
            let mut sorted = values.clone();
            sorted.sort_unstable_by(|a, b| b.cmp(a));
            let numel = values.len() as u64;
            for k in [1, 2, numel / 3 + 1, numel / 2 + 1, numel] {
                let k = k.min(numel);
                let expected = sorted[k as usize - 1];
                let mut sample = values[..values.len().min(64)].to_vec();
                for guess in [
                    Interval::ALL,
                    Interval::guess(&mut sample, k, numel),
                    Interval { low: 1, high: 2 },
                    Interval { low: 1 << 62, high: (1 << 62) + 9 },
                ] {
                    let (found, passes) = kth(&values, k, guess);
                    assert_eq!(found, expected);
                    assert!(passes <= 9, "{passes}");
                }
            }
        }
    }
}
