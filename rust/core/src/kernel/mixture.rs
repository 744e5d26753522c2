//! The distribution of a difference in units, as a mixture that is fitted to counts.
//!
//! A mixture of zero and of uniform distributions between zero and each of some widths, which grow by
//! factors of two. The table says how likely each count is for each width, and how far off it is.

use std::sync::OnceLock;

/// Units of so many sizes are kept apart; finer ones add nothing to the rounding.
pub(super) const LEVELS: usize = 8;
/// The smallest |k| of each class of counts.
const FROM: [f32; CLASSES] = [0.0, 1.0, 2.0, 3.0, 4.0, 8.0, 16.0, 32.0];
pub(super) const CLASSES: usize = 8;
/// Widths of the mixture grow by factors of two, from 2 to this power of the coarsest unit on.
const NARROWEST: i32 = -8;
const WIDTHS: usize = 16;
/// Elements that moved, with which a level says something about the shape of δ.
const FEW: u32 = 10;
/// What rounds to the next integer by a random phase has this mean squared error.
pub(super) const RANDOM_PHASE: f32 = 1.0 / 6.0;

/// Shares of the mixture: of each width, and of elements that did not move.
#[derive(Clone, Copy, Default)]
pub(super) struct Shares {
    widths: [f32; WIDTHS],
    still: f32,
}

impl Shares {
    /// All widths alike, and as many that did not move as zeros are not explained by a narrow δ: where
    /// units are fine and what moved mostly moved by several.
    pub(super) fn start<'a>(levels: impl Iterator<Item = &'a [u32; CLASSES]>) -> Self {
        let zeros = levels.map(|counts| {
            let far: u32 = counts[2..].iter().sum();
            let moved = far + counts[1];
            let far = if moved < FEW { 0.0 } else { far as f32 / moved as f32 };
            far * far * counts[0] as f32 / (counts[0] + moved).max(1) as f32
        });
        let still = zeros.fold(1.0 / (WIDTHS + 1) as f32, f32::max);
        Self { widths: [(1.0 - still) / WIDTHS as f32; WIDTHS], still }
    }

    /// Combine every share with another, so that they add up to one.
    pub(super) fn scale(&mut self, other: &Shares, combine: impl Fn(f32, f32) -> f32) {
        for (share, other) in self.widths.iter_mut().zip(&other.widths) {
            *share = combine(*share, *other);
        }
        self.still = combine(self.still, other.still);
        let total = sum(self.widths) + self.still;
        if total > 0.0 {
            self.widths = self.widths.map(|share| share / total);
            self.still /= total;
        }
    }
}

/// Σ in an order that vectorizes.
fn sum(mut values: [f32; WIDTHS]) -> f32 {
    for half in [8, 4, 2, 1] {
        for place in 0..half {
            values[place] += values[place + half];
        }
    }
    values[0]
}

/// How likely a class is, and its squared error, for δ between zero and a width of 2^w units.
pub(super) struct Table {
    /// By level and class.
    likely: [[[f32; WIDTHS]; CLASSES]; LEVELS],
    error: [[[f32; WIDTHS]; CLASSES]; LEVELS],
}

impl Table {
    pub(super) fn get() -> &'static Self {
        static TABLE: OnceLock<Table> = OnceLock::new();
        TABLE.get_or_init(Self::new)
    }

    fn new() -> Self {
        let mut table = Self {
            likely: [[[0.0; WIDTHS]; CLASSES]; LEVELS],
            error: [[[RANDOM_PHASE; WIDTHS]; CLASSES]; LEVELS],
        };
        let places = (0..LEVELS).flat_map(|finer| (0..WIDTHS).map(move |place| (finer, place)));
        for (finer, place) in places {
            let width = f64::from(NARROWEST + (finer + place) as i32).exp2();
            // |k| is at least K for δ above K, and for the share δ − (K − 1) of those just below.
            let half_sq = |x: f64| x.max(0.0) * x.max(0.0) / 2.0;
            let above = |k: f64| (half_sq(width - k + 1.0) - half_sq(width - k)) / width;
            let at_least = |class: usize| match class {
                0 => 1.0,
                CLASSES => 0.0,
                _ => above(f64::from(FROM[class])),
            };
            for class in 0..CLASSES {
                let likely = at_least(class) - at_least(class + 1);
                table.likely[finer][class][place] = likely as f32;
            }
            // The mean of (k − δ)², by how likely δ is to become k: 1 − |k − δ|.
            let inner = width.min(1.0);
            let zero = inner * inner * (1.0 / 3.0 - inner / 4.0) / (1.0 - inner / 2.0);
            let outer = (width - 1.0).clamp(0.0, 1.0);
            let weight = inner * inner / 2.0 + outer - outer * outer / 2.0;
            let moment = |x: f64| x * x * x * (1.0 / 3.0 - x / 4.0);
            let one = (1.0 / 12.0 - moment(1.0 - inner) + moment(outer)) / weight;
            table.error[finer][0][place] = zero as f32;
            table.error[finer][1][place] = one as f32;
        }
        table
    }

    /// Add the expected number of elements of each share: half a step of expectation and maximization.
    pub(super) fn expect(
        &self,
        finer: usize,
        counts: &[f32; CLASSES],
        shares: &Shares,
        numbers: &mut Shares,
    ) {
        self.each(finer, counts, shares, |class, number, likely| {
            for ((sum, share), likely) in numbers.widths.iter_mut().zip(&shares.widths).zip(likely)
            {
                *sum += number * share * likely;
            }
            if class == 0 {
                numbers.still += number * shares.still;
            }
        });
    }

    /// Σ of the expected squared errors in units.
    pub(super) fn squared_error(
        &self,
        finer: usize,
        counts: &[f32; CLASSES],
        shares: &Shares,
    ) -> f32 {
        let mut total = 0.0;
        self.each(finer, counts, shares, |class, number, likely| {
            let mut errors = self.error[finer][class];
            for ((error, share), likely) in errors.iter_mut().zip(&shares.widths).zip(likely) {
                *error *= number * share * likely;
            }
            total += sum(errors);
        });
        total
    }

    /// Call `then` with every class that occurs, its count over how likely it is, and how likely it is
    /// for each width.
    #[inline(always)]
    fn each(
        &self,
        finer: usize,
        counts: &[f32; CLASSES],
        shares: &Shares,
        mut then: impl FnMut(usize, f32, &[f32; WIDTHS]),
    ) {
        for (class, (&count, likely)) in counts.iter().zip(&self.likely[finer]).enumerate() {
            if count == 0.0 {
                continue;
            }
            let mut parts = *likely;
            for (part, share) in parts.iter_mut().zip(&shares.widths) {
                *part *= share;
            }
            let whole = sum(parts) + if class == 0 { shares.still } else { 0.0 };
            if whole > 0.0 {
                then(class, count / whole, likely);
            }
        }
    }
}
