//! The largest singular values of a matrix that is seen once, in blocks of rows.
//!
//! The two-sided sketch of Tropp, Yurtsever, Udell and Cevher, "Practical sketching algorithms for
//! low-rank matrix approximation" (2017), algorithm 4: Y = AΩ and W = ΨA are taken while A goes by;
//! then Q = orth(Y), X = (ΨQ)⁺W, and the singular values of QX, which are X's, stand for A's. Ω has
//! signs for entries, Ψ eight signs in each column, one in each of eight equal parts of it; both are
//! made from the seed where they are needed, so only Y and W are held: rows × width and
//! height × columns numbers of four bytes.
//!
//! How far off it is. With T what A has beyond the values that are asked for, Q misses part of their
//! directions, so that a σ² may be too small by about ‖T‖²/23 (`under_sq`); and E = A − QQᵀA leaks into
//! X, so that it may be too large by about ‖E‖²/256 (`over_sq`). Both vanish with low rank, where the
//! values are exact to float32's rounding. A direction with less than a few per cent of ‖A‖² in
//! noise is below `under_sq` and is not told from the noise by one pass.
//!
//! The bits depend on the seed and on the order of [`Sketch::add`] alone, which takes blocks in
//! ascending order whichever thread made them; [`Sketch::rows_of_range`] is what can run in parallel.

use crate::error::{Error, Result};

/// Columns of Ω beyond the values that are asked for.
const OVERSAMPLING: usize = 24;
/// Rows of Ψ beyond the columns of Ω.
const EXCESS: usize = 256;
/// Signs in one column of Ψ.
const SIGNS: usize = 8;
/// Bits of one random word that make up a row of Ω.
const LARGEST_WIDTH: usize = 64;
/// A column this much smaller than it was before it was made orthogonal is rounding.
const DEPENDENT: f64 = 1e-6;

/// Both halves of a sketch of a matrix in row-major order.
#[derive(Debug, Clone)]
pub struct Sketch {
    rows: usize,
    columns: usize,
    singular: usize,
    width: usize,
    height: usize,
    seed: u64,
    /// Y, rows × width.
    range: Vec<f32>,
    /// W, height × columns.
    corange: Vec<f32>,
    /// ‖A‖² so far.
    square: f64,
    next_row: usize,
}

/// What a sketch tells.
#[derive(Debug, Clone, PartialEq)]
pub struct SingularValues {
    /// The largest singular values, in descending order.
    pub values: Vec<f64>,
    /// About what the square of each may be too large by.
    pub over_sq: f64,
    /// About what the square of each may be too small by.
    pub under_sq: f64,
}

impl Sketch {
    /// An empty sketch for the `singular` largest values of a rows × columns matrix.
    ///
    /// # Errors
    /// A matrix without elements, or fewer than one or more than 40 values.
    pub fn new(rows: usize, columns: usize, singular: usize, seed: u64) -> Result<Self> {
        let (width, height) = Self::sizes(rows, columns, singular)?;
        Ok(Self {
            rows,
            columns,
            singular,
            width,
            height,
            seed,
            range: vec![0.0; rows * width],
            corange: vec![0.0; height * columns],
            square: 0.0,
            next_row: 0,
        })
    }

    /// A sketch that holds nothing, for [`Sketch::rows_of_range`] apart from the one that is filled.
    ///
    /// # Errors
    /// As [`Sketch::new`].
    pub fn shape_only(rows: usize, columns: usize, singular: usize, seed: u64) -> Result<Self> {
        let (width, height) = Self::sizes(rows, columns, singular)?;
        let (range, corange) = (Vec::new(), Vec::new());
        let square = 0.0;
        Ok(Self {
            rows,
            columns,
            singular,
            width,
            height,
            seed,
            range,
            corange,
            square,
            next_row: 0,
        })
    }

    /// The bytes that a sketch of such a matrix holds, none where there can be no sketch.
    pub fn nbytes_of(rows: usize, columns: usize, singular: usize) -> usize {
        let Ok((width, height)) = Self::sizes(rows, columns, singular) else { return 0 };
        size_of::<f32>() * (rows * width + height * columns)
    }

    /// The most bytes that finding the singular values takes beside the sketch.
    pub fn solving_nbytes(rows: usize, columns: usize, singular: usize) -> usize {
        let Ok((width, height)) = Self::sizes(rows, columns, singular) else { return 0 };
        (size_of::<f64>() * width).saturating_mul(rows + height)
    }

