//! How much of a difference is rounding of what was subtracted, estimated from a sample.
//!
//! Both models round to grids: neighbors of a value are one unit in the last place apart. Where the
//! two units differ, the errors are independent and add unit²/12 each. Where they are equal, the
//! difference is a whole number k of units: by the phase of the weights on their grid, δ units
//! become the one or the other integer beside δ, on average δ. How large the error is then depends on
//! how large δ mostly is, and that is seen in those elements whose units are fine. So k is counted
//! for each size of unit, the distribution of δ is fitted to the counts, as a mixture of zero and
//! uniform distributions of any width (Khinchin: those are all that are symmetric with one mode), and
//! each count gets the mean squared error that the fit gives it. docs/format.md derives it.

use super::blend::vectorised;
use super::mixture::{CLASSES, LEVELS, RANDOM_PHASE, Shares, Table};
use super::{Dtype, Moments};

/// Consecutive elements that are taken together, which mostly share a block scale.
pub(crate) const RUN: usize = 64;
const LANES: usize = 8;
/// As large as any other |k|.
const MOST_UNITS: f64 = 32.0;
/// Steps of the fit to all levels, and of the one to each, which counts the former as so many elements.
const STEPS: usize = 15;
const STEPS_OF_LEVEL: usize = 5;
const PRIOR: f32 = 50.0;

/// Values with more than a power of two that show how many bits all of them have.
const ENOUGH: usize = 16;

/// The values that a model can have beside a value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Grid {
    /// Bits of the significand, the hidden one included.
    nbits: i32,
    /// The exponent of the smallest normal value.
    lowest: i32,
    /// What the values were multiplied by after rounding.
    scale: f64,
}

impl Grid {
    /// The grid of a dtype.
    pub(crate) fn of(dtype: Dtype) -> Self {
        let (nbits, lowest) = match dtype {
            Dtype::BF16 => (8, -126),
            Dtype::F16 => (11, -14),
            Dtype::F32 => (24, -126),
            Dtype::F64 => (53, -1022),
        };
        Self { nbits, lowest, scale: 1.0 }
    }

    /// The grid of scaled codes.
    pub(crate) fn of_codes(nbits: i32, lowest: i32, scale: f64) -> Self {
        Self { nbits, lowest, scale }
    }

    /// The grid of values that were rounded to a narrower type before they were stored, as the bits show
    /// that none of them uses.
    pub(crate) fn seen_in(self, values: &[f64]) -> Self {
        if self.nbits == 8 {
            return self;
        }
        let (mut used, mut count) = (0, 0);
        for value in values.iter().filter(|value| value.is_finite()) {
            let mantissa = value.to_bits() & ((1 << 52) - 1);
            used |= mantissa;
            count += usize::from(mantissa != 0);
        }
        let needed = 53 - used.trailing_zeros() as i32;
        let nbits = [8, 11, 24].into_iter().find(|&nbits| needed <= nbits).unwrap_or(53);
        if count < ENOUGH { self } else { Self { nbits: self.nbits.min(nbits), ..self } }
    }

    /// One unit in the last place of each value.
    #[inline(always)]
    fn units(&self, values: &[f64; RUN]) -> [f64; RUN] {
        let unit = |code: f64| {
            let exponent = exponent(code).max(self.lowest) - (self.nbits - 1);
            f64::from_bits(((exponent + 1023).max(1) as u64) << 52)
        };
        if self.scale == 1.0 {
            return values.map(unit);
        }
        values.map(|value| self.scale * unit(value / self.scale))
    }
}

/// Sums over a sample, in lanes.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Sums<T> {
    /// Of the squared differences, and of the squares of both sides.
    delta_sq: T,
    values_sq: T,
    /// Of the squared differences where units differ, and of what rounding to the coarser and to the
    /// finer one adds to them.
    unlike_sq: T,
    coarse_sq: T,
    fine_sq: T,
}

/// What a run looks like.
pub(crate) struct Run {
    sums: Sums<[f64; LANES]>,
    moved: u32,
    top: f64,
    /// log₂ of the unit, rounded down, where both are equal; less than any elsewhere.
    exponents: [i32; RUN],
    /// The class of |k|.
    classes: [i32; RUN],
}

