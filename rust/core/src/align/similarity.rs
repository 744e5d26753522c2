//! How similar the weights of two models are, layer against layer, judging by samples.
//!
//! Names and shapes cannot distinguish the right match from one that is shifted by a layer. Weights
//! can: fine-tuning changes them little, and other layers of the same shape are unrelated. Owns the
//! sampling and the correlations; the caller decides what follows from them.

use super::pair::{Pair, Source};
use crate::checkpoint::Operand;
use crate::checkpoint::operand::Dequantized;
use crate::error::{Error, Result};
use crate::kernel::Elements;

/// The number and the length of the runs that are read from each tensor: so few that even a cold
/// disk answers at once.
const RUNS: usize = 8;
const RUN: usize = 128;

/// Pearson's correlation of each reasoning tensor with each multimodal one, row by row, and the
/// number of elements that each was computed from.
///
/// All pairs have the same shape: they are one module in every layer. The correlation with a constant
/// tensor is NaN. Values that are not finite are left out.
///
/// # Errors
/// Pairs of different shapes, or a failed read.
pub fn correlate_samples(pairs: &[Pair<'_>]) -> Result<(Vec<f64>, usize)> {
    let Some(first) = pairs.first() else { return Ok((Vec::new(), 0)) };
    let shape = &first.multimodal.tensor.shape;
    if let Some(other) = pairs.iter().find(|pair| pair.multimodal.tensor.shape != *shape) {
        return Err(Error::Argument(format!(
            "{} has shape {:?}, {} has {shape:?}",
            other.multimodal.tensor.name,
            other.multimodal.tensor.shape,
            first.multimodal.tensor.name
        )));
    }
    let elements = sampled(first.multimodal.tensor.numel());
    let mut reasoning = Vec::with_capacity(pairs.len());
    let mut multimodal = Vec::with_capacity(pairs.len());
    for pair in pairs {
        reasoning.push(match &pair.reasoning {
            Source::Whole(operand) => values_at(*operand, &elements)?,
            Source::Blocks(blocks) => {
                let mut bytes = Vec::with_capacity(elements.len());
                blocks.pick(&elements, &mut bytes)?;
                let dtype = blocks.dtype();
                bytes
                    .iter()
                    .map(|bytes| {
                        bytes.as_ref().map_or(f64::NAN, |bytes| {
                            Elements { dtype, bytes: &bytes[..dtype.nbytes()] }.value(0)
                        })
                    })
                    .collect()
            }
        });
        multimodal.push(values_at(pair.multimodal, &elements)?);
    }
    let reasoning: Vec<Vec<f64>> = reasoning.iter().map(|values| standardized(values)).collect();
    let multimodal: Vec<Vec<f64>> = multimodal.iter().map(|values| standardized(values)).collect();
    let matrix = reasoning
        .iter()
        .flat_map(|a| multimodal.iter().map(move |b| a.iter().zip(b).map(|(x, y)| x * y).sum()))
        .collect();
    Ok((matrix, elements.len()))
}

/// Indices of runs that are spread evenly over a tensor, or all indices of a small one.
fn sampled(numel: usize) -> Vec<usize> {
    if numel <= RUNS * RUN {
        return (0..numel).collect();
    }
    let stride = (numel - RUN) / (RUNS - 1);
    (0..RUNS).flat_map(|run| run * stride..run * stride + RUN).collect()
}

fn values_at(operand: Operand<'_>, elements: &[usize]) -> Result<Vec<f64>> {
    let nbytes = operand.element_nbytes();
    let mut dequantized = Dequantized::default();
    let mut values = Vec::with_capacity(elements.len());
    for run in elements.chunk_by(|one, next| one + 1 == *next) {
        let mut bytes = vec![0; run.len() * nbytes];
        let start = operand.tensor.range.start + (run[0] * nbytes) as u64;
        operand.shard.read_exact_at(&mut bytes, start)?;
        let run = operand.values(run[0], &bytes, &mut dequantized)?;
        values.extend((0..run.numel()).map(|index| run.value(index)));
    }
    Ok(values)
}

/// Values minus their mean, scaled to norm one, so that the product of two is their correlation. Those
/// that are not finite become the mean. Constant values become NaN.
fn standardized(values: &[f64]) -> Vec<f64> {
    let finite = || values.iter().filter(|value| value.is_finite());
    let count = finite().count().max(1) as f64;
    let mean = finite().sum::<f64>() / count;
    let squares: f64 = finite().map(|value| (value - mean) * (value - mean)).sum();
    // What remains of a constant is the rounding of its mean, whose correlation means nothing.
    let norm =
        if squares <= f64::EPSILON * count * mean * mean { f64::NAN } else { squares.sqrt() };
    values
        .iter()
        .map(|value| if value.is_finite() { (value - mean) / norm } else { 0.0 / norm })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_distinct_and_inside() {
        for numel in [0, 1, 1023, 1024, 1025, 2000, 1 << 20] {
            let elements = sampled(numel);
            assert!(elements.iter().all(|&element| element < numel));
            assert!(elements.windows(2).all(|pair| pair[0] < pair[1]), "{numel}");
            assert_eq!(elements.len(), numel.min(RUNS * RUN));
        }
    }

    #[test]
    fn a_correlation_ignores_offset_and_scale_and_what_does_not_vary() {
        let correlation = |a: &[f64], b: &[f64]| -> f64 {
            standardized(a).iter().zip(standardized(b)).map(|(x, y)| x * y).sum()
        };
        let a = [1.0, 2.0, 3.0, -1.0];
        let b: Vec<f64> = a.iter().map(|x| 5.0 - 2.0 * x).collect();
        assert!((correlation(&a, &b) + 1.0).abs() < 1e-12);
        assert!(correlation(&a, &[4.0; 4]).is_nan());
        assert!(correlation(&[0.3; 100], &[0.51; 100]).is_nan());
        assert!(correlation(&a, &[f64::NAN; 4]).is_nan());
    }
}