    /// Numbers of Y for each row, none where there can be no sketch.
    pub fn width(rows: usize, columns: usize, singular: usize) -> usize {
        Self::sizes(rows, columns, singular).map_or(0, |(width, _)| width)
    }

    fn sizes(rows: usize, columns: usize, singular: usize) -> Result<(usize, usize)> {
        let most = LARGEST_WIDTH - OVERSAMPLING;
        if rows == 0 || columns == 0 || !(1..=most).contains(&singular) {
            return Err(Error::Argument(format!(
                "a sketch needs a matrix with elements and 1 to {most} singular values, got \
                 {rows} x {columns} and {singular}"
            )));
        }
        let width = (singular + OVERSAMPLING).min(rows).min(columns);
        Ok((width, width + EXCESS))
    }

    /// The bytes that a sketch holds.
    pub fn nbytes(&self) -> usize {
        size_of::<f32>() * (self.range.len() + self.corange.len())
    }

    /// The rows of Y that belong to whole rows of the matrix; where they lie does not matter.
    ///
    /// # Errors
    /// Values that are no whole number of rows.
    pub fn rows_of_range(&self, values: &[f32]) -> Result<Vec<f32>> {
        let rows = self.count(values)?;
        let mut range = vec![0.0_f32; rows * self.width];
        let mut signs = vec![0.0_f32; self.width];
        for column in 0..self.columns {
            let word = random(self.seed, column as u64);
            for (bit, sign) in signs.iter_mut().enumerate() {
                *sign = sign_of(word >> bit);
            }
            for (row, sums) in range.chunks_exact_mut(self.width).enumerate() {
                let value = values[row * self.columns + column];
                for (sum, sign) in sums.iter_mut().zip(&signs) {
                    *sum += value * sign;
                }
            }
        }
        Ok(range)
    }

    /// Take in the next whole rows, with what [`Sketch::rows_of_range`] returned for them.
    ///
    /// # Errors
    /// Rows that are not the next ones, or that are not whole.
    pub fn add(&mut self, first_row: usize, values: &[f32], range: &[f32]) -> Result<()> {
        let rows = self.count(values)?;
        let end = first_row + rows;
        if first_row != self.next_row || end > self.rows || range.len() != rows * self.width {
            return Err(Error::Argument(format!(
                "a sketch of {} rows expects row {} next, got rows {first_row} to {end}",
                self.rows, self.next_row
            )));
        }
        self.range[first_row * self.width..end * self.width].copy_from_slice(range);
        for (row, line) in values.chunks_exact(self.columns).enumerate() {
            // Row by row, so that how rows are cut changes no bit.
            self.square +=
                line.iter().map(|&value| f64::from(value) * f64::from(value)).sum::<f64>();
            for (place, sign) in self.column_of_left(first_row + row) {
                let at = place * self.columns;
                for (sum, value) in self.corange[at..at + self.columns].iter_mut().zip(line) {
                    *sum += sign * value;
                }
            }
        }
        self.next_row = end;
        Ok(())
    }

    /// Take in the next rows, which are zero.
    ///
    /// # Errors
    /// Rows that are not the next ones.
    pub fn skip(&mut self, run: &std::ops::Range<usize>) -> Result<()> {
        if run.start != self.next_row || run.end > self.rows {
            return Err(Error::Argument(format!(
                "a sketch of {} rows expects row {} next, got rows {} to {}",
                self.rows, self.next_row, run.start, run.end
            )));
        }
        self.next_row = run.end;
        Ok(())
    }