vectorised! {
    /// Look at a run of values, whose grids are known.
    fn look(left: &[f64; RUN], right: &[f64; RUN], first: Grid, second: Grid, run: &mut Run) {
        let (first, second) = (first.units(left), second.units(right));
        let mut tops = [0f64; LANES];
        let mut moved = [0u32; LANES];
        for start in (0..RUN).step_by(LANES) {
            for lane in 0..LANES {
                let i = start + lane;
                let (x, y) = (left[i], right[i]);
                let difference = (x - y).abs();
                let sq = difference * difference;
                run.sums.delta_sq[lane] += sq;
                run.sums.values_sq[lane] += x * x + y * y;
                moved[lane] += u32::from(difference > 0.0);
                let (coarse, fine) = if first[i] > second[i] {
                    (first[i], second[i])
                } else {
                    (second[i], first[i])
                };
                tops[lane] = if coarse > tops[lane] { coarse } else { tops[lane] };
                let unlike = if (coarse != fine) & (difference > 0.0) { 1.0 } else { 0.0 };
                run.sums.unlike_sq[lane] += unlike * sq;
                run.sums.coarse_sq[lane] += unlike * coarse * coarse;
                run.sums.fine_sq[lane] += unlike * fine * fine;
                run.exponents[i] = if coarse == fine { exponent(coarse) } else { i32::MIN / 2 };
                let units = difference / coarse;
                let units = if units < MOST_UNITS { units } else { MOST_UNITS };
                let small = units as i32;
                run.classes[i] = if small < 4 { small } else { 2 + exponent(units) };
            }
        }
        run.moved = moved.iter().sum();
        run.top = tops.iter().fold(0.0, |top, &one| if one > top { one } else { top });
    }
}

/// Counts and sums of a sample of one pair's elements.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Rounding {
    /// log₂ of the coarsest unit, rounded down; nothing was counted yet if `numel` is zero.
    top: i32,
    /// How often each class occurs where both units are 2^(top − level).
    levels: [[u32; CLASSES]; LEVELS],
    /// Σ of how much larger than a power of two a squared unit is, over all elements.
    excess: f64,
    numel: u64,
    /// Elements that the sample is taken from, and those of the sample that differ.
    population: u64,
    moved: u64,
    sums: Sums<f64>,
}

impl Rounding {
    /// Nothing yet of a sample of so many elements.
    pub(crate) fn of(population: usize) -> Self {
        Self { population: population as u64, ..Self::default() }
    }

    /// Take `numel` values of both sides into account, which are on these grids; others are zero.
    pub(crate) fn sample(
        &mut self,
        (left, right): (&[f64; RUN], &[f64; RUN]),
        numel: usize,
        (first, second): (Grid, Grid),
    ) {
        let mut run = Run {
            sums: Sums::default(),
            moved: 0,
            top: 0.0,
            exponents: [0; RUN],
            classes: [0; RUN],
        };
        look(left, right, first, second, &mut run);
        let sums = run.sums.folded();
        if !(sums.delta_sq + sums.values_sq).is_finite() {
            return;
        }
        self.raise(exponent(run.top));
        self.numel += numel as u64;
        self.moved += u64::from(run.moved);
        self.sums.add(&sums);
        let power = f64::from(exponent(first.scale)).exp2();
        self.excess += numel as f64 * (first.scale / power).powi(2);
        for (&exponent, &class) in run.exponents.iter().zip(&run.classes).take(numel) {
            if let Some(counts) = self.levels.get_mut((self.top - exponent) as usize) {
                counts[class as usize % CLASSES] += 1;
            }
        }
    }

    /// Make room for units of 2^`top`.
    fn raise(&mut self, top: i32) {
        if self.numel == 0 {
            self.top = top;
        } else if top > self.top {
            let by = ((top - self.top) as usize).min(LEVELS);
            self.levels.copy_within(..LEVELS - by, by);
            self.levels[..by].fill([0; CLASSES]);
            self.top = top;
        }
    }

    /// Add what was found in later elements.
    pub(crate) fn add(&mut self, later: &Rounding) {
        self.population += later.population;
        if later.numel == 0 {
            return;
        }
        self.raise(later.top);
        let from = (self.top - later.top) as usize;
        for (counts, later) in self.levels.iter_mut().skip(from).zip(&later.levels) {
            for (count, later) in counts.iter_mut().zip(later) {
                *count += later;
            }
        }
        self.excess += later.excess;
        self.numel += later.numel;
        self.moved += later.moved;
        self.sums.add(&later.sums);
    }