    /// The singular values, when every row was taken in.
    ///
    /// # Errors
    /// Rows that are missing, or values that are not finite.
    pub fn singular_values(&self) -> Result<SingularValues> {
        let square = self.square;
        if self.next_row != self.rows {
            return Err(Error::Argument(format!(
                "a sketch of {} rows was given {} of them",
                self.rows, self.next_row
            )));
        }
        let finite = self.range.iter().chain(&self.corange).all(|value| value.is_finite());
        if !finite || !square.is_finite() {
            return Err(Error::Argument(
                "singular values of a matrix with NaN, infinity or sums beyond float32".to_owned(),
            ));
        }
        let mut q = Columns::from_rows(&self.range, self.width);
        q.make_orthonormal();
        let mut left = Columns { length: self.height, columns: Vec::new() };
        for column in &q.columns {
            let mut image = vec![0.0; self.height];
            for (row, value) in column.iter().enumerate() {
                for (place, sign) in self.column_of_left(row) {
                    image[place] += f64::from(sign) * value;
                }
            }
            left.columns.push(image);
        }
        let gram = self.gram_of_core(left);
        let mut squares = eigenvalues(gram);
        squares.resize(self.singular.min(self.rows).min(self.columns), 0.0);
        let values: Vec<f64> = squares.into_iter().map(|value| value.max(0.0).sqrt()).collect();
        let told: f64 = values.iter().map(|value| value * value).sum();
        // Where told is all there is, what is left is rounding of either sign.
        let rest = (square - told).max(0.0);
        let (over_sq, under_sq) = (rest / EXCESS as f64, rest / (OVERSAMPLING - 1) as f64);
        Ok(SingularValues { values, over_sq, under_sq })
    }

    /// XXᵀ of the X that solves ΨQ·X = W.
    fn gram_of_core(&self, mut left: Columns) -> Vec<Vec<f64>> {
        let triangle = left.make_orthonormal();
        let rank = left.columns.len();
        let mut gram = vec![vec![0.0; rank]; rank];
        let mut solved = vec![0.0; rank];
        let mut sums = vec![0.0; rank];
        for column in 0..self.columns {
            sums.fill(0.0);
            for (place, line) in self.corange.chunks_exact(self.columns).enumerate() {
                for (sum, unit) in sums.iter_mut().zip(&left.columns) {
                    *sum += unit[place] * f64::from(line[column]);
                }
            }
            for at in (0..rank).rev() {
                let later: f64 = (at + 1..rank).map(|k| triangle[k][at] * solved[k]).sum();
                solved[at] = (sums[at] - later) / triangle[at][at];
            }
            for (row, first) in gram.iter_mut().zip(&solved) {
                for (sum, second) in row.iter_mut().zip(&solved) {
                    *sum += first * second;
                }
            }
        }
        gram
    }

    /// The places and signs of one column of Ψ.
    fn column_of_left(&self, row: usize) -> [(usize, f32); SIGNS] {
        // Another stream of numbers than Ω's.
        let seed = self.seed ^ 0x5bd1_e995_9d1b_58a3;
        let part = self.height / SIGNS;
        std::array::from_fn(|index| {
            let word = random(seed, (row * SIGNS + index) as u64);
            // The last part takes what the division leaves.
            let size = if index + 1 == SIGNS { self.height - part * (SIGNS - 1) } else { part };
            // The high bits of a product are even over a range, Lemire (2019).
            let within = (u128::from(word) * size as u128) >> 64;
            (index * part + within as usize, sign_of(word))
        })
    }

    fn count(&self, values: &[f32]) -> Result<usize> {
        if !values.len().is_multiple_of(self.columns) {
            return Err(Error::Argument(format!(
                "{} values are no whole rows of {}",
                values.len(),
                self.columns
            )));
        }
        Ok(values.len() / self.columns)
    }
}