    /// The part of `whole.delta_sq` that is rounding; `whole` is about all that was sampled.
    pub(crate) fn part_of(&self, whole: &Moments) -> f64 {
        let moved = self.population.saturating_sub(whole.zeros);
        if self.numel == 0 || moved == 0 || !whole.delta_sq.is_finite() {
            return 0.0;
        }
        if self.moved == 0 {
            // The sample has seen nothing of a sparse change: units if all are one, else any number.
            let all_sq = f64::from(self.top).exp2().powi(2) * moved as f64;
            let share = if whole.delta_sq <= 2.0 * all_sq { 1.0 } else { f64::from(RANDOM_PHASE) };
            return whole.delta_sq.min(share * all_sq);
        }
        // A smaller difference than rounding alone makes: the finer model was trained from the values
        // of the coarser one, which therefore lost nothing.
        let Sums { delta_sq, values_sq, unlike_sq, coarse_sq, fine_sq } = self.sums;
        let coarse_sq = if unlike_sq < 0.8 * coarse_sq / 12.0 { 0.0 } else { coarse_sq };
        let unlike_sq = (coarse_sq + fine_sq) / 12.0;
        let found = (unlike_sq + self.in_levels()).min(delta_sq);
        // From the sample to the whole: what is mostly rounding grows as Δ does, and what is not as the
        // weights do, whose units it comes from, and the share of them that moved.
        let share = found / delta_sq;
        let of_whole = whole.reasoning_sq + whole.multimodal_sq;
        let moved = moved as f64 / self.population as f64 * self.numel as f64 / self.moved as f64;
        let by_units = found * of_whole / values_sq * moved;
        (share * share * whole.delta_sq + (1.0 - share) * by_units).min(whole.delta_sq)
    }

    /// The expected Σ of the squared errors where both units are equal.
    fn in_levels(&self) -> f64 {
        let table = Table::get();
        let counts = self.levels.map(|counts| counts.map(|count| count as f32));
        let total: f32 = counts.iter().flatten().sum();
        let mut all = Shares::start(self.levels.iter());
        for _ in 0..STEPS {
            let mut next = Shares::default();
            for (finer, counts) in counts.iter().enumerate() {
                table.expect(finer, counts, &all, &mut next);
            }
            // Further than the expectation, which is a small step in the right direction.
            all.scale(&next, |share, number| {
                let step = number / total;
                if share > 0.0 { step * (step / share).sqrt() } else { 0.0 }
            });
        }
        let mut sum = 0.0;
        for (finer, counts) in counts.iter().enumerate() {
            let numel: f32 = counts.iter().sum();
            if numel == 0.0 || counts[0] == numel {
                continue;
            }
            let mut own = all;
            for _ in 0..STEPS_OF_LEVEL {
                let mut next = Shares::default();
                table.expect(finer, counts, &own, &mut next);
                own = all;
                own.scale(&next, |share, number| number + PRIOR * share);
            }
            let unit_sq = f64::from(2 * (self.top - finer as i32)).exp2();
            sum += unit_sq * f64::from(table.squared_error(finer, counts, &own));
        }
        sum * self.excess / self.numel as f64
    }
}

/// log₂ of a normal value, rounded down.
#[inline(always)]
fn exponent(value: f64) -> i32 {
    (value.to_bits() >> 52 & 0x7ff) as i32 - 1023
}

impl Sums<[f64; LANES]> {
    fn folded(&self) -> Sums<f64> {
        let total = |lanes: &[f64; LANES]| lanes.iter().sum();
        Sums {
            delta_sq: total(&self.delta_sq),
            values_sq: total(&self.values_sq),
            unlike_sq: total(&self.unlike_sq),
            coarse_sq: total(&self.coarse_sq),
            fine_sq: total(&self.fine_sq),
        }
    }
}

impl Sums<f64> {
    fn add(&mut self, other: &Self) {
        self.delta_sq += other.delta_sq;
        self.values_sq += other.values_sq;
        self.unlike_sq += other.unlike_sq;
        self.coarse_sq += other.coarse_sq;
        self.fine_sq += other.fine_sq;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::blend::random;
    #[cfg(target_arch = "x86_64")]
    use crate::kernel::blend::{Level, tests::WIDEST};

    /// Numbers of about a hundredth, as they are stored in bfloat16, and others beside them.
    fn runs(key: u64) -> ([f64; RUN], [f64; RUN]) {
        let number = |index: usize| random(key, index as u64) as f64 / 2f64.powi(53) - 0.5;
        let stored = |value: f64| half::bf16::from_f64(value).to_f64();
        let left = std::array::from_fn(|i| stored(0.05 * number(i)));
        (left, std::array::from_fn(|i| stored(left[i] + 1e-4 * number(RUN + i))))
    }

    fn of_runs(keys: impl Iterator<Item = u64>) -> Rounding {
        let grid = Grid::of(Dtype::BF16);
        let mut found = Rounding::default();
        for key in keys {
            let (left, right) = runs(key);
            let mut one = Rounding::of(RUN);
            one.sample((&left, &right), RUN, (grid, grid));
            found.add(&one);
        }
        found
    }

    #[test]
    fn a_unit_is_the_distance_to_the_next_value() {
        let at = |grid: Grid, value: f64| grid.units(&[value; RUN])[0];
        for value in [1.0, -1.99, 0.013, 300.0, 1e-30] {
            let bits = half::bf16::from_f64(value).to_bits();
            let (here, next) =
                (half::bf16::from_bits(bits).to_f64(), half::bf16::from_bits(bits + 1).to_f64());
            assert_eq!(at(Grid::of(Dtype::BF16), here), (next - here).abs());
        }
        assert_eq!(at(Grid::of(Dtype::F16), 1e-7), 2f64.powi(-24), "subnormal");
        assert_eq!(at(Grid::of(Dtype::F32), 1.0), f64::from(f32::EPSILON));
        // The code 1.125 and its neighbor 1.25, times three.
        assert_eq!(at(Grid::of_codes(4, -6, 3.0), 3.375), 0.375);
    }

    #[test]
    fn bits_that_no_value_uses_show_a_narrower_type_unless_the_values_are_few() {
        let wide = Grid::of(Dtype::F32);
        let (narrow, _) = runs(1);
        assert_eq!(wide.seen_in(&narrow), Grid { nbits: 8, ..wide });
        assert_eq!(wide.seen_in(&narrow[..8]), wide);
        assert_eq!(wide.seen_in(&[0.5; RUN]), wide);
        let mut other = narrow;
        other[3] = f64::from(0.1f32);
        assert_eq!(wide.seen_in(&other), wide);
    }

    #[test]
    fn counts_add_up_whatever_the_coarsest_unit_of_a_part_is() {
        let grid = Grid::of(Dtype::BF16);
        let (mut small, mut large) = (Rounding::of(RUN), Rounding::of(RUN));
        let (left, right) = runs(2);
        small.sample((&left.map(|x| x / 16.0), &right.map(|x| x / 16.0)), RUN, (grid, grid));
        large.sample((&left, &right), RUN, (grid, grid));
        let (mut one, mut other) = (small, large);
        one.add(&large);
        other.add(&small);
        assert_eq!((one.top, one.levels), (other.top, other.levels));
        assert_eq!(one.levels[0], large.levels[0]);
        assert_eq!(one.levels[5][1], small.levels[1][1] + large.levels[5][1]);
    }

    #[test]
    fn values_that_are_not_finite_are_left_out_with_their_run() {
        let (mut left, right) = runs(3);
        left[5] = f64::NAN;
        let grid = Grid::of(Dtype::BF16);
        let mut found = Rounding::of(RUN);
        found.sample((&left, &right), RUN, (grid, grid));
        assert_eq!((found.numel, found.population), (0, RUN as u64));
        assert_eq!(found.part_of(&Moments { delta_sq: 1.0, ..Moments::default() }), 0.0);
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn every_level_of_instructions_counts_and_sums_alike() {
        let whole = Moments { delta_sq: 1.0, reasoning_sq: 1.0, ..Moments::default() };
        let found = [Level::Baseline, Level::Avx2, Level::Avx512].map(|level| {
            WIDEST.set(Some(level));
            let found = of_runs(0..50);
            WIDEST.set(None);
            (found.levels, found.moved, found.part_of(&whole).to_bits())
        });
        assert_eq!(found[0], found[1]);
        assert_eq!(found[0], found[2]);
    }
}