/// The word of a stream at an index: Steele, Lea and Flood's SplitMix64 (2014), entered anywhere.
fn random(seed: u64, index: u64) -> u64 {
    let mut word = seed.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

fn sign_of(word: u64) -> f32 {
    if word & 1 == 0 { 1.0 } else { -1.0 }
}

/// A matrix by columns.
struct Columns {
    length: usize,
    columns: Vec<Vec<f64>>,
}

impl Columns {
    fn from_rows(values: &[f32], width: usize) -> Self {
        let columns = (0..width)
            .map(|column| {
                values.iter().skip(column).step_by(width).map(|&v| f64::from(v)).collect()
            })
            .collect();
        Self { length: values.len() / width, columns }
    }

    /// Make the columns orthonormal, leave out those that depend on others, and return the upper
    /// triangle R by columns: Gram and Schmidt's way, twice, which is as good as can be
    /// (Giraud, Langou and Rozložník, 2005).
    fn make_orthonormal(&mut self) -> Vec<Vec<f64>> {
        let mut done: Vec<Vec<f64>> = Vec::with_capacity(self.columns.len());
        let mut triangle = Vec::new();
        for mut column in std::mem::take(&mut self.columns) {
            let before = norm(&column);
            let mut parts = vec![0.0; done.len()];
            for _ in 0..2 {
                for (unit, part) in done.iter().zip(&mut parts) {
                    let along: f64 = unit.iter().zip(&column).map(|(a, b)| a * b).sum();
                    *part += along;
                    for (value, unit) in column.iter_mut().zip(unit) {
                        *value -= along * unit;
                    }
                }
            }
            let after = norm(&column);
            if done.len() < self.length && after > DEPENDENT * before {
                for value in &mut column {
                    *value /= after;
                }
                parts.push(after);
                triangle.push(parts);
                done.push(column);
            }
        }
        self.columns = done;
        triangle
    }
}

fn norm(values: &[f64]) -> f64 {
    values.iter().map(|value| value * value).sum::<f64>().sqrt()
}

/// The eigenvalues of a symmetric matrix in descending order, by Jacobi's rotations.
fn eigenvalues(mut matrix: Vec<Vec<f64>>) -> Vec<f64> {
    let size = matrix.len();
    let scale: f64 = (0..size).map(|at| matrix[at][at].abs()).sum();
    // It converges quadratically; sixty sweeps are far more than 64 rows ever take.
    for _ in 0..60 {
        let mut largest = 0.0_f64;
        for p in 0..size {
            for q in p + 1..size {
                largest = largest.max(matrix[p][q].abs());
                rotate(&mut matrix, p, q);
            }
        }
        if largest <= f64::EPSILON * scale {
            break;
        }
    }
    let mut values: Vec<f64> = (0..size).map(|at| matrix[at][at]).collect();
    values.sort_by(|a, b| b.total_cmp(a));
    values
}

/// Rotate rows and columns p and q so that the element between them becomes zero.
fn rotate(matrix: &mut [Vec<f64>], p: usize, q: usize) {
    let between = matrix[p][q];
    if between == 0.0 {
        return;
    }
    let ratio = (matrix[q][q] - matrix[p][p]) / (2.0 * between);
    let tangent = ratio.signum() / (ratio.abs() + ratio.hypot(1.0));
    let cosine = 1.0 / tangent.hypot(1.0);
    let sine = tangent * cosine;
    for row in matrix.iter_mut() {
        let (a, b) = (row[p], row[q]);
        row[p] = cosine * a - sine * b;
        row[q] = sine * a + cosine * b;
    }
    let (above, below) = matrix.split_at_mut(q);
    for (a, b) in above[p].iter_mut().zip(&mut below[0]) {
        (*a, *b) = (cosine * *a - sine * *b, sine * *a + cosine * *b);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values between −1 and 1.
    fn noise(seed: u64, count: usize) -> Vec<f64> {
        (0..count as u64)
            .map(|at| (random(seed, at) >> 11) as f64 / (1_u64 << 52) as f64 - 1.0)
            .collect()
    }

    fn orthonormal(seed: u64, length: usize, count: usize) -> Columns {
        let columns = noise(seed, length * count).chunks(length).map(<[f64]>::to_vec).collect();
        let mut columns = Columns { length, columns };
        columns.make_orthonormal();
        columns
    }

    /// A matrix with the given singular values, row by row.
    fn with_spectrum(rows: usize, columns: usize, spectrum: &[f64]) -> Vec<f32> {
        let left = orthonormal(1, rows, spectrum.len());
        let right = orthonormal(2, columns, spectrum.len());
        let mut values = Vec::with_capacity(rows * columns);
        for row in 0..rows {
            for column in 0..columns {
                let terms = left.columns.iter().zip(&right.columns).zip(spectrum);
                let value: f64 = terms.map(|((u, v), s)| u[row] * s * v[column]).sum();
                values.push(value as f32);
            }
        }
        values
    }

    fn sketched(values: &[f32], columns: usize, singular: usize, block: usize) -> SingularValues {
        let rows = values.len() / columns;
        let mut sketch = Sketch::new(rows, columns, singular, 7).unwrap();
        for (index, part) in values.chunks(block * columns).enumerate() {
            let range = sketch.rows_of_range(part).unwrap();
            sketch.add(index * block, part, &range).unwrap();
        }
        sketch.singular_values().unwrap()
    }

    #[test]
    fn a_matrix_of_low_rank_is_known_as_exactly_as_float32_is() {
        let spectrum = [9.0, 4.0, 2.0, 1.0, 0.5];
        for (rows, columns) in [(300, 170), (90, 400), (12, 40), (40, 12)] {
            let found = sketched(&with_spectrum(rows, columns, &spectrum), columns, 6, 17);
            for (value, expected) in found.values.iter().zip(spectrum) {
                assert!((value - expected).abs() < 1e-5 * expected, "{rows}x{columns} {value}");
            }
            assert!(found.values[5] < 1e-4, "{}", found.values[5]);
        }
    }

    #[test]
    fn values_in_a_tail_are_within_what_is_said_of_their_error() {
        // A direction of 60 and one of 20 in a tail whose values go from 1 down.
        let tail = (0..150).map(|index| 1.0 - f64::from(index) / 160.0);
        let spectrum: Vec<f64> = [60.0, 20.0].into_iter().chain(tail).collect();
        let found = sketched(&with_spectrum(400, 160, &spectrum), 160, 2, 64);
        for (value, expected) in found.values.iter().zip([60.0_f64, 20.0]) {
            let (square, expected) = (value * value, expected * expected);
            assert!(square < expected + 4.0 * found.over_sq, "{square} for {expected}");
            assert!(square > expected - 2.0 * found.under_sq, "{square} for {expected}");
        }
        // The tail's squares are about 53, so both bounds are narrow.
        assert!(found.under_sq < 3.0 && found.over_sq < 0.3, "{found:?}");
        let beyond = sketched(&with_spectrum(400, 160, &spectrum), 160, 4, 64);
        assert!(beyond.values[2].powi(2) < 1.0 + 8.0 * beyond.over_sq, "{beyond:?}");
    }

    #[test]
    fn no_direction_of_noise_is_taken_for_a_large_one() {
        let values: Vec<f32> = noise(3, 500 * 300).iter().map(|&v| v as f32).collect();
        let square: f64 = values.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
        let found = sketched(&values, 300, 2, 100);
        // By Marchenko and Pastur the share is (√500 + √300)²/(500 · 300).
        let expected = (500_f64.sqrt() + 300_f64.sqrt()).powi(2) / (500.0 * 300.0);
        let share = found.values[0].powi(2) / square;
        assert!(share < expected + 4.0 * found.over_sq / square, "{share} for {expected}");
        assert!(share > expected - found.under_sq / square, "{share} for {expected}");
    }

    #[test]
    fn how_rows_are_cut_changes_no_bit() {
        let values = with_spectrum(120, 50, &[3.0, 2.0, 1.0]);
        assert_eq!(sketched(&values, 50, 3, 1), sketched(&values, 50, 3, 50));
    }

    #[test]
    fn zeros_have_zero_singular_values() {
        let found = sketched(&[0.0; 60], 6, 4, 3);
        assert_eq!(found, SingularValues { values: vec![0.0; 4], over_sq: 0.0, under_sq: 0.0 });
        assert_eq!(sketched(&[2.0], 1, 3, 1).values.len(), 1);
    }

    #[test]
    fn what_is_no_row_out_of_order_missing_or_not_finite_is_refused() {
        let mut sketch = Sketch::new(4, 3, 1, 0).unwrap();
        assert!(sketch.rows_of_range(&[0.0; 4]).is_err());
        let range = sketch.rows_of_range(&[1.0; 3]).unwrap();
        assert!(sketch.add(1, &[1.0; 3], &range).is_err());
        sketch.add(0, &[1.0; 3], &range).unwrap();
        assert!(sketch.singular_values().is_err());
        for row in 1..4 {
            let values = [f32::NAN; 3];
            let range = sketch.rows_of_range(&values).unwrap();
            sketch.add(row, &values, &range).unwrap();
        }
        assert!(sketch.singular_values().is_err());
        assert!(sketch.add(4, &[1.0; 3], &range).is_err());
        for (rows, columns, singular) in [(0, 1, 1), (1, 0, 1), (1, 1, 0), (1, 1, 41)] {
            assert!(Sketch::new(rows, columns, singular, 0).is_err());
        }
        assert_eq!(Sketch::new(100, 50, 8, 0).unwrap().nbytes(), 4 * (100 * 32 + 288 * 50));
    }
}
